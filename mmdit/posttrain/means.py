"""Average what micro-batches report, over an epoch and all processes."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from mmdit.training.distributed import World

# behind the name of a number: the mean of its squares; the number is the largest of a micro-batch
SQUARE, LARGEST = "_square", "_largest"


class Means:
    """Collects scalars by name, each with its weight; they stay on their device until a mean is
    asked for."""

    def __init__(self) -> None:
        self.values: dict[str, list[Tensor]] = defaultdict(list)
        self.weights: dict[str, list[float]] = defaultdict(list)

    def add(self, numbers: dict[str, Tensor], weight: float) -> None:
        """Add some numbers, each with the given weight."""
        for name, value in numbers.items():
            self.values[name].append(value.detach().float())
            self.weights[name].append(weight)

    def over(self, world: World) -> dict[str, float]:
        """Return, on every process, the weighted mean of each number that any process has added, or
        the largest of those whose name ends in LARGEST, without that ending."""
        sums: dict[str, tuple[float, float]] = {}
        for name, values in self.values.items():
            if name.endswith(LARGEST):
                sums[name] = torch.stack(values).max().item(), 1.0
                continue
            weights = torch.tensor(self.weights[name], dtype=torch.float64)
            weighted = torch.stack(values).cpu().double() * weights
            sums[name] = weighted.sum().item(), weights.sum().item()
        means = {}
        parts = world.gather(sums)
        for name in dict.fromkeys(name for part in parts for name in part):
            there = [part[name] for part in parts if name in part]
            if name.endswith(LARGEST):
                means[name.removesuffix(LARGEST)] = max(value for value, _ in there)
                continue
            means[name] = sum(total for total, _ in there) / sum(weight for _, weight in there)
        for name in [name for name in means if name.endswith(SQUARE)]:
            plain = name.removesuffix(SQUARE)
            variance = means.pop(name) - means.pop(plain) ** 2
            means[f"{plain}_std"] = math.sqrt(max(0.0, variance))
        return means


def moments(name: str, values: Tensor) -> dict[str, Tensor]:
    """Return what `Means` needs to report the standard deviation of `values` as `<name>_std`,
    whatever micro-batches they come in."""
    values = values.detach()
    return {name: values.mean(), f"{name}{SQUARE}": values.square().mean()}
