"""Convert between pixels in [0, 1] and the pixel space of the networks (ImageNet mean and standard
deviation, as in the public release)."""

from __future__ import annotations

from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalize(pixels: Tensor) -> Tensor:
    """Return pixels `(…, 3, H, W)` in [0, 1] as the networks take them: less the mean, divided by
    the deviation."""
    return (pixels - pixels.new_tensor(MEAN)[:, None, None]) / pixels.new_tensor(STD)[:, None, None]


def denormalize(pixels: Tensor) -> Tensor:
    """Undo `normalize`, and clamp to [0, 1]."""
    return (
        pixels * pixels.new_tensor(STD)[:, None, None] + pixels.new_tensor(MEAN)[:, None, None]
    ).clamp(0, 1)
