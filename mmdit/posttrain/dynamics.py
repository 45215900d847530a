"""One step of sampling as a Gaussian: ODE, Flow-SDE, Dance-SDE, CPS; its log-probability, log-ratio
and KL.

Every kind is linear in the state and the velocity: `y = c_x x + c_v v + s z`. Times are sigma = t
of the linear path, from 1 down to 0; `v = noise - clean`. The means over all but the batch axis
(`mean_d`) keep numbers alike for every latent size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

Kind = Literal["ode", "flow_sde", "dance_sde", "cps"]
Norm = Literal["mean", "sqrt_dim", "sum"]


class Step(NamedTuple):
    """`mean = state * x + velocity * v`, `std`: of the noise added."""

    state: float
    velocity: float
    std: float

    def mean(self, x: Tensor, v: Tensor) -> Tensor:
        return self.state * x + self.velocity * v


def step(kind: Kind, level: float, times: Sequence[float], index: int) -> Step:
    """From `times[index]` to `times[index + 1]`. Flow-SDE (Liu et al. 2505.05470, eq. 9): `g =
    level sqrt(t / (1 - t))`, with the second time in the denominator at t = 1; Dance-SDE (Xue et
    al. 2505.07818): `g = level`; both keep the flow's marginals. CPS (2509.05952) keeps the noise
    level but not the marginals, and leaves no residual noise. ODE: `level` has no meaning.
    """
    t, s = times[index], times[index + 1]
    width = t - s
    if kind == "cps":
        std = s * math.sin(level * math.pi / 2)
        rest = math.sqrt(s * s - std * std)
        return Step(1 - s + rest, rest * (1 - t) - (1 - s) * t, std)
    g = {"ode": 0.0, "dance_sde": level}.get(kind)
    if g is None:
        g = level * math.sqrt(t / (1 - (times[1] if t == 1 else t)))
    drift = g * g / (2 * t)
    return Step(1 - width * drift, -width * (1 + drift * (1 - t)), g * math.sqrt(width))


def mean_d(x: Tensor) -> Tensor:
    """`(B, ...)` to `(B,)`."""
    return x.flatten(1).mean(1)


def log_prob(y: Tensor, mean: Tensor, std: float) -> Tensor:
    """`(B,)`: mean over dimensions of the Gaussian log-density."""
    return (
        mean_d(-(y - mean).square() / (2 * std * std)) - math.log(std) - 0.5 * math.log(2 * math.pi)
    )


def log_ratio(y: Tensor, old: Tensor, new: Tensor, std: float, norm: Norm = "mean") -> Tensor:
    """`(B,)`: log-probability of y under the mean `new` less that under `old`. The factored form:
    the difference of two float32 log-probabilities would have an error as large as the ratios
    themselves. `sqrt_dim` has a spread that does not depend on the number of dimensions, so that
    one clip serves every latent size."""
    shift = (new - old).double()
    return _normed(
        mean_d(shift * (2 * (y.double() - old.double()) - shift)) / (2 * std * std), y, norm
    )


def guard_log_ratio(y: Tensor, old: Tensor, new: Tensor, std: float, norm: Norm = "mean") -> Tensor:
    """GRPO-Guard (2510.22319): `mean_d(z · (new - old))`, which has zero mean under the old policy
    and a variance that does not grow with 1 / std²; the plain log-ratio sinks as the policies part,
    so that its upper clip is hardly reached.
    """
    return _normed(mean_d((new - old).double() * (y.double() - old.double())) / std, y, norm)


def kl(new: Tensor, reference: Tensor, std: float) -> Tensor:
    """`(B,)`: exact KL of two Gaussians of the same deviation, mean over dimensions."""
    return mean_d((new - reference).square()) / (2 * std * std)


def _normed(value: Tensor, like: Tensor, norm: Norm) -> Tensor:
    dimensions = like[0].numel()
    return (
        value * {"mean": 1.0, "sqrt_dim": math.sqrt(dimensions), "sum": dimensions}[norm]
    ).float()
