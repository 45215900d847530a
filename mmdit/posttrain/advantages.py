"""From rewards to advantages within groups of one prompt, and the arithmetic of groups, ranks and
micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mmdit.config import ConfigError

# of a standard deviation: less among rewards, most of which reach from 0 to 1, is rounding
FLOOR = 1e-4


def group_moments(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the group of every sample, `(N,)` float64. ValueError
    for a group of one."""
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
    """Return the sum of one or several tensors."""
    return sum(parts[1:], start=parts[0])


def advantages(
    rewards: dict[str, Tensor],
    weights: dict[str, float],
    groups: Tensor,
    mode: Literal["sum", "gdpo"] = "sum",
    std: Literal["global", "group"] = "global",
    clip: float = 5.0,
) -> tuple[Tensor, dict[str, float]]:
    """Return `(N,)` float64 on the CPU for the samples of a whole epoch, and numbers to report.

    `sum` (Flow-GRPO): the weighted rewards less their group's mean, over the deviation of the epoch
    or of the group. `gdpo` (2601.05242): every reward standardised within its group, weighted, and
    the sum standardised over the epoch, so that no reward wins by its scale. Groups whose rewards
    are equal, or differ by less than rounding may make them, get 0; their share is reported.
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
    """Return mean ranks in [0, 1], ties alike, for a groupwise reward of places instead of
    values."""
    below = (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) - 1) / 2
    return below / max(len(values) - 1, 1)


def check_shares(prompts: int, processes: int) -> None:
    """Raise ConfigError where the processes would not have equally many prompts."""
    if prompts % processes:
        raise ConfigError(
            "posttrain.prompts_per_epoch",
            f"is {prompts}, must be a multiple of the {processes} processes",
        )


def check_geometry(prompts: int, group: int, processes: int, micro_batch: int, updates: int) -> int:
    """Return how many micro-batches a rank has in an epoch; whole groups stay on one rank.
    ConfigError says what does not divide."""
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
