"""Queries, keys and values from one product, for attention within large groups (whole frames, long
clips): normed and rotated by one kernel, forward and backward (Triton, CUDA).

Groups that are too large for a tile (nn/fused/attention_kernels.py) attend through torch's kernels,
which take queries and keys that are normed and rotated already. As separate operations, norm and
rotation would read and write each of them in float32 several times.

Axes: t token · h head · d width of a head · l row of a program's tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmdit.nn.fused.attention_kernels import (
    _load,
    _prepare,
    _store,
    _store_halves,
    _tile,
    _unprepare,
)
from mmdit.nn.fused.ops import launch, operator

ROWS = 64


@triton.jit
def _part(
    source,
    target,
    grad_source,
    gain,
    gain_grad,
    offset,
    inner,
    valid,
    columns,
    cosine,
    sine,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Norm and rotate the queries, or the keys, of one head into `target`. In the backward pass
    `target` holds the gradient of the result, and that of the source is written."""
    low = _load(source, inner, columns, valid)
    high = _load(source, inner + HALF, columns, valid)
    first, second, inverse = _prepare(low, high, gain, columns, cosine, sine, HALF, NORM, ROTATE)
    if not BACKWARD:
        _store_halves(target, first, second, offset, columns, valid, HALF)
    else:
        first, second = (
            _load(target, offset, columns, valid),
            _load(target, offset + HALF, columns, valid),
        )
        low, high, gain_low, gain_high = _unprepare(
            first, second, low, high, inverse, gain, columns, cosine, sine, HALF, NORM, ROTATE
        )
        _store_halves(grad_source, low, high, inner, columns, valid, HALF)
        if NORM:
            tl.store(gain_grad + columns, gain_low)
            tl.store(gain_grad + HALF + columns, gain_high)


@triton.jit
def _heads_kernel(
    qkv,
    q,
    k,
    v,
    q_gain,
    k_gain,
    cosine,
    sine,
    grad_qkv,
    gain_grads,
    tokens,
    steps,
    apart,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    head, tile = tl.program_id(0), tl.program_id(1).to(tl.int64)
    HALF: tl.constexpr = D // 2
    WIDTH: tl.constexpr = HEADS * D
    columns, wide = tl.arange(0, HALF), tl.arange(0, D)
    token = tile * ROWS + tl.arange(0, ROWS)
    valid = token < tokens
    offset, inner = token * WIDTH + head * D, token * (3 * WIDTH) + head * D
    turn_cos = tl.zeros((ROWS, HALF), tl.float32)
    turn_sin = tl.zeros((ROWS, HALF), tl.float32)
    if ROTATE:
        turn = (token // apart % steps)[:, None] * HALF + columns[None, :]
        turn_cos, turn_sin = tl.load(cosine + turn), tl.load(sine + turn)
    sums = gain_grads + (tile * HEADS + head) * 2 * D
    _part(
        qkv,
        q,
        grad_qkv,
        q_gain,
        sums,
        offset,
        inner,
        valid,
        columns,
        turn_cos,
        turn_sin,
        HALF,
        NORM,
        ROTATE,
        BACKWARD,
    )
    _part(
        qkv + WIDTH,
        k,
        grad_qkv + WIDTH,
        k_gain,
        sums + D,
        offset,
        inner,
        valid,
        columns,
        turn_cos,
        turn_sin,
        HALF,
        NORM,
        ROTATE,
        BACKWARD,
    )
    if not BACKWARD:
        _store(v, _tile(qkv + 2 * WIDTH, inner, wide, valid), offset, wide, valid)
    else:
        _store(grad_qkv + 2 * WIDTH, _tile(v, offset, wide, valid), inner, wide, valid)


def _launch(
    qkv: Tensor,
    parts: list[Tensor],
    gains: list[Tensor],
    turns: list[Tensor],
    heads: int,
    backward: bool,
) -> list[Tensor]:
    width = qkv.shape[-1] // 3
    tokens, d = qkv.numel() // (3 * width), width // heads
    tiles, steps = triton.cdiv(tokens, ROWS), len(turns[0]) if turns else 1
    grad = torch.empty_like(qkv) if backward else qkv
    sums = qkv
    if backward and gains:
        sums = qkv.new_empty((tiles * heads, 2, d), dtype=torch.float32)
    launch(_heads_kernel)[(heads, tiles)](
        qkv,
        *parts,
        *(gains or (qkv, qkv)),
        *(turns or (qkv, qkv)),
        grad,
        sums,
        tokens,
        steps,
        qkv.shape[-2] // steps,
        HEADS=heads,
        ROWS=ROWS,
        D=d,
        NORM=bool(gains),
        ROTATE=bool(turns),
        BACKWARD=backward,
        num_warps=4,
    )
    if not backward:
        return parts
    return [grad, sums.sum(0)] if gains else [grad]


@operator
def split_heads(qkv: Tensor, gains: list[Tensor], turns: list[Tensor], heads: int) -> list[Tensor]:
    """Return queries, keys and values, each `(…, t, h, d)`, from `qkv (…, t, 3·h·d)`, which has
    them side by side. Queries and keys are normed with `gains`, each `(d,)` float32 (an empty list:
    not normed), and rotated by `turns`, cosines and sines `(s, d/2)` float32 for s equal runs of
    the t tokens (an empty list: not rotated). d is a power of two, at least 32."""
    qkv = qkv.contiguous()
    shape = (*qkv.shape[:-1], heads, qkv.shape[-1] // (3 * heads))
    return _launch(qkv, [qkv.new_empty(shape) for _ in range(3)], gains, turns, heads, False)


@split_heads.register_fake
def _(qkv, gains, turns, heads):
    shape = (*qkv.shape[:-1], heads, qkv.shape[-1] // (3 * heads))
    return [qkv.new_empty(shape) for _ in range(3)]


@operator
def split_heads_backward(
    grads: list[Tensor], qkv: Tensor, gains: list[Tensor], turns: list[Tensor], heads: int
) -> list[Tensor]:
    """Return the gradients of qkv and, if there are any, of the gains, `(2, d)`."""
    grads = [grad.contiguous() for grad in grads]
    return _launch(qkv.contiguous(), grads, gains, turns, heads, True)


@split_heads_backward.register_fake
def _(grads, qkv, gains, turns, heads):
    return [qkv.new_empty(qkv.shape), *([torch.stack(gains)] if gains else [])]


def _keep(ctx, inputs, output):
    qkv, gains, turns, ctx.heads = inputs
    ctx.gains = len(gains)
    ctx.save_for_backward(qkv, *gains, *turns)


def _back(ctx, grads):
    qkv, *rest = ctx.saved_tensors
    gains, turns = rest[: ctx.gains], rest[ctx.gains :]
    grad_qkv, *gain_grads = split_heads_backward(list(grads), qkv, gains, turns, ctx.heads)
    of_gains = [gradient for both in gain_grads for gradient in both.unbind()]
    return grad_qkv, of_gains, [None] * len(turns), None


split_heads.register_autograd(_back, setup_context=_keep)
