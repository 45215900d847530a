"""Rewards: the samples that they see, the analytic ones, and the pool that runs and checks them.

A reward is its own configuration: a frozen dataclass in the list `posttrain.rewards`, identified by
its `type`. To add one, write a class, and add its name to the union in `posttrain_config`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.config import ConfigError
from mmdit.pixels import to_shown
from mmdit.posttrain.advantages import added, ranks
from mmdit.rng import Draws

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples that rewards score. `pixels (B, F, 3, H, W)` in [0, 1]; `images`: the same in the
    form that files have; `latents` are normalised; `groups (B,)` number the prompts; `draws` key
    anything random. A reward reads these and never changes them."""

    captions: list[str]
    latents: Tensor
    groups: Tensor
    draws: Draws
    pixels: Tensor | None = None
    facts: list[Any] | None = None

    @property
    def images(self) -> Tensor | None:
        """Return the pixels as uint8 `(B, F, H, W, 3)` on the CPU;
        `PIL.Image.fromarray(frame.numpy())` takes each frame."""
        if self.pixels is None:
            return None
        return to_shown(self.pixels).movedim(2, -1)

    def each(self, change: Callable[[Any], Any]) -> Samples:
        """Return a copy with `change` applied to every tensor and every list."""
        draws = replace(self.draws, indices=change(self.draws.indices))
        values = {k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor | list)}
        return replace(self, draws=draws, **values)

    def to(self, device: torch.device | str) -> Samples:
        """Return a copy on `device`; this one stays where it is."""
        return self.each(lambda v: v.to(device) if isinstance(v, Tensor) else v)

    def rows(self, places: Tensor) -> Samples:
        """Return the samples at these places."""

        def take(values):
            if isinstance(values, list):
                return [values[i] for i in places.tolist()]
            return values[places.to(values.device)]

        return self.each(take)


def given(value: T | None) -> T:
    """Return a field of `Samples` that a reward `needs` and that is therefore not None."""
    assert value is not None, "a reward needs what it looks at"
    return value


@dataclass(frozen=True)
class Reward:
    """The base of rewards: `call(samples)` returns `(B,)`. `needs`: the fields of `Samples` that it
    reads; `limits`: the range of its values. A `groupwise` reward sees all samples of one prompt at
    a time, any other one `batch` samples (0: all that were drawn together). `device`: where it
    runs, if not on the device of the model."""

    needs: ClassVar[tuple[str, ...]] = ("pixels",)
    limits: ClassVar[tuple[float, float]] = (0.0, 1.0)
    groupwise: ClassVar[bool] = False
    # The weight of this reward; a negative one rewards less of it.
    weight: float = 1.0
    # Its name in reports; null is its type. Two rewards of one type need different names.
    name: str | None = None
    # How many samples it sees at a time; 0 is all that were drawn together.
    batch: int = 0
    # The device on which it runs; null is that of the model.
    device: str | None = None

    def __post_init__(self):
        if self.batch < 0 or self.batch and self.groupwise:
            raise ConfigError(
                "batch",
                f"is {self.batch}; must be 0 or more, and 0 for a groupwise reward: it takes whole"
                " groups",
            )

    @property
    def label(self) -> str:
        return self.name or str(getattr(self, "type", ""))

    def prepare(self, device: torch.device) -> None:
        """Load what the reward needs; called once."""

    def call(self, samples: Samples) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Brightness(Reward):
    """The mean of the pixels."""

    # Chooses this reward.
    type: Literal["brightness"] = "brightness"

    def call(self, samples: Samples) -> Tensor:
        return given(samples.pixels).flatten(1).mean(1)


@dataclass(frozen=True)
class ColorMatch(Reward):
    """Minus the squared distance of the mean colour from `target`."""

    limits: ClassVar[tuple[float, float]] = (-3.0, 0.0)
    # Chooses this reward.
    type: Literal["color_match"] = "color_match"
    # The wanted colour: red, green and blue from 0 to 1.
    target: tuple[float, float, float] = (1.0, 0.0, 0.0)

    def call(self, samples: Samples) -> Tensor:
        pixels = given(samples.pixels)
        target = torch.tensor(self.target, device=pixels.device)
        return -(pixels.mean((1, 3, 4)) - target).square().sum(1)


@dataclass(frozen=True)
class Sharpness(Reward):
    """The mean absolute Laplacian, divided by its largest possible value, 8."""

    # Chooses this reward.
    type: Literal["sharpness"] = "sharpness"

    def call(self, samples: Samples) -> Tensor:
        pixels = given(samples.pixels)
        kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], device=pixels.device) / 8
        edges = F.conv2d(pixels.flatten(0, 2)[:, None].float(), kernel[None, None])
        return edges.abs().reshape(len(pixels), -1).mean(1)


@dataclass(frozen=True)
class Motion(Reward):
    """The mean absolute difference of neighbouring frames; 0 for pictures."""

    # Chooses this reward.
    type: Literal["motion"] = "motion"

    def call(self, samples: Samples) -> Tensor:
        pixels = given(samples.pixels)
        moved = (pixels[:, 1:] - pixels[:, :-1]).abs().flatten(1)
        return moved.mean(1) if moved.shape[1] else pixels.new_zeros(len(pixels))


@dataclass(frozen=True)
class LatentNorm(Reward):
    """exp(-(rms of the latents - 1)²): a reward that needs no decoding."""

    needs: ClassVar[tuple[str, ...]] = ("latents",)
    # Chooses this reward.
    type: Literal["latent_norm"] = "latent_norm"

    def call(self, samples: Samples) -> Tensor:
        return torch.exp(-(samples.latents.flatten(1).square().mean(1).sqrt() - 1).square())


@dataclass(frozen=True)
class Noise(Reward):
    """A random reward, for the null run: its drift is what an algorithm does without any reason."""

    needs: ClassVar[tuple[str, ...]] = ()
    # Chooses this reward.
    type: Literal["noise"] = "noise"

    def call(self, samples: Samples) -> Tensor:
        return samples.draws.uniform("null reward")


@dataclass(frozen=True)
class BrightnessRank(Reward):
    """The rank of a sample's brightness within its group, the same for equal values: a groupwise
    reward."""

    groupwise: ClassVar[bool] = True
    # Chooses this reward.
    type: Literal["brightness_rank"] = "brightness_rank"

    def call(self, samples: Samples) -> Tensor:
        return ranks(given(samples.pixels).flatten(1).mean(1))


@dataclass
class RewardPool:
    """Runs rewards on samples: in a thread while the sampler goes on, or at once if `workers` is 0,
    with the same values."""

    rewards: tuple
    workers: int = 1
    seconds: float = field(default=0.0, init=False)

    def __post_init__(self):
        names = [reward.label for reward in self.rewards]
        if len(set(names)) < len(names):
            raise ConfigError(
                "posttrain.rewards", f"have the names {names}; must differ: give each a name"
            )
        self.pool = ThreadPoolExecutor(self.workers) if self.workers else None

    @property
    def weights(self) -> dict[str, float]:
        return {reward.label: reward.weight for reward in self.rewards}

    @property
    def needs_pixels(self) -> bool:
        """Return whether any reward reads decoded samples."""
        return any({"pixels", "images"} & set(reward.needs) for reward in self.rewards)

    def total(self, values: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the rewards, `(N,)`."""
        return added([self.weights[name] * value for name, value in values.items()])

    def submit(self, samples: Samples) -> Future:
        """Return a future of `score(samples)`; its `result()` also raises the errors of the
        rewards."""
        if self.pool:
            return self.pool.submit(self.score, samples)
        done: Future = Future()
        done.set_result(self.score(samples))
        return done

    @torch.no_grad()
    def score(self, samples: Samples) -> dict[str, Tensor]:
        """Return the values of each reward, `(B,)` float32 on the CPU. ValueError names a reward
        whose values are not finite, outside its limits, or of another shape."""
        begin = time.perf_counter()
        values = {reward.label: self._score_one(reward, samples) for reward in self.rewards}
        self.seconds += time.perf_counter() - begin
        return values

    def _score_one(self, reward: Reward, samples: Samples) -> Tensor:
        for name in reward.needs:
            if getattr(samples, name) is None:
                raise ValueError(
                    f"the reward {reward.label!r} needs {name}, which these samples have not; use"
                    " prompts that come with them, as moving_shapes do"
                )
        count = len(samples.captions)
        if reward.groupwise:
            parts = [(samples.groups == group).nonzero()[:, 0] for group in samples.groups.unique()]
        else:
            parts = torch.arange(count).split(reward.batch or count)
        values = torch.empty(count)
        for rows in parts:
            part = samples if len(rows) == count else samples.rows(rows)
            value = reward.call(part.to(reward.device) if reward.device else part).float().cpu()
            if tuple(value.shape) != (len(rows),):
                raise ValueError(
                    f"the reward {reward.label!r} gave {tuple(value.shape)} for {len(rows)} samples"
                )
            values[rows] = value
        low, high = reward.limits
        fits = (values >= low - 1e-4) & (values <= high + 1e-4)  # nan fails this, too
        if not fits.all():
            first = int(fits.int().argmin())
            raise ValueError(
                f"the reward {reward.label!r} gave {values[first].item()} for"
                f" {samples.captions[first]!r}; must be finite and within {low} … {high}"
            )
        return values
