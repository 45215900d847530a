"""Measure how steady the frames of clips are, as VBench (Huang et al. 2023, 2311.17982) defines it.
A still clip scores 1 in all of it: look at real clips beside, and at whether there is motion at
all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def steadiness(pixels: Tensor) -> Tensor:
    """Return `(N,)`: one minus the mean absolute difference of neighbouring frames of
    `pixels (N, F, 3, H, W)` in [0, 1]; VBench's temporal flickering."""
    return 1 - pixels.double().diff(dim=1).abs().flatten(1).mean(1)


def consistency(features: Tensor) -> Tensor:
    """Return `(N,)`: how much the frames of a clip resemble its first frame and the one before, as
    the mean of both cosines over the frames from the second on, those below 0 counted as 0, of
    `features (N, F, D)`. VBench's subject consistency with features of DINO, its background
    consistency with CLIP's."""
    features = F.normalize(features.double(), dim=-1)
    first = (features[:, 1:] * features[:, :1]).sum(-1).clamp(min=0)
    before = (features[:, 1:] * features[:, :-1]).sum(-1).clamp(min=0)
    return (first + before).mean(1) / 2


class FrameScores:
    """Means over clips of what is measured on their frames."""

    def __init__(self):
        self.values: dict[str, list[Tensor]] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Take in `values (N,)` of clips."""
        self.values.setdefault(name, []).append(values)

    def report(self) -> dict[str, float]:
        """Return the mean of each."""
        return {name: float(torch.cat(parts).mean()) for name, parts in self.values.items()}
