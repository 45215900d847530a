"""A tokenizer without weights, for tests and dry runs: it keeps the lowest frequencies of each
patch.

Every patch of f×f pixels is projected on the first `latent_d` functions of its cosine basis (the
DCT-II of JPEG), with the three colours in turn. Flat areas and slow gradients survive the round
trip; detail finer than the kept frequencies does not.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from mmdit.config import ConfigError, least
from mmdit.interfaces import LatentSpec, Tokenizer, TokenizerSection
from mmdit.pixels import from_signed, to_signed
from mmdit.tokenizers.checks import frames_of, latent_frames_of


@dataclass(frozen=True)
class DummyTokenizerConfig(TokenizerSection):
    """A tokenizer without weights, for tests and dry runs."""

    # Chooses the dummy tokenizer.
    type: Literal["dummy"] = "dummy"
    # Pixels that a latent cell covers along each axis.
    latent_f: int = 16
    # Channels of a latent, at most 3·latent_f², where decoding becomes exact.
    latent_d: int = 64
    # Multiplies latents, as with `vtp`.
    latent_scale: float = 1.0
    # Cache beside each clip the same clip as a model of this width and height in pixels could at
    # best have drawn it, for super-resolution; null caches the clip alone.
    low_resolution: tuple[int, int] | None = None

    def __post_init__(self):
        least(self, 0, "latent_f", "latent_d", "latent_scale", above=True)
        if self.latent_f > 256:
            raise ConfigError("latent_f", f"is {self.latent_f}; must be at most 256")
        most = 3 * self.latent_f**2
        if self.latent_d > most:
            raise ConfigError(
                "latent_d",
                f"is {self.latent_d}; must be at most {most} with latent_f {self.latent_f}",
            )


class DummyTokenizer(Tokenizer):
    """Pixels [0, 1] `(B, F, 3, H, W)` ↔ latents `(B, F, H/f, W/f, C)`, float32; linear up to the
    clamp of `decode`."""

    def __init__(self, config: DummyTokenizerConfig, device: torch.device | str = "cpu"):
        self.spec = LatentSpec(
            channels=config.latent_d, spatial=config.latent_f, scale=config.latent_scale
        )
        self.fingerprint = hashlib.sha256(
            f"dct {config.latent_f} {config.latent_d}".encode()
        ).hexdigest()
        self._kernel = _cosines(config.latent_f, config.latent_d).to(device)

    def encode(self, pixels: Tensor) -> Tensor:
        frames = to_signed(frames_of(pixels, self.spec).to(self._kernel))
        latents = F.conv2d(frames, self._kernel, stride=self.spec.spatial) / self.spec.spatial
        return rearrange(latents, "(b f) c h w -> b f h w c", b=len(pixels))

    def decode(self, latents: Tensor) -> Tensor:
        frames = latent_frames_of(latents, self.spec).to(self._kernel) * self.spec.spatial
        signed = F.conv_transpose2d(frames, self._kernel, stride=self.spec.spatial)
        return rearrange(from_signed(signed), "(b f) c h w -> b f c h w", b=len(latents))


def _cosines(size: int, channels: int) -> Tensor:
    """Return orthonormal patch functions `(channels, 3, size, size)`, ordered by rising
    frequency."""
    position, frequency = torch.arange(size) + 0.5, torch.arange(size)
    waves = torch.cos(math.pi / size * frequency[:, None] * position) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    order = sorted(
        ((i, j) for i in range(size) for j in range(size)), key=lambda pair: (sum(pair), pair)
    )
    kernel = torch.zeros(channels, 3, size, size)
    for channel in range(channels):
        i, j = order[channel // 3]
        kernel[channel, channel % 3] = waves[i][:, None] * waves[j]
    return kernel
