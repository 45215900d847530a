"""Check the shapes that every tokenizer takes."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from mmdit.interfaces import LatentSpec


def frames_of(pixels: Tensor, spec: LatentSpec) -> Tensor:
    """Return the frames `(B F, 3, H, W)` of `pixels (B, F, 3, H, W)` in [0, 1]. ValueError for
    other shapes, for integers, and for sizes that the tokenizer would have to crop."""
    if pixels.ndim != 5 or pixels.shape[2] != 3:
        raise ValueError(
            f"pixels are {tuple(pixels.shape)}; must be (batch, frames, 3, height, width)"
        )
    if not pixels.is_floating_point():
        raise ValueError(
            f"pixels are {pixels.dtype}; must be floating point in [0, 1]: divide 8-bit values"
            " by 255"
        )
    height, width = pixels.shape[-2:]
    spec.grid(width, height)
    return rearrange(pixels, "b f c h w -> (b f) c h w")


def latent_frames_of(latents: Tensor, spec: LatentSpec) -> Tensor:
    """Return raw `latents (B, F, h, w, C)` as `(B F, C, h, w)`. ValueError for other shapes."""
    if latents.ndim != 5 or latents.shape[-1] != spec.channels:
        raise ValueError(
            f"latents are {tuple(latents.shape)}; must be (batch, frames, rows, columns,"
            f" {spec.channels})"
        )
    return rearrange(latents, "b f h w c -> (b f) c h w")
