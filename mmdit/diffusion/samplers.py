"""Sampling: go from noise to latents with a denoiser, in `steps` steps along any path, at the times
t_start = times[0] > … > times[steps] = 0.

The network is called once a step, at the step's noisy end, never at t = 0: `n` steps are `n` calls
(2n - 1 for heun). Each solver is a function `step(index, x, t, s) -> (x_s, clean estimate at t)`
from time t to the earlier time s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmdit.config import ConfigError
from mmdit.diffusion.objective import Denoise, Objective
from mmdit.diffusion.path import Path, shift_time
from mmdit.rng import Draws

Solver = Literal["ddim", "euler", "heun", "ab2", "dpmpp_2m", "unipc"]
Grid = Literal["even", "wan", "diffusers"]
Step = Callable[[int, Tensor, float, float], tuple[Tensor, Tensor]]
# (steps done, t reached, x, clean estimate) -> x to go on from, or None for x as it is
Callback = Callable[[int, float, Tensor, Tensor], Tensor | None]


MOST_STEPS = 100_000


@dataclass(frozen=True)
class SamplerConfig:
    """First order: ddim, euler. Second order: heun, and ab2, dpmpp_2m and unipc, which reuse the
    last step's call; ab2 is the most accurate per call on mixtures of Gaussians with even steps
    (tests/test_diffusion_samplers.py). `grid`: the times before the shift, either even ones or
    those of Wan's official code or of Diffusers; with the latter two, networks are told whole
    timesteps, as there.

    `eta` (ddim only): 0 is deterministic, 1 the ancestral sampler of DDPM. `shift` above 1 puts
    more steps at the noisy end; the objective's `clip_shift` multiplies it."""

    solver: Solver = "ab2"
    steps: int = 50
    eta: float = 0.0
    shift: float = 1.0
    grid: Grid = "even"

    def __post_init__(self):
        if not 1 <= self.steps <= MOST_STEPS:
            raise ConfigError(
                "steps", f"is {self.steps}; must be from 1 to {MOST_STEPS}; 20 … 50 are usual"
            )
        if not 0 <= self.eta <= 1:
            raise ConfigError(
                "eta", f"is {self.eta}; must be between 0 and 1; use 0 for a deterministic sampler"
            )
        if self.eta and self.solver != "ddim":
            raise ConfigError(
                "eta",
                f"is {self.eta} with solver {self.solver!r}, which is deterministic; set solver to"
                " ddim or eta to 0",
            )
        if not 0 < self.shift < math.inf:
            raise ConfigError(
                "shift", f"is {self.shift}; must be above 0 and finite; use 1 for even steps"
            )


def sampling_times(
    objective: Objective,
    steps: int,
    shift: float = 1.0,
    start: float | None = None,
    grid: Grid = "even",
) -> list[float]:
    """Return `steps + 1` decreasing times from `start` (default: the objective's `t_start`) to 0.
    On a discrete path they are times that training can draw."""
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if grid != "even":
        # Wan begins at 0.999 in float32; Diffusers ends at 0.001, from where the last step leads to
        # 0. The operations are those of numpy.linspace: the last digit decides about whole times.
        high, low = (torch.tensor(0.999).item(), 0.0) if grid == "wan" else (1.0, 1 / 1000)
        even = high + torch.arange(steps + 1, dtype=torch.float64) * ((low - high) / steps)
        even[-1] = 0
    first = objective.t_start if start is None else min(start, objective.t_start)
    times = (first * shift_time(even, shift)).tolist()
    if grid != "even":
        times = [_cut_in_float32(t, objective.time_scale) for t in times]
    times = [objective.path.snap(t) for t in times]
    if grid == "diffusers" and times[0] == 1:
        times[0] -= 1e-6  # as Diffusers does, where log(alpha / sigma) would be infinite
    if any(t <= s for t, s in zip(times, times[1:])):
        levels = len({t for t in times if t > 0})
        raise ConfigError(
            "steps",
            f"is {steps} at shift {shift}, which reaches only {levels} different noise levels; take"
            " fewer steps",
        )
    return times


def _cut_in_float32(t: float, scale: float) -> float:
    """Return `t`, or the time just before it if `t * scale` is so close below a whole number that
    float32, in which networks get times, rounds it up: Wan and Diffusers cut it off in float64."""
    exact = torch.tensor(t * scale, dtype=torch.float64)
    rounded = exact.float()
    if rounded.floor() <= exact.floor():
        return t
    return torch.nextafter(rounded, torch.zeros_like(rounded)).item() / scale


@torch.no_grad()
def sample(
    denoise: Denoise,
    noise: Tensor,
    objective: Objective,
    config: SamplerConfig = SamplerConfig(),
    draws: Draws | None = None,
    callback: Callback | None = None,
    guess: tuple[Tensor, float] | None = None,
) -> Tensor:
    """Return latents at t = 0, shaped like `noise (B, ...)` (standard normal), at least float32.
    `guess`: clean latents to start from and the time to which they are noised first (SDEdit, Meng
    et al. 2108.01073); the later that time, the less of them is left.

    `denoise` comes from `objective.denoiser` or `guided`. `draws` keys the noise that `eta > 0`
    adds, by sample and step. `callback(steps done, t reached, x, clean estimate)` is called after
    each step, for progress and previews; if it returns latents, they replace `x`.
    """
    if config.eta and draws is None:
        raise ValueError(
            f"eta is {config.eta}, which adds noise, but there are no draws to key it; pass draws"
            " or set eta to 0"
        )
    if guess is not None and not 0 < guess[1] <= 1:
        raise ValueError(
            f"the guess is to be noised to t = {guess[1]}; must be above 0 (kept as it is) and at"
            " most 1 (pure noise)"
        )
    path = objective.path
    shift = config.shift * objective.clip_shift(noise.shape[1])
    times = sampling_times(objective, config.steps, shift, guess[1] if guess else None, config.grid)
    step = _solver(config, denoise, path, times, draws)
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    if guess is not None:
        x = path.add_noise(guess[0].to(x), x, times[0])
    elif config.grid != "wan":  # the official code starts from noise as it is
        # Scale to the deviation of x_t for data of unit variance: 1 at t = 1, and at all times on
        # paths that preserve variance.
        x = x * math.hypot(*_floats(path, times[0]))
    for index, (t, s) in enumerate(zip(times, times[1:])):
        x, clean = step(index, x, t, s)
        if callback is not None:
            changed = callback(index + 1, s, x, clean)
            x = x if changed is None else changed
    return x


def _solver(
    config: SamplerConfig, denoise: Denoise, path: Path, times: list[float], draws: Draws | None
) -> Step:
    if config.solver == "ddim":
        return _ddim(denoise, path, config.eta, draws)
    if config.solver == "unipc":
        return _unipc(denoise, path, times)
    solvers = {"euler": _euler, "heun": _heun, "ab2": _ab2, "dpmpp_2m": _dpmpp_2m}
    return solvers[config.solver](denoise, path)


def _floats(path: Path, t: float) -> tuple[float, float]:
    alpha, sigma = path.alpha_sigma(t)
    return float(alpha), float(sigma)


def _ddim(denoise: Denoise, path: Path, eta: float, draws: Draws | None) -> Step:
    """Make DDIM's step: Song et al. 2010.02502, eq. 12 and 16, with sigma² in place of 1 - alpha²:
    right on every path.

    `fresh` is eta times the standard deviation of x_s given x_t and x0; any value up to sigma_s
    gives x_s its right marginal.
    """

    def step(index: int, x: Tensor, t: float, s: float) -> tuple[Tensor, Tensor]:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = _floats(path, t), _floats(path, s)
        clean = denoise(x, t)
        ratio = alpha_t * sigma_s / (alpha_s * sigma_t)
        fresh = eta * sigma_s * math.sqrt(max(0.0, 1 - ratio**2))
        noise = path.to_noise("x0", clean, x, t)
        x = alpha_s * clean + math.sqrt(sigma_s**2 - fresh**2) * noise
        if fresh:
            assert draws is not None, "sample() asks for them where eta is above 0"
            x = x + fresh * draws.normal(f"sampler {index}", *x.shape[1:]).to(x)
        return x, clean

    return step


def _velocity(path: Path, clean: Tensor, x: Tensor, t: float) -> Tensor:
    return path.mix("velocity", clean, path.to_noise("x0", clean, x, t), t)


def _euler(denoise: Denoise, path: Path) -> Step:
    """Make Euler's step, of first order along dx / d clock. On the linear path this is ddim with
    eta 0."""

    def step(index: int, x: Tensor, t: float, s: float) -> tuple[Tensor, Tensor]:
        clean = denoise(x, t)
        return x + (path.clock(s) - path.clock(t)) * _velocity(path, clean, x, t), clean

    return step


def _heun(denoise: Denoise, path: Path) -> Step:
    """Make Heun's step, of second order: the mean of the velocities at both ends. The last step is
    Euler's, since no noise is left to estimate at t = 0."""

    def step(index: int, x: Tensor, t: float, s: float) -> tuple[Tensor, Tensor]:
        clean = denoise(x, t)
        velocity = _velocity(path, clean, x, t)
        width = path.clock(s) - path.clock(t)
        ahead = x + width * velocity
        if s > 0:
            ahead = x + width * 0.5 * (velocity + _velocity(path, denoise(ahead, s), ahead, s))
        return ahead, clean

    return step


def _ab2(denoise: Denoise, path: Path) -> Step:
    """Make a step of Adams and Bashforth: the velocities of this step and of the last one are
    extrapolated to the middle of the step ahead."""
    last_velocity: Tensor | None = None
    last_width = torch.tensor(0.0)

    def step(index: int, x: Tensor, t: float, s: float) -> tuple[Tensor, Tensor]:
        nonlocal last_velocity, last_width
        clean = denoise(x, t)
        velocity = _velocity(path, clean, x, t)
        width = path.clock(s) - path.clock(t)
        middle = velocity
        if last_velocity is not None:
            middle = velocity + width / (2 * last_width) * (velocity - last_velocity)
        last_velocity, last_width = velocity, width
        return x + width * middle, clean

    return step


def _dpmpp_2m(denoise: Denoise, path: Path) -> Step:
    """Make a step of DPM-Solver++(2M), Lu et al. 2211.01095, algorithm 2: exact in x but for the
    clean estimate, which is extrapolated in lambda = log(alpha / sigma) from the last two. First
    order where a lambda is infinite: leaving alpha = 0, reaching t = 0."""
    last_clean: Tensor | None = None
    last_width = math.inf

    def step(index: int, x: Tensor, t: float, s: float) -> tuple[Tensor, Tensor]:
        nonlocal last_clean, last_width
        (alpha_t, sigma_t), (alpha_s, sigma_s) = _floats(path, t), _floats(path, s)
        clean = extrapolated = denoise(x, t)
        shrink = alpha_t * sigma_s / (alpha_s * sigma_t)  # exp(-width)
        width = -math.log(shrink) if shrink > 0 else math.inf
        if last_clean is not None and width < math.inf:
            extrapolated = clean + width / (2 * last_width) * (clean - last_clean)
        last_clean, last_width = clean, width
        return sigma_s / sigma_t * x + alpha_s * (1 - shrink) * extrapolated, clean

    return step


def _unipc(denoise: Denoise, path: Path, times: list[float]) -> Step:
    """Make a step of UniPC of order 2 in clean estimates with B(h) = e^h - 1 ("bh2"), Zhao et al.
    2302.04867, algorithms 1 and 2: each step predicts from the last two estimates; the next
    estimate first corrects what was predicted. The last step is of first order."""
    past: list[tuple[Tensor, float]] = []  # clean estimates and their times, newest last
    before: Tensor | None = None  # x of the last step, corrected
    order = 1

    def clock(t: float) -> float:  # log(alpha / sigma)
        alpha, sigma = _floats(path, t)
        if sigma == 0:
            return math.inf
        return math.log(alpha / sigma) if alpha > 0 else -math.inf

    def linear(x: Tensor, clean: Tensor, t: float, s: float) -> tuple[Tensor, float, float]:
        """Return x after a step of first order from t to s, the width of the step in `clock`, and
        the factor by which a change of the clean estimate changes that x."""
        (_, sigma_t), (alpha_s, sigma_s) = _floats(path, t), _floats(path, s)
        width = clock(s) - clock(t)
        weight = alpha_s * math.expm1(-width)
        return sigma_s / sigma_t * x - weight * clean, width, -weight

    def second_order(ratio: float, width: float) -> tuple[float, float]:
        """Return the weights of the older and of the newest estimate in the correction."""
        h = -width
        first = math.expm1(h) / h - 1
        right = [first / math.expm1(h), (first / h - 0.5) * 2 / math.expm1(h)]
        return torch.linalg.solve(
            torch.tensor([[1, 1], [ratio, 1]], dtype=torch.float64),
            torch.tensor(right, dtype=torch.float64),
        ).tolist()

    def step(index: int, x: Tensor, t: float, s: float) -> tuple[Tensor, Tensor]:
        nonlocal before, order
        clean = denoise(x, t)
        if before is not None and math.isfinite(clock(past[-1][1])):
            last, then = past[-1]  # correct the x for which the estimate was made
            x, width, worth = linear(before, last, then, t)
            if order == 1:
                x = x + worth * 0.5 * (clean - last)
            else:
                ratio = (clock(past[-2][1]) - clock(then)) / width
                a, c = second_order(ratio, width)
                x = x + worth * (a / ratio * (past[-2][0] - last) + c * (clean - last))
        before = x
        past.append((clean, t))
        del past[:-2]
        ahead, width, worth = linear(x, clean, t, s)
        is_last = index + 2 == len(times)
        order = 1
        if len(past) == 2 and not is_last and math.isfinite(clock(past[0][1])):
            order = 2
            older, then = past[0]
            ahead = ahead + worth * 0.5 * width / (clock(then) - clock(t)) * (older - clean)
        return ahead, clean

    return step
