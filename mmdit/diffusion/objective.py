"""Training objectives: draw a time and noise, call the network, measure the error; and turn the
network into a denoiser for samplers.

An objective is a path, what the network predicts, how times are drawn and how errors are weighted.
The network is called as `model(x (B, ...), t (B,) * time_scale, text, **network_inputs)` and knows
none of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.config import ConfigError, Section
from mmdit.diffusion.path import (
    CosinePath,
    LinearPath,
    Path,
    Prediction,
    Time,
    ddpm_path,
    shift_time,
)
from mmdit.interfaces import TextTokens
from mmdit.rng import Draws

# `Call`: (x_t, times scaled for the network, text, further inputs) -> prediction; an
# interfaces.Denoiser, or anything that is called like one. `Denoise`: (x_t, t) -> estimate of the
# clean latents, both (B, ...).
Call = Callable[..., Tensor]
Denoise = Callable[[Tensor, Time], Tensor]

# The network's time embedding sees the same range whatever num_timesteps is.
DDPM_TIME_SCALE = 1000.0
# alpha / sigma where sampling starts, for networks that know nothing reliable about x0 beyond.
FAINTEST_SIGNAL = 0.03
# The velocity loss of an x0 network grows like 1 / t²; this is the clip of 2511.13720.
SMALLEST_TIME_OF_X0_WEIGHT = 0.05


@dataclass(frozen=True)
class LossParts:
    """`per_sample (B,)` float32 losses, differentiable, and the times `t (B,)` float32 at which
    they were measured."""

    per_sample: Tensor
    t: Tensor


class Objective(ABC):
    """A path, a prediction and a law of times. `prediction`: what the network predicts; `t_range`:
    the least and the greatest time in training; `t_start`: the time at which sampling begins;
    `time_scale`: the factor by which times are multiplied for the network."""

    def __init__(
        self,
        path: Path,
        prediction: Prediction,
        t_range: tuple[float, float],
        t_start: float,
        time_scale: float,
    ):
        self.path, self.prediction = path, prediction
        self.t_range, self.t_start, self.time_scale = t_range, t_start, time_scale

    @abstractmethod
    def draw_time(self, draws: Draws, frames: int = 1) -> Tensor:
        """Return times `(B,)` float64 in `t_range`, for clips of `frames`."""

    def clip_shift(self, frames: int) -> float:
        """Return the shift (`path.shift_time`) that the times of clips of `frames` get beyond that
        of pictures, in training and in sampling; 1 is none."""
        return 1.0

    @abstractmethod
    def error_scale(self, t: Tensor) -> Tensor:
        """Return the factors `(B,)` by which errors of the prediction are multiplied before they
        are squared."""

    def measure(self, error: Tensor, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Turn the scaled error `(B, ...)` into losses `(B,)`."""
        return error.square().flatten(1).mean(1)

    def loss(
        self,
        model: Call,
        clean: Tensor,
        text: TextTokens,
        draws: Draws,
        given: int = 0,
        **network_inputs,
    ) -> LossParts:
        """Return the losses of one batch. `clean (B, ..., C)`: normalised latents, on the device
        where `draws` makes its numbers with a shape. Everything but the network computes in
        float32, under autocast too. The first `given` frames (axis 1) stay clean, the network gets
        their number, and the loss leaves them out."""
        clean = clean.float()
        noise = draws.normal("noise", *clean.shape[1:])
        t = self.draw_time(draws, clean.shape[1]).to(clean.device, non_blocking=True)
        x = self.path.add_noise(clean, noise, t)
        if given:
            x = torch.cat([clean[:, :given], x[:, given:]], 1)
            network_inputs = network_inputs | {"given": given}
        prediction = model(x, self._network_time(t, x), text, **network_inputs).float()
        target = self.path.mix(self.prediction, clean, noise, t)
        assert prediction.shape == target.shape, (
            f"network gave {tuple(prediction.shape)} for latents {tuple(target.shape)}"
        )
        scale = self.error_scale(t).reshape(-1, *[1] * (clean.dim() - 1)).float()
        error = scale * (prediction - target)
        losses = self.measure(error[:, given:], clean[:, given:], noise[:, given:], t)
        return LossParts(losses, t.float())

    def denoiser(self, model: Call, text: TextTokens, **network_inputs) -> Denoise:
        """Return `denoise(x (B, ...), t float | () | (B,)) -> clean estimate (B, ...)`, at least
        float32.

        Outside `t_range` the network gets the nearest time that it was trained at; the arithmetic
        uses the true one.
        """

        def denoise(x: Tensor, t: Time) -> Tensor:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            prediction = model(x, self._network_time(t, x), text, **network_inputs).to(x.dtype)
            return self.path.to_clean(self.prediction, prediction, x, t)

        return denoise

    def network_time(self, t: Time) -> Tensor:
        """Return the time `t` as networks get it, `()` or `(B,)`: scaled, in float32."""
        exact = torch.as_tensor(t, dtype=torch.float64).clamp(*self.t_range)
        return (exact * self.time_scale).float()

    def _network_time(self, t: Time, x: Tensor) -> Tensor:
        t = self.network_time(t)
        if t.dim() == 0 and t.device.type == "cpu":
            # Filled by a kernel: a copy from the CPU would wait for the work queued on the device.
            return torch.full((len(x),), t.item(), dtype=torch.float32, device=x.device)
        return t.to(x.device).expand(len(x))


@dataclass(frozen=True)
class DiffusionConfig(Section):
    """The section `diffusion:`, for `train.objective: ddpm`."""

    # Number of noise levels.
    num_timesteps: int = 1000
    # How noise grows with the level.
    schedule: Literal["cosine", "linear"] = "cosine"
    # What the network predicts: the noise, the rotated target v, or the clean latents.
    prediction_type: Literal["eps", "v", "x0"] = "v"
    # Weight the squared error of x0 at each level by min(signal-to-noise ratio, gamma); Hang et al.
    # (2303.09556) use 5. Null takes the plain squared error of what is predicted.
    min_snr_gamma: float | None = None
    # Make the last level pure noise, as sampling assumes (2305.08891).
    zero_terminal_snr: bool = False

    def __post_init__(self):
        if not 2 <= self.num_timesteps <= 1 << 20:
            raise ConfigError(
                "num_timesteps", f"is {self.num_timesteps}; must be 2 … 1048576; 1000 is usual"
            )
        if self.min_snr_gamma is not None and not 0 < self.min_snr_gamma < math.inf:
            raise ConfigError(
                "min_snr_gamma",
                f"is {self.min_snr_gamma}; must be above 0 and finite; use 5, or null for no"
                " weighting",
            )
        if self.zero_terminal_snr and self.prediction_type == "eps":
            raise ConfigError(
                "zero_terminal_snr",
                "is true with prediction_type 'eps', which tells nothing from pure noise; set"
                " prediction_type to v or x0, or zero_terminal_snr to false",
            )
        if self.zero_terminal_snr and self.min_snr_gamma is not None:
            raise ConfigError(
                "zero_terminal_snr",
                f"is true with min_snr_gamma {self.min_snr_gamma}, which gives the last level no"
                " weight; set min_snr_gamma to null or zero_terminal_snr to false",
            )


class DDPM(Objective):
    """Times are the levels (k + 1) / T, equally likely (Ho et al. 2020)."""

    def __init__(self, config: DiffusionConfig):
        path = ddpm_path(config.schedule, config.num_timesteps, config.zero_terminal_snr)
        # The x0 of an eps network has sigma / alpha times the error of eps (20,000 times at the
        # last level of the cosine schedule), and a min-SNR loss leaves the faintest levels
        # untrained. So sampling with either starts where some signal is left.
        unreliable = config.prediction_type == "eps" or config.min_snr_gamma is not None
        t_start = path.latest(FAINTEST_SIGNAL) if unreliable else 1.0
        super().__init__(
            path, config.prediction_type, (1 / config.num_timesteps, 1.0), t_start, DDPM_TIME_SCALE
        )
        self.num_timesteps, self.min_snr_gamma = config.num_timesteps, config.min_snr_gamma

    def draw_time(self, draws: Draws, frames: int = 1) -> Tensor:
        level = (draws.uniform("time").double() * self.num_timesteps).floor()
        return (level + 1) / self.num_timesteps

    def error_scale(self, t: Tensor) -> Tensor:
        if self.min_snr_gamma is None:
            return torch.ones_like(t)
        alpha, sigma = self.path.alpha_sigma(t)
        weight = (alpha / sigma).clamp(max=self.min_snr_gamma**0.5)
        return weight * self.path.gain(self.prediction, "x0", t)


@dataclass(frozen=True)
class FlowMatchingConfig(Section):
    """The section `flow_matching:`. Times are drawn on [0, 1], shifted, then scaled to [t_min,
    t_max]."""

    # The way from data to noise.
    path: Literal["linear", "cosine"] = "linear"
    # What the network predicts: the velocity, or x0 (the clean latents, under the velocity loss),
    # which helps when latents have many channels (2511.13720).
    prediction: Literal["velocity", "x0"] = "velocity"
    # The smallest time that is trained.
    t_min: float = 0.0
    # The largest time that is trained, where sampling begins.
    t_max: float = 1.0
    # The factor by which times are multiplied for the network.
    time_scale: float = 1000.0
    # The distribution of times: `uniform`, or `logit_normal`, the sigmoid of a normal (Esser et al.
    # 2403.03206), which prefers the middle.
    time: Literal["uniform", "logit_normal"] = "uniform"
    # Mean of that normal; above 0 is noisier.
    logit_mean: float = 0.0
    # Deviation of that normal.
    logit_std: float = 1.0
    # Above 1 moves times towards noise, which large pictures need.
    shift: float = 1.0
    # Shift the times of clips by sqrt(frames) more, in training and in sampling: n frames that
    # repeat each other are as clear as one under sqrt(n) times less noise (the argument of
    # 2403.03206, eq. 23, along time).
    shift_by_frames: bool = False
    # Weight of a further loss, 1 - cosine (over channels) between the true and the predicted
    # velocity (2501.01423).
    direction_weight: float = 0.0
    # Draw only times in this range (that of an expert), from the same distribution truncated to it.
    between: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ConfigError(
                "t_min",
                f"is {self.t_min} with t_max {self.t_max}; must be 0 <= t_min < t_max <= 1; use 0"
                " and 1",
            )
        if not 0 <= self.between[0] < self.between[1] <= 1:
            raise ConfigError(
                "between",
                f"is {list(self.between)}; must be 0 <= first < second <= 1; [0, 1] is all",
            )
        for name in ("time_scale", "logit_std", "shift"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    name,
                    f"is {getattr(self, name)}; must be above 0 and finite; leave it out for the"
                    " default",
                )
        if not math.isfinite(self.logit_mean):
            raise ConfigError(
                "logit_mean",
                f"is {self.logit_mean}; must be finite; 0 is the middle, above 0 is noisier",
            )
        if self.time == "uniform" and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            raise ConfigError(
                "logit_mean",
                f"is {self.logit_mean} (logit_std {self.logit_std}) with time 'uniform', which has"
                " neither; set time to logit_normal or leave both out",
            )
        if not 0 <= self.direction_weight < math.inf:
            raise ConfigError(
                "direction_weight",
                f"is {self.direction_weight}; must be 0 or more and finite; 0 turns it off",
            )


class FlowMatching(Objective):
    """The squared error of the velocity, whatever the network predicts."""

    def __init__(self, config: FlowMatchingConfig):
        path = LinearPath() if config.path == "linear" else CosinePath()
        super().__init__(
            path, config.prediction, (config.t_min, config.t_max), config.t_max, config.time_scale
        )
        self.config = config

    def clip_shift(self, frames: int) -> float:
        return math.sqrt(frames) if self.config.shift_by_frames else 1.0

    def draw_time(self, draws: Draws, frames: int = 1) -> Tensor:
        config = self.config
        shift = config.shift * self.clip_shift(frames)
        width = config.t_max - config.t_min
        u = draws.uniform("time").double()
        if config.between != (0.0, 1.0):  # draw only the quantiles of the law that lie inside
            between = torch.tensor(config.between, dtype=torch.float64)
            bounds = ((between - config.t_min) / width).clamp(0, 1)
            low, high = self._share(shift_time(bounds, 1 / shift).clamp(0, 1)).tolist()
            if not low < high:
                raise ConfigError(
                    "flow_matching.between",
                    f"is {list(config.between)}, where the law of times draws nothing",
                )
            u = low + (high - low) * u
        if config.time == "uniform":
            t = u
        elif config.between == (0.0, 1.0):
            t = torch.sigmoid(config.logit_mean + config.logit_std * draws.normal("time").double())
        else:
            t = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(u))
        return config.t_min + width * shift_time(t, shift)

    def _share(self, t: Tensor) -> Tensor:
        """Return the share of the times drawn before the shift that lie below t."""
        if self.config.time == "uniform":
            return t
        return torch.special.ndtr(
            (torch.special.logit(t) - self.config.logit_mean) / self.config.logit_std
        )

    def error_scale(self, t: Tensor) -> Tensor:
        if self.prediction == "x0":
            t = t.clamp(min=SMALLEST_TIME_OF_X0_WEIGHT)
        return self.path.gain(self.prediction, "velocity", t)

    def measure(self, error: Tensor, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        loss = super().measure(error, clean, noise, t)
        if self.config.direction_weight:
            velocity = self.path.mix("velocity", clean, noise, t)
            turned = 1 - F.cosine_similarity(velocity + error, velocity, dim=-1)  # over channels
            loss = loss + self.config.direction_weight * turned.flatten(1).mean(1)
        return loss


def build_objective(
    name: Literal["ddpm", "flow_matching"],
    diffusion: DiffusionConfig = DiffusionConfig(),
    flow_matching: FlowMatchingConfig = FlowMatchingConfig(),
) -> Objective:
    """Return the objective that `train.objective` names, built from its section."""
    return DDPM(diffusion) if name == "ddpm" else FlowMatching(flow_matching)
