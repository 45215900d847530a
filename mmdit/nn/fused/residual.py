"""The residual stream and its modulated norm as one kernel, forward and backward (Triton, CUDA).

`x ← x + gate · change`, `y = norm(x) · (1 + scale) + shift`: one pass over the stream each way,
where autograd makes several.

Axes: b sample · t token · d width. A program takes a run of tokens of one sample, some at a time,
so that the sums over tokens, which the gradients of gate, scale and shift are, stay in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmdit.nn import EPSILON
from mmdit.nn.fused.ops import launch, operator

# For rows up to each width: the approximate number of programs (each leaves sums to a last
# reduction), the rows that a program takes at a time, the steps that it fetches ahead, and warps.
# Measured on an H200: of wide rows, several at a time do not fit into the registers.
LAYOUTS = {512: (2112, 4, 3, 4), 2048: (528, 1, 4, 4), 1 << 30: (528, 1, 2, 8)}
EPS = tl.constexpr(EPSILON)


@triton.jit
def _vector(source, columns, width):
    values = tl.load(source + columns, mask=columns < width, other=0.0)
    return values.to(tl.float32)[None, :]


@triton.jit
def _forward(
    x,
    change,
    gate,
    shift,
    scale,
    summed,
    y,
    tokens,
    run,
    width,
    gate_step,
    shift_step,
    scale_step,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    part, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, D)
    inside = (columns < width)[None, :]
    gates = _vector(gate + sample * gate_step, columns, width)
    shifts = _vector(shift + sample * shift_step, columns, width)
    scales = 1 + _vector(scale + sample * scale_step, columns, width)
    end = tl.minimum((part + 1) * run, tokens)
    for first in tl.range(part * run, end, ROWS, num_stages=STAGES):
        token = first + tl.arange(0, ROWS)
        there = (token < end)[:, None] & inside
        place = (sample * tokens + token)[:, None] * width + columns[None, :]
        added = tl.load(change + place, mask=there, other=0.0).to(tl.float32)
        value = tl.load(x + place, mask=there, other=0.0)
        value = value + (gates * added).to(value.dtype)
        tl.store(summed + place, value, mask=there)
        value = value.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(value * value, 1) / width + EPS)[:, None]
        normed = value * inverse * scales + shifts
        tl.store(y + place, normed.to(y.dtype.element_ty), mask=there)


@triton.jit
def _backward(
    summed,
    change,
    gate,
    scale,
    grad_stream,
    grad_y,
    grad_x,
    grad_change,
    sums,
    tokens,
    run,
    width,
    gate_step,
    scale_step,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    part, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, D)
    inside = (columns < width)[None, :]
    gates = _vector(gate + sample * gate_step, columns, width)
    scales = 1 + _vector(scale + sample * scale_step, columns, width)
    gate_sum, shift_sum = tl.zeros((ROWS, D), tl.float32), tl.zeros((ROWS, D), tl.float32)
    scale_sum = tl.zeros((ROWS, D), tl.float32)
    end = tl.minimum((part + 1) * run, tokens)
    for first in tl.range(part * run, end, ROWS, num_stages=STAGES):
        token = first + tl.arange(0, ROWS)
        there = (token < end)[:, None] & inside
        place = (sample * tokens + token)[:, None] * width + columns[None, :]
        value = tl.load(summed + place, mask=there, other=0.0).to(tl.float32)
        grad = tl.load(grad_y + place, mask=there, other=0.0).to(tl.float32)
        passed = tl.load(grad_stream + place, mask=there, other=0.0)
        added = tl.load(change + place, mask=there, other=0.0)
        inverse = tl.rsqrt(tl.sum(value * value, 1) / width + EPS)[:, None]
        value = value * inverse
        shift_sum += grad
        scale_sum += grad * value
        grad = grad * scales
        along = (tl.sum(grad * value, 1) / width)[:, None]
        total = passed.to(tl.float32) + (grad - value * along) * inverse
        tl.store(grad_x + place, total.to(passed.dtype), mask=there)
        gate_sum += total * added.to(tl.float32)
        tl.store(grad_change + place, (total * gates).to(added.dtype), mask=there)
    inside = columns < width
    target = sums + (sample * tl.num_programs(0) + part) * 3 * width + columns
    tl.store(target, tl.sum(gate_sum, 0), mask=inside)
    tl.store(target + width, tl.sum(shift_sum, 0), mask=inside)
    tl.store(target + 2 * width, tl.sum(scale_sum, 0), mask=inside)


def _layout(x: Tensor) -> tuple[tuple[int, int], tuple[int, int, int], dict]:
    """Return the grid of programs; the tokens of a sample, the tokens of a program and the width;
    the kernel's options. Rows are fetched some steps ahead, since a program would else wait for
    each."""
    samples, width = len(x), x.shape[-1]
    tokens = x.numel() // (samples * width)
    side = triton.next_power_of_2(width)
    programs, rows, stages, warps = next(layout for most, layout in LAYOUTS.items() if side <= most)
    run = rows * triton.cdiv(tokens * samples, rows * programs)
    options = {"D": side, "ROWS": rows, "STAGES": stages, "num_warps": warps}
    return (triton.cdiv(tokens, run), samples), (tokens, run, width), options


@operator
def add_norm(
    x: Tensor, change: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Return the new residual stream, `x + gate · change`, and its modulated norm in the type
    `dtype`. `x`, `change (b, …, d)`; `gate`, `shift`, `scale (b, d)` with adjacent columns."""
    x, change = x.contiguous(), change.contiguous()
    grid, numbers, options = _layout(x)
    stream, y = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    steps = [vector.stride(0) for vector in (gate, shift, scale)]
    launch(_forward)[grid](x, change, gate, shift, scale, stream, y, *numbers, *steps, **options)
    return [stream, y]


@add_norm.register_fake
def _(x, change, gate, shift, scale, dtype):
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format),
    ]


@operator
def add_norm_backward(
    stream: Tensor, change: Tensor, gate: Tensor, scale: Tensor, grad_stream: Tensor, grad_y: Tensor
) -> list[Tensor]:
    """Return the gradients of x and change, and `(b, 3, d)` those of gate, shift and scale."""
    change, grad_stream, grad_y = change.contiguous(), grad_stream.contiguous(), grad_y.contiguous()
    grid, numbers, options = _layout(stream)
    grad_x, grad_change = torch.empty_like(stream), torch.empty_like(change)
    sums = stream.new_empty((grid[1], grid[0], 3, stream.shape[-1]), dtype=torch.float32)
    steps = gate.stride(0), scale.stride(0)
    launch(_backward)[grid](
        stream,
        change,
        gate,
        scale,
        grad_stream,
        grad_y,
        grad_x,
        grad_change,
        sums,
        *numbers,
        *steps,
        **options,
    )
    return [grad_x, grad_change, sums.sum(1)]


@add_norm_backward.register_fake
def _(stream, change, gate, scale, grad_stream, grad_y):
    vectors = stream.new_empty((len(stream), 3, stream.shape[-1]), dtype=torch.float32)
    return [
        torch.empty_like(stream),
        torch.empty_like(change, memory_format=torch.contiguous_format),
        vectors,
    ]


def _keep(ctx, inputs, output):
    _, change, gate, _, scale, _ = inputs
    ctx.save_for_backward(output[0], change, gate, scale)


def _back(ctx, grads):
    stream, change, gate, scale = ctx.saved_tensors
    grad_x, grad_change, vectors = add_norm_backward(stream, change, gate, scale, *grads)
    return grad_x, grad_change, *vectors.to(gate.dtype).unbind(1), None


add_norm.register_autograd(_back, setup_context=_keep)
