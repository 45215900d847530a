"""Losses on pictures and captions, and the small networks that only training needs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from mmdit.config import ConfigError, Section, least


@dataclass(frozen=True)
class ReconstructionConfig:
    """The section `reconstruction:`."""

    # Weight of the whole loss.
    weight: float = 1.0
    # Weight of the absolute error.
    l1: float = 1.0
    # Weight of the squared error.
    l2: float = 1.0
    # Weight of the error of the picture's horizontal and vertical differences, which rewards sharp
    # edges in the right places.
    gradient: float = 1.0
    # The number of halvings of the picture at which differences are compared.
    levels: int = 3

    def __post_init__(self):
        least(self, 0, "l1", "l2", "gradient")
        least(self, 1, "levels")
        if self.weight <= 0 or self.l1 + self.l2 + self.gradient <= 0:
            raise ConfigError(
                "weight",
                f"is {self.weight}; it and the sum of l1, l2 and gradient must be positive",
            )
        if self.levels > 5:
            raise ConfigError("levels", f"is {self.levels}, must be 1 to 5")


def reconstruction_loss(
    predicted: Tensor, target: Tensor, l1: float, l2: float, gradient: float, levels: int
) -> tuple[Tensor, Tensor]:
    """Return `(loss, squared error per picture (B,))` of float32 `(B, 3, H, W)`.

    L1 is robust. L2 corresponds to PSNR, and punishes the few wrong pixels of an edge. The gradient
    term compares horizontal and vertical differences on a pyramid of `levels` scales, each half of
    the last: it rewards edges with the right place and steepness.
    """
    difference = predicted - target
    squared = difference.square().mean((1, 2, 3))
    loss = l1 * difference.abs().mean() + l2 * squared.mean()
    # Differences are linear: the difference of two pictures' gradients is the gradient of their
    # difference.
    for _ in range(levels):
        loss = loss + gradient / levels * (
            difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        )
        difference = F.avg_pool2d(difference, 2)
    return loss, squared


@dataclass(frozen=True)
class ContrastConfig(Section):
    """The section `contrast:`: image-text contrast on the class token before the bottleneck (CLIP,
    Radford et al. 2021)."""

    # Weight of the loss; 0 is off.
    weight: float = 0.0
    # The most pairs in a step.
    pairs: int = 512
    # Keep the text tower in the exported checkpoint, which makes that larger.
    keep_text_tower: bool = False

    def __post_init__(self):
        least(self, 0, "weight")
        least(self, 2, "pairs")

    def check(self, run: Any) -> None:
        """Refuse this loss if no picture has a caption."""
        if self.weight and run.images.mix.shapes <= 0:
            raise ConfigError(
                "contrast.weight",
                f"is {self.weight} with images.mix.shapes 0: only moving shapes have captions;"
                " raise mix.shapes",
            )


def contrast_loss(image: Tensor, text: Tensor, scale: Tensor, facts: Tensor) -> Tensor:
    """Return the symmetric cross entropy of `scale · image · textᵀ` for rows of unit length, `(N,
    T)`. Moving shapes have only a few hundred combinations of facts, so a batch holds many equal
    ones: all pairs with the same `facts (N,)` are positives.
    """
    logits = scale * image @ text.T
    same = (facts[:, None] == facts[None, :]).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@dataclass(frozen=True)
class AdversarialConfig:
    """The section `adversarial:`: a last stage in which the encoder is frozen and the decoder also
    faces a discriminator."""

    # Weight of the loss; 0 is off.
    weight: float = 0.0
    # The share of the planned steps after which this stage begins.
    start: float = 0.8
    # The learning rate of the discriminator.
    lr: float = 4e-4

    def __post_init__(self):
        least(self, 0, "weight")
        for name in ("start", "lr"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(name, f"is {getattr(self, name)}, must be between 0 and 1")


class PatchDiscriminator(nn.Module):
    """Maps normalised pixels `(B, 3, H, W)` to a field of scores, each of which sees 22 by 22
    pixels; with spectral norm (Miyato et al. 2018)."""

    def __init__(self, width: int = 64):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width]
        self.layers = nn.Sequential()
        for (before, after), stride in zip(pairwise(widths), (2, 2, 1), strict=True):
            layer = spectral_norm(nn.Conv2d(before, after, 4, stride, 1))
            self.layers.append(nn.Sequential(layer, nn.LeakyReLU(0.2)))
        self.layers.append(spectral_norm(nn.Conv2d(widths[-1], 1, 1)))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the hinge loss of the scores (Lim and Ye 2017)."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
