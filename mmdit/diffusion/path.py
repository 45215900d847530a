"""Noise paths `x_t = alpha(t) * clean + sigma(t) * noise`, t = 0 clean and t = 1 noise, and all
conversions of predictions.

A network may predict any fixed mixture of the two unknowns, `prediction = a * clean + b * noise`:

    x0        a = 1        b = 0        the clean latents
    eps       a = 0        b = 1        the noise (Ho et al. 2020)
    v         a = -sigma   b = alpha    the rotated target (Salimans & Ho 2022, appendix D)
    velocity  a = alpha'   b = sigma'   dx / d clock, which a flow follows (Lipman et al. 2023)

Together with x_t these are two equations in two unknowns, so one 2x2 solve converts them all. Its
determinant `b * alpha - a * sigma` vanishes for eps where alpha = 0 (clean is undefined) and for x0
where sigma = 0 (noise is undefined).

Axes: `x`, `clean`, `noise`, `prediction` are `(B, ...)`; a time is a float or a tensor `()` or
`(B,)`. Coefficients are computed in float64 and rounded once, to the precision of the latents.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

Time = float | Tensor
Prediction = Literal["x0", "eps", "v", "velocity"]
Coefficients = tuple[Tensor, Tensor]


class Path(ABC):
    """A way from data to noise. A subclass defines `_alpha_sigma(t)` and `_velocity(t)` for times
    in float64."""

    @abstractmethod
    def _alpha_sigma(self, t: Tensor) -> Coefficients: ...

    @abstractmethod
    def _velocity(self, t: Tensor) -> Coefficients:
        """Return (d alpha, d sigma) / d clock."""

    def clock(self, t: Time) -> Tensor:
        """Return the coordinate in which an ODE solver steps: t itself, unless a path has a
        smoother one."""
        return _double(t)

    def snap(self, t: float) -> float:
        """Return the nearest time that training can draw (on a continuous path: any time)."""
        return t

    def alpha_sigma(self, t: Time) -> Coefficients:
        """Return alpha and sigma in float64, shaped like `t`."""
        return self._alpha_sigma(_double(t))

    def mixture(self, prediction: Prediction, t: Time) -> Coefficients:
        """Return `(a, b)` of the table above in float64, shaped like `t`."""
        t = _double(t)
        if prediction == "x0":
            return torch.ones_like(t), torch.zeros_like(t)
        if prediction == "eps":
            return torch.zeros_like(t), torch.ones_like(t)
        if prediction == "v":
            alpha, sigma = self._alpha_sigma(t)
            return -sigma, alpha
        assert prediction == "velocity", prediction
        return self._velocity(t)

    def determinant(self, prediction: Prediction, t: Time) -> Tensor:
        """Return the determinant of the two equations (x_t, prediction) in (clean, noise)."""
        return self._equations(prediction, t)[-1]

    def _equations(
        self, prediction: Prediction, t: Time
    ) -> tuple[Coefficients, Coefficients, Tensor]:
        """Return `(alpha, sigma)` and `(a, b)` of the two equations, and their determinant."""
        alpha, sigma = self.alpha_sigma(t)
        a, b = self.mixture(prediction, t)
        return (alpha, sigma), (a, b), b * alpha - a * sigma

    def gain(self, source: Prediction, target: Prediction, t: Time) -> Tensor:
        """Return the factor by which an error of a `source` prediction grows in the `target` that
        it implies, at a fixed x_t."""
        return self.determinant(target, t) / self.determinant(source, t)

    def add_noise(self, clean: Tensor, noise: Tensor, t: Time) -> Tensor:
        """Return x_t."""
        return _weighted(self.alpha_sigma(t), clean, noise)

    def mix(self, prediction: Prediction, clean: Tensor, noise: Tensor, t: Time) -> Tensor:
        """Return what a perfect network with this kind of prediction would give."""
        return _weighted(self.mixture(prediction, t), clean, noise)

    def to_clean(self, prediction: Prediction, value: Tensor, x: Tensor, t: Time) -> Tensor:
        """Return the clean latents that a prediction of `value` implies at x_t. From eps they are
        infinite where alpha = 0."""
        if prediction == "x0":
            return value
        (_, sigma), (_, b), determinant = self._equations(prediction, t)
        return _weighted((b / determinant, -sigma / determinant), x, value)

    def to_noise(self, prediction: Prediction, value: Tensor, x: Tensor, t: Time) -> Tensor:
        """Return the noise that a prediction of `value` implies at x_t. From x0 it is infinite
        where sigma = 0."""
        if prediction == "eps":
            return value
        (alpha, _), (a, _), determinant = self._equations(prediction, t)
        return _weighted((-a / determinant, alpha / determinant), x, value)


class LinearPath(Path):
    """alpha = 1 - t, sigma = t: straight lines (rectified flow, Liu et al. 2022)."""

    def _alpha_sigma(self, t: Tensor) -> Coefficients:
        return 1 - t, t

    def _velocity(self, t: Tensor) -> Coefficients:
        return -torch.ones_like(t), torch.ones_like(t)


class CosinePath(Path):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): preserves variance, at constant angular speed
    (2209.15571)."""

    def _alpha_sigma(self, t: Tensor) -> Coefficients:
        return _on_circle(math.pi / 2 * t)

    def _velocity(self, t: Tensor) -> Coefficients:
        alpha, sigma = self._alpha_sigma(t)
        return -math.pi / 2 * sigma, math.pi / 2 * alpha


class DiscretePath(Path):
    """A DDPM schedule of T noise levels; level k of the papers (0 … T - 1) is t = (k + 1) / T, and
    t = 0 is clean.

    A variance preserving path is an angle, alpha = cos(angle) and sigma = sin(angle). Between
    levels the angle is interpolated, which keeps alpha² + sigma² = 1 and needs no care at either
    end. The angle is also the clock: near t = 0 it grows like sqrt(t), so that an Euler step in t
    would fall short of the data, and `dx / d angle` is exactly v.
    """

    def __init__(self, alphas_cumprod: Tensor):
        """`alphas_cumprod (T,)` float64, decreasing: alpha² at each level (0 at the last: zero
        terminal SNR)."""
        self.alphas_cumprod = alphas_cumprod
        self.num_timesteps = len(alphas_cumprod)
        angles = torch.atan2((1 - alphas_cumprod).sqrt(), alphas_cumprod.sqrt())
        angles = torch.cat([torch.zeros(1, dtype=torch.float64), angles])
        self._angles = {torch.device("cpu"): angles}  # copied to each device once

    def clock(self, t: Time) -> Tensor:
        t = _double(t)
        if t.device not in self._angles:
            self._angles[t.device] = self._angles[torch.device("cpu")].to(t.device)
        angles, position = self._angles[t.device], t * self.num_timesteps
        below = position.long().clamp(0, self.num_timesteps - 1)
        return torch.lerp(angles[below], angles[below + 1], position - below)

    def snap(self, t: float) -> float:
        return round(t * self.num_timesteps) / self.num_timesteps

    def latest(self, ratio: float) -> float:
        """Return the last level whose alpha / sigma is at least `ratio` (else the first level)."""
        levels = int((self.alphas_cumprod >= ratio**2 * (1 - self.alphas_cumprod)).sum())
        return max(levels, 1) / self.num_timesteps

    def _alpha_sigma(self, t: Tensor) -> Coefficients:
        return _on_circle(self.clock(t))

    def _velocity(self, t: Tensor) -> Coefficients:
        alpha, sigma = self._alpha_sigma(t)
        return -sigma, alpha


def ddpm_path(
    schedule: Literal["cosine", "linear"], num_timesteps: int, zero_terminal_snr: bool = False
) -> DiscretePath:
    """Return a path of DDPM. `cosine`: Nichol & Dhariwal 2021, eq. 17. `linear`: Ho et al. 2020,
    betas 1e-4 … 0.02 at 1000 levels, scaled to other counts. `zero_terminal_snr` stretches alpha so
    that the last level is pure noise (Lin et al. 2305.08891, algorithm 1)."""
    if schedule == "cosine":
        at = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        remaining = torch.cos((at + 0.008) / 1.008 * math.pi / 2).square()
        betas = 1 - remaining[1:] / remaining[:-1]
    else:
        betas = torch.linspace(1e-4, 0.02, num_timesteps, dtype=torch.float64) * (
            1000 / num_timesteps
        )
    alphas_cumprod = (1 - betas.clamp(max=0.999)).cumprod(0)
    if zero_terminal_snr:
        alpha = alphas_cumprod.sqrt()
        alphas_cumprod = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])).square()
    return DiscretePath(alphas_cumprod)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Map [0, 1] onto itself with more time at the noisy end for shift > 1, as large latents need
    (Esser et al. 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def _double(t: Time) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64)


def _on_circle(angle: Tensor) -> Coefficients:
    # cos(pi / 2) is 6e-17 in floating point; sin(0) is exactly 0.
    return torch.sin(math.pi / 2 - angle), torch.sin(angle)


def _weighted(coefficients: Coefficients, first: Tensor, second: Tensor) -> Tensor:
    a, b = coefficients
    if a.dim():
        shape = (-1, *[1] * (first.dim() - 1))
        a, b = a.reshape(shape).to(first), b.reshape(shape).to(first)
    return a * first + b * second
