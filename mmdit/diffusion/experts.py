"""Experts: networks that each serve a part of the noise. Which one a time belongs to, which one a
training step trains, and the times that it draws are pure functions: of the time, of `(seed,
step)`, and of the law that the objective draws from.

A boundary is a time t; on the linear path that is sigma. Times at the boundary belong to the
noisier expert, as in Wan 2.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from mmdit.config import ConfigError, Section
from mmdit.diffusion.objective import Objective
from mmdit.rng import Draws, generator

HALVINGS = 64  # of the interval in which a boundary's quantile lies


@dataclass(frozen=True)
class ExpertsConfig(Section):
    """The section `experts:`. Two sets of adapters on one base: `high` serves the times t >=
    boundary, `low` the rest. A step trains one of them, at times of its own range."""

    # Whether there are two sets.
    enabled: bool = False
    # Which of them are trained; the other expert gets no adapter.
    train: Literal["both", "high", "low"] = "both"
    # The time at which they change over; null is that of Wan's release, and 0.875 for other models.
    boundary: float | None = None
    # `block`: they take turns of `switch_every` steps. `by_sigma`: each step trains the one that a
    # time drawn from the whole law belongs to.
    routing: Literal["block", "by_sigma"] = "block"
    # Optimizer steps of a turn.
    switch_every: int = 100

    def __post_init__(self):
        if self.boundary is not None and not 0 < self.boundary < 1:
            raise ConfigError(
                "boundary",
                f"is {self.boundary}; must be between 0 (clean) and 1 (noise), for example 0.875",
            )
        if self.switch_every < 1:
            raise ConfigError(
                "switch_every", f"is {self.switch_every}; must be at least 1 optimizer step"
            )

    def check(self, run: Any) -> None:
        if self.enabled and not run.lora.train_lora_only:
            raise ConfigError(
                "experts.enabled",
                "is true with lora.train_lora_only false: both would train their common base",
            )

    @property
    def trained(self) -> tuple[str, ...]:
        return ("high", "low") if self.train == "both" else (self.train,)

    def plan(self, objective: Objective, seed: int) -> ExpertPlan:
        assert self.boundary is not None, "a learner is built from a resolved configuration"
        stages = Stages(("high", "low"), (self.boundary,), objective.time_scale)
        return ExpertPlan(stages, objective, self.trained, seed, self.routing, self.switch_every)


@dataclass(frozen=True)
class FixedTimes(Draws):
    """Draws of which `time` is at given `quantiles (B,)` of the distribution that the objective
    draws from."""

    quantiles: Tensor

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        return self.quantiles if purpose == "time" else super().uniform(purpose, *shape)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        if purpose == "time":
            return math.sqrt(2) * torch.erfinv(2 * self.quantiles - 1)
        return super().normal(purpose, *shape)

    def __getitem__(self, index) -> FixedTimes:
        return FixedTimes(self.seed, self.step, self.indices[index], self.quantiles[index])


def in_turn(step: int, trained: tuple[str, ...], switch_every: int) -> str:
    """The expert that optimizer step `step` (from 0) trains, in blocks: a pure function, so that a
    resume needs no state."""
    return trained[step // switch_every % len(trained)]


@dataclass(frozen=True)
class Stages:
    """`names` of the experts from noise to clean, and the decreasing `boundaries` between them."""

    names: tuple[str, ...]
    boundaries: tuple[float, ...]
    time_scale: float = 1.0

    def __post_init__(self):
        falling = all(a > b for a, b in zip((1.0, *self.boundaries), (*self.boundaries, 0.0)))
        if not falling or len(self.names) != len(self.boundaries) + 1:
            raise ValueError(
                f"{len(self.names)} experts, boundaries {self.boundaries}; must be one fewer,"
                " falling from 1 to 0"
            )

    @cached_property
    def thresholds(self) -> Tensor:
        """As the network is told its times: float32."""
        return torch.tensor(
            [boundary * self.time_scale for boundary in self.boundaries], dtype=torch.float64
        ).float()

    def route(self, t: Tensor) -> Tensor:
        """`t (B,)` as the network is told it → the number of each sample's expert `(B,)`; a time at
        a boundary is noisier."""
        return (t[:, None] < self.thresholds.to(t.device)).sum(1)


class ExpertPlan:
    """Who trains when, and at which times. `trained`: names, in their order of turn; ConfigError if
    one is never drawn."""

    def __init__(
        self,
        stages: Stages,
        objective: Objective,
        trained: tuple[str, ...],
        seed: int,
        routing: Literal["block", "by_sigma"] = "block",
        switch_every: int = 1,
    ):
        self.stages, self.objective, self.trained, self.seed = stages, objective, trained, seed
        self.routing, self.switch_every = routing, switch_every
        self._ranges: dict[int, dict[str, tuple[float, float]]] = {}
        empty = [name for name in trained if self.mass(name) <= 0]
        if empty:
            raise ConfigError(
                "experts.boundary",
                f"leaves no time to the expert {empty[0]!r}: times are drawn in "
                f"{objective.t_range}; move it inside, or leave the expert out of experts.train",
            )

    def ranges(self, frames: int) -> dict[str, tuple[float, float]]:
        """By expert the quantiles [low, high) of the law that clips of `frames` draw their times
        from."""
        if frames not in self._ranges:
            cuts = [
                1.0,
                *(self._quantile(number, frames) for number in range(len(self.stages.boundaries))),
                0.0,
            ]
            self._ranges[frames] = {
                name: (low, high) for name, high, low in zip(self.stages.names, cuts, cuts[1:])
            }
        return self._ranges[frames]

    def _quantile(self, number: int, frames: int) -> float:
        """The least quantile that lies at or above a boundary, by halving: any monotonous law will
        do, and the router itself, rounding of times included, decides."""
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            draws = FixedTimes(0, 0, torch.zeros(1), torch.tensor([middle], dtype=torch.float64))
            t = (self.objective.draw_time(draws, frames) * self.stages.time_scale).float()
            low, high = (low, middle) if self.stages.route(t) <= number else (middle, high)
        return high

    def mass(self, name: str, frames: int = 1) -> float:
        """The share of drawn times that are of this expert."""
        low, high = self.ranges(frames)[name]
        return high - low

    def describe(self) -> str:
        """What to tell before training."""
        shares = ", ".join(
            f"{name} has {self.mass(name):.1%} of the times" for name in self.trained
        )
        return (
            f"experts with boundary {', '.join(f't = {t:g}' for t in self.stages.boundaries)},"
            f" {self.routing}: {shares}"
        )

    def active(self, step: int, frames: int = 1) -> str:
        """The expert that optimizer step `step` (from 0) trains."""
        if self.routing == "block":
            return in_turn(step, self.trained, self.switch_every)
        masses = torch.tensor(
            [self.mass(name, frames) for name in self.trained], dtype=torch.float64
        ).cumsum(0)
        place = (
            torch.rand((), dtype=torch.float64, generator=generator(self.seed, "expert", step))
            * masses[-1]
        )
        return self.trained[int((place >= masses[:-1]).sum())]

    def draws(self, draws: Draws, name: str, frames: int) -> FixedTimes:
        """The same draws, but times of this expert alone: the law of all times, truncated to its
        range."""
        low, high = self.ranges(frames)[name]
        within = (
            draws.uniform("time").double() + 2.0**-25
        )  # the middles of 2**24 steps: neither end is reached
        return FixedTimes(draws.seed, draws.step, draws.indices, low + (high - low) * within)
