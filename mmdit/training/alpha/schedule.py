"""Alpha of adapters in named phases: how strongly each step moves them, changed when the loss has
come to rest.

A phase ends after `min_steps` (of its expert) when its exit criteria hold. `tested`, the default,
asks for a plateau that a test can tell: over W = max(200, 4800 CV²) steps, where chance moves the
relative slope by 5 %, the loss changes by less than 10 % and by less than two standard errors, and
gradients agree in sign more than by chance. Each window is judged once: looking at overlapping ones
again and again would accept anything in the end. `image` and `video` are the thresholds documented
for the AI-Toolkit fork that the idea is from, judged at every look; a slope below 0.005 a step is
met by nearly every loss curve, and R² above a threshold by few plateaus, so they are for
comparison.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmdit.adapters import adapters
from mmdit.adapters.strength import outer, set_alpha
from mmdit.config import ConfigError, Section, least
from mmdit.training.alpha.trend import LONGEST, WINDOW, Course, Trend
from mmdit.training.optim import Optimizer

LOOK = 10  # steps between two looks at the criteria
CHANCE = 4800  # times CV²: steps in which chance moves the relative slope by CV sqrt(12 / W) = 5 %


@dataclass(frozen=True)
class ExitConfig:
    """Criteria that end a phase, all of which must hold; null asks nothing."""

    # The slope of the loss, times the window, over its mean, is below this in size.
    relative_slope: float | None = None
    # The slope of the loss in its standard errors is below this in size.
    t: float | None = None
    # Gradients agree in sign at least by chance and so many standard errors.
    stability_errors: float | None = None
    # The slope of the loss a step is below this in size.
    slope: float | None = None
    # R² of a straight line through the losses is above this.
    r2: float | None = None
    # The share of the gradient's elements that keep their sign is at least this.
    stability: float | None = None
    # The coefficient of variation of the loss is below this.
    cv: float | None = None
    # Steps of the window; null chooses it by the noise of the losses: max(200, 4800 CV²).
    samples: int | None = None

    def __post_init__(self):
        least(self, 0, "relative_slope", "t", "stability_errors", "slope", "r2", "stability", "cv")
        if self.samples is not None and not 20 <= self.samples <= WINDOW:
            raise ConfigError(
                "samples",
                f"is {self.samples}; must be 20 … {WINDOW}, or null for one by the losses' noise",
            )

    def window(self, losses: list[float]) -> int | None:
        """Steps that a judgement needs; None where that cannot be told yet."""
        if self.samples is not None:
            return self.samples
        recent = Trend.of(losses[-WINDOW:]) if len(losses) >= WINDOW else None
        return (
            min(LONGEST, max(WINDOW, math.ceil(CHANCE * recent.cv**2)))
            if recent and recent.cv is not None
            else None
        )

    def met(self, course: Course) -> bool:
        """Whether the last window of `course` meets all; False where a number that is asked for is
        missing."""
        tested = self.samples is None
        window = self.window(course.levelled)
        losses = course.levelled if tested else course.losses
        if window is None or len(losses) < window:
            return False
        trend = Trend.of(losses[-(window if tested else WINDOW) :])
        relative = None if trend.relative is None else abs(trend.relative)
        chance = None if course.stability_error is None else (course.stability or 0) - 0.5
        below = (
            (relative, self.relative_slope),
            (abs(trend.t), self.t),
            (abs(trend.slope), self.slope),
            (trend.cv, self.cv),
        )
        above = ((trend.r2, self.r2),)
        least = (
            (course.stability, self.stability),
            (None if chance is None else chance / course.stability_error, self.stability_errors),
        )
        return (
            all(limit is None or value is not None and value < limit for value, limit in below)
            and all(limit is None or value is not None and value > limit for value, limit in above)
            and all(limit is None or value is not None and value >= limit for value, limit in least)
        )


PRESETS = {
    "tested": ExitConfig(relative_slope=0.10, t=2.0, stability_errors=3.0),
    "image": ExitConfig(slope=0.001, r2=0.1, stability=0.55, cv=0.5, samples=20),
    "video": ExitConfig(slope=0.005, r2=0.01, stability=0.50, cv=0.5, samples=20),
    "steps": ExitConfig(samples=20),
}


@dataclass(frozen=True)
class PhaseConfig:
    """An entry of `alpha_schedule.phases`."""

    # What reports call the phase.
    name: str
    # Alpha in this phase.
    alpha: float
    # Steps before the phase may end (of its expert, where there are two).
    min_steps: int = 0
    # Alpha of the high-noise expert, where it differs.
    high: float | None = None
    # Alpha of the low-noise expert, where it differs.
    low: float | None = None
    # What ends the phase after `min_steps`: a preset (`tested`: a plateau that a test can tell;
    # `image`, `video`: the thresholds of an AI-Toolkit fork; `steps`: nothing more) or criteria one
    # by one.
    exit: Literal["tested", "image", "video", "steps"] | ExitConfig = "tested"

    def __post_init__(self):
        for name in ("alpha", "high", "low"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    name,
                    f"is {getattr(self, name)}; must be positive; the update is scaled by"
                    " alpha/rank",
                )
        if self.min_steps < 0:
            raise ConfigError("min_steps", f"is {self.min_steps}, must not be negative")

    def alpha_of(self, expert: str) -> float:
        own = getattr(self, expert) if expert in ("high", "low") else None
        return self.alpha if own is None else own

    @property
    def criteria(self) -> ExitConfig:
        return self.exit if isinstance(self.exit, ExitConfig) else PRESETS[self.exit]


@dataclass(frozen=True)
class AlphaScheduleConfig(Section):
    """The section `alpha_schedule:`, for runs with adapters; its alpha is in force in place of
    `lora.alpha`."""

    # Whether alpha follows the phases.
    enabled: bool = False
    # `preserve` rescales one factor, its moments and its average: the model stays the same
    # function, and alpha changes only how fast it moves. `ramp` goes linearly over `ramp_steps`;
    # `jump` changes at once.
    on_change: Literal["preserve", "ramp", "jump"] = "preserve"
    # Steps of a ramp.
    ramp_steps: int = 100
    # The phases, one after the other.
    phases: tuple[PhaseConfig, ...] = ()

    def __post_init__(self):
        if self.enabled and not self.phases:
            raise ConfigError(
                "phases",
                "is empty but alpha_schedule.enabled is true: give one, {name: start, alpha: 8}",
            )
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise ConfigError("phases", f"are named {names}; each needs a name of its own")
        if self.ramp_steps < 1:
            raise ConfigError("ramp_steps", f"is {self.ramp_steps}, must be at least 1")

    def check(self, run: Any) -> None:
        if self.enabled and self.on_change == "ramp" and run.train.compile is not False:
            raise ConfigError(
                "alpha_schedule.on_change",
                "is ramp: blocks would be compiled anew; set train.compile: false",
            )

    def describe(self) -> str:
        """What to tell before training."""
        shown = ", ".join(
            f"{phase.name} (alpha {phase.alpha:g}, {phase.min_steps} steps or more)"
            for phase in self.phases
        )
        return f"alpha schedule of {len(self.phases)} phases, {self.on_change} on change: {shown}"


@torch.no_grad()
def keep_strength(
    layer: nn.Module,
    alpha: float,
    state: Mapping[nn.Parameter, dict[str, Tensor]],
    shadow: dict[nn.Parameter, Tensor],
) -> None:
    """Change the alpha of an adapter that goes on computing what it did; what `state` (the
    optimizer's) and `shadow` (averages) hold in units of the rescaled factor follows: gradients,
    and so moments, by the inverse."""
    ratio, factor = set_alpha(layer, alpha, preserve=True), outer(layer)
    if factor in shadow:
        shadow[factor].mul_(ratio)
    for name, moment in state.get(factor, {}).items():
        power = {"exp_avg": -1, "momentum_buffer": -1, "exp_avg_sq": -2, "rest": 1}.get(name, 0)
        if power:  # moments of 8 bits have a scale by block
            (moment.scale if hasattr(moment, "codes") else moment).mul_(ratio**power)


@dataclass
class Progress:
    """Of one expert. `start`: alpha when the phase began; `judged`: steps of the phase at the last
    refused judgement."""

    phase: int = 0
    start: float | None = None
    judged: int = 0


class AlphaSchedule:
    """Moves the alpha of the adapters in `models` (by expert; "" where there are none) along the
    phases. `optimizer` and `shadow` (averages by parameter) are kept in step with what is
    rescaled."""

    def __init__(
        self,
        config: AlphaScheduleConfig,
        models: dict[str, nn.Module],
        optimizer: Optimizer,
        shadow: dict[nn.Parameter, Tensor],
    ):
        self.config, self.optimizer, self.shadow = config, optimizer, shadow
        self.layers = {name: list(adapters(model).values()) for name, model in models.items()}
        self.progress = {name: Progress() for name in models}
        self.history: list[dict] = []
        for name in models:
            self._set(
                name, config.phases[0].alpha_of(name), preserve=True
            )  # new adapters are zero, others stay as they are

    def alpha(self, expert: str) -> float:
        """In force."""
        return self.layers[expert][0].alpha

    def phase(self, expert: str) -> PhaseConfig:
        return self.config.phases[self.progress[expert].phase]

    def due(self, step: int) -> bool:
        """Whether `look` must be called after this step: on a ramp after each."""
        return step % LOOK == 0 or any(p.start is not None for p in self.progress.values())

    def look(self, step: int, courses: dict[str, Course]) -> list[str]:
        """Moves what is to move; returns what to tell."""
        told = []
        for expert, progress in self.progress.items():
            course = courses[expert]
            if self._leaves(expert, course):
                old, left, steps = self.alpha(expert), self.phase(expert), course.steps
                progress.phase += 1
                progress.judged, progress.start = (
                    0,
                    old if self.config.on_change == "ramp" else None,
                )
                course.reset()
                new = self.phase(expert)
                self.history.append(
                    {
                        "step": step,
                        "expert": expert or None,
                        "from": left.name,
                        "to": new.name,
                        "steps": steps,
                        "alpha_from": old,
                        "alpha_to": new.alpha_of(expert),
                    }
                )
                told.append(
                    f"step {step}: {expert + ' ' if expert else ''}alpha {old:g} →"
                    f" {new.alpha_of(expert):g} ({self.config.on_change}), phase {left.name!r} of"
                    f" {steps} steps → {new.name!r}"
                )
            self._follow(expert, course.steps)
        return told

    def _leaves(self, expert: str, course: Course) -> bool:
        progress, phase = self.progress[expert], self.phase(expert)
        if (
            progress.phase + 1 == len(self.config.phases)
            or course.steps < phase.min_steps
            or progress.start is not None
        ):
            return False
        if phase.exit == "steps":
            return True
        criteria = phase.criteria
        if criteria.samples is None:  # a window is judged once
            window = criteria.window(course.levelled)
            if window is None or course.steps - progress.judged < window:
                return False
            progress.judged = course.steps
        return criteria.met(course)

    def _follow(self, expert: str, steps: int) -> None:
        """Alpha as it should be `steps` into the phase."""
        progress, target = self.progress[expert], self.phase(expert).alpha_of(expert)
        if progress.start is not None:
            share = min(1.0, steps / self.config.ramp_steps)
            target, start = progress.start + share * (target - progress.start), progress.start
            progress.start = None if share == 1 else start
        self._set(expert, target, self.config.on_change == "preserve")

    @torch.no_grad()
    def _set(self, expert: str, alpha: float, preserve: bool) -> None:
        """With `preserve` the adapters go on computing what they did."""
        state = self.optimizer.state if preserve else {}
        for layer in self.layers[expert]:
            if layer.alpha == alpha:
                continue
            if preserve:
                keep_strength(layer, alpha, state, self.shadow)
            else:
                set_alpha(layer, alpha)

    # state
    def state(self) -> dict:
        return {
            "experts": {name: vars(progress) for name, progress in self.progress.items()},
            "history": self.history,
        }

    def restore(self, state: dict) -> None:
        """What `state` gave (the alphas in force come with the weights); a changed alpha of the
        config is then reached as `on_change` says. ValueError if it is of other experts or
        phases."""
        if state["experts"].keys() != self.progress.keys():
            raise ValueError(
                f"the stored alpha schedule is of the experts {list(state['experts'])}, the config"
                f" has {list(self.progress)}"
            )
        for name, stored in state["experts"].items():
            self.progress[name] = Progress(**stored)
            if not 0 <= stored["phase"] < len(self.config.phases):
                raise ValueError(
                    f"the stored alpha schedule is in phase {stored['phase']},"
                    f" alpha_schedule.phases has {len(self.config.phases)}: keep the phases that"
                    " were run"
                )
        self.history = state["history"]
