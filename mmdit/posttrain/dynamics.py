"""One step of sampling as a Gaussian, by ODE, Flow-SDE, Dance-SDE or CPS; its log-probability,
log-ratio and KL.

The step is linear in the state and the velocity: `y = c_x x + c_v v + s z`. Times are sigma = t of
the linear path, from 1 down to 0; `v = noise - clean`. Means over all axes but the batch (`mean_d`)
keep numbers comparable for every latent size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

Dynamics = Literal["ode", "flow_sde", "dance_sde", "cps"]
Norm = Literal["mean", "sqrt_dim", "sum"]


class Step(NamedTuple):
    """The Gaussian of a step: `mean = state * x + velocity * v`, and `std`, the deviation of the
    added noise."""

    state: float
    velocity: float
    std: float

    def mean(self, x: Tensor, v: Tensor) -> Tensor:
        return self.state * x + self.velocity * v


def step(dynamics: Dynamics, level: float, times: Sequence[float], index: int) -> Step:
    """Return the step from `times[index]` to `times[index + 1]`.

    Flow-SDE (Liu et al. 2505.05470, eq. 9): `g = level sqrt(t / (1 - t))`; in the first step, if
    its start is nearer to 1 than to its end, the denominator takes the end instead. Dance-SDE (Xue
    et al. 2505.07818): `g = level`. Both keep the flow's marginals. CPS (2509.05952) keeps the
    noise level but not the marginals, and leaves no residual noise. The ODE ignores `level`.
    """
    t, s = times[index], times[index + 1]
    width = t - s
    if dynamics == "cps":
        std = s * math.sin(level * math.pi / 2)
        rest = math.sqrt(s * s - std * std)
        return Step(1 - s + rest, rest * (1 - t) - (1 - s) * t, std)
    g = level
    if dynamics == "ode":
        g = 0.0
    elif dynamics == "flow_sde":
        clear = 1 - t
        if index == 0 and clear < width:  # the noise would be larger than any state
            clear = 1 - s
        g = level * math.sqrt(t / clear)
    drift = g * g / (2 * t)
    return Step(1 - width * drift, -width * (1 + drift * (1 - t)), g * math.sqrt(width))


def mean_d(x: Tensor) -> Tensor:
    """Return the mean over all but the batch axis: `(B, ...)` to `(B,)`."""
    return x.flatten(1).mean(1)


def log_ratio(y: Tensor, old: Tensor, new: Tensor, std: float, norm: Norm = "mean") -> Tensor:
    """Return `(B,)`: the log-probability of `y` under the mean `new` less that under `old`. It is
    computed in factored form: the difference of two float32 log-probabilities would have an error
    as large as the ratio itself. With the norm `sqrt_dim` its spread does not depend on the number
    of dimensions, so that one clip range suits every latent size."""
    shift = (new - old).double()
    return _normed(
        mean_d(shift * (2 * (y.double() - old.double()) - shift)) / (2 * std * std), y, norm
    )


def guard_log_ratio(y: Tensor, old: Tensor, new: Tensor, std: float, norm: Norm = "mean") -> Tensor:
    """Return the ratio of GRPO-Guard (2510.22319): `mean_d(z · (new - old))`, which has zero mean
    under the old policy and a variance that does not grow with 1 / std². The plain log-ratio falls
    as the policies diverge, so that it hardly ever reaches its upper clip."""
    return _normed(mean_d((new - old).double() * (y.double() - old.double())) / std, y, norm)


def _normed(value: Tensor, like: Tensor, norm: Norm) -> Tensor:
    dimensions = like[0].numel()
    return (
        value * {"mean": 1.0, "sqrt_dim": math.sqrt(dimensions), "sum": dimensions}[norm]
    ).float()
