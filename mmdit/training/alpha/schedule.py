"""Alpha of adapters in named phases: it sets how much each step changes the adapters' output, and
moves to the next phase when the loss has reached a plateau.

A phase ends after `min_steps` (of its expert) when its exit criteria hold. `tested`, the default,
asks for a plateau that a statistical test can tell: over W = max(200, 4800 CV²) steps, where chance
moves the relative slope by 5 %, the loss changes by less than 10 % and by less than two standard
errors, and gradients agree in sign more than by chance. Each window is tested once: testing
overlapping ones again and again would accept anything in the end. `image` and `video` are the
thresholds documented for the AI-Toolkit fork that the idea is from, tested at every look. They are
for comparison: nearly every loss curve has a slope below 0.005 a step, and few plateaus have an R²
above a threshold.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmdit.adapters import Adapter, adapters
from mmdit.adapters.strength import set_alpha
from mmdit.config import ConfigError, Section, least
from mmdit.training.alpha.trend import LONGEST, WINDOW, LossHistory, Trend
from mmdit.training.optim import Optimizer

LOOK = 10  # steps between two looks at the criteria
CHANCE = 4800  # times CV²: steps after which chance moves the slope by CV sqrt(12 / W) = 5 %


@dataclass(frozen=True)
class ExitConfig:
    """Criteria that end a phase when all of them hold; null leaves one out."""

    # The absolute slope of the loss, times the window, over its mean, is below this.
    relative_slope: float | None = None
    # The absolute slope of the loss, in standard errors of the slope, is below this.
    t: float | None = None
    # Gradients agree in sign by this many standard errors more often than by chance.
    stability_errors: float | None = None
    # The absolute slope of the loss per step is below this.
    slope: float | None = None
    # R² of a straight line through the losses is above this.
    r2: float | None = None
    # The share of the gradient's elements that keep their sign is at least this.
    stability: float | None = None
    # The coefficient of variation of the loss is below this.
    cv: float | None = None
    # Steps of the window; null derives it from the noise of the losses: max(200, 4800 CV²).
    samples: int | None = None

    def __post_init__(self):
        least(self, 0, "relative_slope", "t", "stability_errors", "slope", "r2", "stability", "cv")
        if self.samples is not None and not 20 <= self.samples <= WINDOW:
            raise ConfigError(
                "samples",
                f"is {self.samples}; must be 20 … {WINDOW}, or null for one by the losses' noise",
            )

    def window(self, losses: list[float]) -> int | None:
        """Return how many steps the criteria need; None while that is not known."""
        if self.samples is not None:
            return self.samples
        recent = Trend.of(losses[-WINDOW:]) if len(losses) >= WINDOW else None
        if recent is None or recent.cv is None:
            return None
        return min(LONGEST, max(WINDOW, math.ceil(CHANCE * recent.cv**2)))

    def met(self, history: LossHistory) -> bool:
        """Return whether the last window of `history` meets all criteria; False where a number that
        one of them needs is missing."""
        window = self.window(history.levelled)
        if window is None:
            return False
        losses, looks_back = history.losses, WINDOW
        if self.samples is None:
            losses, looks_back = history.levelled, window
        trend = Trend.of(losses[-looks_back:])
        if trend is None or len(losses) < window:
            return False
        relative = None if trend.relative is None else abs(trend.relative)
        errors = None
        if history.stability_error is not None:
            stability = history.stability or 0.0
            errors = (stability - 0.5) / history.stability_error
        limits = [
            (self.relative_slope, relative, operator.lt),
            (self.t, abs(trend.t), operator.lt),
            (self.slope, abs(trend.slope), operator.lt),
            (self.cv, trend.cv, operator.lt),
            (self.r2, trend.r2, operator.gt),
            (self.stability, history.stability, operator.ge),
            (self.stability_errors, errors, operator.ge),
        ]
        return all(
            value is not None and holds(value, limit)
            for limit, value, holds in limits
            if limit is not None
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
    # `image`, `video`: the thresholds of an AI-Toolkit fork; `steps`: no further criterion), or
    # criteria one by one.
    exit: Literal["tested", "image", "video", "steps"] | ExitConfig = "tested"

    def __post_init__(self):
        for name in ("alpha", "high", "low"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    name,
                    f"is {getattr(self, name)}; must be positive; the update is scaled by"
                    " alpha/rank",
                )
        least(self, 0, "min_steps")

    def alpha_of(self, expert: str) -> float:
        alpha = getattr(self, expert) if expert in ("high", "low") else None
        return self.alpha if alpha is None else alpha

    @property
    def criteria(self) -> ExitConfig:
        return self.exit if isinstance(self.exit, ExitConfig) else PRESETS[self.exit]


@dataclass(frozen=True)
class AlphaScheduleConfig(Section):
    """The section `alpha_schedule:`, for runs with adapters. Its alphas replace `lora.alpha`."""

    # Whether alpha follows the phases.
    enabled: bool = False
    # `preserve` rescales one factor of each adapter, with its moments and its average: the model's
    # output stays the same, and alpha changes only how fast it learns. `ramp` changes alpha
    # linearly over `ramp_steps`; `jump` changes it at once.
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
        least(self, 1, "ramp_steps")

    def check(self, run: Any) -> None:
        if self.enabled and self.on_change == "ramp" and run.train.compile is not False:
            raise ConfigError(
                "alpha_schedule.on_change",
                "is ramp: blocks would be compiled anew; set train.compile: false",
            )
        if not self.enabled or run.experts.enabled:
            return
        for number, phase in enumerate(self.phases):
            for name in ("high", "low"):
                if (value := getattr(phase, name)) is not None:
                    raise ConfigError(
                        f"alpha_schedule.phases[{number}].{name}",
                        f"is {value:g}, but experts.enabled is false: one set of adapters has the"
                        f" phase's alpha, {phase.alpha:g}; set that, and leave it out",
                    )

    def describe(self) -> str:
        """Return a line to print before training."""
        shown = ", ".join(
            f"{phase.name} (alpha {phase.alpha:g}, {phase.min_steps} steps or more)"
            for phase in self.phases
        )
        return f"alpha schedule of {len(self.phases)} phases, {self.on_change} on change: {shown}"


@torch.no_grad()
def keep_strength(
    layer: Adapter, alpha: float, optimizer: Optimizer, averages: dict[nn.Parameter, Tensor]
) -> None:
    """Change the alpha of an adapter without changing what it computes: one of its factors is
    rescaled, together with its average and its state in the optimizer."""
    ratio, factor = set_alpha(layer, alpha, preserve=True), layer.outer
    if factor in averages:
        averages[factor].mul_(ratio)
    optimizer.rescale(factor, ratio)


@dataclass
class Progress:
    """The position of one expert in the schedule. `start`: alpha when the current ramp began, None
    without one; `began`: the step of the phase at which it began; `judged_at`: the step of the
    phase at which the criteria were last tested, without ending it."""

    phase: int = 0
    start: float | None = None
    judged_at: int = 0
    began: int = 0


class AlphaSchedule:
    """Moves the alpha of the adapters in `models` (by expert; "" where there are none) through the
    phases. `optimizer` and `averages` (by parameter) follow when a factor is rescaled."""

    def __init__(
        self,
        config: AlphaScheduleConfig,
        models: Mapping[str, nn.Module],
        optimizer: Optimizer,
        averages: dict[nn.Parameter, Tensor],
    ):
        self.config, self.optimizer, self.averages = config, optimizer, averages
        self.layers = {name: list(adapters(model).values()) for name, model in models.items()}
        self.progress = {name: Progress() for name in models}
        self.history: list[dict] = []
        for name in models:
            # New adapters are zero; others keep computing what they did.
            self._set(name, config.phases[0].alpha_of(name), preserve=True)

    def begin(self, histories: dict[str, LossHistory]) -> None:
        """Begin the first phase in a run that is continued and had no schedule before. Its steps so
        far belong to no phase, and its alpha moves to that of the phase as `on_change` says."""
        for expert in self.progress:
            histories[expert].reset()
            self._follow(expert, 0)

    def alpha(self, expert: str) -> float:
        """Return the alpha in force."""
        return self.layers[expert][0].alpha

    def phase(self, expert: str) -> PhaseConfig:
        return self.config.phases[self.progress[expert].phase]

    def due(self, step: int) -> bool:
        """Return whether `look` must be called after this step; during a ramp, after each."""
        return step % LOOK == 0 or any(p.start is not None for p in self.progress.values())

    def look(self, step: int, histories: dict[str, LossHistory]) -> list[str]:
        """Begin the phases whose time has come, and move alphas; return a line for each new
        phase."""
        lines = []
        for expert, progress in self.progress.items():
            history = histories[expert]
            if self._leaves(expert, history):
                old, left, steps = self.alpha(expert), self.phase(expert), history.steps
                progress.phase += 1
                progress.judged_at = 0
                history.reset()
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
                subject = f"{expert} alpha" if expert else "alpha"
                lines.append(
                    f"step {step}: {subject} {old:g} → {new.alpha_of(expert):g}"
                    f" ({self.config.on_change}), phase {left.name!r} of {steps} steps →"
                    f" {new.name!r}"
                )
            self._follow(expert, history.steps)
        return lines

    def _leaves(self, expert: str, history: LossHistory) -> bool:
        """Return whether the phase of an expert ends now."""
        progress, phase = self.progress[expert], self.phase(expert)
        is_last = progress.phase + 1 == len(self.config.phases)
        is_on_ramp = progress.start is not None
        if is_last or is_on_ramp or history.steps < phase.min_steps:
            return False
        if phase.exit == "steps":
            return True
        criteria = phase.criteria
        if criteria.samples is None:  # a window is judged once
            window = criteria.window(history.levelled)
            if window is None or history.steps - progress.judged_at < window:
                return False
            progress.judged_at = history.steps
        return criteria.met(history)

    def _follow(self, expert: str, steps: int) -> None:
        """Set the alpha of an expert for `steps` into its phase. If alpha differs from that of the
        phase, in a new phase or because a resume changed the config, begin a ramp where `on_change`
        says so."""
        progress, alpha = self.progress[expert], self.phase(expert).alpha_of(expert)
        ramps = self.config.on_change == "ramp"
        if ramps and progress.start is None and alpha != self.alpha(expert):
            progress.start, progress.began = self.alpha(expert), steps
        if progress.start is not None:
            share = (steps - progress.began) / self.config.ramp_steps
            if share < 1:
                alpha = progress.start + share * (alpha - progress.start)
            else:
                progress.start = None
        self._set(expert, alpha, self.config.on_change == "preserve")

    @torch.no_grad()
    def _set(self, expert: str, alpha: float, preserve: bool) -> None:
        """Set the alpha of an expert's adapters; with `preserve`, what they compute stays the
        same."""
        for layer in self.layers[expert]:
            if layer.alpha == alpha:
                continue
            if preserve:
                keep_strength(layer, alpha, self.optimizer, self.averages)
            else:
                set_alpha(layer, alpha)

    def state(self) -> dict:
        """Return the state for a checkpoint, as JSON."""
        experts = {
            name: {
                "phase": p.phase,
                "name": self.phase(name).name,
                "start": p.start,
                "began": p.began,
                "judged": p.judged_at,
            }
            for name, p in self.progress.items()
        }
        return {"experts": experts, "history": self.history}

    def restore(self, state: dict) -> None:
        """Take over what `state` returned (the alphas in force come with the weights). If the
        config has another alpha now, it is then reached as `on_change` says. A phase is recognised
        by its name, wherever in the list it stands now. ValueError if the state has other experts
        or phases."""
        if state["experts"].keys() != self.progress.keys():
            raise ValueError(
                f"the stored alpha schedule is of the experts {list(state['experts'])}, the config"
                f" has {list(self.progress)}"
            )
        names = [phase.name for phase in self.config.phases]
        for expert, stored in state["experts"].items():
            # earlier versions stored the number of the phase alone
            phase = names.index(stored["name"]) if stored.get("name") in names else stored["phase"]
            if stored.get("name") not in (None, *names) or not 0 <= phase < len(names):
                raise ValueError(
                    f"the stored alpha schedule is in phase {stored.get('name', phase)!r},"
                    f" alpha_schedule.phases has {', '.join(names)}: keep the phases that were run"
                )
            self.progress[expert] = Progress(
                phase, stored.get("start"), stored.get("judged", 0), stored.get("began", 0)
            )
        self.history = state["history"]
