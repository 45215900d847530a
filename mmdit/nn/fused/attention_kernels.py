"""Attention within small groups and to short texts as one kernel each, forward and backward
(Triton, CUDA).

A window (64 places) or a few columns of frames fit into one tile of a kernel: it reads queries,
keys and values where the linears left them, norms and rotates them in float32, attends, and writes
where the next linear reads. No tensor is rearranged, no mask is stored, and the backward pass
computes all of it again from q, k, v. `nn/attention.py` decides where the kernels are used.

Axes: t token · h head · d width of a head · g group · l row of a group's tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmdit.nn import EPSILON
from mmdit.nn.fused.ops import launch, operator

PARTS = 16  # into which the queries of one sample and head are cut, at most
EXACT = tl.constexpr("ieee")  # products of float32 stay float32
EPS = tl.constexpr(EPSILON)


@triton.jit
def _tile(source, rows, columns, valid):
    return tl.load(source + rows[:, None] + columns[None, :], mask=valid[:, None], other=0.0)


@triton.jit
def _load(source, rows, columns, valid):
    return _tile(source, rows, columns, valid).to(tl.float32)


@triton.jit
def _store(target, values, rows, columns, valid):
    place = target + rows[:, None] + columns[None, :]
    tl.store(place, values.to(target.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _prepare(
    low,
    high,
    gain,
    columns,
    cosine,
    sine,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Return the halves of queries or keys, normed and rotated, and for each row the reciprocal of
    its root mean square."""
    inverse = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + EPS)
    if NORM:
        low = low * inverse[:, None] * tl.load(gain + columns)[None, :]
        high = high * inverse[:, None] * tl.load(gain + HALF + columns)[None, :]
    if ROTATE:
        low, high = low * cosine - high * sine, high * cosine + low * sine
    return low, high, inverse


@triton.jit
def _unprepare(
    grad_low,
    grad_high,
    low,
    high,
    inverse,
    gain,
    columns,
    cosine,
    sine,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Return the gradients of the inputs `low` and `high` of `_prepare` and of the halves of the
    gain, from those of its outputs."""
    if ROTATE:
        grad_low, grad_high = (
            grad_low * cosine + grad_high * sine,
            grad_high * cosine - grad_low * sine,
        )
    if NORM:
        low, high = low * inverse[:, None], high * inverse[:, None]
    gain_low, gain_high = tl.sum(grad_low * low, 0), tl.sum(grad_high * high, 0)
    if NORM:
        grad_low = grad_low * tl.load(gain + columns)[None, :]
        grad_high = grad_high * tl.load(gain + HALF + columns)[None, :]
        along = (tl.sum(grad_low * low, 1) + tl.sum(grad_high * high, 1)) / (2 * HALF)
        grad_low = (grad_low - low * along[:, None]) * inverse[:, None]
        grad_high = (grad_high - high * along[:, None]) * inverse[:, None]
    return grad_low, grad_high, gain_low, gain_high


@triton.jit
def _store_halves(target, low, high, rows, columns, valid, HALF: tl.constexpr):
    _store(target, low, rows, columns, valid)
    _store(target + HALF, high, rows, columns, valid)


@triton.jit
def _softmax(q_low, q_high, k_low, k_high, allowed, scale):
    logits = tl.dot(q_low, tl.trans(k_low), input_precision=EXACT) + tl.dot(
        q_high, tl.trans(k_high), input_precision=EXACT
    )
    logits = tl.where(allowed, logits * scale, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _softmax_back(weights, change, values, scale):
    """Return the gradient of the logits, from that of the output of attention."""
    grad = tl.dot(change, tl.trans(values), input_precision=EXACT)
    return (weights * (grad - tl.sum(weights * grad, 1)[:, None]) * scale).to(values.dtype)


# ── within groups ─────────────────────────────────────────────────────────────────────────────────
@triton.jit
def _group_kernel(
    qkv,
    out,
    q_gain,
    k_gain,
    index,
    names,
    cosine,
    sine,
    grad,
    grad_qkv,
    gain_grads,
    groups,
    block,
    apart,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    head, tile = tl.program_id(0), tl.program_id(1)
    HALF: tl.constexpr = D // 2
    scale: tl.constexpr = D**-0.5
    rows, columns, wide = tl.arange(0, ROWS), tl.arange(0, HALF), tl.arange(0, D)
    group = tile % groups
    place = tl.load(index + group * ROWS + rows)
    name = tl.load(names + group * ROWS + rows)
    valid = place >= 0
    token = (tile // groups).to(tl.int64) * block + place
    WIDTH: tl.constexpr = HEADS * D
    offset, inner = token * WIDTH + head * D, token * (3 * WIDTH) + head * D
    turn_cos = tl.zeros((ROWS, HALF), tl.float32)
    turn_sin = tl.zeros((ROWS, HALF), tl.float32)
    if ROTATE:
        turn_cos = tl.load(cosine + rows[:, None] * HALF + columns[None, :])
        turn_sin = tl.load(sine + rows[:, None] * HALF + columns[None, :])
    dtype = qkv.dtype.element_ty
    q_low, q_high = _load(qkv, inner, columns, valid), _load(qkv, inner + HALF, columns, valid)
    k_low, k_high = (
        _load(qkv + WIDTH, inner, columns, valid),
        _load(qkv + WIDTH, inner + HALF, columns, valid),
    )
    values = _tile(qkv + 2 * WIDTH, inner, wide, valid)
    q1, q2, q_inverse = _prepare(
        q_low, q_high, q_gain, columns, turn_cos, turn_sin, HALF, NORM, ROTATE
    )
    k1, k2, k_inverse = _prepare(
        k_low, k_high, k_gain, columns, turn_cos, turn_sin, HALF, NORM, ROTATE
    )
    q1, q2, k1, k2 = q1.to(dtype), q2.to(dtype), k1.to(dtype), k2.to(dtype)
    weights = _softmax(q1, q2, k1, k2, name[:, None] == name[None, :], scale)
    if not BACKWARD:
        result = tl.dot(weights.to(dtype), values, input_precision=EXACT)
        _store(out, result, offset, wide, valid)
    else:
        change = _tile(grad, offset, wide, valid)
        value_grad = tl.dot(tl.trans(weights.to(dtype)), change, input_precision=EXACT)
        _store(grad_qkv + 2 * WIDTH, value_grad, inner, wide, valid)
        logit_grad = _softmax_back(weights, change, values, scale)
        back = tl.trans(logit_grad)
        gain_target = gain_grads + (tile.to(tl.int64) * HEADS + head) * D + columns
        low, high, gain_low, gain_high = _unprepare(
            tl.dot(logit_grad, k1, input_precision=EXACT),
            tl.dot(logit_grad, k2, input_precision=EXACT),
            q_low,
            q_high,
            q_inverse,
            q_gain,
            columns,
            turn_cos,
            turn_sin,
            HALF,
            NORM,
            ROTATE,
        )
        _store_halves(grad_qkv, low, high, inner, columns, valid, HALF)
        if NORM:
            tl.store(gain_target, gain_low)
            tl.store(gain_target + HALF, gain_high)
        low, high, gain_low, gain_high = _unprepare(
            tl.dot(back, q1, input_precision=EXACT),
            tl.dot(back, q2, input_precision=EXACT),
            k_low,
            k_high,
            k_inverse,
            k_gain,
            columns,
            turn_cos,
            turn_sin,
            HALF,
            NORM,
            ROTATE,
        )
        _store_halves(grad_qkv + WIDTH, low, high, inner, columns, valid, HALF)
        if NORM:
            tl.store(gain_target + apart, gain_low)
            tl.store(gain_target + apart + HALF, gain_high)


def _launch_groups(
    qkv: Tensor,
    gains: list[Tensor],
    index: Tensor,
    names: Tensor,
    turns: list[Tensor],
    heads: int,
    grad: Tensor | None,
) -> list[Tensor]:
    qkv, backward = qkv.contiguous(), grad is not None
    groups, rows = index.shape
    block, width = qkv.shape[-2], qkv.shape[-1] // 3
    tiles, d = qkv.numel() // (block * 3 * width) * groups, width // heads
    result = torch.empty_like(qkv) if backward else qkv.new_empty((*qkv.shape[:-1], width))
    sums = qkv.new_empty((2, tiles, heads, d), dtype=torch.float32) if backward and gains else qkv
    launch(_group_kernel)[(heads, tiles)](
        qkv,
        result,
        *(gains or (qkv, qkv)),
        index,
        names,
        *(turns or (qkv, qkv)),
        qkv if grad is None else grad.contiguous(),
        result,
        sums,
        groups,
        block,
        tiles * heads * d,
        HEADS=heads,
        ROWS=rows,
        D=d,
        NORM=bool(gains),
        ROTATE=bool(turns),
        BACKWARD=backward,
        num_warps=rows // 16,
    )
    return [result, sums.sum((1, 2))] if backward and gains else [result]


@operator
def group_attention(
    qkv: Tensor, gains: list[Tensor], index: Tensor, names: Tensor, turns: list[Tensor], heads: int
) -> Tensor:
    """Attend (softmax) from every token to those of its group. `qkv (…, t, 3·h·d)`: queries, keys
    and values side by side; `index (g, l)` int32: the tokens, of the t, in each group's tile, -1
    for none; `names (g, l)` int32: tokens attend to those of the same name; `gains`: those of the
    norms of queries and keys, each `(d,)` float32, or none; `turns`: cosines and sines of the
    rotation `(l, d/2)` float32, or none. Every token must be in one tile; l and d are powers of
    two, at least 16 and 32. Returns `(…, t, h·d)`."""
    return _launch_groups(qkv, gains, index, names, turns, heads, None)[0]


@group_attention.register_fake
def _(qkv, gains, index, names, turns, heads):
    return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))


@operator
def group_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    gains: list[Tensor],
    index: Tensor,
    names: Tensor,
    turns: list[Tensor],
    heads: int,
) -> list[Tensor]:
    """Return the gradients of qkv and, if there are any, of the gains, `(2, d)`."""
    return _launch_groups(qkv, gains, index, names, turns, heads, grad)


@group_attention_backward.register_fake
def _(grad, qkv, gains, index, names, turns, heads):
    return [qkv.new_empty(qkv.shape), *([torch.stack(gains)] if gains else [])]


def _keep_groups(ctx, inputs, output):
    qkv, gains, index, names, turns, ctx.heads = inputs
    ctx.gains = len(gains)
    ctx.save_for_backward(qkv, index, names, *gains, *turns)


def _groups_back(ctx, grad):
    qkv, index, names, *rest = ctx.saved_tensors
    gains, turns = rest[: ctx.gains], rest[ctx.gains :]
    grad_qkv, *gain_grads = group_attention_backward(
        grad, qkv, gains, index, names, turns, ctx.heads
    )
    of_gains = [gradient for both in gain_grads for gradient in both.unbind()]
    return grad_qkv, of_gains, None, None, [None] * len(turns), None


group_attention.register_autograd(_groups_back, setup_context=_keep_groups)


# ── to a text ─────────────────────────────────────────────────────────────────────────────────────
@triton.jit
def _text_kernel(
    q,
    k,
    v,
    valid,
    out,
    q_gain,
    grad,
    grad_q,
    grad_kv,
    gain_grads,
    length,
    chunk,
    keys,
    apart,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    head, part, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    HALF: tl.constexpr = D // 2
    scale: tl.constexpr = D**-0.5
    rows, columns, wide, places = (
        tl.arange(0, ROWS),
        tl.arange(0, HALF),
        tl.arange(0, D),
        tl.arange(0, KEYS),
    )
    dtype = v.dtype.element_ty
    there = places < keys
    text = (sample * keys + places) * (HEADS * D) + head * D
    k1, k2 = _tile(k, text, columns, there), _tile(k + HALF, text, columns, there)
    values = _tile(v, text, wide, there)
    allowed = tl.load(valid + sample * keys + places, mask=there, other=0) != 0
    none = tl.zeros((ROWS, HALF), tl.float32)
    k1_grad, k2_grad = tl.zeros((KEYS, HALF), tl.float32), tl.zeros((KEYS, HALF), tl.float32)
    v_grad = tl.zeros((KEYS, D), tl.float32)
    gain_low_sum, gain_high_sum = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
    for first in range(part * chunk, tl.minimum((part + 1) * chunk, length), ROWS):
        inside = first + rows < length
        offset = (sample * length + first + rows) * (HEADS * D) + head * D
        q_low, q_high = _load(q, offset, columns, inside), _load(q, offset + HALF, columns, inside)
        q1, q2, inverse = _prepare(q_low, q_high, q_gain, columns, none, none, HALF, NORM, False)
        q1, q2 = q1.to(dtype), q2.to(dtype)
        weights = _softmax(q1, q2, k1, k2, allowed[None, :], scale)
        if not BACKWARD:
            result = tl.dot(weights.to(dtype), values, input_precision=EXACT)
            _store(out, result, offset, wide, inside)
        else:
            change = _tile(grad, offset, wide, inside)
            v_grad += tl.dot(tl.trans(weights.to(dtype)), change, input_precision=EXACT)
            logit_grad = _softmax_back(weights, change, values, scale)
            back = tl.trans(logit_grad)
            k1_grad += tl.dot(back, q1, input_precision=EXACT)
            k2_grad += tl.dot(back, q2, input_precision=EXACT)
            low, high, gain_low, gain_high = _unprepare(
                tl.dot(logit_grad, k1, input_precision=EXACT),
                tl.dot(logit_grad, k2, input_precision=EXACT),
                q_low,
                q_high,
                inverse,
                q_gain,
                columns,
                none,
                none,
                HALF,
                NORM,
                False,
            )
            _store_halves(grad_q, low, high, offset, columns, inside, HALF)
            gain_low_sum += gain_low
            gain_high_sum += gain_high
    if BACKWARD:
        samples = tl.num_programs(2)
        first = (part * samples + sample) * keys * (HEADS * D)
        text = first + places * (HEADS * D) + head * D
        _store_halves(grad_kv, k1_grad, k2_grad, text, columns, there, HALF)
        _store(grad_kv + apart, v_grad, text, wide, there)
        if NORM:
            gain_target = gain_grads + ((part * samples + sample) * HEADS + head) * D + columns
            tl.store(gain_target, gain_low_sum)
            tl.store(gain_target + HALF, gain_high_sum)


def _launch_text(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor,
    gains: list[Tensor],
    heads: int,
    grad: Tensor | None,
) -> list[Tensor]:
    q, k, v, backward = q.contiguous(), k.contiguous(), v.contiguous(), grad is not None
    samples, keys, width = v.shape
    length = q.numel() // (samples * width)
    chunk = 64 * max(
        4, triton.cdiv(length, 64 * PARTS)
    )  # queries of a program, which writes its sums over them apart
    parts = triton.cdiv(length, chunk)
    alone = parts == 1  # no sums of other programs to add
    sums = (
        v.new_empty((2, parts, *v.shape), dtype=v.dtype if alone else torch.float32)
        if backward
        else v
    )
    gain = (
        v.new_empty((parts, samples, heads, width // heads), dtype=torch.float32)
        if backward and gains
        else v
    )
    result, rows = torch.empty_like(q), max(16, triton.next_power_of_2(keys))
    launch(_text_kernel)[(heads, parts, samples)](
        q,
        k,
        v,
        valid.to(torch.uint8).contiguous(),
        result,
        *(gains or (q,)),
        q if grad is None else grad.contiguous(),
        result,
        sums,
        gain,
        length,
        chunk,
        keys,
        sums.numel() // 2,
        HEADS=heads,
        ROWS=64,
        KEYS=rows,
        D=width // heads,
        NORM=bool(gains),
        BACKWARD=backward,
        num_warps=4 * max(1, rows // 64),
    )
    if not backward:
        return [result]
    return [
        result,
        sums[:, 0] if alone else sums.sum(1).to(v.dtype),
        *([gain.sum((0, 1, 2))] if gains else []),
    ]


@operator
def text_attention(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, gains: list[Tensor], heads: int
) -> Tensor:
    """Attend (softmax) from `q (b, …, h·d)` to the valid ones of `k`, `v (b, t, h·d)`; `valid (b,
    t)`: bool, with a valid token in every row; `gains`: that of the norm of queries `(d,)` float32,
    or none (keys are normed already). Returns the shape of `q`.
    """
    return _launch_text(q, k, v, valid, gains, heads, None)[0]


@text_attention.register_fake
def _(q, k, v, valid, gains, heads):
    return torch.empty_like(q)


@operator
def text_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, gains: list[Tensor], heads: int
) -> list[Tensor]:
    """Return the gradients of q, of k and v, `(2, b, t, h·d)`, and of the gain, if there is one."""
    return _launch_text(q, k, v, valid, gains, heads, grad)


@text_attention_backward.register_fake
def _(grad, q, k, v, valid, gains, heads):
    return [
        torch.empty_like(q),
        v.new_empty((2, *v.shape)),
        *(torch.empty_like(gain) for gain in gains),
    ]


def _keep_text(ctx, inputs, output):
    q, k, v, valid, gains, ctx.heads = inputs
    ctx.save_for_backward(q, k, v, valid, *gains)


def _text_back(ctx, grad):
    q, k, v, valid, *gains = ctx.saved_tensors
    grad_q, both, *gain_grads = text_attention_backward(grad, q, k, v, valid, gains, ctx.heads)
    return grad_q, *both.unbind(), None, gain_grads, None


text_attention.register_autograd(_text_back, setup_context=_keep_text)
