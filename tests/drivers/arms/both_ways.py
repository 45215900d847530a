"""Clips both ways: half of the clips of a batch come a second time with their frames in reversed
order and the opposite direction in their captions, so that a batch holds pairs that differ in the
sign of a motion alone."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmdit.data.batches.batch_plan import BatchPlan, PlannedBatch
from mmdit.data.batches.latent_batches import LatentBatches
from mmdit.data.dataset.buckets import VideoConfig
from mmdit.interfaces import Batch

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
DIRECTION = re.compile(rf"\b({'|'.join(OPPOSITE)})(?=\b|wards\b)")
plan_batch, make_batch = BatchPlan.batch, LatentBatches._batch


@dataclass(frozen=True)
class ArmsVideoConfig(VideoConfig):
    both_ways: bool = False


def with_reversed(plan: BatchPlan, *words) -> PlannedBatch:
    """Return what `BatchPlan.batch` does, the first half of the clips reversed in place of the
    second."""
    batch = plan_batch(plan, *words)
    if not getattr(plan.video, "both_ways", False) or batch.frames.shape[1] == 1:
        return batch
    kept = math.ceil(len(batch.items) / 2)
    seen = torch.arange(len(batch.items)) % kept
    frames = batch.frames[seen]
    frames[kept:] = frames[kept:].flip(1)
    return replace(batch, items=batch.items[seen], frames=frames)


def worded(batches: LatentBatches, grid, items: Tensor, frames: Tensor, draws) -> Batch:
    """Return what `LatentBatches._batch` does, of reversed clips with the opposite direction."""
    batch = make_batch(batches, grid, items, frames, draws)
    turned = (frames[:, 0] > frames[:, -1]).tolist()
    captions = [opposite(text) if back else text for text, back in zip(batch.captions, turned)]
    return replace(batch, captions=captions)


def opposite(caption: str) -> str:
    """Return the caption of the reversed clip."""
    return DIRECTION.sub(lambda match: OPPOSITE[match[1]], caption)
