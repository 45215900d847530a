"""What is said of sources is what caching then does; what is said of a cache is what training then
uses."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.batches.data_report import cache_report, report_text
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.look import look_at, look_text, totals
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.packing import pack_cache
from mmdit.data.cache.writer import CacheWriter
from mmdit.data.dataset.buckets import BucketingConfig, VideoConfig
from mmdit.data.dataset.frames import PreprocessConfig, crop_shares
from mmdit.data.dataset.problems import Skip
from mmdit.data.dataset.records import read_records
from mmdit.diagnostics.cache_sheet import cache_sheet, spread_items
from mmdit.scripts import cache_vtp_images, inspect_cache, inspect_data
from tests.helpers.tiny import refused
from tests.test_cache import MeanPixels, run, write_meta
from tests.test_sources import write_video

BUCKETS = BucketingConfig(True, buckets=((32, 32), (64, 32)))


def compared(meta, kind, video, preprocess, tmp_path, workers=0):
    """Rows of the look, after a comparison of every decision with what caching the same records
    stores."""
    manifest = CacheManifest.of(MeanPixels(), video, BUCKETS, preprocess)
    rows = look_at(read_records(meta, kind), kind, manifest.choose, preprocess, video, workers)
    report = run(
        meta, tmp_path / "cache", kind=kind, video=video, bucketing=BUCKETS, preprocess=preprocess
    )
    skips = [row for row in rows if isinstance(row, Skip)]
    assert {skip.id: skip for skip in skips} == {skip.id: skip for skip in report.skipped}
    cache, items = open_cache(tmp_path / "cache"), {}
    seen = [row for row in rows if isinstance(row, dict)]
    for row in seen:
        for crop, box in enumerate(row["crops"]):
            shape = [row["frames"], row["bucket"][1] // 16, row["bucket"][0] // 16, 3]
            items[preprocess.item_ids(row["id"])[crop]] = (shape, box)
    stored = zip(cache.ids, cache.shapes.tolist(), cache.sources, strict=True)
    assert items == {id: (shape, source["crop"]) for id, shape, source in stored}
    sums = totals(rows)
    assert (sums["items"], sums["skipped"], sums["buckets"]) == (
        report.written,
        len(report.skipped),
        report.sizes,
    )
    return {row["id"]: row for row in seen} | {skip.id: skip for skip in skips}


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_become_what_was_said(tmp_path, workers):
    for name, size in (
        ("wide", (90, 32)),
        ("square", (50, 50)),
        ("small", (20, 20)),
        ("torn", (64, 64)),
    ):
        Image.effect_noise(size, 90).save(tmp_path / f"{name}.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (40, 90)).save(tmp_path / "turned.jpg", exif=turned)
    (tmp_path / "torn.png").write_bytes((tmp_path / "torn.png").read_bytes()[:900])
    (tmp_path / "empty.png").write_bytes(b"")
    files = [
        "wide.png",
        "square.png",
        "small.png",
        "torn.png",
        "turned.jpg",
        "empty.png",
        "gone.png",
    ]
    records = [
        {"id": f.partition(".")[0], "image_path": f, "caption": f[:1] if f < "t" else ""}
        for f in files
    ]
    meta = write_meta(tmp_path, records)
    preprocess = PreprocessConfig("shifted", num_crops=2)
    rows = compared(meta, "image", VideoConfig(32, 32), preprocess, tmp_path, workers)
    assert (
        rows["turned"]["size"] == [90, 40]
        and rows["turned"]["bucket"] == [64, 32]
        and rows["turned"]["kept"] == 0.8889
    )
    assert (
        rows["small"]["enlarged"]
        and not rows["square"]["enlarged"]
        and len(rows["square"]["crops"]) == 1
    )
    text = look_text(list(rows.values()), totals(list(rows.values())))
    assert "turned: 90x40 → 64x32, crop [" in text and "gone: SKIPPED, file not found" in text
    assert "7 records: 4 usable as 6 items, 3 skipped, 2 empty captions" in text, text


def test_clips_become_what_was_said(tmp_path):
    write_video(tmp_path / "a.mp4", np.arange(24) / 24)
    write_video(tmp_path / "slow.mp4", np.arange(10) / 5)
    (tmp_path / "bad.mp4").write_bytes(b"")
    rows = [
        {"id": name, "video_path": f"{name}.mp4", "caption": name}
        for name in ("a", "slow", "bad", "gone")
    ]
    for name, sizes in (("same", [(64, 40)] * 3), ("mixed", [(64, 40), (40, 64)]), ("none", [])):
        (tmp_path / name).mkdir()
        for i, size in enumerate(sizes):
            Image.new("RGB", size).save(tmp_path / name / f"{i}.png")
        rows.append({"id": name, "frames_dir": name, "caption": name})
    (tmp_path / "torn").mkdir()
    Image.effect_noise((64, 64), 90).save(tmp_path / "torn/0.png")
    (tmp_path / "torn/0.png").write_bytes((tmp_path / "torn/0.png").read_bytes()[:900])
    rows.append({"id": "torn", "frames_dir": "torn", "caption": ""})
    video = VideoConfig(32, 32, fps=12, num_frames=5)
    found = compared(
        write_meta(tmp_path, rows, "v.jsonl"), "video", video, PreprocessConfig(), tmp_path
    )
    assert (
        found["a"]["fps"],
        found["a"]["source_frames"],
        found["a"]["frames"],
        found["a"]["frames_used"],
    ) == (24, 24, 12, 5)
    assert (
        found["same"]["frames"] == 3
        and found["same"]["frames_used"] == 0
        and totals(list(found.values()))["too_short"] == 1
    )
    assert (
        found["mixed"].reason
        == "frames of different sizes: 1.png is (40, 64), the first is (64, 40)"
    )


@pytest.mark.parametrize(
    "source",
    [
        {"size": [0, 0], "crop": [0, 0, 0, 0]},
        *({"size": [32, 32], "crop": crop} for crop in ("x", [1, 2], [0, 0, "a", 1], None)),
        {"size": [32, 32], "notes": 5, "fps": []},
        {"crop": [0, 0, 32, 32], "notes": [["a"]], "fps": "ten"},
    ],
)
def test_a_cache_of_another_program_is_reported_without_what_cannot_be_understood(tmp_path, source):
    """Nor do lines in the list of what was left out that no caching writes end the report."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    rows = [{"id": id, "image_path": "a.png", "caption": id} for id in ("a", "b")]
    cache = tmp_path / "cache"
    run(write_meta(tmp_path, rows), cache, video=VideoConfig(32, 32))
    lines = [json.loads(line) for line in (cache / "index.jsonl").read_text().splitlines()]
    lines[0]["source"] = source
    (cache / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    skips = ['{"id": "c", "reason": "too dark"}', "torn", "[1]", '{"id": 1}', "5"]
    (cache / "skipped.jsonl").write_text("\n".join(skips))
    opened = open_cache(cache)
    plan = BatchPlan(opened, VideoConfig(32, 32), 2, seed=0)
    report = cache_report(opened, plan, 10)
    assert report["cropped"]["items"] == 1 and report["notes"] == {}
    assert report["skipped_when_cached"]["reasons"] == {"too dark": 1}
    assert crop_shares(source) == (0.0, 0.0, 1.0, 1.0)
    pack_cache(cache, tmp_path / "packed")
    assert len(open_cache(tmp_path / "packed")) == 2


def test_the_report_counts_what_is_used_cropped_repeated_left_out_and_skipped(tmp_path):
    rows = []
    for clip, count, size in (
        ("long", 9, (64, 32)),
        ("square", 7, (32, 32)),
        ("short", 3, (32, 32)),
        ("tiny", 9, (16, 16)),
    ):
        (tmp_path / clip).mkdir()
        for i in range(count):
            Image.fromarray(np.full((*size[::-1], 3), i, np.uint8)).save(
                tmp_path / clip / f"{i}.png"
            )
        rows.append(
            {
                "id": clip,
                "frames_dir": clip,
                "captions": ["one two", "three"] if clip == "long" else [""],
            }
        )
    rows.append({"id": "gone", "frames_dir": "gone", "caption": "x"})
    run(
        write_meta(tmp_path, rows, "train_videos.jsonl"),
        tmp_path / "cache",
        kind="video",
        source="train_videos.jsonl",
    )
    cache = open_cache(tmp_path / "cache")
    video = VideoConfig(32, 32, num_frames=4, frame_stride=2, image_fraction=0.5)
    report = json.loads(
        json.dumps(cache_report(cache, BatchPlan(cache, video, 2, seed=0), max_steps=10))
    )
    assert report["items"] == 4 and report["made_from"] == "train_videos.jsonl"
    names = ("steps", "size", "frames", "items", "batches", "repeats")
    assert [tuple(row[name] for name in names) for row in report["groups"]] == [
        ("clips", [32, 32], 4, 3, 1.5, 0),
        ("images", [32, 32], 1, 4, 2, 0),
    ]
    assert report["repeated"] == {"places": 0, "share_of_an_epoch": 0.0}
    assert cache_report(cache, BatchPlan(cache, video, 6, seed=0), 1)["repeated"] == {
        "places": 3,
        "share_of_an_epoch": 0.4048,
    }
    assert report["epochs"]["clips"] == {"steps_an_epoch": 1.5, "steps": 5, "epochs": 3.333}
    assert report["left_out"]["items"] == 1 and report["left_out"]["examples"] == [
        {"id": "short", "frames": 3}
    ]
    assert "needs 7" in report["left_out"]["why"]
    assert report["frames"]["items_by_frames_used"] == {"4": 3}
    assert report["cropped"]["mean_kept"] == 0.875 and report["cropped"]["enlarged"] == 1
    assert report["cropped"]["examples"][0] == {"id": "long", "size": [64, 32], "kept": 0.5}
    assert report["cropped"]["items_below_80_percent"] == 1
    assert report["skipped_when_cached"]["reasons"] == {"file not found": 1}
    assert [row["fill"] for row in report["groups"]] == [1.0, 1.0]
    assert report["captions"]["captions"] == 5 and report["captions"]["empty"] == 3
    text = report_text(report)
    for told in (
        "4 items",
        "clips 32x32, 4 frames: 3 items, 1.5 batches of 2 an epoch, 100.0% filled",
        "87.5% on average, 50.0% at least",
        "long 64x32: 50.0% kept",
        "frames: 3 to 9, median 9",
        "captions: 5, 3 of them empty",
        "needs 7",
        "skipped when cached: 1 file not found",
    ):
        assert told in text, text


class FirstChannels(MeanPixels):
    def decode(self, latents):
        return latents.movedim(-1, 2).repeat_interleave(16, -1).repeat_interleave(16, -2)


def test_the_sheet_shows_items_of_every_size_as_they_decode(tmp_path):
    manifest = CacheManifest.of(
        FirstChannels(), VideoConfig(), BucketingConfig(True, buckets=((32, 32), (64, 16)))
    )
    with CacheWriter(tmp_path / "cache", manifest) as writer:
        for i in range(20):
            latents = torch.full((4, *((1, 4) if i == 13 else (2, 2)), 3), 0.2)
            latents[3] = 0.8
            writer.add(f"{i:02}", latents, f"caption {i}")
    pack_cache(tmp_path / "cache", tmp_path / "packed")
    cache = open_cache(tmp_path / "packed")
    chosen = spread_items(cache, 5)
    assert (
        13 in chosen
        and {0, 19} < set(chosen)
        and len(set(chosen)) == 5
        and sorted(spread_items(cache, 99)) == list(range(20))
    )
    sheet = np.asarray(cache_sheet(cache, FirstChannels(), 5))
    shades, counts = np.unique(sheet.reshape(-1, 3), axis=0, return_counts=True)
    count = {
        tuple(shade): number for shade, number in zip(shades.tolist(), counts.tolist(), strict=True)
    }
    cell = 160 * 160 * 4 + 160 * 40  # four squares and one strip four times as wide as high
    assert [round(count[shade, shade, shade] / cell, 2) for shade in (51, 204)] == [
        3,
        1,
    ]  # the letters have grey edges


def test_the_commands(tmp_path, capsys):
    for name in "abc":
        Image.new("RGB", (48, 32)).save(tmp_path / f"{name}.png")
    config = tmp_path / "config.yaml"
    config.write_text(
        "experiment_name: x\nvideo: {width: 32, height: 32}\ntokenizer: {type: dummy}\ntrain:"
        " {batch_size: 2}\nnum_workers: 0\n"
    )
    meta = write_meta(
        tmp_path, [{"id": name, "image_path": f"{name}.png", "caption": "one"} for name in "abcd"]
    )
    look = ["--config", str(config), "--meta_jsonl", str(meta)]
    assert inspect_data.main([*look, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["totals"]["usable"] == 3 and report["items"][3]["reason"] == "file not found"
    assert (
        inspect_data.main([*look, "video.width=48"]) == 0
        and "a: 48x32 → 48x32" in capsys.readouterr().out
    )
    assert inspect_data.main(look) == 0
    assert f"d: SKIPPED, file not found, {tmp_path}/d.png" in capsys.readouterr().out
    refused(capsys, inspect_data.main, [*look, "--kind", "video"], 'has no "frames_dir"')
    (tmp_path / "frames").mkdir()
    Image.new("RGB", (48, 32)).save(tmp_path / "frames/0.png")
    clip = {"id": "e", "frames_dir": "frames", "caption": ""}
    clips = write_meta(tmp_path, [clip], "clips.jsonl")
    assert inspect_data.main(["--config", str(config), "--meta_jsonl", str(clips)]) == 0
    nothing = write_meta(
        tmp_path, [{"id": "d", "image_path": "d.png", "caption": ""}], "nothing.jsonl"
    )
    assert inspect_data.main(["--config", str(config), "--meta_jsonl", str(nothing)]) == 2
    assert cache_vtp_images.main([*look, "--out_dir", str(tmp_path / "c"), "--device", "cpu"]) == 0
    words = ["--config", str(config), "--cache_dir", str(tmp_path / "c"), "--device", "cpu"]
    assert inspect_cache.main(words) == 0
    said = capsys.readouterr().out
    assert (
        "  pictures 32x32: 3 items, 1.5 batches of 2 an epoch, 100.0% filled" in said
        and "clips" not in said
        and "skipped when cached: 1 file not found" in said
    )
    assert Image.open(tmp_path / "c/sheet.png").size[0] > 3 * 160
    assert inspect_cache.main([*words, "--processes", "2", "--json", "--samples", "0"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (
        report["global_batch"] == 4 and report["repeated"]["places"] == 1 and "sheet" not in report
    )
    held_out = ["--samples", "0", "train.val_every_steps=1", "train.val_share=0.5"]
    assert inspect_cache.main([*words, *held_out]) == 0
    said = capsys.readouterr().out
    assert "3 items, " in said and "held out for validation: 2 items" in said
    refused(capsys, inspect_cache.main, [*words, "--sheet", "sheet.jpg"], "must end with .png")
    item = torch.load(tmp_path / "c/b.pt")
    item["latents"][0, 0, 0, 0] = torch.inf
    torch.save(item, tmp_path / "c/b.pt")
    with pytest.raises(SystemExit):
        inspect_cache.main(words)
    said = capsys.readouterr()  # the report needs no sheet
    assert "3 items, 1.5 batches" in said.out and "c/b.pt is damaged: its latents" in said.err
    refused(capsys, inspect_cache.main, [*words, "video.width=64"], "made with other settings")


def test_a_cache_is_compared_with_its_metadata_and_one_that_is_read_only_is_reported(
    tmp_path, capsys, monkeypatch
):
    for name in "abcd":
        Image.new("RGB", (48, 32)).save(tmp_path / f"{name}.png")
    config = tmp_path / "config.yaml"
    config.write_text(
        "{experiment_name: x, video: {width: 32, height: 32}, tokenizer: {type: dummy}, train:"
        " {batch_size: 2}, num_workers: 0}"
    )
    rows = [{"id": name, "image_path": f"{name}.png", "caption": "one"} for name in "abcd"]
    words = ["--config", str(config), "--device", "cpu"]
    meta = write_meta(tmp_path, rows[:3])
    assert (
        cache_vtp_images.main([*words, "--meta_jsonl", str(meta), "--out_dir", str(tmp_path / "c")])
        == 0
    )
    rows[1]["caption"] = "two"
    Image.new("RGB", (48, 32), "red").save(tmp_path / "c.png")
    (tmp_path / "b.png").touch()  # the same picture
    words += [
        "--cache_dir",
        str(tmp_path / "c"),
        "--meta_jsonl",
        str(write_meta(tmp_path, rows[1:])),
    ]
    capsys.readouterr()

    def read_only(image, path):
        if str(tmp_path / "c") in str(path):
            raise OSError(30, "Read-only file system", str(path))
        image.save(path)
        return path

    monkeypatch.setattr(inspect_cache, "save_image", read_only)
    monkeypatch.chdir(tmp_path)
    assert inspect_cache.main(words) == 0 and (tmp_path / "c_sheet.png").exists()
    told = capsys.readouterr().out
    for part in (
        "1 items of the cache are not in this file (for example a): they are trained, too; --prune",
        "3 items, ",
        "1 records of the file are not in the cache (for example d)",
        "1 items have another caption",
        "1 records have another picture or clip than when they were cached (for example c)",
        "c_sheet.png",
    ):
        assert part in told, told
    message = refused(
        capsys,
        inspect_cache.main,
        [*words, "--sheet", tmp_path / "c/mine.png"],
        "Read-only file system",
    )
    assert "mine.png" in message
    assert inspect_cache.main([*words, "--json", "--samples", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["not_in_file"] == {
        "items": 1,
        "examples": ["a"],
    }
