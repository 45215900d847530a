"""What the page about a cache shows: sizes, crops, captions, what was left out, and where it is
found."""

import json

import pytest

pytest.importorskip("starlette")
from mmdit.ui.data_pages import find_caches, from_here, names
from mmdit.ui.job_files import Job
from tests.helpers.browser import browser
from tests.helpers.tiny import Workshop

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def cache(tmp_path):
    cache = Workshop(tmp_path).cache("pictures")
    rows = [{"id": HOSTILE, "path": "a.png", "reason": "torn", "problem": "torn"}]
    (cache / "skipped_0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return cache


def test_a_cache_is_found_and_shown(cache, tmp_path):
    client = browser(tmp_path / "runs")
    assert str(cache) in client.get("/data").text
    page = client.get("/cache", params={"path": str(cache)}).text
    assert "8 items" in page and "48x32" in page and "Nothing was cropped" in page
    assert "torn" in page and "&lt;script&gt;alert" in page and "<script>alert" not in page
    assert "/new/inspect-cache?cache_dir=" in page
    assert "Decoded samples" not in page  # nobody has asked for them yet


@pytest.mark.parametrize("path", ["/etc", "", "runs", "../..", "absent", "ring"])
def test_what_is_no_cache_or_outside_is_refused(cache, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ring").symlink_to("ring")
    answer = browser(tmp_path / "runs").get("/cache", params={"path": path})
    assert answer.status_code == 404 and "problem" in answer.text


def test_a_folder_is_looked_through_to_a_bounded_depth(tmp_path):
    for name in ("a", "b/c", "d/e/f/g", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "manifest.json").touch()
    (tmp_path / "a" / "inside").mkdir()
    (tmp_path / "a" / "inside" / "manifest.json").touch()
    (tmp_path / "link").symlink_to(tmp_path / "b")
    assert list(find_caches(tmp_path)) == [tmp_path / "a", tmp_path / "b/c"]


def test_the_jobs_of_a_cache_are_those_whose_command_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    named = [["cache-images", "--out_dir=cache"], ["train", f"--train_cache_dir={tmp_path}/cache"]]
    (tmp_path / "ring").symlink_to("ring")
    other = [["train", "--train_cache_dir=other", "train.lr=cache"], ["doctor"]]
    other += [["sample", "--negative=~blurred"], ["train", "--train_cache_dir=ring"]]
    found = [names(Job("00001", words, None, 0.0), tmp_path / "cache") for words in named + other]
    assert found == [True, True, False, False, False, False]


def test_a_path_below_the_working_directory_is_as_one_types_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert from_here(tmp_path / "data/cache") == "data/cache"
    assert from_here(tmp_path.parent / "x") == str(tmp_path.parent / "x")
