"""Losses of post-training: tensors in, a differentiable scalar (or per-sample values) out. No
networks, no schedules.

`advantage (B,)`, velocities `(B, ...)`, `sigma (B,)` noise levels, `clean` and `noise` of the
linear path.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.posttrain.dynamics import mean_d

Weighting = Literal["one", "t", "t2", "huber", "ghuber"]
POWER = 0.25  # of ghuber


def clipped(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Return `(B,)`: the clipped surrogate of PPO (Schulman et al. 2017, eq. 7) with `low < 0 <
    high`, negated."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 + low, 1 + high))


def wide(sigma: Tensor, like: Tensor) -> Tensor:
    """Return `sigma (B,)` with as many axes as `like`, to multiply it with."""
    return sigma.reshape(-1, *[1] * (like.dim() - 1)).to(like)


def nft(
    v: Tensor,
    v_old: Tensor,
    x: Tensor,
    clean: Tensor,
    sigma: Tensor,
    share: Tensor,
    beta: float,
    weighted: bool = True,
) -> Tensor:
    """Return `(B,)`: DiffusionNFT (Zheng et al. 2509.16117, eq. 5) with `share (B,)` in [0, 1], how
    much a sample is positive. The optimum moves v by (2 / beta) E[share (target - v_old)].
    `weighted`: divided by its own mean error, which is then not differentiated."""
    share, level = share.to(v), wide(sigma, v)

    def error(velocity: Tensor) -> Tensor:
        gap = x - level * velocity - clean
        scale = mean_d(gap.abs()).clamp(min=1e-5).detach() if weighted else 1.0
        return mean_d(gap.square()) / scale

    positive, negative = beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v
    return (share * error(positive) + (1 - share) * error(negative)) / beta


def positive_share(advantage: Tensor, most: float) -> Tensor:
    """Map advantages, clipped at ± `most`, to [0, 1]."""
    return (advantage / most / 2 + 0.5).clamp(0, 1)


def matching(v: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Return `(B,)` float64: the flow-matching error."""
    return mean_d((v - (noise - clean)).double().square())


def weigh(error: Tensor, sigma: Tensor, weighting: Weighting) -> Tensor:
    """Return AWM's function of the matching error (Xue et al. 2509.25050), which stands for -log
    p."""
    sigma = sigma.to(error)
    match weighting:
        case "one":
            return error
        case "t":
            return sigma * error
        case "t2":
            return sigma.square() * error
        case "huber":
            return sigma * ((error + 1e-10).sqrt() - 1e-5)
        case "ghuber":
            return sigma / POWER * ((error + 1e-10) ** POWER - 1e-10**POWER)


def awm_log_ratio(error: Tensor, error_old: Tensor, sigma: Tensor, weighting: Weighting) -> Tensor:
    """Return `(B,)` for `clipped`; both errors are at the same sigma and noise."""
    return (weigh(error_old, sigma, weighting) - weigh(error, sigma, weighting)).float()


def dpo_margin(
    win: Tensor, win_reference: Tensor, lose: Tensor, lose_reference: Tensor, beta: float
) -> Tensor:
    """Return `(P,)` from matching errors `(P,)`; above 0 a pair is ranked as wanted (Wallace et al.
    2311.12908, eq. 14)."""
    return -beta / 2 * ((win - win_reference) - (lose - lose_reference))


def dpo(margin: Tensor) -> Tensor:
    """Return `(P,)`: ln 2 where the policy is the reference."""
    return -F.logsigmoid(margin)
