"""The ways in which published encoders resize pictures. Distances of features depend on them, so
each result says which one was used.

crop         short side to the size, bicubic with antialiasing, then the middle (CLIP, timm)
clean        the whole picture, bicubic with antialiasing, as Pillow does (clean-fid, FD-DINOv2)
tensorflow   the whole picture, bilinear without antialiasing, sampled at the top left corners of
             pixels, as TensorFlow 1 did (Heusel et al. 2017 and every score from their network,
             FVD)
pytorch      the whole picture, bilinear without antialiasing, sampled at the centres of pixels
             (pytorch-fid, FVD in PyTorch)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Resize = Literal["crop", "clean", "tensorflow", "pytorch"]


def square(images: Tensor, size: int) -> Tensor:
    """Return `(N, 3, size, size)` in [0, 1]: the middle of `images (N, 3, H, W)` after scaling
    their short side to `size`; the long side is rounded down."""
    short = min(images.shape[-2:])
    if short != size:
        sides = [size * side // short for side in images.shape[-2:]]
        images = F.interpolate(images, sides, mode="bicubic", antialias=True)
    top, left = ((side - size) // 2 for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size].clamp(0, 1)


def _clean(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


def _pytorch(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False)


def _tensorflow(images: Tensor, size: int) -> Tensor:
    for axis in (-1, -2):  # along rows first: TensorFlow rounds in this order
        side = images.shape[axis]
        place = torch.arange(size, device=images.device) * (side / size)
        below = place.long()
        above = (below + 1).clamp(max=side - 1)
        share = (place - below).view(-1, *[1] * (-1 - axis))
        first = images.index_select(axis, below)
        images = first + (images.index_select(axis, above) - first) * share
    return images


WAYS: dict[Resize, Callable[[Tensor, int], Tensor]] = {
    "crop": square,
    "clean": _clean,
    "tensorflow": _tensorflow,
    "pytorch": _pytorch,
}


def resized_square(images: Tensor, size: int, way: Resize) -> Tensor:
    """Return `images (N, 3, H, W)` in [0, 1] as `(N, 3, size, size)`, resized in one of the
    `WAYS`."""
    return WAYS[way](images, size)
