"""Normalisation with statistics in at least float32, and adaptive modulation.

Axes: b sample · f frame · n window · k place in the window · d width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmdit.nn import EPSILON, kernels


def upcast(x: Tensor) -> Tensor:
    """Return `x` in float32, or as it is when it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def working_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which the next matrix product computes: autocast's when it is on, else
    that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return `x` divided by its root mean square over the last axis (Zhang & Sennrich 2019), times
    `weight`, in at least float32."""
    x = upcast(x)
    return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), EPSILON)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight `(width,)`; shapes stay."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


class Modulation(NamedTuple):
    """The modulation of one sublayer, each part broadcastable to `(b, f, n, k, d)`."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply AdaLN (Peebles & Xie 2023, section 3.2): the norm without weights, times `1 + scale`,
    plus `shift`. The result is cast once to the type in which the linears after it compute
    (autocast would cast for each of q, k and v)."""
    return (rms_norm(x) * (1 + scale) + shift).to(working_dtype(x))


def add_gated(x: Tensor, change: Tensor | None, gate: Tensor | None) -> Tensor:
    """Return `x + gate · change` in the type of the residual stream `x`; `x` if `change` is
    None."""
    if change is None:
        return x
    assert gate is not None, "a change comes with its gate"
    return x + (gate * change).to(x.dtype)


def no_change(x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
    """Return a `change` and its `gate` that leave the residual stream `x` as it is. With them, a
    first block is compiled to the same graph as the blocks behind it, which saves seconds.
    `modulation (b, m, d)`: the one that the blocks get."""
    change = torch.zeros_like(x).requires_grad_(x.requires_grad)
    gates = torch.zeros_like(modulation).requires_grad_(modulation.requires_grad)
    return change, rearrange(gates, "b m d -> m b 1 1 1 d")[-1]


def add_norm(
    x: Tensor, change: Tensor | None, gate: Tensor | None, then: Modulation
) -> tuple[Tensor, Tensor]:
    """Return the sum that `add_gated` gives, and its norm modulated by `then`, which is the input
    of the next sublayer. `x`, `change (b, f, n, k, d)`."""
    if change is not None and gate is not None and kernels.can_run(x):
        vectors = (vector.flatten(1) for vector in (gate, then.shift, then.scale))
        return tuple(kernels.residual.add_norm(x, change, *vectors, working_dtype(x)))
    x = add_gated(x, change, gate)
    return x, modulated_norm(x, then.shift, then.scale)
