"""The nouns every layer shares. Conventions: latents `(B, F, H, W, C)`, `t = 0` clean and `t = 1`
noise, boolean masks with `True` = valid, pixels in `[0, 1]` as `(B, F, 3, H, W)` everywhere outside
a tokenizer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.config import ConfigError, Section


@dataclass(frozen=True)
class LatentSpec:
    """What a tokenizer's latents are, and the one place where raw latents and model inputs are
    converted.

    The cache holds raw latents; `normalize` is applied when a batch is used: `(z - mean_c) / std_c
    * scale` per channel.
    """

    channels: int
    spatial: int = 16  # pixels a latent cell covers along each axis
    mean: tuple[float, ...] = ()  # per channel; empty means 0
    std: tuple[float, ...] = ()  # per channel; empty means 1
    scale: float = 1.0
    # frames a latent frame covers; of more than 1 the first latent frame covers the first frame
    # alone
    temporal: int = 1

    def __post_init__(self):
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values and len(values) != self.channels:
                raise ValueError(
                    f"latent {name} has {len(values)} values but the latents have {self.channels}"
                    " channels"
                )
        divisors = {"scale": (self.scale,), "std": self.std}
        for name, values in divisors.items():
            if not all(0 < value < math.inf for value in values):
                raise ValueError(
                    f"latent {name} holds {min(values)}; every value must be above 0 and finite"
                )

    @lru_cache(
        maxsize=8
    )  # made anew it would hold up every step: a copy to a GPU waits for the work queued there
    def _affine(self, device: torch.device) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):  # first made while sampling, it must also serve training
            mean = torch.tensor(self.mean or (0.0,), dtype=torch.float32, device=device)
            std = torch.tensor(self.std or (1.0,), dtype=torch.float32, device=device)
            return mean, std / self.scale

    def normalize(self, raw: Tensor) -> Tensor:
        """Raw tokenizer latents `(…, C)` to model space, float32."""
        mean, std = self._affine(raw.device)
        return (raw.float() - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        """Inverse of `normalize`."""
        mean, std = self._affine(latents.device)
        return latents.float() * std + mean

    def frames(self, count: int) -> int:
        """Frames of a clip to latent frames. ValueError with the nearest counts that can be."""
        if (count - 1) % self.temporal or count < 1:
            below = 1 + max(0, count - 1) // self.temporal * self.temporal
            raise ValueError(
                f"{count} frames are not {self.temporal}n + 1, as this tokenizer needs; the nearest"
                f" are {below} and {below + self.temporal}"
            )
        return 1 + (count - 1) // self.temporal

    def grid(self, width: int, height: int, patch: int = 1) -> tuple[int, int]:
        """Pixels `(width, height)` to latent cells `(rows, columns)`, of which a network takes
        `patch` by `patch` at a time. ValueError with the nearest size that can be."""
        cell = self.spatial * patch
        if width % cell or height % cell:
            near = [max(cell, round(side / cell) * cell) for side in (width, height)]
            why = (
                "the tokenizer's downsampling"
                if patch == 1
                else f"the tokenizer's {self.spatial} times the model's patches of {patch}"
            )
            raise ValueError(
                f"size {width}x{height} is not a multiple of {cell}, {why}; the nearest is"
                f" {near[0]}x{near[1]}"
            )
        return height // self.spatial, width // self.spatial


@dataclass
class TextTokens:
    """Encoded captions: `embeddings (B, T, D)` and `valid (B, T)` bool. A dropped caption is the
    unconditional case, in training (caption dropout) and in sampling (guidance) alike: it has no
    valid token, or the rows of `empty (N, D)` where the encoder has something to say for it (an
    encoded empty or negative prompt)."""

    embeddings: Tensor
    valid: Tensor
    empty: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeddings)

    def drop(self, dropped: Tensor) -> TextTokens:
        """`dropped (B,)` bool: those captions become unconditional."""
        if self.empty is None:
            return TextTokens(self.embeddings, self.valid & ~dropped[:, None])
        text = self.pad(max(self.valid.shape[1], len(self.empty)))
        instead = F.pad(self.empty, (0, 0, 0, text.valid.shape[1] - len(self.empty)))
        valid = torch.arange(text.valid.shape[1], device=dropped.device) < len(self.empty)
        rows = torch.where(
            dropped[:, None, None], instead.to(text.embeddings.dtype), text.embeddings
        )
        return TextTokens(rows, torch.where(dropped[:, None], valid, text.valid), self.empty)

    def null(self) -> TextTokens:
        """The unconditional tokens of as many captions."""
        return self.drop(torch.ones(len(self), dtype=torch.bool, device=self.valid.device))

    def pad(self, length: int) -> TextTokens:
        """Invalid tokens behind, up to `length` in all."""
        extra = length - self.valid.shape[1]
        return TextTokens(
            F.pad(self.embeddings, (0, 0, 0, extra)),
            F.pad(self.valid, (0, extra), value=False),
            self.empty,
        )

    def __getitem__(self, index) -> TextTokens:
        return TextTokens(self.embeddings[index], self.valid[index], self.empty)

    def to(self, *args, **kwargs) -> TextTokens:
        embeddings = self.embeddings.to(*args, **kwargs)
        empty = None if self.empty is None else self.empty.to(*args, **kwargs)
        return TextTokens(embeddings, self.valid.to(device=embeddings.device), empty)

    @staticmethod
    def cat(parts: list[TextTokens]) -> TextTokens:
        longest = max(part.valid.shape[1] for part in parts)
        parts = [part.pad(longest) for part in parts]
        return TextTokens(
            torch.cat([p.embeddings for p in parts]),
            torch.cat([p.valid for p in parts]),
            parts[0].empty,
        )


@dataclass
class Batch:
    """One rank's part of a step. `indices (B,)` int64 are the positions in the global batch: with
    `(seed, purpose, step)` they key every random draw, so that neither resume nor the number of
    ranks changes what is drawn.
    """

    latents: Tensor  # (B, F, H, W, C), raw
    captions: list[str]
    ids: list[str]
    indices: Tensor
    facts: list[dict] = field(default_factory=list)
    crops: Tensor | None = (
        # (B, 4): left, top, right, bottom of the part shown, as shares of the picture; if asked for
        None
    )

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from where a GPU fetches it while it computes. DataLoader
        knows this name."""
        tensors = {name: getattr(self, name) for name in ("latents", "indices", "crops")}
        return replace(
            self,
            **{name: tensor.pin_memory() for name, tensor in tensors.items() if tensor is not None},
        )


@runtime_checkable
class Denoiser(Protocol):
    """A network from tensors to tensors; it knows nothing of schedules, losses or guidance."""

    def __call__(self, x: Tensor, t: Tensor, text: TextTokens) -> Tensor:
        """`x (B, F, H, W, C)`, `t (B,)` as the objective scales it; returns the prediction, shaped
        like `x`."""
        ...


class ModelSection(Section):
    """The base of the configs of models: what the rest of the program asks of the section `model:`,
    with the answers of a network that is trained from scratch."""

    freeze: bool

    @property
    def patch(self) -> int:
        """Return how many latent cells along each axis the network takes at a time."""
        return 1

    @property
    def released(self) -> bool:
        """Return whether the weights come from a release, and not from a seed."""
        return False

    @property
    def takes_picture(self) -> bool:
        """Return whether the network may be given a picture that a clip begins (and ends) with."""
        return False

    @property
    def dtype(self) -> str:
        """Return the type in which frozen weights are stored."""
        return "float32"

    @property
    def products(self) -> str:
        """Return the type of the matrix products in training; `autocast` is `train.precision`'s."""
        return "autocast"

    def check(self, run: Any) -> None:
        if self.freeze and run.lora.enabled:
            raise ConfigError(
                "model.freeze",
                "is true with lora.enabled, which trains adapters in it; set one of them to false",
            )
        if self.freeze and not (self.released or run.train.init_from):
            raise ConfigError(
                "model.freeze",
                "is true without train.init_from: the text encoder would learn for random weights;"
                " name a run",
            )
        whole = run.train.autocast and not run.lora.enabled and run.posttrain is None
        if self.products == "float8" and not whole:
            raise ConfigError(
                "model.products",
                "is float8, for whole models in bfloat16, not with train.precision fp32, lora or"
                " posttrain; leave it out",
            )


class TokenizerSection(Section):
    """The base of the configs of tokenizers: what the rest of the program asks of the section
    `tokenizer:`, with the answers of a tokenizer of single frames."""

    @property
    def temporal(self) -> int:
        """Return how many frames a latent frame covers."""
        return 1

    @property
    def picture(self) -> str:
        """Return which pictures are cached beside each clip: none, first or first_last."""
        return "none"

    def check(self, run: Any) -> None:
        if self.picture != "none" and not run.model.takes_picture:
            raise ConfigError(
                "tokenizer.picture",
                f"is {self.picture}; only Wan's I2V models take one: set it to none",
            )


@runtime_checkable
class Tokenizer(Protocol):
    """Pixels in `[0, 1]` `(B, F, 3, H, W)` ↔ raw latents `(B, F, H/spatial, W/spatial, C)`."""

    spec: LatentSpec
    fingerprint: str  # changes when the weights or the configuration change

    def encode(self, pixels: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


@runtime_checkable
class TextEncoder(Protocol):
    """Captions to `TextTokens`; an empty caption has no valid token. An `nn.Module`; trainable ones
    have parameters."""

    dim: int

    def __call__(self, captions: list[str]) -> TextTokens: ...
