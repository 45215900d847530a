"""Convert pixels between the ranges in which they are held:

uint8     0 … 255, rounded             files, data workers, moving shapes
unit      float32 in [0, 1]            everywhere outside tokenizers and encoders of pictures
signed    float in [-1, 1]             Wan's VAE, the dummy tokenizer
standard  mean 0, deviation 1          networks trained on pictures: VTP (ImageNet), CLIP
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.weights import is_finite

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean, deviation

IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: Statistics = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)


def to_unit(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [0, 1], in one pass."""
    return torch.true_divide(pixels, 255)


def to_uint8(pixels: Tensor) -> Tensor:
    """Return unit pixels, clamped, as the nearest of 256 values: the inverse of `to_unit`."""
    return (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)


def to_shown(pixels: Tensor) -> Tensor:
    """Return pixels, unit or uint8, as uint8 on the CPU, to be shown or written to a file.
    ValueError if they are not finite: they would come out black."""
    if pixels.dtype == torch.uint8:
        return pixels.cpu()
    if not is_finite(pixels):
        raise ValueError(
            "the pixels hold nan or infinity: the weights or latents that they were drawn from "
            "do; look at these"
        )
    return to_uint8(pixels.detach()).cpu()


def to_signed(pixels: Tensor) -> Tensor:
    """Return unit pixels as signed ones, in [-1, 1]."""
    return pixels * 2 - 1


def from_signed(pixels: Tensor) -> Tensor:
    """Return signed pixels as unit ones, clamped: the inverse of `to_signed`."""
    return (pixels / 2 + 0.5).clamp(0, 1)


def resized(pixels: Tensor, width: int, height: int) -> Tensor:
    """Return unit pixels of clips `(b, f, 3, H, W)` at another size, antialiased bicubic."""
    frames = F.interpolate(
        pixels.flatten(0, 1), (height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return frames.clamp_(0, 1).unflatten(0, pixels.shape[:2])


class Standard:
    """Converts between unit pixels `(…, 3, H, W)` and those of a network that was trained on
    pictures with these `statistics` (mean and deviation of each colour)."""

    def __init__(self, statistics: Statistics, device: torch.device | str):
        mean, deviation = (torch.tensor(values, device=device) for values in statistics)
        self.mean, self.deviation = mean.view(3, 1, 1), deviation.view(3, 1, 1)

    def to_standard(self, pixels: Tensor) -> Tensor:
        """Return unit pixels as standard ones: less the mean, divided by the deviation."""
        return (pixels - self.mean) / self.deviation

    def to_unit(self, pixels: Tensor) -> Tensor:
        """Return standard pixels as unit ones, clamped: the inverse of `to_standard`."""
        return (pixels * self.deviation + self.mean).clamp(0, 1)
