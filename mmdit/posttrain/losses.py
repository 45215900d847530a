"""Losses of post-training: they map tensors to a differentiable scalar or to values for each
sample, and know nothing of networks and schedules.

`advantage (B,)`; velocities `(B, ...)`; `sigma (B,)`: noise levels; `clean` and `noise`: the ends
of the linear path.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.posttrain.dynamics import mean_d

Weighting = Literal["one", "t", "t2", "huber", "ghuber"]
POWER = 0.25  # the exponent of ghuber


def clipped(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Return `(B,)`: the negated clipped surrogate of PPO (Schulman et al. 2017, eq. 7); the ratio
    is clipped to 1 + `low` … 1 + `high`, with `low < 0 < high`."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 + low, 1 + high))


def wide(sigma: Tensor, like: Tensor) -> Tensor:
    """Return `sigma (B,)` with as many axes as `like`, so that the two can be multiplied."""
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
    """Return `(B,)`: the loss of DiffusionNFT (Zheng et al. 2509.16117, eq. 5). `share (B,)` in [0,
    1] says how positive a sample is. At the optimum v has moved by (2 / beta) E[share (target -
    v_old)]. `weighted`: each error is divided by its mean absolute error, through which no gradient
    flows."""
    share, level = share.to(v), wide(sigma, v)

    def error(velocity: Tensor) -> Tensor:
        gap = x - level * velocity - clean
        scale = mean_d(gap.abs()).clamp(min=1e-5).detach() if weighted else 1.0
        return mean_d(gap.square()) / scale

    positive, negative = beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v
    return (share * error(positive) + (1 - share) * error(negative)) / beta


def positive_share(advantage: Tensor, most: float) -> Tensor:
    """Return advantages, clipped to ± `most`, mapped linearly to [0, 1]."""
    return (advantage / most / 2 + 0.5).clamp(0, 1)


def matching(v: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Return `(B,)` float64: the mean squared flow-matching error."""
    return mean_d((v - (noise - clean)).double().square())


def weigh(error: Tensor, sigma: Tensor, weighting: Weighting) -> Tensor:
    """Return the function of the matching error that takes the place of -log p in AWM (Xue et al.
    2509.25050)."""
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
    """Return the log-ratio `(B,)` for `clipped`. Both errors must be taken at the same sigma and
    noise."""
    return (weigh(error_old, sigma, weighting) - weigh(error, sigma, weighting)).float()


def dpo_margin(
    win: Tensor, win_reference: Tensor, lose: Tensor, lose_reference: Tensor, beta: float
) -> Tensor:
    """Return the margin `(P,)` from matching errors `(P,)`; where it is above 0, the pair is ranked
    as wanted (Wallace et al. 2311.12908, eq. 14)."""
    return -beta / 2 * ((win - win_reference) - (lose - lose_reference))


def dpo(margin: Tensor) -> Tensor:
    """Return the loss `(P,)`, which is ln 2 where the policy equals the reference."""
    return -F.logsigmoid(margin)
