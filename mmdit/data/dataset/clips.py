"""Choose the frames of a clip that make a sample: a window that starts anywhere, or frames spread
over the whole clip; both with jitter.

For a tokenizer of single frames, all frames are cached, and chosen for each batch. A tokenizer that
joins frames in time is given the frames of a sample, chosen once when the clip is cached: the
settings of this choice are then among those that the cache's manifest records.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mmdit.data.dataset.buckets import VideoConfig
from mmdit.data.dataset.problems import Unusable
from mmdit.interfaces import LatentSpec
from mmdit.rng import Draws


def usable_frames(counts: Tensor, video: VideoConfig) -> Tensor:
    """Return how many frames a sample gets from each clip of `counts (N,)` frames: the largest of
    the configured numbers that fits; 0 if none does."""
    frames = torch.zeros_like(counts)
    for number in sorted((video.num_frames, *video.frame_counts)):
        frames[counts >= video.needed(number)] = number
    return frames


def jitter_limits(counts: Tensor, frames: int | Tensor, video: VideoConfig) -> Tensor:
    """Return how far jitter may move a frame of each clip without reaching its neighbour: at most
    `⌊(gap - 1) / 2⌋`, where `gap` is the distance of two frames, and at most `temporal_jitter`."""
    if video.shrink_video_to_frames:
        gaps = (counts - 1) // (frames - 1)
    else:
        gaps = torch.full_like(counts, video.frame_stride)
    return ((gaps - 1) // 2).clamp(0, video.temporal_jitter)


def frame_numbers(
    counts: Tensor, frames: int, video: VideoConfig, draws: Draws, aligned: int = 1
) -> Tensor:
    """Return the frame numbers of a sample, `(B, frames)` int64, ascending and different, for clips
    of `counts (B,)` frames. A single frame is drawn from all frames. `aligned`: samples start at
    multiples of this number (where samples started that a tokenizer encoded). Jitter never moves
    the first frame, so that it can serve as the given one."""
    if frames == 1 or not video.shrink_video_to_frames:
        last = counts - (video.needed(frames) if frames > 1 else 1)
        starts = last // aligned + 1  # the number of possible starts
        start = (draws.uniform("frame_start").double() * starts).long() * aligned
        chosen = start[:, None] + torch.arange(frames) * video.frame_stride
    else:
        gaps = (counts - 1).double() / (frames - 1)
        chosen = (gaps[:, None] * torch.arange(frames) + 0.5).long()
    if video.temporal_jitter and frames > 1:
        limits = jitter_limits(counts, frames, video)[:, None]
        moved = (draws.uniform("frame_jitter", frames).double() * (2 * limits + 1)).long() - limits
        moved[:, 0] = 0
        chosen = (chosen + moved).minimum(counts[:, None] - 1)
    return chosen


PLAN = ("num_frames", "frame_stride", "frame_counts", "shrink_video_to_frames")


def clip_plan(video: VideoConfig, spec: LatentSpec) -> dict:
    """Return, for the manifest, the settings that decide which frames of a clip are cached; an
    empty dict where all of them are. ConfigError for settings that need frames to be chosen for
    each batch."""
    if spec.temporal == 1:
        return {}
    video.check_frames(spec)
    values = {name: getattr(video, name) for name in PLAN}
    return values | {"frame_counts": list(video.frame_counts)}


def cached_frames(count: int, video: VideoConfig) -> list[int]:
    """Return the frames of a clip of `count` that a tokenizer which joins frames gets: as many
    samples as fit, one after the other, around the middle of the clip; or one sample that is spread
    over it. ValueError if there are too few."""
    frames = int(usable_frames(torch.tensor([count]), video)[0])
    if not frames:
        least = video.needed(min((video.num_frames, *video.frame_counts)))
        raise Unusable("too short", f"{count} frames, a sample needs {least}")
    if video.shrink_video_to_frames:
        return frame_numbers(torch.tensor([count]), frames, video, Draws.of(0, 0, 1))[0].tolist()
    span = video.needed(frames)
    samples = count // span if frames == video.num_frames else 1
    first = (count - samples * span) // 2
    return [
        first + sample * span + number * video.frame_stride
        for sample in range(samples)
        for number in range(frames)
    ]


def latent_video(video: VideoConfig, spec: LatentSpec) -> VideoConfig:
    """Return `video` counted in latent frames, as items of a cache made with `clip_plan` have them.
    These items are used as they are."""
    if spec.temporal == 1:
        return video
    return replace(
        video,
        num_frames=spec.frames(video.num_frames),
        frame_counts=tuple(map(spec.frames, video.frame_counts)),
        frame_stride=1,
        shrink_video_to_frames=False,
    )
