"""Direct-Align and the semantic relative reward of SRPO (Shen et al. 2509.06942): a clean image and
a bounded gradient from one network call at any noise level. All arithmetic but that call is
float32: in bfloat16 the recovered latents are wrong by 0.4 a value."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmdit.config import ConfigError

# Maps pixels (B, F, 3, H, W) and texts to similarities (B,) in [-1, 1].
Scorer = Callable[[Tensor, list[str]], Tensor]


def add_noise(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Return the state at noise level `sigma` of the linear path from `clean` to `noise`."""
    assert clean.dtype == noise.dtype == torch.float32, (
        f"Direct-Align in {clean.dtype}: it needs float32"
    )
    return (1 - sigma) * clean + sigma * noise


def recover(x: Tensor, velocity: Tensor, noise: Tensor, entered: float, landed: float) -> Tensor:
    """Return the clean latents implied by one step from noise level `entered` to `landed`, given
    the noise that was added. If `velocity` is exact, they are the true ones; an error of the
    velocity enters multiplied by `(landed - entered) / (1 - landed)`."""
    assert x.dtype == velocity.dtype == noise.dtype == torch.float32, (
        f"Direct-Align in {velocity.dtype}: it needs float32"
    )
    return (x + (landed - entered) * velocity - landed * noise) / (1 - landed)


def window_check(window: tuple[float, float], width: float, boundary: float | None = None) -> None:
    """Raise ConfigError unless `window`, the noise levels (noisy end, clean end) at which steps of
    `width` land, lies inside (0, 1), and with two experts on one side of their `boundary`."""
    noisy, clean = window
    if not 0 < clean < noisy or noisy + width > 0.99 or clean - width <= 0:
        raise ConfigError(
            "posttrain.srpo.sigma_window",
            f"is {list(window)} with step {width}; must be [noisy, clean] with noisy + step at most"
            " 0.99 (nothing is left of the picture beyond) and clean - step above 0",
        )
    if boundary is not None and clean - width < boundary <= noisy + width:
        raise ConfigError(
            "posttrain.srpo.sigma_window",
            f"is {list(window)}, on both sides of the experts' boundary "
            f"{boundary}; choose one side",
        )


def discount(ends: tuple[float, float], window: tuple[float, float], sigma: float) -> float:
    """Return the discount at noise level `sigma`, interpolated from `ends[0]` at the clean end of
    the window to `ends[1]` at its noisy end."""
    return ends[0] + (ends[1] - ends[0]) * (sigma - window[1]) / (window[0] - window[1])


def relative_score(
    scorer: Scorer, pixels: Tensor, positive: list[str], negative: list[str], k: float
) -> Tensor:
    """Return `(B,)`: (1 + k) r(x, positive) - r(x, negative). ValueError if the scorer leaves [-1,
    1]: nothing would bound the ascent."""
    scores = [scorer(pixels, texts) for texts in (positive, negative)]
    for score in scores:
        if not bool((score.detach().abs() <= 1 + 1e-4).all()):  # refuses nan, too
            worst = score.detach().abs().max().item()
            raise ValueError(
                f"the scorer gave {worst:.3g}; similarities must be finite and within -1 … 1"
            )
    return (1 + k) * scores[0] - scores[1]
