"""A packed cache gives the batches of the cache it was packed from, bit for bit; killed, damaged or
grown, it says so."""

import gc
import json
import os
import signal
import time
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.batches.latent_batches import LatentBatches
from mmdit.data.cache import packing
from mmdit.data.cache.items import Entry
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.packed import INDEX, index_of, read_shard, shard_name, write_index
from mmdit.data.cache.verify import verify_cache
from mmdit.data.cache.writer import CacheWriter
from mmdit.data.dataset.buckets import BucketingConfig, VideoConfig
from mmdit.interfaces import LatentSpec
from mmdit.scripts.pack_cache import main
from tests.helpers.forks import ended, in_child
from tests.test_cache import MeanPixels, contents

VIDEO = VideoConfig(
    32, 32, num_frames=3, image_fraction=0.4, temporal_jitter=1, frame_stride=3, fps=8
)
MANIFEST = CacheManifest.of(
    MeanPixels(), VIDEO, BucketingConfig(True, buckets=((32, 32), (48, 16)))
)


def add(folder, names):
    with CacheWriter(folder, MANIFEST) as writer:
        for i, name in enumerate(names):
            facts = {"captions": ["猫 one", "two\nlines"]} if i % 2 else {}
            source = {"size": [9, 9], "crop": [0, 0, 9, 9], "fps": 8.0} if i % 3 else {}
            latents = torch.randn(7 + i % 5, *((2, 2) if i % 4 else (1, 3)), 3)
            writer.add(name, latents, "" if i == 2 else f"caption {i}", facts, source)
    return folder


@pytest.fixture
def cache(tmp_path):
    return add(tmp_path / "cache", [f"猫{i:02}" if i % 2 else f"item {i}" for i in range(25)])


def pack(cache, shard_bytes=1500):
    return packing.pack_cache(cache, cache.parent / "packed", shard_bytes)


def steps(folder, **options):
    opened = open_cache(folder, MANIFEST)
    batches = LatentBatches(opened, BatchPlan(opened, VIDEO, 6, seed=3), **options)
    return [batch for step in range(12) for batch in batches.step(step)]


@pytest.mark.parametrize("in_memory", [True, False])
def test_batches_are_bit_equal_to_those_of_the_unpacked_cache(cache, in_memory):
    assert pack(cache)["shards"] > 2
    mine, theirs = (
        steps(folder, in_memory=in_memory) for folder in (cache.parent / "packed", cache)
    )
    for packed, plain in zip(mine, theirs, strict=True):
        assert torch.equal(packed.latents.view(torch.int16), plain.latents.view(torch.int16))
        assert (packed.captions, packed.ids, packed.facts) == (
            plain.captions,
            plain.ids,
            plain.facts,
        )
    packed, plain = open_cache(cache.parent / "packed"), open_cache(cache)
    assert (
        list(packed.sources) == plain.sources
        and packed.rates == plain.rates == {8.0}
        and packed.ids[-1] == plain.ids[-1]
    )
    assert verify_cache(cache.parent / "packed") == (pack(cache)["shards"], [])


def test_worker_processes_read_a_packed_cache(cache):
    pack(cache)
    opened = open_cache(cache.parent / "packed")
    batches = LatentBatches(
        opened, BatchPlan(opened, VIDEO, 6, seed=3), in_memory=False, num_workers=1
    )
    for made, known in zip(batches.iterate(0, 3), range(3), strict=True):
        assert torch.equal(made[0].latents, batches.step(known)[0].latents)


def test_a_shard_is_a_plain_safetensors_file_that_holds_everything(cache):
    pack(cache)
    opened, found = open_cache(cache), {}
    for path in sorted((cache.parent / "packed").glob("shard-*")):
        tensors = load_file(path)
        lines = [json.loads(line) for line in tensors.pop(".texts").numpy().tobytes().splitlines()]
        assert tensors.keys() == {entry.id for entry in read_shard(path)} and len(lines) == len(
            tensors
        )
        found |= tensors
    assert found.keys() == set(opened.ids)
    assert all(torch.equal(found[id], opened.load(i)) for i, id in enumerate(opened.ids))


def test_packing_again_writes_only_what_changed(cache):
    made = pack(cache)
    out, before = cache.parent / "packed", contents(cache.parent / "packed")
    assert (
        made["written"] == made["shards"]
        and pack(cache)["written"] == 0
        and contents(out) == before
    )
    (out / "shard-00001.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"shard-00001.safetensors is damaged: it is missing.*pack-cache again"
    ):
        open_cache(out)
    (out / INDEX).unlink()
    with pytest.raises(ValueError, match="packing was not finished"):
        open_cache(out)
    assert pack(cache)["written"] == 1 and contents(out) == before
    with CacheWriter(cache, MANIFEST) as writer:
        plain = open_cache(cache)
        writer.add(
            "猫23", plain.load(24), "caption 99", plain.facts[24], plain.sources[24]
        )  # of the same length
    assert pack(cache)["written"] == 1 and open_cache(out).captions[24] == "caption 99"
    last = [entry.id for entry in read_shard(sorted(out.glob("shard-*"))[-1])]
    with CacheWriter(cache, MANIFEST) as writer:
        assert writer.remove(last) == len(last)
    made = pack(cache)
    assert made["written"] == 0 and made["removed"] == len(last)
    assert list(open_cache(out).ids) == open_cache(cache).ids
    packing.pack_cache(cache, out, 1 << 20)
    assert [path.name for path in out.glob("shard-*")] == ["shard-00000.safetensors"] and len(
        open_cache(out)
    ) == 25 - len(last)
    path = cache / plain.columns.files[5]  # replaced by hand: the index does not know
    item = torch.load(path)
    item["latents"] += 1
    torch.save(item, path)
    os.utime(path, (1e9, 1e9))  # a copy that keeps the time of an older file
    assert packing.pack_cache(cache, out, 1 << 20)["written"] == 1
    assert torch.equal(open_cache(out).load(5), item["latents"])


def test_a_damaged_shard_or_index_is_named(cache):
    pack(cache)
    out = cache.parent / "packed"
    shard, index = out / "shard-00001.safetensors", out / INDEX
    entry = read_shard(shard)[1]
    good, columns = shard.read_bytes(), index.read_bytes()
    bad = bytearray(good)
    bad[entry.offset + 3] ^= 4
    shard.write_bytes(bad)
    opened = open_cache(out)
    with pytest.raises(
        ValueError,
        match=f"shard-00001.safetensors is damaged: the check sum of item '{entry.id}' is wrong",
    ):
        opened.load(opened.ids.index(entry.id))
    (found,) = verify_cache(out)[1]
    assert (
        found.file == shard.name
        and f"item '{entry.id}': its check sum is wrong; delete it and run" in str(found)
    )
    shard.write_bytes(good[:-50])
    with pytest.raises(
        ValueError, match=r"shard-00001.safetensors is damaged: it has \d+ bytes, the index .* says"
    ):
        open_cache(out)
    assert {damage.file for damage in verify_cache(out)[1]} == {shard.name}
    shard.write_bytes(good)
    for bad in (columns[:1000], columns[:12] + b"\xff" + columns[13:], b""):
        index.write_bytes(bad)
        with pytest.raises(ValueError, match=f"{INDEX} is damaged"):
            open_cache(out)
    head = 8 + int.from_bytes(columns[:8], "little")
    index.write_bytes(columns[:head] + bytes(byte ^ 64 for byte in columns[head:]))
    with pytest.raises(ValueError, match=f"{INDEX} is damaged"):
        open_cache(out)
    assert [damage.file for damage in verify_cache(out)[1]] == [INDEX]


def test_a_killed_run_leaves_whole_shards_and_goes_on_to_the_same_bytes(cache):
    """SIGKILL while the shard number `at` is being written, then the same command again."""
    pack(cache)
    expected = contents(cache.parent / "packed")
    whole_shard = packing._shard

    def killed_shard(cache, part, *rest):
        for number, piece in enumerate(whole_shard(cache, part, *rest)):
            yield piece
            if part.start >= at and number == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    for at in (0, 5, 15):
        out = cache.parent / f"killed{at}"

        def packed(out=out):
            packing._shard = killed_shard
            packing.pack_cache(cache, out, 1500)

        assert ended(in_child(packed)) == -signal.SIGKILL and list(out.glob(".writing-*"))
        with pytest.raises(
            ValueError, match="packing was not finished|is no latent cache|holds no item"
        ):
            open_cache(out)
        whole = len(list(out.glob("shard-*")))
        made = packing.pack_cache(cache, out, 1500)
        assert made["written"] == made["shards"] - whole and contents(out) == expected


def test_other_folders_are_refused(cache, tmp_path, capsys):
    pack(cache)
    for itself in (cache, cache.parent / "packed"):
        with pytest.raises(ValueError, match="is the cache itself"):
            packing.pack_cache(itself, itself)
    with pytest.raises(ValueError, match="holds an unpacked cache"):
        packing.pack_cache(cache.parent / "packed", cache)
    with pytest.raises(
        ValueError, match="is a packed cache; add items to the cache it was packed from"
    ):
        CacheWriter(tmp_path / "packed", MANIFEST)
    other = CacheManifest.of(
        MeanPixels("another"), VIDEO, BucketingConfig(True, buckets=((32, 32), (48, 16)))
    )
    with CacheWriter(tmp_path / "other", other) as writer:
        writer.add("__metadata__", torch.zeros(1, 2, 2, 3), "")
    with pytest.raises(ValueError, match="made with other settings"):
        packing.pack_cache(tmp_path / "other", tmp_path / "packed")
    second, packed = add(tmp_path / "second", ["elsewhere"]), tmp_path / "packed"
    before = contents(packed)
    with pytest.raises(ValueError, match="holds 25 packed items .* has none of them"):
        packing.pack_cache(second, packed)
    assert contents(packed) == before
    with pytest.raises(SystemExit):
        main(["--cache_dir", str(tmp_path / "other"), "--out_dir", str(tmp_path / "new")])
    assert "give that item another id" in capsys.readouterr().err
    assert main(["--cache_dir", str(cache), "--out_dir", str(tmp_path / "new2")]) == 0
    assert "25 items" in capsys.readouterr().out


def memory():
    """Megabytes of this process that are its own, mapped files aside."""
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) / 1024


@pytest.mark.slow
def test_a_million_items_open_from_the_index_in_seconds_and_memory_stays_flat(tmp_path):
    """Ten shards of 100,000 items of 256x256 pictures (sparse files: 33 GB of zeros)."""
    manifest = CacheManifest("none", "none", LatentSpec(64), ((256, 256),), False)
    manifest.write(tmp_path)
    size = 2 * 16 * 16 * 64
    source = {"size": [1024, 768], "crop": [128, 0, 896, 768]}
    crc = zlib.crc32(bytes(size))

    def shards():
        for number in range(10):
            path = tmp_path / shard_name(number)
            with path.open("wb") as file:
                os.truncate(file.fileno(), 100_000 * size)
            yield [
                Entry(
                    id=f"item{number}{i:06}",
                    file=path.name,
                    shape=[1, 16, 16, 64],
                    caption=f"a picture of thing {i} on a table",
                    bytes=100_000 * size,
                    offset=i * size,
                    crc=crc,
                    source=source,
                )
                for i in range(100_000)
            ]

    write_index(tmp_path, index_of(shards()))
    gc.collect()
    before, begin = memory(), time.perf_counter()
    opened = open_cache(tmp_path, manifest)
    batches = LatentBatches(
        opened, BatchPlan(opened, VideoConfig(256, 256), 256, 0), in_memory=False, num_workers=0
    )
    first = batches.step(0)
    spent = time.perf_counter() - begin
    for step in range(1, 20):
        batches.step(step)
    settled = memory()
    for step in range(20, 60):
        batches.step(step)
    assert memory() - settled < 20
    grown = memory() - before
    print(
        f"opened, planned and read a first batch of {len(opened):,} items in {spent:.2f} s;"
        f" {grown:.0f} MB"
    )
    assert len(opened) == 1_000_000 and len(first[0].ids) == 256 and spent < 10 and grown < 200
