"""Turn rewards into advantages within groups of samples of one prompt, and check how groups, ranks
and micro-batches divide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mmdit.config import ConfigError

# A smaller standard deviation is taken for rounding; most rewards range from 0 to 1.
FLOOR = 1e-4


def group_moments(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for every sample, the mean and the standard deviation of its group, each `(N,)`
    float64. ValueError for a group of one."""
    _, group, count = torch.unique(groups, return_inverse=True, return_counts=True)

    def mean_of(values: Tensor) -> Tensor:
        sums = torch.zeros(len(count), dtype=torch.float64).index_add_(0, group, values)
        return (sums / count)[group]

    if (count < 2).any():
        raise ValueError(
            "a group has a single sample, so its advantage is always 0; take posttrain.group_size"
            " of 2 or more"
        )
    mean = mean_of(values.double())
    return mean, mean_of((values.double() - mean).square()).sqrt()


def added(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of one or more tensors."""
    return sum(parts[1:], start=parts[0])


def advantages(
    rewards: dict[str, Tensor],
    weights: dict[str, float],
    groups: Tensor,
    mode: Literal["sum", "gdpo"] = "sum",
    std: Literal["global", "group"] = "global",
    clip: float = 5.0,
) -> tuple[Tensor, dict[str, float]]:
    """Return the advantages `(N,)` of the samples of a whole epoch, float64 on the CPU, and numbers
    to report.

    `sum` (Flow-GRPO): the weighted sum of the rewards less its mean over the group, divided by its
    deviation over the epoch or over the group. `gdpo` (2601.05242): every reward is standardised
    within its group and weighted, and their sum is standardised over the epoch, so that no reward
    dominates by its scale. Groups whose rewards are equal, or differ by no more than rounding, get
    0; their share is reported.
    """
    floor = FLOOR * max(1e-9, *(abs(weight) for weight in weights.values()))
    total = added([weights[name] * value.double() for name, value in rewards.items()])
    _, spread = group_moments(total, groups)
    if mode == "gdpo":
        parts = []
        for name, value in rewards.items():
            mean, deviation = group_moments(value, groups)
            scaled = (value.double() - mean) / deviation.clamp(min=FLOOR)
            parts.append(weights[name] * torch.where(deviation > FLOOR, scaled, 0.0))
        total = added(parts)
    centred, flat = total - group_moments(total, groups)[0], spread <= floor
    if mode == "gdpo":
        result = centred / centred.std(correction=0).clamp(min=floor)
    else:
        deviation = total.std(correction=0) if std == "global" else spread
        result = torch.where(flat, 0.0, centred / deviation.clamp(min=floor))
    result = result.clamp(-clip, clip)
    return result, {
        "zero_std_share": flat.double().mean().item(),
        "advantage_clipped": (result.abs() >= clip).double().mean().item(),
    }


def ranks(values: Tensor) -> Tensor:
    """Return mean ranks in [0, 1], the same for equal values: for groupwise rewards that count
    ranks instead of values."""
    below = (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) - 1) / 2
    return below / max(len(values) - 1, 1)


def check_shares(prompts: int, processes: int) -> None:
    """Raise ConfigError unless all processes get equally many prompts."""
    if prompts % processes:
        raise ConfigError(
            "posttrain.prompts_per_epoch",
            f"is {prompts}, must be a multiple of the {processes} processes",
        )


def check_geometry(prompts: int, group: int, processes: int, micro_batch: int, updates: int) -> int:
    """Return the number of micro-batches of one rank in an epoch; whole groups stay on one rank.
    ConfigError names the count that does not divide."""
    check_shares(prompts, processes)
    samples = prompts * group // processes
    if samples % micro_batch:
        raise ConfigError(
            "posttrain.micro_batch",
            f"is {micro_batch}, must divide the {samples} samples of a process "
            f"({prompts} prompts × {group} / {processes} processes)",
        )
    if samples // micro_batch % updates:
        raise ConfigError(
            "posttrain.updates_per_epoch",
            f"is {updates}, must divide the {samples // micro_batch} micro-batches "
            "of a process; take a smaller posttrain.micro_batch",
        )
    return samples // micro_batch
