"""Attention within small groups and to short texts as one kernel each, forward and backward (Triton, CUDA).

A window (64 places) or a few columns of frames fit into one tile of a kernel: it reads queries, keys and values where the
linears left them, norms and rotates them in float32, attends, and writes where the next linear reads. Nothing is laid out anew,
no mask is stored, and the backward pass computes all of it again from q, k, v. `nn/attention.py` decides where these serve.

Axes: t token · h head · d width of a head · g group · l row of a group's tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmdit.nn import EPSILON

PARTS = 16  # at most, into which the queries of one sample and head are cut
EXACT = tl.constexpr("ieee")  # products of float32 stay float32
EPS = tl.constexpr(EPSILON)


@triton.jit
def _tile(source, rows, columns, valid):
    return tl.load(source + rows[:, None] + columns[None, :], mask=valid[:, None], other=0.0)


@triton.jit
def _save(target, rows, columns, valid, value):
    tl.store(target + rows[:, None] + columns[None, :], value.to(target.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _turn(low, high, cosine, sine):
    return low * cosine - high * sine, high * cosine + low * sine


@triton.jit
def _ready(source, rows, valid, gain, cosine, sine, turns, HALF: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr):
    """Queries or keys in two halves, normed and rotated in float32, in their own type."""
    columns = tl.arange(0, HALF)
    low = _tile(source, rows, columns, valid).to(tl.float32)
    high = _tile(source + HALF, rows, columns, valid).to(tl.float32)
    if NORM:
        inverse = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + EPS)
        low = low * inverse[:, None] * tl.load(gain + columns)[None, :]
        high = high * inverse[:, None] * tl.load(gain + HALF + columns)[None, :]
    if ROTATE:
        low, high = _turn(low, high, _tile(cosine, turns, columns, valid), _tile(sine, turns, columns, valid))
    return low.to(source.dtype.element_ty), high.to(source.dtype.element_ty)


@triton.jit
def _back(source, target, grad_low, grad_high, rows, valid, gain, cosine, sine, turns, HALF: tl.constexpr, NORM: tl.constexpr,
          ROTATE: tl.constexpr):  # fmt: skip
    """From the gradients of what `_ready` returns, those of `source` into `target`; returns those of the gain's halves. Reads
    the rows again: kept in registers they would push others out."""
    columns = tl.arange(0, HALF)
    if ROTATE:
        grad_low, grad_high = _turn(grad_low, grad_high, _tile(cosine, turns, columns, valid), -_tile(sine, turns, columns, valid))
    gain_low, gain_high = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
    if NORM:
        low = _tile(source, rows, columns, valid).to(tl.float32)
        high = _tile(source + HALF, rows, columns, valid).to(tl.float32)
        inverse = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + EPS)
        low, high = low * inverse[:, None], high * inverse[:, None]
        gain_low, gain_high = tl.sum(grad_low * low, 0), tl.sum(grad_high * high, 0)
        grad_low = grad_low * tl.load(gain + columns)[None, :]
        grad_high = grad_high * tl.load(gain + HALF + columns)[None, :]
        along = (tl.sum(grad_low * low, 1) + tl.sum(grad_high * high, 1)) / (2 * HALF)
        grad_low = (grad_low - low * along[:, None]) * inverse[:, None]
        grad_high = (grad_high - high * along[:, None]) * inverse[:, None]
    _save(target, rows, columns, valid, grad_low)
    _save(target + HALF, rows, columns, valid, grad_high)
    return gain_low, gain_high


@triton.jit
def _softmax(q_low, q_high, k_low, k_high, allowed, scale):
    logits = tl.dot(q_low, tl.trans(k_low), input_precision=EXACT) + tl.dot(q_high, tl.trans(k_high), input_precision=EXACT)
    logits = tl.where(allowed, logits * scale, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _logit_grad(weights, change, values, scale):
    grad = tl.dot(change, tl.trans(values), input_precision=EXACT)
    return (weights * (grad - tl.sum(weights * grad, 1)[:, None]) * scale).to(values.dtype)


# ── within groups ────────────────────────────────────────────────────────────────────────────────────────────────────
@triton.jit
def _group_kernel(qkv, out, q_gain, k_gain, index, names, cosine, sine, grad, grad_qkv, gain_grads, groups, block, apart, scale,
                  HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
                  BACKWARD: tl.constexpr):  # fmt: skip
    head, tile = tl.program_id(0), tl.program_id(1)
    HALF: tl.constexpr = D // 2
    WIDTH: tl.constexpr = HEADS * D
    lanes, columns, wide = tl.arange(0, ROWS), tl.arange(0, HALF), tl.arange(0, D)
    group, turns = tile % groups, lanes * HALF
    place = tl.load(index + group * ROWS + lanes)
    name = tl.load(names + group * ROWS + lanes)
    valid, rows, inner = place >= 0, place * WIDTH, place * (3 * WIDTH)
    start = (tile // groups).to(tl.int64) * block * WIDTH
    source = qkv + 3 * start + head * D  # the rest of each address fits 32 bits
    q1, q2 = _ready(source, inner, valid, q_gain, cosine, sine, turns, HALF, NORM, ROTATE)
    k1, k2 = _ready(source + WIDTH, inner, valid, k_gain, cosine, sine, turns, HALF, NORM, ROTATE)
    values = _tile(source + 2 * WIDTH, inner, wide, valid)
    weights = _softmax(q1, q2, k1, k2, name[:, None] == name[None, :], scale)
    if not BACKWARD:
        result = tl.dot(weights.to(values.dtype), values, input_precision=EXACT)
        _save(out + start + head * D, rows, wide, valid, result)
    else:
        target = grad_qkv + 3 * start + head * D
        own = gain_grads + (tile.to(tl.int64) * HEADS + head) * D + columns
        change = _tile(grad + start + head * D, rows, wide, valid)
        value_grad = tl.dot(tl.trans(weights.to(values.dtype)), change, input_precision=EXACT)
        _save(target + 2 * WIDTH, inner, wide, valid, value_grad)
        logit_grad = _logit_grad(weights, change, values, scale)
        low, high = tl.dot(logit_grad, k1, input_precision=EXACT), tl.dot(logit_grad, k2, input_precision=EXACT)
        gain_low, gain_high = _back(source, target, low, high, inner, valid, q_gain, cosine, sine, turns, HALF, NORM, ROTATE)
        if NORM:
            tl.store(own, gain_low)
            tl.store(own + HALF, gain_high)
        back = tl.trans(logit_grad)
        low, high = tl.dot(back, q1, input_precision=EXACT), tl.dot(back, q2, input_precision=EXACT)
        gain_low, gain_high = _back(source + WIDTH, target + WIDTH, low, high, inner, valid, k_gain, cosine, sine, turns, HALF,
                                    NORM, ROTATE)  # fmt: skip
        if NORM:
            tl.store(own + apart, gain_low)
            tl.store(own + apart + HALF, gain_high)


def _launch_groups(qkv: Tensor, gains: list[Tensor], index: Tensor, names: Tensor, turns: list[Tensor], heads: int,
                   grad: Tensor | None) -> list[Tensor]:  # fmt: skip
    qkv, backward = qkv.contiguous(), grad is not None
    groups, rows = index.shape
    block, width = qkv.shape[-2], qkv.shape[-1] // 3
    tiles, d = qkv.numel() // (block * 3 * width) * groups, width // heads
    result = torch.empty_like(qkv) if backward else qkv.new_empty((*qkv.shape[:-1], width))
    sums = qkv.new_empty((2, tiles, heads, d) if backward and gains else (1,), dtype=torch.float32)
    _group_kernel[(heads, tiles)](
        qkv, result, *(gains or (qkv, qkv)), index, names, *(turns or (qkv, qkv)), grad.contiguous() if backward else qkv, result,
        sums, groups, block, tiles * heads * d, d**-0.5, HEADS=heads, ROWS=rows, D=d, NORM=bool(gains), ROTATE=bool(turns),
        BACKWARD=backward, num_warps=rows // 16,
    )  # fmt: skip
    return [result, *(part.sum((0, 1)) for part in sums)] if backward and gains else [result]


@torch.library.custom_op("mmdit::group_attention", mutates_args=())
def group_attention(qkv: Tensor, gains: list[Tensor], index: Tensor, names: Tensor, turns: list[Tensor], heads: int) -> Tensor:
    """Softmax attention of every token to those of its group. `qkv (…, t, 3·h·d)`: queries, keys and values side by side;
    `index (g, l)` int32: the tokens of each group's tile among the t, -1 for none; `names (g, l)` int32: tokens attend to those
    of the same name; `gains`: of the norms of queries and keys, each `(d,)` float32, or none; `turns`: cosines and sines of the
    rotation `(l, d/2)` float32, or none. Every token must be in one tile; l and d are powers of two from 16 and 32 on. Returns
    `(…, t, h·d)`."""
    return _launch_groups(qkv, gains, index, names, turns, heads, None)[0]


@group_attention.register_fake
def _(qkv, gains, index, names, turns, heads):
    return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))


@torch.library.custom_op("mmdit::group_attention_backward", mutates_args=())
def group_attention_backward(grad: Tensor, qkv: Tensor, gains: list[Tensor], index: Tensor, names: Tensor, turns: list[Tensor],
                             heads: int) -> list[Tensor]:  # fmt: skip
    return _launch_groups(qkv, gains, index, names, turns, heads, grad)


@group_attention_backward.register_fake
def _(grad, qkv, gains, index, names, turns, heads):
    return [qkv.new_empty(qkv.shape), *(torch.empty_like(gain) for gain in gains)]


def _keep_groups(ctx, inputs, output):
    qkv, gains, index, names, turns, ctx.heads = inputs
    ctx.gains = len(gains)
    ctx.save_for_backward(qkv, index, names, *gains, *turns)


def _groups_back(ctx, grad):
    qkv, index, names, *rest = ctx.saved_tensors
    gains, turns = rest[: ctx.gains], rest[ctx.gains :]
    grad_qkv, *gain_grads = group_attention_backward(grad, qkv, gains, index, names, turns, ctx.heads)
    return grad_qkv, gain_grads, None, None, [None] * len(turns), None


group_attention.register_autograd(_groups_back, setup_context=_keep_groups)


# ── to a text ────────────────────────────────────────────────────────────────────────────────────────────────────────
@triton.jit
def _text_kernel(q, k, v, valid, out, q_gain, grad, grad_q, grad_k, grad_v, gain_grads, length, chunk, keys, scale,
                 HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr,
                 BACKWARD: tl.constexpr):  # fmt: skip
    head, part, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    HALF: tl.constexpr = D // 2
    WIDTH: tl.constexpr = HEADS * D
    lanes, columns, wide, places = tl.arange(0, ROWS), tl.arange(0, HALF), tl.arange(0, D), tl.arange(0, KEYS)
    there, text, start = places < keys, places * WIDTH, sample * keys * WIDTH + head * D
    k1, k2 = _tile(k + start, text, columns, there), _tile(k + start + HALF, text, columns, there)
    values = _tile(v + start, text, wide, there)
    allowed = tl.load(valid + sample * keys + places, mask=there, other=0) != 0
    k1_grad, k2_grad = tl.zeros((KEYS, HALF), tl.float32), tl.zeros((KEYS, HALF), tl.float32)
    v_grad = tl.zeros((KEYS, D), tl.float32)
    gain_low, gain_high = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
    for first in range(part * chunk, tl.minimum((part + 1) * chunk, length), ROWS):
        inside, rows = first + lanes < length, lanes * WIDTH
        start = (sample * length + first) * WIDTH + head * D
        q1, q2 = _ready(q + start, rows, inside, q_gain, q_gain, q_gain, lanes, HALF, NORM, False)
        weights = _softmax(q1, q2, k1, k2, allowed[None, :], scale)
        if not BACKWARD:
            _save(out + start, rows, wide, inside, tl.dot(weights.to(values.dtype), values, input_precision=EXACT))
        else:
            change = _tile(grad + start, rows, wide, inside)
            v_grad += tl.dot(tl.trans(weights.to(values.dtype)), change, input_precision=EXACT)
            logit_grad = _logit_grad(weights, change, values, scale)
            back = tl.trans(logit_grad)
            k1_grad += tl.dot(back, q1, input_precision=EXACT)
            k2_grad += tl.dot(back, q2, input_precision=EXACT)
            low, high = tl.dot(logit_grad, k1, input_precision=EXACT), tl.dot(logit_grad, k2, input_precision=EXACT)
            low, high = _back(q + start, grad_q + start, low, high, rows, inside, q_gain, q_gain, q_gain, lanes, HALF, NORM, False)
            gain_low += low
            gain_high += high
    if BACKWARD:
        start = (part * tl.num_programs(2) + sample) * keys * WIDTH + head * D
        _save(grad_k + start, text, columns, there, k1_grad)
        _save(grad_k + start + HALF, text, columns, there, k2_grad)
        _save(grad_v + start, text, wide, there, v_grad)
        if NORM:
            own = ((part * tl.num_programs(2) + sample) * HEADS + head) * D + columns
            tl.store(gain_grads + own, gain_low)
            tl.store(gain_grads + own + HALF, gain_high)


def _launch_text(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, gains: list[Tensor], heads: int,
                 grad: Tensor | None) -> list[Tensor]:  # fmt: skip
    q, k, v, backward = q.contiguous(), k.contiguous(), v.contiguous(), grad is not None
    samples, keys, width = v.shape
    length = q.numel() // (samples * width)
    chunk = 64 * max(4, triton.cdiv(length, 64 * PARTS))  # queries of a program: their sums over keys are kept apart
    parts = triton.cdiv(length, chunk)
    sums = [v.new_empty((parts if backward else 0, *v.shape), dtype=torch.float32) for _ in range(2)]
    gain = v.new_empty((parts, samples, heads, width // heads) if backward and gains else (0,), dtype=torch.float32)
    result, rows = torch.empty_like(q), max(64, triton.next_power_of_2(keys))  # fewer than 64 keys cost more registers
    _text_kernel[(heads, parts, samples)](
        q, k, v, valid.contiguous().view(torch.uint8), result, *(gains or (q,)), grad.contiguous() if backward else q, result,
        *sums, gain, length, chunk, keys, (width // heads) ** -0.5, HEADS=heads, ROWS=64, KEYS=rows, D=width // heads,
        NORM=bool(gains), BACKWARD=backward, num_warps=rows // 16, num_stages=1,
    )  # fmt: skip
    if not backward:
        return [result]
    return [result, *(part.sum(0).to(v.dtype) for part in sums), *([gain.sum((0, 1, 2))] if gains else [])]


@torch.library.custom_op("mmdit::text_attention", mutates_args=())
def text_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, gains: list[Tensor], heads: int) -> Tensor:
    """Softmax attention of `q (b, …, h·d)` to the valid ones of `k`, `v (b, t, h·d)`, `valid (b, t)` bool with a valid token in
    every row; `gains`: that of the norm of queries `(d,)` float32, or none (keys come normed). Returns the shape of `q`."""
    return _launch_text(q, k, v, valid, gains, heads, None)[0]


@text_attention.register_fake
def _(q, k, v, valid, gains, heads):
    return torch.empty_like(q)


@torch.library.custom_op("mmdit::text_attention_backward", mutates_args=())
def text_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, gains: list[Tensor],
                            heads: int) -> list[Tensor]:  # fmt: skip
    return _launch_text(q, k, v, valid, gains, heads, grad)


@text_attention_backward.register_fake
def _(grad, q, k, v, valid, gains, heads):
    return [torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), *(torch.empty_like(gain) for gain in gains)]


def _keep_text(ctx, inputs, output):
    q, k, v, valid, gains, ctx.heads = inputs
    ctx.save_for_backward(q, k, v, valid, *gains)


def _text_back(ctx, grad):
    q, k, v, valid, *gains = ctx.saved_tensors
    result = text_attention_backward(grad, q, k, v, valid, gains, ctx.heads)
    return *result[:3], None, result[3:], None


text_attention.register_autograd(_text_back, setup_context=_keep_text)
