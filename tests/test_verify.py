"""Every kind of damage to a cache is found and mended by caching again; the report before training counts every item."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_cache import VIDEO, contents, flip, images, run, write_meta  # noqa: F401 (images is a fixture)

from mmdit.data.batches import BatchPlan
from mmdit.data.buckets import BucketingConfig, VideoConfig
from mmdit.data.cache import open_cache
from mmdit.data.frames import PreprocessConfig
from mmdit.data.report import data_report
from mmdit.data.verify import verify_cache
from mmdit.scripts import data_report as report_script
from mmdit.scripts import verify_cache as verify_script
from mmdit.scripts.cache_vtp_images import main as cache_images


def truncated(raw):
    return raw[: len(raw) // 2]


def damage_all(folder):
    """One file of each kind of damage; returns the name → a word of what must be told."""
    (folder / "画1.pt").write_bytes(truncated((folder / "画1.pt").read_bytes()))
    (folder / "画2.pt").write_bytes(flip((folder / "画2.pt").read_bytes()))
    (folder / "画3.pt").write_bytes(b"")
    (folder / "画4.pt").write_bytes((folder / "画5.pt").read_bytes())  # whole, but another item's
    torch.save({"latents": torch.zeros(1, 3, 3, 3, dtype=torch.float16), "caption": ""}, folder / "画6.pt")
    torch.save({"latents": torch.full((1, 2, 2, 3), torch.nan, dtype=torch.float16), "caption": "picture 7"}, folder / "画7.pt")
    torch.save({"latents": torch.zeros(1, 2, 2, 3, dtype=torch.float16), "caption": "picture 8"}, folder / "画8.pt")
    (folder / ".writing-0-1.tmp").touch()
    return {"画1.pt": "cannot be read", "画2.pt": "check sum", "画3.pt": "cannot be read", "画4.pt": "index says otherwise",
            "画8.pt": "index says otherwise", "画6.pt": "48x48 does not belong",
            "画7.pt": "not finite", ".writing-0-1.tmp": "killed process"}  # fmt: skip


def test_a_whole_cache_has_no_findings_and_each_damage_is_named(images, tmp_path, capsys):  # noqa: F811
    run(images, tmp_path / "cache")
    before = contents(tmp_path / "cache")
    assert verify_cache(tmp_path / "cache") == (10, [])
    assert verify_script.main(["--cache_dir", str(tmp_path / "cache")]) == 0 and "0 findings" in capsys.readouterr().out
    expected = damage_all(tmp_path / "cache")
    count, damage = verify_cache(tmp_path / "cache")
    assert count == 10 and {row["file"] for row in damage} == set(expected)
    assert all(expected[row["file"]] in row["problem"] and row["delete"] for row in damage)
    assert verify_script.main(["--cache_dir", str(tmp_path / "cache"), "--delete", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["damage"]) == 8
    assert run(images, tmp_path / "cache").written == 7
    assert verify_cache(tmp_path / "cache") == (10, []) and contents(tmp_path / "cache") == before


def test_files_and_index_that_contradict_each_other_are_told(images, tmp_path):  # noqa: F811
    buckets = BucketingConfig(True, buckets=((32, 32), (48, 32)))
    run(images, tmp_path / "cache", bucketing=buckets)
    cache = tmp_path / "cache"
    (cache / "48x32/画0.pt").write_bytes((cache / "32x32/画0.pt").read_bytes())
    (cache / "32x32/画2.pt").unlink()
    index = cache / "index.jsonl"
    index.write_text("".join(line for line in index.read_text().splitlines(True) if "画4" not in line) + '{"id": "torn')
    told = {(row["file"], row["problem"].partition(" (")[0], row["delete"]) for row in verify_cache(cache)[1]}
    assert told == {
        ("48x32/画0.pt", "its size is 32x32, its folder is for another", True),
        ("48x32/画0.pt", "its id is there 2 times", False),
        ("32x32/画0.pt", "its id is there 2 times", False),
        ("48x32/画0.pt", "not in the index", False),
        ("32x32/画2.pt", "listed in the index, but missing", False),
        ("32x32/画4.pt", "not in the index", False),
        ("index.jsonl:10", "the line cannot be read", False),
    }
    with pytest.raises(ValueError, match="is no latent cache"):
        verify_cache(tmp_path)


def test_the_report_counts_what_is_used_cropped_repeated_left_out_and_skipped(tmp_path):
    rows = []
    for clip, count, size in (("long", 9, (64, 32)), ("square", 7, (32, 32)), ("short", 3, (32, 32)), ("tiny", 9, (16, 16))):
        (tmp_path / clip).mkdir()
        for i in range(count):
            Image.fromarray(np.full((*size[::-1], 3), i, np.uint8)).save(tmp_path / clip / f"{i}.png")
        rows.append({"id": clip, "frames_dir": clip, "captions": ["one two", "three"] if clip == "long" else [""]})
    rows.append({"id": "gone", "frames_dir": "gone", "caption": "x"})
    run(write_meta(tmp_path, rows, "train_videos.jsonl"), tmp_path / "cache", kind="video", source="train_videos.jsonl")
    cache = open_cache(tmp_path / "cache")
    video = VideoConfig(32, 32, num_frames=4, frame_stride=2, image_fraction=0.5)
    report = json.loads(json.dumps(data_report(cache, BatchPlan(cache, video, 2, seed=0), max_steps=10)))
    assert report["items"] == 4 and report["made_from"] == "train_videos.jsonl"
    names = ("steps", "size", "frames", "items", "batches", "repeats")
    assert [tuple(row[name] for name in names) for row in report["groups"]] == [
        ("clips", [32, 32], 4, 3, 2, 1), ("images", [32, 32], 1, 4, 2, 0)]  # fmt: skip
    assert report["repeated"] == {"places": 1, "share_of_an_epoch": 0.125}
    assert report["epochs"]["clips"] == {"steps_an_epoch": 2, "steps": 5, "epochs": 2.5}
    assert report["left_out"]["items"] == 1 and report["left_out"]["examples"] == [{"id": "short", "frames": 3}]
    assert "needs 7" in report["left_out"]["why"]
    assert report["frames"]["items_by_frames_used"] == {"4": 3}
    assert report["cropped"]["mean_kept"] == 0.875 and report["cropped"]["enlarged"] == 1
    assert report["cropped"]["examples"][0] == {"id": "long", "size": [64, 32], "kept": 0.5}
    assert report["skipped_when_cached"]["reasons"] == {"file not found": 1}
    assert report["captions"]["captions"] == 5 and report["captions"]["empty"] == 3


def test_crop_coordinates_are_stored_for_every_crop(images, tmp_path):  # noqa: F811
    run(images, tmp_path / "cache", preprocess=PreprocessConfig("shifted", num_crops=2))
    cache = open_cache(tmp_path / "cache")
    for source, file in zip(cache.sources, cache._columns.files, strict=True):
        left, top, right, bottom = source["crop"]
        assert (right - left, bottom - top) == (40, 40) and right <= source["size"][0] and bottom <= source["size"][1]
        assert torch.load(tmp_path / "cache" / file, weights_only=True)["source"] == source


def test_the_command_prints_json_for_a_config(tmp_path, capsys):
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    config = tmp_path / "config.yaml"
    config.write_text("experiment_name: x\nvideo: {width: 32, height: 32}\ntokenizer: {type: dummy}\ntrain: {batch_size: 3}\n")
    meta = write_meta(tmp_path, [{"id": "a", "image_path": "a.png", "caption": "one"}])
    where = ["--config", str(config), "--train_cache_dir", str(tmp_path / "c")]
    assert cache_images([*where[:2], "--meta_jsonl", str(meta), "--out_dir", str(tmp_path / "c"), "--device", "cpu"]) == 0
    capsys.readouterr()
    assert report_script.main([*where, "--processes", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["global_batch"] == 6 and report["repeated"]["places"] == 5 and VIDEO.num_frames == 1
    with pytest.raises(SystemExit):
        report_script.main([*where, "video.width=64"])
