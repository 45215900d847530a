"""The trend of a loss: regression over a window, exponential means, and the loss without the part
that is due to the drawn times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

BINS = 16  # of noise levels
SPANS = (10, 50, 100)  # spans of the exponential means, in steps
WINDOW = 200  # steps of the reported slope
FEWEST = 20  # samples; with less, no trend is reported
LONGEST = 8192  # steps kept
PATIENCE = 100  # visits of a noise level over which its mean loss is taken


@dataclass(frozen=True)
class Trend:
    """A least-squares line through the losses of a window: `slope` per step, `t`: the slope in
    standard errors, `cv`: standard deviation / mean."""

    samples: int
    mean: float
    slope: float
    t: float
    r2: float | None  # None where nothing varies
    cv: float | None

    @property
    def relative(self) -> float | None:
        """Return the change over the window as a share of the mean."""
        return self.slope * self.samples / self.mean if self.mean > 0 else None

    @staticmethod
    def of(values: Sequence[float]) -> Trend | None:
        """Fit a line; return None under `FEWEST` values."""
        n = len(values)
        if n < FEWEST:
            return None
        y = np.asarray(values, dtype=np.float64)
        x = np.arange(n) - (n - 1) / 2
        mean, spread = float(y.mean()), float(x @ x)
        slope = float(x @ (y - mean)) / spread
        total, rest = float(((y - mean) ** 2).sum()), float(((y - mean - slope * x) ** 2).sum())
        error = math.sqrt(rest / (n - 2) / spread)
        t = 0.0
        if slope:
            t = slope / error if error else math.copysign(math.inf, slope)
        cv = math.sqrt(total / (n - 1)) / mean if mean > 0 else None
        return Trend(n, mean, slope, t, 1 - rest / total if total else None, cv)


def ema(mean: float | None, value: float, span: int) -> float:
    """Return an exponential mean over about `span` steps, moved by `value`; None begins it."""
    return value if mean is None else mean + 2 / (span + 1) * (value - mean)


@dataclass
class StepFacts:
    """The results of one step, over all ranks: sums and counts of the finite losses by noise level
    (`BINS`), and the sum of their times."""

    sums: list[float]
    counts: list[float]
    times: float
    norm: float
    bad: bool  # skipped: loss or gradient not finite
    expert: str
    agreeing: float = 0.0  # elements of the gradient with the same sign as last time
    compared: float = 0.0

    @property
    def loss(self) -> float | None:
        return sum(self.sums) / sum(self.counts) if sum(self.counts) else None


@dataclass
class LossHistory:
    """The losses of one expert (of the one network, without experts) and how its gradients agree in
    sign: plain numbers, stored as JSON. `losses`, `levelled` (without the part that t explains) and
    `stabilities` hold the steps since `reset`, at most `LONGEST`; the means go on over resets."""

    steps: int = 0  # since reset
    losses: list[float] = field(default_factory=list)
    levelled: list[float] = field(default_factory=list)
    stabilities: list[float] = field(default_factory=list)
    compared: float = 0.0  # elements in the last comparison of signs
    loss_emas: list[float | None] = field(default_factory=lambda: [None] * len(SPANS))
    grad_emas: list[float | None] = field(default_factory=lambda: [None] * len(SPANS))
    means: list[float | None] = field(default_factory=lambda: [None] * BINS)
    visits: list[int] = field(default_factory=lambda: [0] * BINS)

    def add(self, facts: StepFacts) -> None:
        """Add a step, unless it was skipped."""
        loss = facts.loss
        if facts.bad or loss is None:
            return
        self.steps += 1
        self.losses.append(loss)
        self.levelled.append(self._levelled(facts))
        self.loss_emas = [ema(mean, loss, span) for mean, span in zip(self.loss_emas, SPANS)]
        self.compared = facts.compared
        if facts.compared:
            stability = facts.agreeing / facts.compared
            self.stabilities.append(stability)
            self.grad_emas = [
                ema(mean, stability, span) for mean, span in zip(self.grad_emas, SPANS)
            ]
        for values in (self.losses, self.levelled, self.stabilities):
            del values[:-LONGEST]

    def _levelled(self, facts: StepFacts) -> float:
        """Return the loss of a step without the part that is due to the drawn times: each sample's
        loss is divided by the running mean of its noise level, and the mean of these ratios is
        multiplied by the mean of all levels. On this common scale a trend stays visible."""
        levels = [i for i, count in enumerate(facts.counts) if count]
        losses = {i: facts.sums[i] / facts.counts[i] for i in levels}
        weights = list(self.visits)
        means: dict[int, float] = {}  # of the levels that this step has
        for i in levels:
            weights[i] += 1
            before = self.means[i]
            means[i] = self.means[i] = losses[i] if before is None else before
        total = sum(w * mean for w, mean in zip(weights, self.means) if mean is not None)
        overall = total / sum(weights)
        ratios = {i: losses[i] / means[i] if means[i] else 1.0 for i in levels}
        count = sum(facts.counts[i] for i in levels)
        levelled = sum(facts.counts[i] * ratios[i] for i in levels) / count
        for i in levels:
            self.visits[i] += 1
            self.means[i] = means[i] + (losses[i] - means[i]) / min(self.visits[i], PATIENCE)
        return levelled * overall

    def reset(self) -> None:
        """Begin a new phase, with a trend of its own."""
        self.steps, self.losses, self.levelled, self.stabilities = 0, [], [], []

    @property
    def stability(self) -> float | None:
        """Return the mean agreement of signs over the window."""
        recent = self.stabilities[-WINDOW:]
        return sum(recent) / len(recent) if recent else None

    @property
    def stability_error(self) -> float | None:
        """Return the standard error of one step's agreement by chance: 0.5 / sqrt(elements)."""
        return 0.5 / math.sqrt(self.compared) if self.compared else None

    def values(self) -> dict:
        """Return what metrics.jsonl records, by the documented names; None where a value is not
        known yet."""
        trend = Trend.of(self.losses[-WINDOW:])
        values = {
            "loss_slope": trend and trend.slope,
            "loss_r2": trend and trend.r2,
            "loss_cv": trend and trend.cv,
            "loss_samples": min(len(self.losses), WINDOW),
            "loss_norm": self.levelled[-1] if self.levelled else None,
            "gradient_stability": (
                self.stabilities[-1] if self.stabilities and self.compared else None
            ),
            "gradient_stability_avg": self.stability,
            "gradient_stability_se": self.stability_error,
        }
        for name, means in (("loss_ema", self.loss_emas), ("grad_ema", self.grad_emas)):
            values |= {f"{name}_{span}": mean for span, mean in zip(SPANS, means)}
        return values
