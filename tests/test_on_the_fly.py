"""Without a cache a training sees what it would see through one: the same order, texts and latents,
on a CPU bit for bit."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.batches.latent_batches import LatentBatches, contents
from mmdit.data.batches.on_the_fly import UnencodedItems
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.dataset.buckets import BucketingConfig, VideoConfig
from mmdit.data.dataset.frames import PreprocessConfig
from mmdit.data.dataset.members import VideoSpan
from mmdit.data.dataset.stamps import ENDS, crc_of_ends
from mmdit.scripts import train_t2v
from mmdit.tokenizers import build_tokenizer
from mmdit.tokenizers.vtp import VTPTokenizer, VTPTokenizerConfig
from mmdit.training.continuing import other_data
from tests.helpers.tiny import Workshop, refused
from tests.test_cache import MeanPixels, run, write_meta
from tests.test_clip_plan import Joining

SHIPPED = "VTP/checkpoints/vtp_tiny_f16d64"
PLAIN = SimpleNamespace(bucketing=BucketingConfig(), preprocess=PreprocessConfig())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures of several shapes and colours, one of them damaged."""
    folder, rows = tmp_path_factory.mktemp("pictures"), []
    noise = np.random.default_rng(0)
    for number in range(9):
        shape = (40, 56 + 24 * (number % 3), 3)
        Image.fromarray(noise.integers(0, 256, shape, np.uint8)).save(folder / f"{number}.png")
        rows.append({"id": f"{number}", "image_path": f"{number}.png", "caption": f"no. {number}"})
    rows[4]["captions"] = ["one", "another"]
    (folder / "7.png").write_bytes(b"no picture")
    return write_meta(folder, rows)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Clips of 5, 17 and 30 frames of random pixels."""
    folder, rows = tmp_path_factory.mktemp("clips"), []
    noise = np.random.default_rng(1)
    for count in (5, 17, 30):
        (folder / f"{count}").mkdir()
        for number in range(count):
            pixels = noise.integers(0, 256, (32, 48, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{count}" / f"{number:02}.png")
        rows.append({"id": f"clip{count}", "frames_dir": f"{count}", "caption": f"{count} frames"})
    return write_meta(folder, rows, "train_videos.jsonl")


def compare(meta, out, tokenizer, video, size=4, **settings):
    """Compare every batch of a few steps, and what is held out, with those through a cache."""
    kind = "video" if "video" in meta.name else "image"
    report = run(meta, out, tokenizer, kind=kind, video=video, **settings)
    cache = open_cache(out)
    chosen = {**vars(PLAIN), **settings}
    items = UnencodedItems(meta, tokenizer, video, chosen["bucketing"], chosen["preprocess"])
    assert [skip.id for skip in items.skips] == [skip.id for skip in report.skipped]
    assert list(items.ids) == list(cache.ids) and torch.equal(items.shapes, cache.shapes)
    ready, made = (
        LatentBatches(part, BatchPlan(part, video, size, 3, 0.3), crops=True, num_workers=0)
        for part in (cache, items)
    )
    pairs = [*zip(ready.held_out(9), made.held_out(9), strict=True)]
    steps = zip(ready.iterate(0, 8), made.iterate(0, 8), strict=True)
    pairs += [(a, b) for one, other in steps for a, b in zip(one, other, strict=True)]
    for a, b in pairs:
        assert a.ids == b.ids and a.captions == b.captions and a.facts == b.facts
        assert torch.equal(a.crops, b.crops) and b.latents.dtype == torch.float16
        # a network rounds a picture otherwise in a batch of another size
        rounding = 1e-3 if isinstance(tokenizer, VTPTokenizer) else 0
        torch.testing.assert_close(a.latents, b.latents, rtol=rounding, atol=rounding)
    assert len({batch.latents.shape for batch, _ in pairs}) > 1 or size == 2
    return items


@pytest.mark.parametrize("config", [None, VTPTokenizerConfig(name_or_path=SHIPPED)])
def test_pictures_in_buckets_with_two_crops(pictures, tmp_path, config):
    items = compare(
        pictures,
        tmp_path / "cache",
        build_tokenizer(config) if config else MeanPixels(),
        VideoConfig(32, 32),
        bucketing=BucketingConfig(True, buckets=((32, 32), (64, 32))),
        preprocess=PreprocessConfig("shifted", 1.0, 2, 0),
    )
    assert items.skips[0].id == "7" and len(items) > len(items._records) / 2


def test_clips_with_single_frames_between_them(clips, tmp_path):
    video = VideoConfig(32, 32, num_frames=3, frame_stride=2, image_fraction=0.4, temporal_jitter=1)
    compare(clips, tmp_path / "cache", MeanPixels(), video)


def test_clips_of_a_tokenizer_that_joins_frames(clips, tmp_path):
    """Take clips of which the long ones hold several samples, one behind the other."""
    video = VideoConfig(32, 32, num_frames=9, frame_counts=(5,), image_fraction=0.3)
    compare(clips, tmp_path / "cache", Joining(), video, size=2)


def test_a_source_that_goes_while_training_is_named(clips, tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "0.png")
    rows = [{"id": "x", "image_path": "frames/0.png", "caption": ""}]
    meta, video = write_meta(tmp_path, rows), VideoConfig(32, 32)
    items = UnencodedItems(meta, MeanPixels(), video, *vars(PLAIN).values())
    (folder / "0.png").unlink()
    with pytest.raises(ValueError, match=r"frames/0\.png: .*make a cache"):
        LatentBatches(items, BatchPlan(items, video, 1, 0), num_workers=0).step(0)
    with pytest.raises(ValueError, match="none of the 1 records of .* can be used"):
        UnencodedItems(meta, MeanPixels(), video, *vars(PLAIN).values())


def test_a_source_that_is_another_while_training_is_named(tmp_path):
    """A picture that now belongs into another bucket, a clip that is shorter."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    meta = write_meta(tmp_path, [{"id": "a", "image_path": "a.png", "caption": ""}])
    buckets = BucketingConfig(True, buckets=((32, 32), (64, 32)))
    items = UnencodedItems(meta, MeanPixels(), VideoConfig(32, 32), buckets, PLAIN.preprocess)
    assert items.pixels(0).shape == (1, 3, 32, 32)
    Image.new("RGB", (80, 32)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png has changed since the training began"):
        items.pixels(0)
    (tmp_path / "clip").mkdir()
    for number in range(4):
        Image.new("RGB", (32, 32)).save(tmp_path / "clip" / f"{number}.png")
    row = {"id": "c", "frames_dir": "clip", "caption": ""}
    meta = write_meta(tmp_path, [row], "train_videos.jsonl")
    clip = UnencodedItems(
        meta, MeanPixels(), VideoConfig(32, 32), BucketingConfig(), PLAIN.preprocess
    )
    assert clip.pixels(0).shape == (4, 3, 32, 32)
    (tmp_path / "clip" / "3.png").unlink()
    with pytest.raises(ValueError, match="clip has changed since the training began"):
        clip.pixels(0)


def test_a_picture_or_clip_that_was_exchanged_is_noticed_wherever_it_is(tmp_path):
    """By what its files hold, though its size in bytes, its shape and its caption are the same."""
    noise = np.random.default_rng(2)
    pixels = noise.integers(0, 256, (7, 32, 32, 3), np.uint8)
    folder = tmp_path / "first"
    (folder / "clip").mkdir(parents=True)
    for number in range(3):
        Image.fromarray(pixels[number]).save(folder / f"clip/{number}.bmp")
    pictures = [Image.fromarray(part) for part in pixels[3:5]]
    pictures[0].save(folder / "a.bmp")
    rows = [{"id": "a", "image_path": "a.bmp", "caption": ""}]
    write_meta(folder, rows)
    write_meta(folder, [{"id": "c", "frames_dir": "clip", "caption": ""}], "train_videos.jsonl")

    def lines(before, after, name):
        rows = []
        for part in (before, after):
            items = UnencodedItems(
                part / name, MeanPixels(), VideoConfig(32, 32), *vars(PLAIN).values()
            )
            rows.append(contents(items))
        return other_data(rows[:1], rows[1:])

    moved = shutil.copytree(folder, tmp_path / "moved", copy_function=shutil.copyfile)
    for name in ("train_images.jsonl", "train_videos.jsonl"):
        assert lines(folder, moved, name) == []
    pictures[1].save(moved / "a.bmp")
    Image.fromarray(pixels[5]).save(moved / "clip/1.bmp")
    for name in ("train_images.jsonl", "train_videos.jsonl"):
        (line,) = lines(folder, moved, name)
        assert "other data: before 1 items in" in line


@pytest.mark.parametrize("size", [0, 5, ENDS - 1, ENDS + 7, 2 * ENDS + 9])
def test_both_ends_and_the_size_of_a_file_enter_its_sum(tmp_path, size):
    path, sums = tmp_path / "a.mp4", set()
    for content in (bytes(size), bytes(size + 1), b"\1" + bytes(size), bytes(size) + b"\1"):
        path.write_bytes(content)
        sums.add(crc_of_ends(str(path)))
    sums |= {crc_of_ends(VideoSpan(str(path), 0, end)) for end in (8, 9)}
    assert len(sums) == (5 if size == 0 else 6)


def test_a_run_without_a_cache_says_that_it_is_slow(pictures, tmp_path, capsys):
    shop = Workshop(tmp_path)
    words = ["--config", str(shop.config), "--device", "cpu", "train.max_steps=1"]
    assert train_t2v.main([*words, "--train_jsonl", str(pictures)]) == 0
    log = capsys.readouterr().out
    assert "8 items are decoded and encoded anew for each batch" in log and "data wait" in log
    assert "left out 1 records" in log
    config = (tmp_path / "runs/base/config.yaml").read_text()
    assert "on_the_fly: true" in config and str(pictures) in config
    other = [*words, f"data.sources=[{{path: {pictures}}}]", "experiment_name=other"]
    refused(capsys, train_t2v.main, other, "data.on_the_fly", "is false", "cache-images")
    first = json.loads((tmp_path / "runs/base/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] > 0
    rows = pictures.read_text(encoding="utf-8").splitlines()
    fewer = pictures.with_name("fewer.jsonl")
    fewer.write_text("\n".join(rows[1:]) + "\n", encoding="utf-8")
    again = [*words, "--train_jsonl", str(fewer), "--resume", "train.max_steps=2"]
    capsys.readouterr()
    assert train_t2v.main(again) == 0
    log = capsys.readouterr().out
    assert f"other data: before 8 items in {pictures}" in log
    assert f"now 7 items in {fewer}" in log
