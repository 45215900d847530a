"""The residual stream and its modulated norm as one kernel, forward and backward (Triton, CUDA).

`x ← x + gate · change`, `y = norm(x) · (1 + scale) + shift`: one pass over the stream each way, where autograd makes several.

Axes: b sample · t token · d width. A program takes a run of tokens of one sample, so that the sums over tokens, which the
gradients of gate, scale and shift are, stay in registers.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmdit.nn import EPSILON

PROGRAMS, ROWS, WARPS = (int(n) for n in os.environ.get("RES", "1024,1,8").split(","))
EPS = tl.constexpr(EPSILON)


@triton.jit
def _vector(source, columns, width):
    return tl.load(source + columns, mask=columns < width, other=0.0).to(tl.float32)


@triton.jit
def _sum(x, change, gate, stream, columns, width):
    """The stream of a token, written; its values and the sum of their squares."""
    value = tl.load(x + columns, mask=columns < width, other=0.0)
    value = value + (_vector(gate, columns, width) * _vector(change, columns, width)).to(value.dtype)
    tl.store(stream + columns, value, mask=columns < width)
    value = value.to(tl.float32)
    return value, tl.sum(value * value, 0)


@triton.jit
def _modulate(value, shift, scale, y, columns, width):
    value = value * (1 + _vector(scale, columns, width)) + _vector(shift, columns, width)
    tl.store(y + columns, value.to(y.dtype.element_ty), mask=columns < width)


@triton.jit
def _forward(x, change, gate, shift, scale, stream, y, tokens, run, width, gate_step, shift_step, scale_step, MOST: tl.constexpr,
             REST: tl.constexpr):  # fmt: skip
    part, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    left, right = tl.arange(0, MOST), MOST + tl.arange(0, REST)
    gate, shift, scale = gate + sample * gate_step, shift + sample * shift_step, scale + sample * scale_step
    for token in range(part * run, tl.minimum((part + 1) * run, tokens)):
        row = (sample * tokens + token) * width
        a, squares = _sum(x + row, change + row, gate, stream + row, left, width)
        b, more = _sum(x + row, change + row, gate, stream + row, right, width)
        inverse = tl.rsqrt((squares + more) / width + EPS)
        _modulate(a * inverse, shift, scale, y + row, left, width)
        _modulate(b * inverse, shift, scale, y + row, right, width)


@triton.jit
def _read(stream, grad_y, scale, columns, width):
    """Of a token: its stream, the gradient of its modulated norm, that of its norm; the sums that the norm's backward takes."""
    value, grad = _vector(stream, columns, width), _vector(grad_y, columns, width)
    inner = grad * (1 + _vector(scale, columns, width))
    return value, grad, inner, tl.sum(value * value, 0), tl.sum(inner * value, 0)


@triton.jit
def _write(value, inner, along, inverse, change, gate, grad_stream, grad_x, grad_change, columns, width):
    """The gradients of a token's stream and change; returns the gate's."""
    passed = tl.load(grad_stream + columns, mask=columns < width, other=0.0)
    total = passed.to(tl.float32) + (inner - value * along) * inverse
    tl.store(grad_x + columns, total.to(passed.dtype), mask=columns < width)
    changed = (total * _vector(gate, columns, width)).to(grad_change.dtype.element_ty)
    tl.store(grad_change + columns, changed, mask=columns < width)
    return total * _vector(change, columns, width)


@triton.jit
def _keep_sums(sums, gate, shift, scale, columns, width):
    tl.store(sums + columns, gate, mask=columns < width)
    tl.store(sums + width + columns, shift, mask=columns < width)
    tl.store(sums + 2 * width + columns, scale, mask=columns < width)


@triton.jit
def _backward(stream, change, gate, scale, grad_stream, grad_y, grad_x, grad_change, sums, tokens, run, width, gate_step,
              scale_step, MOST: tl.constexpr, REST: tl.constexpr):  # fmt: skip
    part, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    left, right = tl.arange(0, MOST), MOST + tl.arange(0, REST)
    gate, scale = gate + sample * gate_step, scale + sample * scale_step
    gate_a, shift_a, scale_a = tl.zeros((MOST,), tl.float32), tl.zeros((MOST,), tl.float32), tl.zeros((MOST,), tl.float32)
    gate_b, shift_b, scale_b = tl.zeros((REST,), tl.float32), tl.zeros((REST,), tl.float32), tl.zeros((REST,), tl.float32)
    for token in range(part * run, tl.minimum((part + 1) * run, tokens)):
        row = (sample * tokens + token) * width
        a, grad_a, inner_a, squares_a, along_a = _read(stream + row, grad_y + row, scale, left, width)
        b, grad_b, inner_b, squares_b, along_b = _read(stream + row, grad_y + row, scale, right, width)
        inverse = tl.rsqrt((squares_a + squares_b) / width + EPS)
        along = (along_a + along_b) * inverse / width
        a, b = a * inverse, b * inverse
        shift_a, shift_b = shift_a + grad_a, shift_b + grad_b
        scale_a, scale_b = scale_a + grad_a * a, scale_b + grad_b * b
        gate_a += _write(a, inner_a, along, inverse, change + row, gate, grad_stream + row, grad_x + row, grad_change + row, left, width)
        gate_b += _write(b, inner_b, along, inverse, change + row, gate, grad_stream + row, grad_x + row, grad_change + row, right, width)
    sums += (sample * tl.num_programs(0) + part) * 3 * width
    _keep_sums(sums, gate_a, shift_a, scale_a, left, width)
    _keep_sums(sums, gate_b, shift_b, scale_b, right, width)


def _layout(x: Tensor) -> tuple[tuple[int, int], tuple[int, int, int], dict]:
    """The grid of programs; tokens of a sample, of a program, and the width; options. A row is cut in two parts, as Triton's
    vectors are powers of two: 1152 = 1024 + 128."""
    samples, width = len(x), x.shape[-1]
    tokens = x.numel() // (samples * width)
    run = triton.cdiv(tokens * samples, PROGRAMS)
    most = 1 << (width.bit_length() - 1)
    options = {"MOST": most, "REST": max(16, triton.next_power_of_2(width - most)), "num_warps": 4 if most <= 1024 else 8}
    return (triton.cdiv(tokens, run), samples), (tokens, run, width), options


@torch.library.custom_op("mmdit::add_norm", mutates_args=())
def add_norm(x: Tensor, change: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, kind: torch.dtype) -> list[Tensor]:
    """`x (b, …, d)` the stream, `change` like it; `gate`, `shift`, `scale (b, d)` with adjacent columns → the new stream, and
    its modulated norm in the type `kind`."""
    x, change = x.contiguous(), change.contiguous()
    grid, numbers, options = _layout(x)
    stream, y = torch.empty_like(x), torch.empty_like(x, dtype=kind)
    steps = [vector.stride(0) for vector in (gate, shift, scale)]
    _forward[grid](x, change, gate, shift, scale, stream, y, *numbers, *steps, **options)
    return [stream, y]


@add_norm.register_fake
def _(x, change, gate, shift, scale, kind):
    return [torch.empty_like(x, memory_format=torch.contiguous_format),
            torch.empty_like(x, dtype=kind, memory_format=torch.contiguous_format)]  # fmt: skip


@torch.library.custom_op("mmdit::add_norm_backward", mutates_args=())
def add_norm_backward(stream: Tensor, change: Tensor, gate: Tensor, scale: Tensor, grad_stream: Tensor,
                      grad_y: Tensor) -> list[Tensor]:  # fmt: skip
    """Gradients of x and change, and `(b, 3, d)` those of gate, shift and scale."""
    change, grad_stream, grad_y = change.contiguous(), grad_stream.contiguous(), grad_y.contiguous()
    grid, numbers, options = _layout(stream)
    grad_x, grad_change = torch.empty_like(stream), torch.empty_like(change)
    sums = stream.new_empty((grid[1], grid[0], 3, stream.shape[-1]), dtype=torch.float32)
    steps = gate.stride(0), scale.stride(0)
    _backward[grid](stream, change, gate, scale, grad_stream, grad_y, grad_x, grad_change, sums, *numbers, *steps, **options)
    return [grad_x, grad_change, sums.sum(1)]


@add_norm_backward.register_fake
def _(stream, change, gate, scale, grad_stream, grad_y):
    vectors = stream.new_empty((len(stream), 3, stream.shape[-1]), dtype=torch.float32)
    return [torch.empty_like(stream), torch.empty_like(change, memory_format=torch.contiguous_format), vectors]


def _keep(ctx, inputs, output):
    _, change, gate, _, scale, _ = inputs
    ctx.save_for_backward(output[0], change, gate, scale)


def _back(ctx, grads):
    stream, change, gate, scale = ctx.saved_tensors
    grad_x, grad_change, vectors = add_norm_backward(stream, change, gate, scale, *grads)
    return grad_x, grad_change, *vectors.to(gate.dtype).unbind(1), None


add_norm.register_autograd(_back, setup_context=_keep)
