"""Choose which of two experts a training step trains, and draw its times: pure functions of `(seed,
step)` and of the distribution of times that the objective draws from. `interfaces.Boundary` says
which times belong to which expert."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mmdit.config import ConfigError, Section, least
from mmdit.diffusion.objective import Objective
from mmdit.interfaces import Boundary
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
    # The time that divides them; null takes that of Wan's release, and 0.875 for other models.
    boundary: float | None = None
    # `block`: they take turns of `switch_every` steps. `by_sigma`: each step draws a time from the
    # whole distribution and trains the set that it belongs to.
    routing: Literal["block", "by_sigma"] = "block"
    # Optimizer steps in a turn of `block`.
    switch_every: int = 100

    def __post_init__(self):
        if self.boundary is not None and not 0 < self.boundary < 1:
            raise ConfigError(
                "boundary",
                f"is {self.boundary}; must be between 0 (clean) and 1 (noise), for example 0.875",
            )
        least(self, 1, "switch_every")

    def check(self, run: Any) -> None:
        if self.enabled and not run.lora.train_lora_only:
            raise ConfigError(
                "experts.enabled",
                "is true with lora.train_lora_only false: both would train their common base",
            )

    @property
    def trained(self) -> tuple[str, ...]:
        return ("high", "low") if self.train == "both" else (self.train,)

    def schedule(self, objective: Objective, seed: int) -> ExpertSchedule:
        """Return the schedule of these experts. The boundary must be known
        (`expert_choice.resolved`)."""
        assert self.boundary is not None, "a learner is built from a resolved configuration"
        boundary = Boundary(self.boundary, objective.time_scale)
        return ExpertSchedule(
            boundary, objective, self.trained, seed, self.routing, self.switch_every
        )


@dataclass(frozen=True)
class FixedTimes(Draws):
    """Draws that give the times at `quantiles (B,)` of the objective's distribution of times, and
    are ordinary draws for all other purposes."""

    quantiles: Tensor

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        return self.quantiles if purpose == "time" else super().uniform(purpose, *shape)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        if purpose == "time":
            return math.sqrt(2) * torch.erfinv(2 * self.quantiles - 1)
        return super().normal(purpose, *shape)

    def __getitem__(self, index) -> FixedTimes:
        return replace(self, indices=self.indices[index], quantiles=self.quantiles[index])


class ExpertSchedule:
    """Which expert each step trains, and at which times. `trained`: the names of the trained
    experts, in the order in which they take turns. ConfigError if the times of one are never
    drawn."""

    def __init__(
        self,
        boundary: Boundary,
        objective: Objective,
        trained: tuple[str, ...],
        seed: int,
        routing: Literal["block", "by_sigma"] = "block",
        switch_every: int = 1,
    ):
        self.boundary, self.objective, self.trained, self.seed = boundary, objective, trained, seed
        self.routing, self.switch_every = routing, switch_every
        self._quantiles: dict[int, float] = {}
        for name in trained:
            if self.mass(name) <= 0:
                raise ConfigError(
                    "experts.boundary",
                    f"leaves no time to the expert {name!r}: times are drawn in "
                    f"{objective.t_range}; move it inside, or leave the expert out of"
                    " experts.train",
                )

    def quantiles(self, name: str, frames: int) -> tuple[float, float]:
        """Return the range [least, end) of quantiles that belong to an expert, in the distribution
        from which clips of `frames` draw their times."""
        if frames not in self._quantiles:
            self._quantiles[frames] = self._quantile_of_boundary(frames)
        cut = self._quantiles[frames]
        return (cut, 1.0) if name == "high" else (0.0, cut)

    def _quantile_of_boundary(self, frames: int) -> float:
        """Return the least quantile whose time lies at or above the boundary, by halving. This
        works for any monotonic distribution, and applies the very rule of sampling, which includes
        the rounding of times."""
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            draws = FixedTimes(0, 0, torch.zeros(1), torch.tensor([middle], dtype=torch.float64))
            t = (self.objective.draw_time(draws, frames) * self.objective.time_scale).float()
            if self.boundary.is_high(t).item():
                high = middle
            else:
                low = middle
        return high

    def mass(self, name: str, frames: int = 1) -> float:
        """Return the share of drawn times that belong to this expert."""
        low, high = self.quantiles(name, frames)
        return high - low

    def describe(self) -> str:
        """Return a line for the report before training."""
        shares = ", ".join(
            f"{name} has {self.mass(name):.1%} of the times" for name in self.trained
        )
        return f"experts with boundary t = {self.boundary.time:g}, {self.routing}: {shares}"

    def active(self, step: int, frames: int = 1) -> str:
        """Return the expert that optimizer step `step` (from 0) trains. With `block`, experts take
        turns by the step's number; with `by_sigma`, each is drawn as often as its times are.
        Neither needs a state."""
        if self.routing == "block":
            return self.trained[step // self.switch_every % len(self.trained)]
        masses = torch.tensor(
            [self.mass(name, frames) for name in self.trained], dtype=torch.float64
        ).cumsum(0)
        place = (
            torch.rand((), dtype=torch.float64, generator=generator(self.seed, "expert", step))
            * masses[-1]
        )
        return self.trained[int((place >= masses[:-1]).sum())]

    def trained_lately(self, step: int, count: int, last: str) -> set[str]:
        """Return the experts that the `count` steps before `step` trained, of which `last` was the
        last one. By sigma it is `last` alone: any of them may be it, the more often the more steps
        it has."""
        if self.routing != "block":
            return {last}
        return {self.active(earlier) for earlier in range(max(0, step - count), step)}

    def draws(self, draws: Draws, name: str, frames: int) -> FixedTimes:
        """Return the same draws, but with times of this expert alone: from the distribution of all
        times, truncated to its range."""
        low, high = self.quantiles(name, frames)
        within = (
            draws.uniform("time").double() + 2.0**-25
        )  # the middles of 2**24 steps: neither end is reached
        times = low + (high - low) * within
        return FixedTimes(draws.seed, draws.step, draws.indices, times, device=draws.device)
