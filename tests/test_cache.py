"""The cache: whole items or none, whatever the moment of the kill; a foreign or damaged one is
refused by name."""

import contextlib
import errno
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from mmdit.config import ConfigError
from mmdit.data.batches.data_report import skipped
from mmdit.data.cache.caching import Caching
from mmdit.data.cache.half_latents import HalfLatents
from mmdit.data.cache.items import Entry, load_item, make_item, read_entry, running_crcs
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.packing import pack_cache
from mmdit.data.cache.statistics import latent_statistics
from mmdit.data.cache.verify import verify_cache
from mmdit.data.cache.writer import CacheWriter, SavingThreads
from mmdit.data.dataset import pictures
from mmdit.data.dataset.buckets import BucketingConfig, VideoConfig
from mmdit.data.dataset.frames import PreprocessConfig
from mmdit.data.dataset.records import read_records
from mmdit.interfaces import LatentSpec, Tokenizer
from mmdit.scripts import estimate_latent_scale
from mmdit.scripts import pack_cache as pack_cache_command
from mmdit.tokenizers.with_low_resolution import WithLowResolution
from mmdit.tokenizers.with_picture import WithPicture
from tests.helpers.tiny import refused

VIDEO = VideoConfig(32, 32)


class MeanPixels(Tokenizer):
    """A tokenizer whose latents are the mean colours of 16x16 squares: what was cropped can be read
    off them."""

    spec = LatentSpec(channels=3)

    def __init__(self, fingerprint="mean pixels"):
        self.fingerprint, self.encoded = fingerprint, 0

    def encode(self, pixels):
        assert pixels.dtype == torch.float32 and pixels.min() >= 0 and pixels.max() <= 1
        self.encoded += len(pixels)
        return (
            functional.avg_pool2d(pixels.flatten(0, 1), 16)
            .movedim(1, -1)
            .unflatten(0, pixels.shape[:2])
        )

    def decode(self, latents):
        raise NotImplementedError


def write_meta(folder, rows, name="train_images.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


@pytest.fixture
def images(tmp_path):
    rows = []
    for i in range(10):
        Image.new("RGB", (40 + 16 * (i % 2), 40), (i * 20, 100, 0)).save(tmp_path / f"{i}.png")
        rows.append(
            {"id": f"画{i}", "image_path": f"{i}.png", "caption": f"picture {i}", "licence": "CC0"}
        )
    return write_meta(tmp_path, rows)


def run(meta, out, tokenizer=None, kind="image", **options):
    options = {"video": VIDEO, "progress": False, **options}
    records = read_records(meta, kind)
    return Caching(records, kind, tokenizer or MeanPixels(), out, **options).run()


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def test_lists_of_what_was_skipped_are_of_the_last_run_whoever_shared_it(images, tmp_path):
    """Of two processes, of one, and in a packed copy."""
    folder, packed = tmp_path / "cache", tmp_path / "packed"
    records = read_records(images, "image")
    for picture in records[:2]:
        Path(picture.path).rename(f"{picture.path}.away")

    def lists():
        pack_cache(folder, packed)
        names = [sorted(path.name for path in at.glob("skipped*")) for at in (folder, packed)]
        assert names[0] == names[1]
        return names[0]

    for rank in (0, 1):
        run(images, folder, rank=rank, world=2)
    assert lists() == ["skipped-0.jsonl", "skipped-1.jsonl"] and skipped(folder)["items"] == 2
    run(images, folder)
    assert lists() == ["skipped.jsonl"] and skipped(folder)["items"] == 2
    for picture in records[:2]:
        Path(f"{picture.path}.away").rename(picture.path)
    for rank in (0, 1):
        run(images, folder, rank=rank, world=2)
    assert lists() == [] and skipped(packed)["items"] == 0


def test_each_item_is_one_plain_file_as_documented(images, tmp_path):
    report = run(images, tmp_path / "cache", batch_size=3, num_workers=2)
    assert (report.written, report.sizes, report.skipped) == (10, {"32x32": 10}, [])
    item = torch.load(tmp_path / "cache" / "画3.pt", weights_only=True)
    assert item["latents"].dtype == torch.float16 and item["latents"].shape == (1, 2, 2, 3)
    torch.testing.assert_close(
        item["latents"].float()[0, 0, 0], torch.tensor([60, 100, 0]) / 255, atol=1e-3, rtol=0
    )
    assert item["caption"] == "picture 3" and item["facts"] == {"licence": "CC0"}
    cache = open_cache(tmp_path / "cache", CacheManifest.of(MeanPixels(), VIDEO))
    index = cache.ids.index("画3")
    assert torch.equal(cache.load(index), item["latents"]) and cache.captions[index] == "picture 3"
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_buckets_are_folders_and_an_id_in_two_of_them_is_an_error(images, tmp_path):
    buckets = BucketingConfig(True, buckets=((32, 32), (48, 32)))
    report = run(images, tmp_path / "cache", bucketing=buckets)
    assert report.sizes == {"32x32": 5, "48x32": 5}
    assert (tmp_path / "cache/32x32/画0.pt").exists() and (tmp_path / "cache/48x32/画1.pt").exists()
    (tmp_path / "cache/48x32/画0.pt").write_bytes((tmp_path / "cache/32x32/画0.pt").read_bytes())
    with pytest.raises(ValueError, match="画0.*twice: 32x32/画0.pt and 48x32/画0.pt"):
        open_cache(tmp_path / "cache")


def test_a_second_run_encodes_only_what_is_new_changed_or_recaptioned(images, tmp_path):
    run(images, tmp_path / "cache")
    rows = [json.loads(line) for line in images.read_text().splitlines()]
    rows[2]["caption"] = "another caption"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(
        tmp_path / "4.png"
    )
    Image.new("RGB", (40, 40)).save(tmp_path / "new.png")
    write_meta(tmp_path, rows + [{"id": "new", "image_path": "new.png", "caption": ""}])
    (tmp_path / "1.png").unlink()  # its latents are cached; the picture is no longer needed
    tokenizer = MeanPixels()
    report = run(images, tmp_path / "cache", tokenizer)
    assert (
        report.written,
        report.already,
        report.recaptioned,
        report.empty_captions,
        tokenizer.encoded,
    ) == (2, 9, 1, 1, 2)
    assert torch.load(tmp_path / "cache/画2.pt")["caption"] == "another caption"
    cache = open_cache(tmp_path / "cache")
    assert cache.captions[cache.ids.index("画2")] == "another caption" and len(cache) == 11


def test_what_cannot_be_used_is_listed_with_its_reason_and_the_rest_goes_on(images, tmp_path):
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_text("no picture")
    (tmp_path / "2.png").write_bytes(b"")
    report = run(images, tmp_path / "cache")
    rows = [
        json.loads(line) for line in (tmp_path / "cache/skipped.jsonl").read_text().splitlines()
    ]
    assert report.written == 7 and [row["id"] for row in rows] == ["画0", "画1", "画2"]
    assert rows[0]["reason"] == "file not found" and "cannot identify" in rows[1]["reason"]
    for i in range(10):
        (tmp_path / f"{i}.png").write_text("no picture")
    with pytest.raises(ValueError, match="none of the 10 records could be used"):
        run(images, tmp_path / "other")


def test_settings_that_differ_are_all_named_and_nothing_is_touched(images, tmp_path):
    run(images, tmp_path / "cache")
    before = contents(tmp_path / "cache")
    with pytest.raises(
        ValueError,
        match="(?s)tokenizer: the cache has MeanPixels mean pixels, .*asks MeanPixels other",
    ):
        run(images, tmp_path / "cache", MeanPixels("other"))
    with pytest.raises(
        ValueError,
        match="(?s)preprocess.crop: the cache has center, the config asks shifted.*new folder",
    ):
        run(images, tmp_path / "cache", preprocess=PreprocessConfig("shifted"))
    wanted = CacheManifest.of(MeanPixels(), VIDEO, BucketingConfig(True, buckets=((64, 64),)))
    with pytest.raises(
        ValueError,
        match=r"(?s)bucketing.enabled.*sizes: the cache has \[\(32, 32\)\], .* asks \[\(64, 64\)\]",
    ):
        open_cache(tmp_path / "cache", wanted)
    with pytest.raises(ValueError, match="is no latent cache"):
        open_cache(tmp_path)
    assert contents(tmp_path / "cache") == before


class Coarse(MeanPixels):
    """A tokenizer whose config chooses the type of its arithmetic."""

    precision = "bfloat16"


class Fine(MeanPixels):
    precision = "float32"


def test_a_cache_holds_latents_of_one_precision(images, tmp_path):
    """Captions may be changed and training may go on with any."""
    out, first = tmp_path / "cache", tmp_path / "first.jsonl"
    lines = images.read_text().splitlines(keepends=True)
    first.write_text("".join(lines[:4]))
    run(first, out, Fine())
    before = contents(out)
    expected = (
        "tokenizer.dtype: is bfloat16, and .*/cache were encoded in float32: set tokenizer.dtype to"
        " float32, or cache into a new folder"
    )
    with pytest.raises(ConfigError, match=expected):
        run(images, out, Coarse())
    assert contents(out) == before
    first.write_text("".join(lines[:4]).replace("picture 0", "another"))
    assert run(first, out, Coarse()).recaptioned == 1
    open_cache(out, CacheManifest.of(Coarse(), VIDEO))
    assert run(images, out, Fine()).written == 6 and "note" not in run(images, out, Fine()).text()


def test_an_empty_cache_takes_the_precision_of_what_comes_first(images, tmp_path):
    with CacheWriter(tmp_path, CacheManifest.of(Fine(), VIDEO)):
        pass
    run(images, tmp_path, Coarse())
    assert CacheManifest.read(tmp_path).precision == "bfloat16"


def test_a_cache_that_has_not_noted_its_precision_goes_on_and_says_so(images, tmp_path):
    first = tmp_path / "first.jsonl"
    first.write_text("".join(images.read_text().splitlines(keepends=True)[:4]))
    run(first, tmp_path / "cache")
    report = run(images, tmp_path / "cache", Coarse())
    assert report.written == 6 and "did not note tokenizer.dtype" in report.text()
    assert "did not note" not in run(images, tmp_path / "cache", Coarse()).text()


def test_an_item_stays_while_the_file_system_does_not_give_its_picture(
    images, tmp_path, monkeypatch
):
    """A share that is away says nothing of what was cached of it; a damaged picture does."""
    out = tmp_path / "cache"
    run(images, out)
    for number in (0, 1):
        Image.new("RGB", (40, 40), (0, 0, 250)).save(tmp_path / f"{number}.png")
    original = pictures.open_source

    def away(source):
        if str(source).endswith("0.png"):
            raise OSError(errno.EIO, "Input/output error", str(source))
        return original(source)

    monkeypatch.setattr(pictures, "open_source", away)
    (tmp_path / "2.png").write_bytes(b"no picture")
    report = run(images, out)
    assert {skip.id for skip in report.skipped} == {"画0", "画2"}
    ids = open_cache(out).ids
    assert "画0" in ids and "画2" not in ids and len(ids) == 9


def flip(raw):
    numbers = torch.load(io.BytesIO(raw))["latents"].numpy().tobytes()
    return raw.replace(numbers, bytes([numbers[0] ^ 1]) + numbers[1:])


@pytest.mark.parametrize("damage", [lambda raw: raw[:300], lambda raw: b"", flip])
def test_damaged_file_is_named(images, tmp_path, damage):
    run(images, tmp_path / "cache")
    path = tmp_path / "cache/画5.pt"
    path.write_bytes(damage(path.read_bytes()))
    cache = open_cache(tmp_path / "cache")
    with pytest.raises(ValueError, match="画5.pt is damaged"):
        for index in range(len(cache)):
            cache.load(index)
    path.unlink()
    with pytest.raises(ValueError, match="lost their files.*画5"):
        open_cache(tmp_path / "cache")
    run(images, tmp_path / "cache")
    assert len(open_cache(tmp_path / "cache")) == 10


def test_index_is_rebuilt_when_torn_or_gone(images, tmp_path):
    run(images, tmp_path / "cache")
    index = tmp_path / "cache/index.jsonl"
    whole = index.read_bytes()
    index.write_bytes(whole[:-50])
    assert len(open_cache(tmp_path / "cache")) == 10
    tokenizer = MeanPixels()
    run(images, tmp_path / "cache", tokenizer)
    assert tokenizer.encoded == 0 and index.read_bytes() == whole
    index.unlink()
    assert open_cache(tmp_path / "cache").captions[4] == "picture 4"


def test_latents_that_float16_cannot_hold_are_refused(tmp_path, images):
    class Loud(MeanPixels):
        def encode(self, pixels):
            return torch.where(pixels[:, :1, :1, :1, :1] > 0.5, torch.inf, super().encode(pixels))

    report = run(images, tmp_path / "cache", Loud())
    assert report.written == 7 and {skip.reason for skip in report.skipped} == {
        "latents are not finite in float16"
    }
    with CacheWriter(tmp_path / "direct", CacheManifest.of(MeanPixels(), VIDEO)) as writer:
        with pytest.raises(ValueError, match="loud.*not finite"):
            writer.add("loud", torch.full((1, 2, 2, 3), 1e5), "")
        with pytest.raises(ValueError, match="do not belong"):
            writer.add("wide", torch.zeros(1, 2, 3, 3), "")
        with pytest.raises(ValueError, match="separator"):
            writer.add("../up", torch.zeros(1, 2, 2, 3), "")


def test_an_item_that_gets_another_size_leaves_its_old_place(tmp_path):
    sizes = BucketingConfig(True, buckets=((32, 32), (48, 32)))
    for columns in (2, 3):
        with CacheWriter(tmp_path, CacheManifest.of(MeanPixels(), VIDEO, sizes)) as writer:
            writer.add("a", torch.zeros(1, 2, columns, 3), "")
    assert [path.parent.name for path in tmp_path.rglob("a.pt")] == ["48x32"]
    assert open_cache(tmp_path).shapes.tolist() == [[1, 2, 3, 3]]


def test_several_crops_are_items_of_their_own_and_repetitions_are_not_written(tmp_path):
    Image.fromarray(np.tile(np.arange(96, dtype=np.uint8)[None, :, None], (32, 1, 3)) * 2).save(
        tmp_path / "wide.png"
    )
    Image.new("RGB", (32, 32)).save(tmp_path / "square.png")
    meta = write_meta(
        tmp_path, [{"id": n, "image_path": f"{n}.png", "caption": n} for n in ("wide", "square")]
    )
    options = {"preprocess": PreprocessConfig("shifted", num_crops=3)}
    report = run(meta, tmp_path / "cache", **options)
    assert report.same_crops == 2
    cache = open_cache(tmp_path / "cache")
    assert cache.ids == ["square_c0", "wide_c0", "wide_c1", "wide_c2"]
    for index in (1, 2, 3):  # the brightness tells where the stored crop lies
        left = cache.sources[index]["crop"][0]
        assert cache.load(index)[0, 0, 0, 0] * 255 == pytest.approx(2 * (left + 7.5), abs=2)
    tokenizer = MeanPixels()
    assert (
        run(meta, tmp_path / "cache", tokenizer, **options).already == 2 and tokenizer.encoded == 0
    )
    (tmp_path / "cache/wide_c2.pt").unlink()
    assert (
        run(meta, tmp_path / "cache", **options).already == 1
        and (tmp_path / "cache/wide_c2.pt").exists()
    )


def test_clips_keep_every_frame_in_order(tmp_path):
    for clip, count in (("a", 12), ("b", 3)):
        (tmp_path / clip).mkdir()
        for i in range(count):
            Image.new("RGB", (64, 40), (i * 20, 0, 0)).save(tmp_path / clip / f"{i}.png")
    (tmp_path / "none").mkdir()
    rows = [
        {"id": name, "frames_dir": name, "caption": name} for name in ("a", "b", "none", "gone")
    ]
    meta = write_meta(tmp_path, rows, "train_videos.jsonl")
    report = run(meta, tmp_path / "cache", kind="video", num_workers=1)
    assert [skip.reason for skip in report.skipped] == [
        "folder without pictures",
        "file not found",
    ]
    cache = open_cache(tmp_path / "cache")
    assert cache.shapes[:, 0].tolist() == [12, 3]
    torch.testing.assert_close(
        cache.load(0)[:, 0, 0, 0].float(), torch.arange(12) * 20 / 255, atol=1e-3, rtol=0
    )
    assert torch.equal(cache.load(0, 3, 7), cache.load(0)[3:7])
    path = tmp_path / "cache/a.pt"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="a.pt is damaged"):
        cache.load(0, 3, 7)  # the frames are there, but the file is not whole


def test_processes_share_the_work_and_the_result_is_the_same(images, tmp_path):
    run(images, tmp_path / "one")
    assert [run(images, tmp_path / "three", rank=rank, world=3).written for rank in range(3)] == [
        4,
        3,
        3,
    ]
    one, three = open_cache(tmp_path / "one"), open_cache(tmp_path / "three")
    assert one.ids == three.ids and one.captions == three.captions
    run(images, tmp_path / "three")  # one process gathers the indices
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_items_are_read_without_unpickling_whatever_the_layout_of_their_tensors(
    tmp_path, monkeypatch
):
    latents = torch.randn(3, 4, 3, 2, 2)  # channels first, handed over as a permuted view
    with CacheWriter(tmp_path, CacheManifest.of(MeanPixels(), VIDEO)) as writer:
        writer.add_many(["a", "b", "c"], latents.movedim(2, -1), [""] * 3)
    assert (tmp_path / "a.pt").stat().st_size < 3000  # its own numbers, not the batch's
    cache = open_cache(tmp_path)
    monkeypatch.setattr(torch, "load", None)
    for i in range(3):
        assert torch.equal(cache.load(i), latents[i].movedim(1, -1).half())
        assert torch.equal(cache.load(i, 1, 3), latents[i, 1:3].movedim(1, -1).half())


def test_a_second_writer_of_the_same_rank_is_refused(tmp_path):
    manifest = CacheManifest.of(MeanPixels(), VIDEO)
    with (
        CacheWriter(tmp_path, manifest),
        pytest.raises(ValueError, match="another process is writing"),
    ):
        CacheWriter(tmp_path, manifest)


def test_statistics_equal_those_of_all_values_together(tmp_path):
    latents = torch.randn(7, 2, 2, 2, 3) * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor(
        [5.0, 0.0, -1.0]
    )
    with CacheWriter(tmp_path, CacheManifest.of(MeanPixels(), VIDEO)) as writer:
        writer.add_many([str(i) for i in range(7)], latents, [""] * 7)
    stats, rows = latent_statistics(open_cache(tmp_path)), latents.half().double().flatten(0, 3)
    assert (
        stats["mean"] == pytest.approx(rows.mean(0).tolist()) and stats["values"] == len(rows) == 56
    )
    assert stats["std"] == pytest.approx(rows.std(0, unbiased=False).tolist())
    assert stats["scale"] == pytest.approx(1 / rows.std(unbiased=False).item())


@pytest.mark.parametrize(
    "beside", [WithLowResolution(MeanPixels(), (16, 16)), WithPicture(MeanPixels(), "first")]
)
def test_statistics_are_of_clips_alone_and_name_only_keys_that_there_are(tmp_path, capsys, beside):
    latents = torch.randn(4, 1, 2, 2, 6) * torch.arange(1, 7)
    manifest = CacheManifest.of(beside, VIDEO)
    assert manifest.plain == (MeanPixels().fingerprint, 3)
    with CacheWriter(tmp_path / "c", manifest) as writer:
        writer.add_many([*"abcd"], latents, [""] * 4)
    stats = latent_statistics(open_cache(tmp_path / "c"))
    rows = latents.half().double()[..., :3].flatten(0, 3)
    assert stats["std"] == pytest.approx(rows.std(0, unbiased=False).tolist())
    words = ["--cache_dir", str(tmp_path / "c")]
    name = manifest.tokenizer_name.replace("MeanPixels", "WanVAETokenizer")
    replace(manifest, tokenizer_name=name).write(tmp_path / "c")
    capsys.readouterr()
    assert estimate_latent_scale.main(words) == 0
    assert "nothing to set: WanVAETokenizer has" in capsys.readouterr().out
    refused(capsys, estimate_latent_scale.main, [*words, "--save", "x.json"], "has no such key")


def test_a_scale_has_digits_and_what_never_changes_has_none(tmp_path, capsys):
    manifest = CacheManifest.of(MeanPixels(), VIDEO)
    random = torch.randn(4, 1, 2, 2, 3)
    still = random * torch.tensor([1.0, 1.0, 0.0])
    values = {"still": still, "flat": torch.full_like(random, 3), "large": random * 20_000}
    for name, latents in values.items():
        with CacheWriter(tmp_path / name, manifest) as writer:
            writer.add_many([*"abcd"], latents, [""] * 4)
    words = lambda name: ["--cache_dir", str(tmp_path / name)]
    refused(capsys, estimate_latent_scale.main, words("flat"), "are all 3, and have no scale")
    save = ["--save", str(tmp_path / "stats.json")]
    refused(capsys, estimate_latent_scale.main, [*words("still"), *save], "channel 2 (1 in all)")
    assert not (tmp_path / "stats.json").exists()
    assert estimate_latent_scale.main(words("still")) == 0
    capsys.readouterr()
    assert estimate_latent_scale.main(words("large")) == 0
    scale = float(capsys.readouterr().out.split("latent_scale: ")[1])
    expected = 1 / latents.half().double().std(correction=0)
    assert scale == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("number", [math.nan, -math.inf])
def test_numbers_that_are_not_finite_are_in_no_statistics_and_in_no_shard(tmp_path, capsys, number):
    """Other programs write such items: the commands name the file, and write nothing."""
    cache, out = tmp_path / "c", tmp_path / "stats.json"
    with CacheWriter(cache, CacheManifest.of(MeanPixels(), VIDEO)) as writer:
        writer.add_many([*"abcd"], torch.randn(4, 1, 2, 2, 3), [""] * 4)
    for index in cache.glob("index*.jsonl"):
        index.unlink()
    item = torch.load(cache / "b.pt")
    item["latents"][0, 1, 0, 2] = number
    torch.save(item, cache / "b.pt")
    words, expected = ["--cache_dir", cache], f"{cache / 'b.pt'} is damaged: its latents are not"
    refused(capsys, estimate_latent_scale.main, [*words, "--save", out], expected)
    refused(capsys, pack_cache_command.main, [*words, "--out_dir", tmp_path / "p"], expected)
    assert not out.exists() and not list((tmp_path / "p").glob("shard*"))


def test_a_folder_that_cannot_be_written_to_is_no_full_disk(images, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="nothing can be written there; choose another folder"):
            run(images, out)


class Slow(MeanPixels):
    name = "MeanPixels"

    def encode(self, pixels):
        time.sleep(0.1)  # long enough that a busy parent still stops it half way
        return super().encode(pixels)


def slow_run(meta, out):
    torch.set_num_threads(1)  # as DataLoader does in its forked workers
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored in what a shell started in the background
    sys.exit(7 if run(meta, out, Slow(), batch_size=1).interrupted else 0)


@pytest.mark.parametrize("kind, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 7)])
def test_stopped_at_any_moment_the_finished_cache_is_byte_identical(images, tmp_path, kind, code):
    run(images, tmp_path / "quiet")
    (tmp_path / "cache").mkdir()
    for delay in (0.0, 0.005, 0.02):
        process = multiprocessing.get_context("fork").Process(
            target=slow_run, args=(images, tmp_path / "cache")
        )
        before = len(os.listdir(tmp_path / "cache"))
        process.start()
        while len(os.listdir(tmp_path / "cache")) < max(before, 2) + 1 and process.is_alive():
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(process.pid, kind)
        process.join()
        assert process.exitcode == code
        for path in (tmp_path / "cache").glob("*.pt"):
            torch.load(path, weights_only=True)
    report = run(images, tmp_path / "cache")
    assert report.already + report.written == 10 and report.already >= 3
    assert contents(tmp_path / "cache") == contents(tmp_path / "quiet")


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 5, 7)])
def test_an_item_is_a_plain_file_of_torch_and_its_entry_finds_the_numbers(tmp_path, shape):
    latents = torch.randn(2, *shape).half()[1]  # a part of a larger tensor
    facts, source = {"a": [1, 2.5, None, True]}, {"size": [3, 4]}
    rest = {"caption": "ein Käfer 🐞\n", "facts": facts, "source": source}
    pieces, entry = make_item("a", "a.pt", latents, **rest)
    data, whole = b"".join(pieces), io.BytesIO()
    torch.save({"latents": latents.clone(), **rest}, whole)
    assert data == whole.getvalue(), "what torch.save writes by itself"
    (tmp_path / "a.pt").write_bytes(data)
    for mapped in (False, True):
        item = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mapped)
        assert torch.equal(item.pop("latents"), latents) and item == rest
    raw = latents.numpy().tobytes()
    assert data[entry.offset : entry.offset + len(raw)] == raw and zlib.crc32(raw) == entry.crc
    assert [*entry.frame_crcs, entry.crc] == running_crcs(latents.numpy())
    assert Entry.from_json(json.loads(json.dumps(entry.to_json()))) == entry
    assert zipfile.ZipFile(tmp_path / "a.pt").testzip() is None
    assert load_item(tmp_path / "a.pt", shape[-1])["caption"] == rest["caption"]
    assert read_entry("a", "a.pt", tmp_path, shape[-1]) == entry


def test_the_numbers_of_an_item_are_not_copied_and_pieces_of_their_size_are_no_confusion(tmp_path):
    latents = torch.randn(2, 4, 4, 8).half()
    pieces, entry = make_item("a", "a.pt", latents, "", {}, {})
    (numbers,) = (piece for piece in pieces if isinstance(piece, memoryview))
    assert np.frombuffer(numbers, np.float16).__array_interface__["data"][0] == latents.data_ptr()
    for size in range(1, 70):  # as long as other things that torch.save writes
        latents = torch.full((1, 1, 1, size), 7.0).half()
        pieces, entry = make_item("a", "a.pt", latents, "", {}, {})
        data = b"".join(pieces)
        assert data[entry.offset : entry.offset + 2 * size] == latents.numpy().tobytes()


def test_several_threads_write_what_one_does(tmp_path, monkeypatch):
    """Batch by batch from threads, with flushes between; the same files as from one call."""
    manifest = CacheManifest.of(MeanPixels(), VIDEO)
    latents, ids = torch.rand(60, 2, 2, 2, 3), [f"{i:03d}" for i in range(60)]
    with CacheWriter(tmp_path / "serial", manifest) as writer:
        writer.add_many(ids, latents, ids)
    monkeypatch.setattr("mmdit.data.cache.writer.FLUSH_SECONDS", 0.0)
    with CacheWriter(tmp_path / "threads", manifest) as writer:
        with contextlib.closing(SavingThreads()) as saver:
            for i in range(0, 60, 3):
                part = slice(i, i + 3)
                saver.submit(writer.add_many, ids[part], HalfLatents(latents[part]), ids[part])
            saver.wait()
        assert writer.entries.keys() == set(ids)
    assert contents(tmp_path / "threads") == contents(tmp_path / "serial")


def test_a_helping_process_writes_pictures_as_this_one_does(images, tmp_path, monkeypatch):
    run(images, tmp_path / "alone")
    monkeypatch.setattr("mmdit.data.dataset.workers.ITEMS_PER_HELPER", 5)
    here = os.getpid()

    def elsewhere(id):
        assert os.getpid() != here
        return id

    monkeypatch.setattr("mmdit.data.cache.writer.check_id", elsewhere)
    run(images, tmp_path / "helped", num_workers=4, batch_size=5)
    assert contents(tmp_path / "helped") == contents(tmp_path / "alone")


def test_a_failure_of_a_saving_thread_or_of_a_flush_stops_the_work(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with contextlib.closing(SavingThreads()) as saver, pytest.raises(OSError, match="No space"):
        for _ in range(9):
            saver.submit(full)
    monkeypatch.setattr("mmdit.data.cache.writer.FLUSH_SECONDS", 0.0)
    monkeypatch.setattr("mmdit.data.cache.writer.flush_file_system", full)
    manifest = CacheManifest.of(MeanPixels(), VIDEO)
    with pytest.raises(OSError, match="No space"), CacheWriter(tmp_path, manifest) as writer:
        writer.add("a", torch.zeros(1, 2, 2, 3), "")
    assert (tmp_path / "a.pt").exists() and not (tmp_path / "index.jsonl").read_bytes()


def test_caches_of_older_versions_are_read_and_go_on(tmp_path):
    """`golden/cache` was written when items were packed by code of our own."""
    shutil.copytree(Path(__file__).parent / "golden/cache", tmp_path / "caches")
    manifest = CacheManifest.read(tmp_path / "caches/plain")
    for form in ("plain", "packed"):
        cache = open_cache(tmp_path / "caches" / form)
        assert list(cache.ids) == ["a", "猫"] and list(cache.captions) == ["", "a clip"]
        assert cache.facts[1] == {"captions": ["a clip", "zwei"]}
        for item in range(2):
            frames = len(cache.load(item))
            numbers = torch.arange(frames * 12).view(frames, 2, 2, 3) / 8 + item
            assert torch.equal(cache.load(item), numbers.half())
            assert torch.equal(cache.load(item, 0, 1), numbers[:1].half())
        assert verify_cache(tmp_path / "caches" / form)[1] == []
    before = contents(tmp_path / "caches/plain")
    with CacheWriter(tmp_path / "caches/plain", manifest) as writer:
        assert writer.entries.keys() == {"a", "猫"}
    assert contents(tmp_path / "caches/plain") == before
    assert pack_cache(tmp_path / "caches/plain", tmp_path / "caches/packed")["written"] == 0


def test_an_index_that_cannot_be_written_is_named(tmp_path):
    """ "No space left on device" alone does not say on which."""
    writer = CacheWriter(tmp_path, CacheManifest.of(MeanPixels(), VIDEO))
    writer.close()
    writer._index = open("/dev/full", "ab")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        writer._flush(["a line"])
