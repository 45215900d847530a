"""Which frames of a clip make a sample: a window that starts anywhere, or the whole clip is stretched over it; jitter."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdit.data.buckets import VideoConfig
from mmdit.rng import Draws


def usable_frames(counts: Tensor, video: VideoConfig) -> Tensor:
    """Of clips with `counts (N,)` frames: how many each gives to a sample, the most that fit; 0 if not even the fewest do."""
    frames = torch.zeros_like(counts)
    for number in sorted((video.num_frames, *video.frame_counts)):
        frames[counts >= video.needed(number)] = number
    return frames


def jitter_limits(counts: Tensor, frames: int | Tensor, video: VideoConfig) -> Tensor:
    """How far a frame of each clip may move without meeting its neighbour: `min(N, ⌊(gap - 1) / 2⌋)`, `gap` the distance of
    two frames, `temporal_jitter` N."""
    gaps = (counts - 1) // (frames - 1) if video.shrink_video_to_frames else torch.full_like(counts, video.frame_stride)
    return ((gaps - 1) // 2).clamp(0, video.temporal_jitter)


def frame_numbers(counts: Tensor, frames: int, video: VideoConfig, draws: Draws, aligned: int = 1) -> Tensor:
    """`(B, frames)` int64 for clips of `counts (B,)` frames, ascending, none twice. A single frame is drawn from all of them.
    `aligned`: samples start at multiples of it (the windows that a tokenizer has seen). The first frame is never moved by
    jitter, so that it can serve as the given one."""
    if frames == 1 or not video.shrink_video_to_frames:
        room = counts - (video.needed(frames) if frames > 1 else 1) + 1
        start = (draws.uniform("frame_start").double() * ((room + aligned - 1) // aligned)).long() * aligned
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
