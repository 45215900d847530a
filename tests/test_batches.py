"""The plan: nothing is dropped, every rank agrees, any step can be computed alone; batches are what
it says."""

import io
import math
from types import SimpleNamespace

import pytest
import torch

from mmdit.data.batches.batch_plan import BatchPlan, _Stream
from mmdit.data.batches.latent_batches import LatentBatches
from mmdit.data.batches.stores import InMemory, OnDisk
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.packing import pack_cache
from mmdit.data.cache.writer import CacheWriter
from mmdit.data.dataset.buckets import VideoConfig
from mmdit.interfaces import LatentSpec
from tests.helpers.thorough import thorough


def listing(*groups):
    """A stand-in for an opened cache: (count, frames, rows, columns) per group."""
    shapes = torch.tensor(
        [
            [frames, rows, columns, 3]
            for count, frames, rows, columns in groups
            for _ in range(count)
        ]
    )
    manifest = SimpleNamespace(spec=LatentSpec(channels=3))
    ids = [f"clip{i}" for i in range(len(shapes))]
    return SimpleNamespace(
        shapes=shapes, ids=ids, folder="somewhere", rates=set(), manifest=manifest
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """30 items of two grids; channel 0 holds the item's number, channel 1 the frame's."""
    folder = tmp_path_factory.mktemp("cache")
    tokenizer = SimpleNamespace(spec=LatentSpec(channels=3), fingerprint="none", name="none")
    manifest = CacheManifest(
        tokenizer.fingerprint, "none", tokenizer.spec, ((32, 32), (48, 16)), True
    )
    with CacheWriter(folder, manifest) as writer:
        for i in range(30):
            grid = (2, 2) if i < 19 else (1, 3)
            frames = 6 + i % 5
            latents = torch.zeros(frames, *grid, 3)
            latents[..., 0], latents[..., 1] = i, torch.arange(frames)[:, None, None]
            writer.add(f"{i:02}", latents, f"caption {i}", {"number": i})
    return open_cache(folder)


def make(cache, video, size=4, **options):
    return LatentBatches(
        cache, BatchPlan(cache, video, size, seed=7), **{"num_workers": 2, **options}
    )


@pytest.mark.parametrize(
    "groups, size",
    [((23, 3, 16), 8), ((1000, 1, 299), 256), ((1, 1, 1), 4), ((7,), 7), ((5, 40), 1), ((3,), 64)],
)
def test_every_item_is_seen_equally_often_and_each_batch_is_of_one_grid(groups, size):
    """After any number of steps no item is ahead of another by more than what its group's batches
    must give at once."""
    shapes = [(count, 1, 2, 2 + number) for number, count in enumerate(groups)]
    plan = BatchPlan(listing(*shapes), VideoConfig(), size, seed=1)
    group_of = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))
    share, seen = torch.tensor(groups) / sum(groups), torch.zeros(sum(groups))
    steps = max(40, math.ceil(8 * sum(groups) / size))
    for step in range(steps):
        batch = plan.batch(step)
        assert len(batch.items) == size and set(group_of[batch.items].tolist()) == {
            batch.grid[1] - 2
        }
        seen.index_add_(0, batch.items, torch.ones(size))
    for number, count in enumerate(groups):
        own = seen[group_of == number]
        assert own.max() - own.min() <= 2, "the orders of a group follow each other without a gap"
        batches, due = own.sum() / size, steps * share[number]
        assert abs(batches - due) <= 2 + len(groups) + count / size, (
            batches,
            due,
        )  # the rest of an epoch is in any order
    epochs = steps * size / sum(groups)
    assert abs(seen.mean() - epochs) < 1e-4


def test_a_small_bucket_weighs_no_more_than_its_items():
    """Over many epochs; an item alone in its bucket was seen as often as there are places in a
    batch."""
    members = {
        (16, 16): torch.arange(100),
        (16, 20): torch.arange(100, 101),
        (20, 16): torch.arange(101, 130),
    }
    stream, seen = _Stream(members, 32, 0, "images"), torch.zeros(130)
    for position in range(2000):
        seen.index_add_(0, stream.batch(position)[1], torch.ones(32))
    epochs = 2000 * 32 / 130
    for own in members.values():
        assert (seen[own] - epochs).abs().max() <= 2 * 32 / len(own) + 1
    assert stream.epoch_steps == 130 / 32


def test_what_a_group_smaller_than_a_batch_means_is_told():
    plan = BatchPlan(listing((23, 1, 2, 2), (3, 1, 1, 4)), VideoConfig(), 8, seed=1)
    assert "23 items, 2.875 batches of 8 an epoch" in plan.report()
    assert "3 items, 0.375 batches of 8 an epoch, each item up to 3 times in one" in plan.report()


def test_any_step_is_the_same_whoever_asks_first():
    def fresh():
        return BatchPlan(
            listing((40, 9, 2, 2), (9, 9, 1, 4)),
            VideoConfig(num_frames=4, image_fraction=0.3),
            4,
            seed=3,
        )

    ordered = fresh()
    expected = [ordered.batch(step) for step in range(60)]
    for step in (57, 3, 31):
        batch = fresh().batch(step)
        assert batch.grid == expected[step].grid
        assert torch.equal(batch.items, expected[step].items) and torch.equal(
            batch.frames, expected[step].frames
        )
    assert any(
        not torch.equal(a.items, b.items)
        for a, b in zip(expected[:13], expected[13:26], strict=True)
    )


def test_orders_differ_between_seeds_and_epochs_and_mix_the_grids():
    plan, other = (
        BatchPlan(listing((64, 1, 2, 2), (64, 1, 1, 4)), VideoConfig(), 8, seed) for seed in (1, 2)
    )
    grids = [plan.batch(step).grid for step in range(16)]
    assert grids != sorted(grids) and grids != sorted(grids, reverse=True)
    assert not torch.equal(plan.batch(0).items, other.batch(0).items)
    first, second = (
        {frozenset(plan.batch(step).items.tolist()) for step in range(begin, begin + 16)}
        for begin in (0, 16)
    )
    assert (
        not first & second
    )  # other companions in every epoch, not only another order of the same batches


def test_frames_follow_the_stride_stay_inside_and_use_the_whole_clip():
    plan = BatchPlan(listing((50, 20, 2, 2)), VideoConfig(num_frames=4, frame_stride=5), 50, seed=1)
    frames = torch.cat([plan.batch(step).frames for step in range(40)])
    assert (frames.diff(dim=1) == 5).all()
    starts = frames[:, 0].bincount(minlength=5) / len(frames)
    assert frames.max() == 19 and len(starts) == 5 and (starts - 0.2).abs().max() < 0.04


def test_short_clips_are_counted_with_a_setting_that_keeps_them():
    video = VideoConfig(num_frames=16, frame_stride=5)
    plan = BatchPlan(listing((5, 80, 2, 2), (2, 40, 2, 2), (1, 9, 2, 2)), video, 4, seed=1)
    assert plan.excluded.tolist() == [5, 6, 7]
    assert set(torch.cat([plan.batch(step).items for step in range(4)]).tolist()) == set(range(5))
    assert "left out 3 items of 9 to 40 frames" in plan.report() and "needs 76" in plan.report()
    assert (
        "video.num_frames: 2 would keep all" in plan.report()
        and "video.frame_stride: 2 the longest" in plan.report()
    )
    for keeps, left in (
        (VideoConfig(num_frames=2, frame_stride=5), 0),
        (VideoConfig(num_frames=16, frame_stride=2), 1),
    ):
        assert (
            len(BatchPlan(listing((1, 40, 2, 2), (1, 9, 2, 2)), keeps, 4, seed=1).excluded) == left
        )
    with pytest.raises(ValueError, match="no item of the cache somewhere is long enough"):
        BatchPlan(listing((3, 75, 2, 2)), video, 4, seed=1)


@pytest.mark.parametrize("fraction", [0.25, 0.3, 1.0])
def test_the_share_of_image_steps_is_exact_and_both_streams_are_used_in_full(fraction):
    plan = BatchPlan(
        listing((12, 8, 2, 2), (4, 1, 2, 2)),
        VideoConfig(num_frames=4, image_fraction=fraction),
        4,
        seed=5,
    )
    batches = [plan.batch(step) for step in range(400)]
    images = [batch for batch in batches if batch.frames.shape[1] == 1]
    assert abs(len(images) - 400 * fraction) <= 1
    assert set(torch.cat([batch.items for batch in images[:5]]).tolist()) == set(
        range(16)
    )  # single images serve here too
    clips = [batch for batch in batches if batch.frames.shape[1] == 4]
    assert not clips or set(torch.cat([batch.items for batch in clips[:4]]).tolist()) == set(
        range(12)
    )


@pytest.mark.parametrize("world, accum", [(1, 1), (2, 1), (1, 4), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_together_are_the_global_batch(cache, world, accum):
    video = VideoConfig(num_frames=3, frame_stride=2)
    whole = make(cache, video, size=8)
    parts = [
        make(cache, video, size=8, world=world, accum=accum, rank=rank) for rank in range(world)
    ]
    for step in range(12):
        reference = whole.step(step)[0]
        seen = []
        for part in parts:
            micro = part.step(step)
            assert len(micro) == accum
            for batch in micro:
                seen += batch.indices.tolist()
                assert torch.equal(batch.latents, reference.latents[batch.indices])
                assert batch.ids == [reference.ids[i] for i in batch.indices.tolist()]
                assert batch.captions == [f"caption {int(id)}" for id in batch.ids]
                assert [fact["number"] for fact in batch.facts] == [int(id) for id in batch.ids]
        assert sorted(seen) == list(range(8))


def test_memory_and_disk_give_the_planned_latents(cache):
    video = VideoConfig(num_frames=3, frame_stride=2, image_fraction=0.5)
    memory, disk = (make(cache, video, in_memory=where) for where in (True, False))
    for step in range(20):
        (a,), (b,), planned = memory.step(step), disk.step(step), memory.plan.batch(step)
        assert a.latents.dtype == torch.float16 and a.latents.shape[2:4] == planned.grid
        assert torch.equal(a.latents, b.latents) and a.ids == b.ids
        assert (
            a.latents[:, :, 0, 0, 0].tolist()
            == planned.items[:, None].expand(planned.frames.shape).tolist()
        )
        assert a.latents[:, :, 0, 0, 1].tolist() == planned.frames.tolist()


def test_tiles_say_their_place_and_follow_the_step_of_the_training(cache):
    batches = make(cache, VideoConfig(num_frames=2, frame_stride=3), tile=(1, 1), num_workers=0)
    drawn = [batches.at(position, 40)[0] for position in range(6)]
    first = torch.cat([batch.latents[:, 0, 0, 0, 1].long() for batch in drawn])
    assert torch.equal(torch.cat([batch.places[:, 0] for batch in drawn]), first // 3)
    assert first.max() >= 3, "in frames of the sample, not of the clip"
    again = batches.at(0, 41)[0]
    corners = [batch.places[:, 1:3] for batch in (again, drawn[0])]
    assert again.ids == drawn[0].ids and not torch.equal(*corners)


@pytest.mark.parametrize("workers", [*thorough(0), 3])
@pytest.mark.parametrize("where", [True, False])
def test_iterating_from_any_step_goes_on_as_if_never_stopped(cache, where, workers):
    batches = make(cache, VideoConfig(num_frames=2), in_memory=where, num_workers=workers)
    whole = [step[0] for step in batches.iterate(0, 25)]
    assert len(whole) == 25
    rest = [step[0] for step in batches.iterate(11, 25)]
    assert [batch.ids for batch in rest] == [batch.ids for batch in whole[11:]]
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(rest, whole[11:], strict=True))
    endless = batches.iterate(3)
    assert next(endless)[0].ids == whole[3].ids
    endless.close()


def test_auto_reads_from_disk_what_does_not_fit(cache, monkeypatch):
    assert isinstance(make(cache, VideoConfig()).store, InMemory)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(10**9))
    assert not isinstance(make(cache, VideoConfig()).store, InMemory)


def test_a_global_batch_that_cannot_be_split_is_refused(cache):
    with pytest.raises(
        ValueError, match="global batch of 6 cannot be split over 2 processes and 2.*multiple of 4"
    ):
        make(cache, VideoConfig(), size=6, world=2, accum=2)


def test_held_out_items_that_are_all_too_short_are_told_before_the_training():
    cache, video = (
        listing((20, 1, 2, 2), (6, 9, 2, 2)),
        VideoConfig(num_frames=4, image_fraction=0.5),
    )
    told = []
    for seed in range(12):
        try:
            plan = BatchPlan(cache, video, 4, seed, held_out=0.1)
        except ValueError as error:
            told.append(str(error))
        else:
            assert plan.held_out_batches(99)
    assert len(told) >= 3 and any(
        "every one is too short for a clip" in message for message in told
    )


@pytest.mark.parametrize("form", ["plain", "packed"])
@pytest.mark.parametrize("read_over", [0, 1 << 16])
def test_from_disk_only_the_frames_of_a_sample_are_read(tmp_path, monkeypatch, form, read_over):
    """16 of 80 frames are a fifth of the bytes; frames so small that a gap is cheaper to read than
    to skip are read along. The latents are those from memory, in either case."""
    video = VideoConfig(32, 32, num_frames=16, frame_stride=5, temporal_jitter=1)
    manifest = CacheManifest("none", "none", LatentSpec(channels=3), ((32, 32),), False)
    with CacheWriter(tmp_path / "plain", manifest) as writer:
        writer.add_many(["a", "b", "c"], torch.randn(3, 80, 2, 2, 3), [""] * 3)
    pack_cache(tmp_path / "plain", tmp_path / "packed")
    sizes = []

    def opened(path, buffered):
        class Counting(io.FileIO):
            def readinto(self, buffer):
                sizes.append(super().readinto(buffer))
                return sizes[-1]

        return Counting(path)

    cache = open_cache(tmp_path / form)
    monkeypatch.setattr("mmdit.data.batches.stores.LARGE", 0)  # loaded by several threads
    held = InMemory(cache, progress=False)
    monkeypatch.setattr("mmdit.data.cache.latent_cache.open_regular", opened)
    monkeypatch.setattr("mmdit.data.cache.latent_cache.READ_OVER", read_over)
    plan, read, spans = BatchPlan(cache, video, 2, seed=0), 0, 0
    for step in range(20):
        planned = plan.batch(step)
        there = held.gather(planned.grid, planned.items, planned.frames)
        assert torch.equal(OnDisk(cache).gather(planned.grid, planned.items, planned.frames), there)
        read += planned.frames.numel()
        spans += int((planned.frames[:, -1] - planned.frames[:, 0] + 1).sum())
    frame_bytes = 2 * 2 * 2 * 3
    assert sum(sizes) == (spans if read_over else read) * frame_bytes
    assert read < 0.22 * spans
