"""Films are cut where a viewer sees a cut, and nowhere else; stopped at any frame, the command goes
on from there, and its lines are those of a run that was never stopped."""

import errno
import json
import os
import shutil
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

from mmdit.config import ConfigError
from mmdit.data.dataset.records import read_records
from mmdit.data.preparing import film_signals
from mmdit.data.preparing.film_signals import FilmSignals
from mmdit.data.preparing.shot_signals import ShotSignals
from mmdit.data.preparing.shots import (
    ShotSettings,
    columns,
    cut_into_clips,
    gradual_changes,
    hard_cuts,
)
from mmdit.files import held_folder
from mmdit.scripts import prepare_clips
from tests.helpers.films import Film, Score, join, make_film, shot, write
from tests.helpers.tiny import refused
from tests.test_cache import write_meta

pytest.importorskip("av")
RATE = 24


def measured(frames: list[np.ndarray], rate=RATE) -> dict[str, np.ndarray]:
    """The numbers of grey frames `(H, W)`, without a file."""
    signals = ShotSignals()
    rows = []
    for number, frame in enumerate(frames):
        grey = np.full((3, *frame.shape), 128, np.uint8)
        grey[0] = frame
        rows.append(signals.add(grey, number / rate))
    return columns(np.stack(rows))


def scene(seed: int, count: int, speed: float = 1.0) -> list[np.ndarray]:
    """Grey frames of a picture that moves by `speed` pixels a frame."""
    rng = np.random.default_rng(seed)
    wide = np.kron(rng.integers(40, 220, (6, 60)), np.ones((6, 6)))
    return [wide[:, int(speed * number) :][:, :64] for number in range(count)]


def kept(frames, **settings):
    pieces = cut_into_clips(measured(frames), ShotSettings(**{"min_seconds": 1, **settings}))
    return [(piece.first, piece.end, piece.problem) for piece in pieces]


# ── cuts ──────────────────────────────────────────────────────────────────────────────────────────
def score_of(film: Film, folder) -> Score:
    """Encode, measure and cut a film as the command does."""
    measurement = FilmSignals(str(write(film.frames, folder / "a.mp4")), folder / "a.safetensors")
    assert list(measurement.measure())[-1] == 1.0 and measurement.complete
    numbers, settings = columns(measurement.signals), ShotSettings()
    cuts, score = hard_cuts(numbers, settings), Score()
    score.add(film, cuts, gradual_changes(numbers, cuts, settings.cut))
    return score


def test_a_film_is_cut_where_its_shots_end(tmp_path):
    score = score_of(make_film(1, shots=5), tmp_path)
    assert (score.missed, score.wrong, score.gradual_missed, score.gradual_wrong) == (0, 0, 0, 0)
    assert score.right and score.gradual_right


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_film_of_every_way_of_moving_is_cut_where_its_shots_end(tmp_path, seed):
    """A pan, a whip, a zoom, a shaking hand, a moving object, pictures that are shown three times,
    changing light, a flash, darkness; joined by cuts, dissolves and fades. Forty such films:
    docs/data.md."""
    score = score_of(make_film(seed), tmp_path)
    assert (score.missed, score.wrong, score.gradual_wrong) == (0, 0, 0), score.text()
    assert score.gradual_missed <= 1, score.text()


@pytest.mark.parametrize("flash", [1, 3, 7])
def test_a_flash_is_no_cut_and_a_cut_through_a_flash_is(flash):
    frames = scene(0, 60, 0.25)
    frames[30 : 30 + flash] = [np.full((36, 64), 230)] * flash
    assert hard_cuts(measured(frames), ShotSettings()) == []
    frames[30 + flash :] = scene(1, 30 - flash, 0.25)
    assert 30 + flash in hard_cuts(measured(frames), ShotSettings())


def test_light_that_changes_is_no_cut_and_another_scene_of_equal_light_is():
    frames = scene(0, 60, 0.25)
    for light in (0.5, 1.3, 1.7):  # the last leaves much of the picture white
        lit = [np.clip(frame * light, 16, 255) for frame in frames[30:]]
        assert hard_cuts(measured(frames[:30] + lit), ShotSettings()) == []
    other = frames[:30] + [np.rot90(frame, 2) for frame in frames[30:]]
    assert hard_cuts(measured(other), ShotSettings()) == [30]


def test_cuts_that_follow_each_other_quickly_are_all_seen():
    """A montage: else its shots would pass as one that moves fast."""
    frames = [frame for seed in range(8) for frame in scene(seed, 12, 0.25)]
    assert hard_cuts(measured(frames), ShotSettings()) == list(range(12, 96, 12))


def test_the_frames_of_a_dissolve_belong_to_no_clip():
    film, rng = Film(), np.random.default_rng(3)
    join(film, shot(rng, "still", 60), "cut", 0)
    join(film, shot(rng, "pan", 60), "dissolve", 16)
    (first, end), signals = film.gradual[0], ShotSignals()
    rows = []
    for number, frame in enumerate(film.frames):
        small = np.clip(frame[::2, ::2].transpose(2, 0, 1), 0, 255).astype(np.uint8)
        rows.append(signals.add(small, number / RATE))
    pieces = cut_into_clips(columns(np.stack(rows)), ShotSettings(min_seconds=1, still=0))
    clips = [(piece.first, piece.end) for piece in pieces if not piece.problem]
    assert len(clips) == 2
    assert clips[0][0] == 0 and first - 8 <= clips[0][1] <= first + 4
    assert end - 4 <= clips[1][0] <= end + 8 and clips[1][1] == len(film.frames)


# ── what is kept ──────────────────────────────────────────────────────────────────────────────────
def test_black_and_still_and_short_pieces_are_left_out_and_each_can_be_kept():
    black, slide = [np.full((36, 64), 16)] * 30, scene(5, 1) * 48
    frames = scene(0, 48) + black + scene(1, 12) + scene(2, 48) + slide
    assert kept(frames) == [
        (0, 48, ""),
        (48, 78, "black"),
        (78, 90, "too short"),
        (90, 138, ""),
        (138, 186, "still"),
    ]
    assert kept(frames, black=0, still=0, min_seconds=0.5) == [
        (0, 48, ""),
        (48, 78, ""),
        (78, 90, ""),
        (90, 138, ""),
        (138, 186, ""),
    ]


def test_a_long_shot_becomes_equal_clips_no_longer_than_asked():
    assert kept(scene(0, 145), max_seconds=2) == [
        (0, 36, ""),
        (36, 72, ""),
        (72, 109, ""),
        (109, 145, ""),
    ]
    assert kept(scene(0, 144), max_seconds=2) == [(0, 48, ""), (48, 96, ""), (96, 144, "")]


def test_a_frame_that_cannot_be_decoded_ends_a_clip_and_begins_nothing_new():
    frames, signals = scene(0, 96), ShotSignals()
    rows = []
    for number, frame in enumerate(frames):
        thumbnail = np.stack([frame.astype(np.uint8)] * 3)
        rows.append(signals.add(None if number == 48 else thumbnail, number / RATE))
    pieces = cut_into_clips(columns(np.stack(rows)), ShotSettings(min_seconds=1))
    assert [(piece.first, piece.end, piece.problem) for piece in pieces] == [
        (0, 48, ""),
        (48, 49, "damaged"),
        (49, 96, ""),
    ]


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="at least twice min_seconds"):
        ShotSettings(min_seconds=6, max_seconds=10)
    with pytest.raises(ConfigError, match="cut: is 0.* above 0"):
        ShotSettings(cut=0)


# ── the command ───────────────────────────────────────────────────────────────────────────────────
def coloured(frames):
    return [np.repeat(np.kron(frame, np.ones((2, 2)))[..., None], 3, 2) for frame in frames]


@pytest.fixture
def films(tmp_path):
    """Two films of two shots each, one that is no film, one that is missing."""
    for name, seed in (("one", 0), ("two", 2)):
        write(coloured(scene(seed, 60) + scene(seed + 1, 60)), tmp_path / f"{name}.mp4")
    (tmp_path / "torn.mp4").write_bytes(b"no film")
    rows = [
        {"id": name, "video_path": f"{name}.mp4", "caption": "", "licence": "CC0"}
        for name in ("one", "torn", "gone", "two")
    ]
    return write_meta(tmp_path, rows, "train_videos.jsonl")


def words(films, *more):
    return ["--meta_jsonl", str(films), "--out_dir", str(films.parent / "clips"), *more]


def lines(films):
    path = films.parent / "clips" / "train_videos.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_lines_name_frames_of_the_films_and_keep_their_facts(films, capsys):
    assert prepare_clips.main(words(films)) == 0
    said = capsys.readouterr().out
    assert "4 films: 2 cut into 4 clips" in said and "2 skipped" in said
    assert "file not found" in said and "unreadable video" in said
    first = lines(films)[0]
    assert first == {
        "id": "one_000000",
        "video_path": "../one.mp4",
        "video_span": [0, 60],
        "caption": "",
        "licence": "CC0",
        "film": "one",
        "start_seconds": 0.0,
        "seconds": 2.5,
    }
    records = read_records(films.parent / "clips" / "train_videos.jsonl", "video")
    spans = [(record.span.first, record.span.end) for record in records]
    assert spans == [(0, 60), (60, 120)] * 2
    skipped = (films.parent / "clips" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in skipped] == ["gone", "torn"]


def test_stopped_by_a_signal_it_goes_on_where_it_was(films, capsys, monkeypatch):
    assert prepare_clips.main(words(films)) == 0
    whole = lines(films)
    kept_in = films.parent / "clips" / "films" / "two.safetensors"
    signals = load_file(kept_in)["signals"]
    shutil.rmtree(films.parent / "clips")
    original, seen = film_signals.thumbnails, []

    def thumbnails(path, content, size, first=0):
        for frame in original(path, content, size, first):
            seen.append(os.path.basename(path))
            if seen.count("two.mp4") == 90 and len(seen) < 300:
                os.kill(os.getpid(), signal.SIGTERM)
            yield frame

    monkeypatch.setattr(film_signals, "thumbnails", thumbnails)
    capsys.readouterr()
    assert prepare_clips.main(words(films)) == 130
    said = capsys.readouterr().out
    assert "1 films are not measured yet" in said and "goes on from there" in said
    assert [row["film"] for row in lines(films)] == ["one", "one"]
    seen.clear()
    monkeypatch.setattr(film_signals, "thumbnails", original)
    calls = []

    def counted(path, content, size, first=0):
        calls.append((os.path.basename(path), first))
        return original(path, content, size, first)

    monkeypatch.setattr(film_signals, "thumbnails", counted)
    assert prepare_clips.main(words(films)) == 0
    # the first film is measured, of the second only what was missing, and what that depends on
    assert len(calls) == 1 and calls[0][0] == "two.mp4" and 20 <= calls[0][1] <= 26
    assert lines(films) == whole
    assert np.array_equal(load_file(kept_in)["signals"], signals)  # bit for bit
    assert not list(films.parent.rglob(".writing*"))


def test_other_settings_are_told_and_need_no_film(films, capsys, monkeypatch):
    prepare_clips.main(words(films))
    monkeypatch.setattr(film_signals, "thumbnails", None)
    capsys.readouterr()
    assert prepare_clips.main(words(films, "--min_seconds", "0.5", "--max_seconds", "1.25")) == 0
    said = capsys.readouterr().out
    assert "min_seconds: 2.0 → 0.5" in said and "max_seconds: 10.0 → 1.25" in said
    assert [row["video_span"] for row in lines(films)][:4] == [
        [0, 30],
        [30, 60],
        [60, 90],
        [90, 120],
    ]
    prepare_clips.main(words(films, "--min_seconds", "0.5", "--max_seconds", "1.25"))
    assert "→" not in capsys.readouterr().out
    # captions that were written into the lines by hand
    path = films.parent / "clips" / films.name
    by_hand = path.read_text().replace('"caption": ""', '"caption": "mine"')
    path.write_text(by_hand)
    prepare_clips.main(words(films))
    (kept_lines,) = path.parent.glob("train_videos.before-*.jsonl")
    assert f"kept as {kept_lines.name}" in capsys.readouterr().out
    assert kept_lines.read_text() == by_hand


def test_no_clip_at_all_is_no_success(films, capsys):
    assert prepare_clips.main(words(films, "--min_seconds", "40", "--max_seconds", "99")) == 2
    assert "no clip is left" in capsys.readouterr().out


def test_another_film_of_the_same_name_is_told_and_measured_anew(films, capsys):
    prepare_clips.main(words(films))
    write(coloured(scene(7, 100)), films.parent / "two.mp4")
    os.utime(films.parent / "one.mp4", (1, 1))  # touched: the same bytes
    capsys.readouterr()
    prepare_clips.main(words(films))
    said = capsys.readouterr().out
    assert "(1 were measured before)" in said and "others than before" in said and "two" in said
    assert [row["video_span"] for row in lines(films) if row["film"] == "two"] == [[0, 100]]
    (films.parent / "two.mp4").unlink()
    prepare_clips.main(words(films))
    assert [row["film"] for row in lines(films)] == ["one", "one"]


def test_a_damaged_note_costs_a_measurement_and_no_more(films):
    prepare_clips.main(words(films))
    whole = lines(films)
    for content in (b"", b"\x08\0\0\0\0\0\0\0{}      ", os.urandom(400)):
        (films.parent / "clips" / "films" / "one.safetensors").write_bytes(content)
        prepare_clips.main(words(films))
        assert lines(films) == whole


def test_mistakes_are_refused_in_one_sentence(films, capsys):
    here = ["--meta_jsonl", str(films), "--out_dir", str(films.parent)]
    refused(capsys, prepare_clips.main, here, "would be replaced by clips")
    refused(capsys, prepare_clips.main, words(films, "--max_seconds", "3"), "twice min_seconds")
    bad = write_meta(films.parent, [{"id": "a", "video_path": "torn.mp4", "caption": ""}])
    refused(capsys, prepare_clips.main, words(bad), "none of the films could be used", "torn.mp4")


def test_lines_stay_where_no_film_can_be_reached(tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    path = tmp_path / "clips" / "train_videos.jsonl"
    path.write_text("of an earlier run\n")
    row = {"id": "a", "video_path": "away/one.mp4", "caption": ""}
    meta = write_meta(tmp_path, [row], "train_videos.jsonl")
    refused(capsys, prepare_clips.main, words(meta), "none of the films could be used")
    assert path.read_text() == "of an earlier run\n"


def test_one_process_at_a_time_cuts_into_a_folder(films, capsys):
    """Two would each write the lines of their own films over those of the other."""
    prepare_clips.main(words(films))
    clips = films.parent / "clips"
    more = words(films, "--min_seconds", "1")
    with held_folder(clips, ""):
        before = {path: path.read_bytes() for path in clips.rglob("*") if path.is_file()}
        refused(
            capsys, prepare_clips.main, more, "another process is cutting films into", "wait for it"
        )
        assert {path: path.read_bytes() for path in clips.rglob("*") if path.is_file()} == before
    assert prepare_clips.main(more) == 0 and not (clips / ".lock").exists()


def test_what_a_line_says_of_frames_of_its_film_is_not_said_of_its_clips(films):
    rows = [json.loads(line) for line in films.read_text().splitlines()]
    rows[0] |= {"num_frames": 120, "frames_fps": 24, "author": "me"}
    prepare_clips.main(words(write_meta(films.parent, rows, films.name)))
    assert "num_frames" not in lines(films)[0] and "frames_fps" not in lines(films)[0]
    assert lines(films)[0]["author"] == "me"


def test_a_clip_is_not_cut_again(films, capsys):
    row = {"id": "a", "video_path": "one.mp4", "video_span": [0, 9], "caption": ""}
    meta = write_meta(films.parent, [row, row | {"id": "b", "video_span": [3, 9]}])
    refused(capsys, prepare_clips.main, words(meta), "a clip already")


def test_a_full_disk_ends_the_measuring_and_skips_no_film(films, capsys, monkeypatch):
    measured_films = []

    def full(file, data, flush=False):
        measured_films.append(file)
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    with monkeypatch.context() as patch:
        patch.setattr(film_signals, "write_atomically", full)
        refused(capsys, prepare_clips.main, words(films), "No space left on device", "Free disk")
    assert len(measured_films) == 1
    assert prepare_clips.main(words(films)) == 0
    assert "0 were measured before" in capsys.readouterr().out
