"""Frames of a sample: in order, inside the clip, none twice; a window, or stretched over it; jitter
within its bounds."""

import pytest
import torch

from mmdit.config import ConfigError, decode
from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.dataset.buckets import VideoConfig
from mmdit.data.dataset.clips import frame_numbers, usable_frames
from mmdit.rng import Draws
from tests.test_batches import cache, listing, make  # noqa: F401 (cache is a fixture)

COUNTS = torch.arange(5, 400)


def chosen(video, counts=COUNTS, frames=None, step=0, seed=0):
    return frame_numbers(
        counts, frames or video.num_frames, video, Draws.of(seed, step, len(counts))
    )


def test_a_stretched_clip_goes_from_its_first_to_its_last_frame_evenly():
    for number in range(2, 60):
        counts = torch.arange(number, 400)
        frames = chosen(VideoConfig(num_frames=number, shrink_video_to_frames=True), counts)
        assert (frames[:, 0] == 0).all() and (frames[:, -1] == counts - 1).all()
        gaps = frames.diff(dim=1)
        assert (gaps.amax(1) - gaps.amin(1) <= 1).all() and gaps.min() >= 1
    assert chosen(
        VideoConfig(num_frames=5, shrink_video_to_frames=True), torch.tensor([5, 9])
    ).tolist() == [[0, 1, 2, 3, 4], [0, 2, 4, 6, 8]]


@pytest.mark.parametrize(
    "options",
    [{"shrink_video_to_frames": True}, *({"frame_stride": stride} for stride in (1, 4, 9))],
)
@pytest.mark.parametrize("jitter", [1, 2, 50])
def test_jitter_keeps_the_order_the_first_frame_and_stays_in_the_clip(options, jitter):
    video = VideoConfig(num_frames=5, temporal_jitter=jitter, **options)
    still = VideoConfig(num_frames=5, **options)
    counts = torch.arange(video.span, 400)
    for step in range(10):
        frames, fixed = (chosen(config, counts, step=step) for config in (video, still))
        assert (frames.diff(dim=1) >= 1).all() and (frames[:, 0] == fixed[:, 0]).all()
        assert frames.min() >= 0 and (frames[:, -1] < counts).all()
        assert (frames - fixed).abs().max() <= jitter
        gaps = (
            (counts - 1) // 4
            if video.shrink_video_to_frames
            else torch.full_like(counts, video.frame_stride)
        )
        assert ((frames - fixed).abs().amax(1) <= (gaps - 1).clamp(min=0) // 2).all()


def test_jitter_is_uniform_over_what_is_allowed_and_keyed():
    video = VideoConfig(num_frames=3, frame_stride=10, temporal_jitter=2)
    still = VideoConfig(num_frames=3, frame_stride=10)
    counts = torch.full((5000,), 50)
    moved = (chosen(video, counts) - chosen(still, counts))[:, 1]
    shares = (moved + 2).bincount(minlength=5) / len(moved)
    assert len(shares) == 5 and (shares - 0.2).abs().max() < 0.03
    assert torch.equal(chosen(video, counts), chosen(video, counts))
    assert not torch.equal(chosen(video, counts), chosen(video, counts, step=1))


def test_stretching_leaves_out_short_clips_alone_and_the_report_tells_what_jitter_cannot_move():
    video = VideoConfig(num_frames=4, shrink_video_to_frames=True, temporal_jitter=3)
    plan = BatchPlan(listing((3, 4, 2, 2), (4, 30, 2, 2), (1, 3, 2, 2)), video, 7, seed=1)
    assert plan.excluded.tolist() == [7]
    assert "needs 4." in plan.report() and "video.num_frames: 3 would keep all" in plan.report()
    assert "temporal_jitter moves no frame of 3 clips" in plan.report()
    batch = plan.batch(0)
    assert batch.frames[batch.items < 3].tolist() == [[0, 1, 2, 3]] * 3
    assert batch.frames[batch.items >= 3][:, 0].eq(0).all() and batch.frames.max() <= 29
    assert "temporal_jitter" not in BatchPlan(listing((4, 30, 2, 2)), video, 4, seed=1).report()


def test_clips_of_several_lengths_train_at_the_most_frames_that_fit_in_batches_of_one_shape():
    video = VideoConfig(num_frames=16, frame_stride=2, frame_counts=(4, 8))
    assert usable_frames(torch.tensor([6, 7, 14, 15, 30, 31, 99]), video).tolist() == [
        0,
        4,
        4,
        8,
        8,
        16,
        16,
    ]
    plan = BatchPlan(
        listing((6, 7, 2, 2), (5, 20, 2, 2), (7, 40, 2, 2), (3, 40, 1, 4), (1, 6, 2, 2)),
        video,
        4,
        seed=2,
    )
    rows = {
        (tuple(row["grid"]), row["frames"]): (row["items"], row["batches"]) for row in plan.table()
    }
    assert rows == {
        ((2, 2), 4): (6, 1.5),
        ((2, 2), 8): (5, 1.25),
        ((2, 2), 16): (7, 1.75),
        ((1, 4), 16): (3, 0.75),
    }
    seen = []
    for step in range(12):
        batch = plan.batch(step)
        assert set(plan._frames[batch.items].tolist()) == {batch.frames.shape[1]}
        assert (batch.frames < plan._counts[batch.items][:, None]).all()
        seen += batch.items.tolist()
    assert set(seen) == set(range(21)) and plan.excluded.tolist() == [21]


@pytest.mark.parametrize("where", [True, False])
def test_batches_hold_the_chosen_frames(cache, where):
    video = VideoConfig(
        num_frames=4,
        shrink_video_to_frames=True,
        temporal_jitter=1,
        frame_counts=(2,),
        image_fraction=0.3,
    )
    batches = make(cache, video, in_memory=where)
    for step in range(20):
        (batch,), planned = batches.step(step), batches.plan.batch(step)
        assert batch.latents[:, :, 0, 0, 1].tolist() == planned.frames.tolist()
        assert batch.latents.shape[1:4] == (planned.frames.shape[1], *planned.grid)


@pytest.mark.parametrize(
    "values, told",
    [
        (
            {"shrink_video_to_frames": True, "num_frames": 8, "frame_stride": 2},
            "set frame_stride: 1",
        ),
        ({"shrink_video_to_frames": True}, "at least 2"),
        ({"temporal_jitter": 1}, "0 for single frames"),
        ({"temporal_jitter": -1, "num_frames": 8}, "at least 0"),
        ({"frame_counts": [4, 16], "num_frames": 16}, r"frame_counts\[1\]"),
        ({"frame_counts": [4, 4], "num_frames": 16}, "once"),
    ],
)
def test_impossible_settings_are_refused(values, told):
    with pytest.raises(ConfigError, match=told):
        decode(VideoConfig, values)
