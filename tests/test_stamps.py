"""Which file is which: an exchanged source is encoded anew, one that is now unusable loses its
items, one that was only moved or touched is neither; nothing that no line asks for is trained on
without a word."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.verify import verify_cache
from mmdit.data.cache.writer import CacheWriter
from mmdit.data.dataset.buckets import VideoConfig
from mmdit.data.dataset.frames import PreprocessConfig
from tests.test_cache import VIDEO, MeanPixels, contents, run, write_meta
from tests.test_sources import write_video

RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(path, colour, size=(32, 32)):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def clip(folder, colour, count=3):
    for i in range(count):
        picture(folder / f"{i}.bmp", colour)
    return folder


def meta_of(tmp_path, caption="x", **paths):
    key = (
        "frames_dir" if any((tmp_path / path).is_dir() for path in paths.values()) else "image_path"
    )
    rows = [{"id": id, key: path, "caption": caption} for id, path in paths.items()]
    return write_meta(tmp_path, rows)


def again(tmp_path, meta, kind="image", **options):
    """The report of a further run, and how many pictures or clips it encoded."""
    tokenizer = MeanPixels()
    report = run(meta, tmp_path / "cache", tokenizer, kind=kind, **options)
    return report, tokenizer.encoded


def colours(tmp_path):
    cache = open_cache(tmp_path / "cache")
    names = {(1, 0, 0): "red", (0, 0, 1): "blue"}
    return {
        id: names.get(tuple(cache.load(i)[0, 0, 0].round().int().tolist()))
        for i, id in enumerate(cache.ids)
    }


def with_times_of(path, old):
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))


def test_a_picture_exchanged_for_one_of_equal_size_and_time_is_encoded_anew(tmp_path):
    path = picture(tmp_path / "a.bmp", RED)
    meta, old = meta_of(tmp_path, a="a.bmp"), path.stat()
    run(meta, tmp_path / "cache")
    picture(path, BLUE)
    with_times_of(path, old)
    assert path.stat().st_size == old.st_size and path.stat().st_mtime_ns == old.st_mtime_ns
    report, encoded = again(tmp_path, meta)
    assert encoded == 1 and colours(tmp_path) == {"a": "blue"} and not report.replaced
    assert again(tmp_path, meta)[1] == 0


@pytest.mark.parametrize("kind", ["image", "video"])
def test_an_id_that_names_another_source_of_equal_size_is_encoded_anew(tmp_path, kind):
    for name, colour in (("one", RED), ("two", BLUE)):
        clip(tmp_path / name, colour)
        for file in (tmp_path / name).iterdir():
            os.utime(file, (0, 0))
    end = "" if kind == "video" else "/1.bmp"
    run(meta_of(tmp_path, a=f"one{end}"), tmp_path / "cache", kind=kind)
    report, encoded = again(tmp_path, meta_of(tmp_path, "y", a=f"two{end}"), kind)
    assert encoded == 1 and "made from other files (for example a)" in report.text()
    assert colours(tmp_path) == {"a": "blue"} and open_cache(tmp_path / "cache").captions == ["y"]


def test_another_place_is_another_source_until_its_bytes_are_compared(tmp_path, monkeypatch):
    """Of files of one archive all that a file system tells can be the same."""
    from mmdit.data.dataset import stamps

    quick = stamps._Source.quick_stamp
    monkeypatch.setattr(stamps._Source, "quick_stamp", lambda self: quick(self) | {"stat": "same"})
    for name, colour in (("one", RED), ("two", BLUE)):
        clip(tmp_path / name, colour)
    run(meta_of(tmp_path, a="one"), tmp_path / "cache", kind="video")
    assert again(tmp_path, meta_of(tmp_path, a="one"), "video")[1] == 0
    assert again(tmp_path, meta_of(tmp_path, a="two"), "video")[1] == 1
    assert colours(tmp_path) == {"a": "blue"}


def test_one_exchanged_frame_of_a_clip_is_noticed(tmp_path):
    meta = meta_of(tmp_path, a=clip(tmp_path / "f", RED).name)
    run(meta, tmp_path / "cache", kind="video")
    picture(tmp_path / "f/2.bmp", BLUE)
    assert again(tmp_path, meta, "video")[1] == 1
    (tmp_path / "f/notes.txt").write_text("no picture")
    assert again(tmp_path, meta, "video")[1] == 0


def test_an_exchanged_video_file_is_encoded_anew_and_a_touched_one_is_not(tmp_path):
    pytest.importorskip("av")
    path = write_video(tmp_path / "a.mp4", [0, 0.1, 0.2])
    meta = write_meta(tmp_path, [{"id": "a", "video_path": "a.mp4", "caption": ""}])
    video = VideoConfig(32, 32, fps=10)
    run(meta, tmp_path / "cache", kind="video", video=video)
    os.utime(path, (1, 1))
    assert again(tmp_path, meta, "video", video=video)[1] == 0
    size = path.stat().st_size
    write_video(path, [0.5, 0.6, 0.7])
    path.write_bytes(path.read_bytes()[:size].ljust(size, b"\0"))
    assert again(tmp_path, meta, "video", video=video)[1] == 1


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_source_that_was_moved_or_touched_is_not_encoded_again(tmp_path, kind):
    clip(tmp_path / "one", RED)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    end = "" if kind == "video" else "/1.bmp"
    run(meta_of(tmp_path, a=f"one{end}"), tmp_path / "cache", kind=kind)
    report, encoded = again(tmp_path, meta_of(tmp_path, a=f"two{end}"), kind)
    assert (encoded, report.already, report.renewed) == (
        0,
        1,
        1,
    ) and "1 moved or touched" in report.text()
    for file in (tmp_path / "two").iterdir():
        os.utime(file, (1, 1))
    assert again(tmp_path, meta_of(tmp_path, a=f"two{end}"), kind)[1] == 0
    before = contents(tmp_path / "cache")
    assert (
        again(tmp_path, meta_of(tmp_path, a=f"two{end}"), kind)[0].renewed == 0
    )  # the new place is known now
    assert contents(tmp_path / "cache") == before and verify_cache(tmp_path / "cache")[1] == []


def test_crops_that_an_exchanged_picture_no_longer_has_are_taken_out(tmp_path):
    options = {"preprocess": PreprocessConfig("shifted", num_crops=2)}
    path = picture(tmp_path / "a.png", BLUE, (128, 32))
    meta = meta_of(tmp_path, a="a.png")
    run(meta, tmp_path / "cache", **options)
    assert colours(tmp_path).keys() == {"a_c0", "a_c1"}
    left = (tmp_path / "cache/a_c1.pt").read_bytes()
    picture(path, RED)
    assert again(tmp_path, meta, **options)[0].removed == 1 and colours(tmp_path) == {"a_c0": "red"}
    (tmp_path / "cache/a_c1.pt").write_bytes(left)  # as a kill between the two would leave it
    assert again(tmp_path, meta, **options)[1] == 0 and colours(tmp_path) == {"a_c0": "red"}
    picture(path, BLUE, (128, 32))
    again(tmp_path, meta, **options)
    shutil.copy(tmp_path / "cache/a_c1.pt", tmp_path / "old.pt")
    picture(path, RED, (128, 32))
    again(tmp_path, meta, **options)
    shutil.copy(
        tmp_path / "old.pt", tmp_path / "cache/a_c1.pt"
    )  # killed after the first crop was renewed
    (tmp_path / "cache/index.jsonl").unlink()
    again(tmp_path, meta, **options)
    assert colours(tmp_path) == {"a_c0": "red", "a_c1": "red"}


def test_a_source_that_is_damaged_now_loses_its_items(tmp_path):
    path = picture(tmp_path / "a.png", RED)
    picture(tmp_path / "b.png", BLUE)
    run(meta_of(tmp_path, a="a.png", b="b.png"), tmp_path / "cache")
    path.write_bytes(path.read_bytes()[:40])
    report, _ = again(tmp_path, meta_of(tmp_path, "new", a="a.png", b="b.png"))
    assert (
        colours(tmp_path) == {"b": "blue"}
        and report.removed == 1
        and "1 items taken out" in report.text()
    )
    assert [skip.id for skip in report.skipped] == ["a"] and verify_cache(tmp_path / "cache")[
        1
    ] == []
    assert list(json.loads((tmp_path / "cache/skipped.jsonl").read_text())) == [
        "id",
        "path",
        "reason",
        "problem",
    ]


def test_a_source_that_cannot_be_reached_keeps_its_items_and_is_told(tmp_path):
    path = picture(tmp_path / "a.png", RED)
    run(meta_of(tmp_path, "old", a="a.png"), tmp_path / "cache")
    report, _ = again(
        tmp_path, meta_of(tmp_path, "new", a="elsewhere.png")
    )  # perhaps a disk that is not mounted
    assert (
        report.skipped[0].reason.startswith("file not found")
        and str(tmp_path / "elsewhere.png") in report.text()
    )
    assert open_cache(tmp_path / "cache").captions == [
        "old"
    ]  # the caption of another file is not put on it
    path.unlink()
    report, _ = again(tmp_path, meta_of(tmp_path, "new", a="a.png"))
    assert (
        report.already == 1
        and "keep what was cached of them" in report.text()
        and str(path) in report.text()
    )
    assert open_cache(tmp_path / "cache").captions == ["new"]


@pytest.mark.parametrize("world", [1, 2])
def test_items_of_no_line_are_told_and_pruned(tmp_path, world):
    def both(meta, **options):
        return [
            run(meta, tmp_path / "cache", rank=rank, world=world, **options)
            for rank in range(world)
        ]

    for name in "abc":
        picture(tmp_path / f"{name}.png", RED)
    both(meta_of(tmp_path, a="a.png", b="b.png", c="c.png"))
    fewer = meta_of(tmp_path, a="a.png", b="b.png")
    report = both(fewer)[0]
    told = "1 items of the cache are not in this file (for example c): they are trained, too"
    assert report.strangers == ["c"] and told in report.text()
    assert len(open_cache(tmp_path / "cache")) == 3
    report = both(fewer, prune=True)[0]
    assert (
        report.pruned == 1
        and "c): taken out" in report.text()
        and open_cache(tmp_path / "cache").ids == ["a", "b"]
    )
    assert both(fewer)[0].strangers == [] and verify_cache(tmp_path / "cache")[1] == []
    both(meta_of(tmp_path, a="a.png", b="b.png", c="c.png"))
    assert len(open_cache(tmp_path / "cache")) == 3  # one that was taken out can come back


def stored_as(tmp_path, id, stamp):
    """The item with the stamp of an older version."""
    item = torch.load(tmp_path / f"cache/{id}.pt", weights_only=True)
    with CacheWriter(tmp_path / "cache", CacheManifest.of(MeanPixels(), VIDEO)) as writer:
        writer.add(id, item["latents"], item["caption"], {}, item["source"] | {"stamp": stamp})


def test_stamps_of_older_versions_are_compared_as_they_were_and_renewed(tmp_path):
    path = picture(tmp_path / "a.bmp", RED)
    meta = meta_of(tmp_path, a="a.bmp")
    run(meta, tmp_path / "cache")
    before = contents(tmp_path / "cache")
    stored_as(tmp_path, "a", path.stat().st_size)
    report, encoded = again(tmp_path, meta)
    assert (encoded, report.already, report.old_stamps) == (
        0,
        1,
        1,
    ) and "notes of an older version" in report.text()
    assert contents(tmp_path / "cache") == before and again(tmp_path, meta)[0].old_stamps == 0
    stored_as(tmp_path, "a", path.stat().st_size + 1)
    assert again(tmp_path, meta)[1] == 1
    clip(tmp_path / "f", RED)
    run(meta_of(tmp_path, f="f"), tmp_path / "cache", kind="video")
    for stamp, wanted in ((3, 0), (4, 1)):
        stored_as(tmp_path, "f", stamp)
        assert again(tmp_path, meta_of(tmp_path, f="f"), "video")[1] == wanted


def test_an_item_that_cannot_be_indexed_or_read_is_made_anew(tmp_path):
    picture(tmp_path / "a.png", RED)
    picture(tmp_path / "b.png", BLUE)
    meta = meta_of(tmp_path, a="a.png", b="b.png")
    run(meta, tmp_path / "cache")
    whole = contents(tmp_path / "cache")
    item = torch.load(tmp_path / "cache/a.pt", weights_only=True)
    torch.save(item | {"caption": "half \ud83d"}, tmp_path / "cache/a.pt")
    (tmp_path / "cache/index.jsonl").unlink()
    with pytest.raises(ValueError, match="a.pt is damaged: .*surrogate"):
        open_cache(tmp_path / "cache")
    report, encoded = again(tmp_path, meta)
    assert encoded == 1 and "1 damaged items counted as not there (for example a" in report.text()
    assert contents(tmp_path / "cache") == whole
    (tmp_path / "cache/b.pt").write_bytes(b"cut")
    report, encoded = again(
        tmp_path, meta_of(tmp_path, "another", a="a.png", b="b.png")
    )  # rewriting the caption reads it
    assert (
        encoded == 1
        and report.damaged.keys() == {"b"}
        and set(open_cache(tmp_path / "cache").captions) == {"another"}
    )
    with CacheWriter(tmp_path / "cache", CacheManifest.of(MeanPixels(), VIDEO)) as writer:
        for facts in ({"a": "\ud800"}, {"n": 1 << 70}, {"x": float("nan")}, {"t": torch.zeros(1)}):
            with pytest.raises(ValueError, match="item bad|no JSON|surrogate"):
                writer.add("bad", torch.zeros(1, 2, 2, 3), "", facts)
    assert not (tmp_path / "cache/bad.pt").exists()


def test_clips_too_short_for_a_sample_are_told_when_cached(tmp_path):
    clip(tmp_path / "long", RED, 7)
    clip(tmp_path / "short", RED, 6)
    video = replace(VIDEO, num_frames=3, frame_stride=3)
    report, _ = again(tmp_path, meta_of(tmp_path, a="long", b="short"), "video", video=video)
    assert (
        "1 clips are too short for a sample of this config, which takes 7 frames, for example b (6"
        " frames)" in report.text()
    )
    assert (
        "too short"
        not in again(tmp_path, meta_of(tmp_path, a="long", b="short"), "video")[0].text()
    )


def test_a_full_disk_is_told_with_the_file_and_what_to_do(tmp_path, monkeypatch):
    picture(tmp_path / "a.png", RED)
    meta = meta_of(tmp_path, a="a.png")
    monkeypatch.setattr(
        os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(
        ValueError,
        match=r"No space left on device: '.*cache/.*'; what is written stays.*same command",
    ):
        run(meta, tmp_path / "cache")
    monkeypatch.undo()
    assert again(tmp_path, meta)[0].written == 1
