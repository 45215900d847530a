"""What is wrong with a source or a cached file: values that keep what a text would lose."""

import pickle

import pytest

from mmdit.data.dataset.frames import naming
from mmdit.data.dataset.problems import Damage, Damaged, Skip, Unusable, by_problem
from mmdit.data.dataset.records import Record


def test_an_error_of_a_source_crosses_processes_and_keeps_its_parts():
    error = pickle.loads(pickle.dumps(Unusable("too small", "9x9 pixels", "1.png")))
    assert (error.problem, error.detail, error.frame) == ("too small", "9x9 pixels", "1.png")
    assert str(error) == "too small: 9x9 pixels (frame 1.png)"
    damaged = pickle.loads(pickle.dumps(Damaged("cache file a.pt", Damage("a.pt", "torn", "go"))))
    assert damaged.damage.problem == "torn" and str(damaged) == (
        "cache file a.pt is damaged: torn; go"
    )
    assert str(Damaged(str(damaged))) == str(damaged)  # as DataLoader hands it on


def test_a_frame_is_named_and_counts_under_its_problem(tmp_path):
    skips = []
    for number in (1, 2):
        path = tmp_path / f"{number}.png"
        with pytest.raises(Unusable) as caught, naming(path):
            path.read_bytes()
        skips.append(Skip.of(Record(f"clip{number}", "clips", ""), caught.value))
    assert [skip.reason for skip in skips] == [
        "file not found (frame 1.png)",
        "file not found (frame 2.png)",
    ]
    assert by_problem(skips) == {"file not found": skips}


def test_a_skip_knows_whether_the_file_system_failed_and_is_read_back_from_its_line():
    denied = Skip.of(Record("a", "a.png", ""), PermissionError(13, "Permission denied"))
    broken = Skip.of(Record("b", "b.png", ""), Unusable("damaged picture", "broken: data"))
    other = Skip.of(Record("c", "c.png", ""), RuntimeError("what: ever"))
    assert (denied.unreachable, broken.unreachable) == (True, False)
    assert (other.problem, other.reason) == ("RuntimeError", "RuntimeError: what: ever")
    assert Skip.from_json(broken.to_json()) == broken
    older = Skip.from_json({"id": "d", "path": "d.png", "reason": "too small: 9x9"})
    assert older.problem == older.reason == "too small: 9x9"
