"""Measure how steady the frames of clips are, as VBench (Huang et al. 2023, 2311.17982) defines it.
A still clip scores 1 in everything, so compare with real clips, and check whether there is motion
at all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def steadiness(pixels: Tensor) -> Tensor:
    """Return `(N,)`: one minus the mean absolute difference of neighbouring frames of `pixels (N,
    F, 3, H, W)` in [0, 1]. This is VBench's temporal flickering."""
    return 1 - pixels.double().diff(dim=1).abs().flatten(1).mean(1)


def consistency(features: Tensor) -> Tensor:
    """Return `(N,)` from `features (N, F, D)`: how much the frames of a clip resemble its first
    frame and the frame before them. It is the mean of both cosines over all frames but the first,
    with negative ones counted as 0. With features of DINO this is VBench's subject consistency,
    with CLIP's its background consistency."""
    features = F.normalize(features.double(), dim=-1)
    first = (features[:, 1:] * features[:, :1]).sum(-1).clamp(min=0)
    before = (features[:, 1:] * features[:, :-1]).sum(-1).clamp(min=0)
    return (first + before).mean(1) / 2


class FrameScores:
    """Collects measurements of the frames of clips, and averages them over clips."""

    def __init__(self):
        self.values: dict[str, list[Tensor]] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Add the values `(N,)` that a measurement gave for clips."""
        self.values.setdefault(name, []).append(values)

    def report(self) -> dict[str, float]:
        """Return the mean of each measurement."""
        return {name: float(torch.cat(parts).mean()) for name, parts in self.values.items()}
