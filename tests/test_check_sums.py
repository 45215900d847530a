"""Damage of stored numbers is told before they are trained on, however few frames of a clip are
read."""

import json
import threading
from dataclasses import replace

import pytest
import torch

from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.batches.latent_batches import LatentBatches
from mmdit.data.cache.items import running_crcs
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.packed import INDEX, index_of, read_shard, shards_of, write_index
from mmdit.data.cache.packing import pack_cache
from mmdit.data.cache.verify import verify_cache
from mmdit.data.cache.writer import CacheWriter
from mmdit.data.dataset.buckets import VideoConfig
from tests.test_packed import MANIFEST

VIDEO = VideoConfig(32, 32, num_frames=3)
FRAMES = 7


@pytest.fixture
def clips(tmp_path):
    """Four clips in a cache and in a packed one."""
    with CacheWriter(tmp_path / "cache", MANIFEST) as writer:
        writer.add_many(list("abcd"), torch.randn(4, FRAMES, 2, 2, 3), [""] * 4)
    pack_cache(tmp_path / "cache", tmp_path / "packed")
    return tmp_path


def without_marks(folder):
    """The cache as an older version wrote it."""
    if (folder / INDEX).exists():
        shards = [
            [replace(entry, frame_crcs=[]) for entry in read_shard(path)]
            for path in shards_of(folder)
        ]
        write_index(folder, index_of(shards))
        return
    lines = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    assert all(len(line.pop("marks")) == FRAMES - 1 for line in lines)
    (folder / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_all(folder):
    cache = open_cache(folder)
    batches = LatentBatches(cache, BatchPlan(cache, VIDEO, 4, 0), in_memory=False, num_workers=0)
    for step in range(8):
        batches.step(step)


def flipped(raw, offset, size):
    """One bit of every frame, in no place of an exponent that would make the loss conspicuous."""
    for place in range(offset, offset + size, size // FRAMES):
        raw[place] ^= 64


def zeroed(raw, offset, size):
    raw[offset : offset + size] = bytes(size)


@pytest.mark.parametrize("damage", [flipped, zeroed])
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("form", ["cache", "packed"])
def test_damage_of_a_clip_read_from_disk_is_named(clips, form, older, damage):
    folder = clips / form
    if older:
        without_marks(folder)
    read_all(folder)
    cache = open_cache(folder)
    file = folder / cache.columns.files[2]
    _, offset, _ = cache.columns.places[2].tolist()
    raw = bytearray(file.read_bytes())
    damage(raw, offset, FRAMES * 2 * 2 * 3 * 2)
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=f"{file.name} is damaged"):
        read_all(folder)
    assert file.name in {damage.file.rpartition("/")[2] for damage in verify_cache(folder)[1]}


@pytest.mark.parametrize("form", ["cache", "packed"])
def test_every_part_of_a_clip_is_checked_by_itself(clips, form):
    cache = open_cache(clips / form)
    whole = cache.load(1).clone()
    file = clips / form / cache.columns.files[1]
    _, offset, _ = cache.columns.places[1].tolist()
    raw = bytearray(file.read_bytes())
    raw[offset + 3 * whole[0].nbytes] ^= 1  # frame 3
    file.write_bytes(raw)
    for start in range(FRAMES):
        for stop in range(start + 1, FRAMES + 1):
            if start <= 3 < stop:
                with pytest.raises(ValueError, match="is damaged"):
                    cache.load(1, start, stop)
            elif form == "packed" or stop > start:
                assert torch.equal(cache.load(1, start, stop), whole[start:stop])


def test_a_file_whose_head_is_gone_is_told_though_its_numbers_are_whole(clips):
    file = clips / "cache" / open_cache(clips / "cache").columns.files[0]
    raw = file.read_bytes()
    file.write_bytes(bytes(64) + raw[64:])
    for frames in ((0, FRAMES), (2, 4)):
        with pytest.raises(ValueError, match="a.pt is damaged"):
            open_cache(clips / "cache").load(0, *frames)


def test_an_item_of_another_caption_than_the_index_says_is_told(clips):
    cache = open_cache(clips / "cache")
    file = clips / "cache" / cache.columns.files[0]
    torch.save({"latents": cache.load(1), "caption": "another"}, file)
    with pytest.raises(
        ValueError, match="a.pt has the caption 'another', the index says ''; delete"
    ):
        cache.load(0)


def test_an_older_packed_cache_is_current_and_gives_the_same(clips):
    without_marks(clips / "cache")
    pack_cache(clips / "cache", clips / "older")
    columns_of_before = open_cache(clips / "older")
    assert all(len(columns_of_before.columns.frame_crcs[i]) == 0 for i in range(4))
    assert pack_cache(clips / "cache", clips / "older")["written"] == 0
    assert torch.equal(columns_of_before.load(2, 1, 3), open_cache(clips / "packed").load(2, 1, 3))


def test_marks_continue_each_other():
    numbers = torch.randn(3, 2, 2, 3).half().numpy()
    assert (
        running_crcs(numbers)[:2] == running_crcs(numbers[:2])
        and len(set(running_crcs(numbers))) == 3
    )


def test_lines_enter_the_index_when_their_items_are_on_the_disk(tmp_path, monkeypatch):
    from mmdit.data.cache import writer as module

    may_flush, flushed = threading.Event(), threading.Event()

    def flush(folder):
        assert may_flush.wait(60)
        flushed.set()

    monkeypatch.setattr(module, "flush_file_system", flush)
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.0)
    with CacheWriter(tmp_path, MANIFEST) as writer:
        for name in "ab":  # written while the flush for the first goes on
            writer.add(name, torch.zeros(1, 2, 2, 3), "")
        assert len(list(tmp_path.rglob("*.pt"))) == 2
        assert not (tmp_path / "index.jsonl").read_text()
        may_flush.set()
        assert flushed.wait(60)
        writer.close()
        assert len((tmp_path / "index.jsonl").read_text().split()) == 2
    monkeypatch.setattr(module, "FLUSH_SECONDS", 100.0)
    with CacheWriter(tmp_path, MANIFEST) as writer:
        writer.add("c", torch.zeros(1, 2, 2, 3), "")
        assert '"c"' not in (tmp_path / "index.jsonl").read_text()
    assert '"c"' in (tmp_path / "index.jsonl").read_text()
