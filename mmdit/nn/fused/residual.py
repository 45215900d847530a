"""The residual stream and its modulated norm as one kernel, forward and backward (Triton, CUDA).

`x ← x + gate · change`, `y = norm(x) · (1 + scale) + shift`: one pass over the stream each way,
where autograd makes several.

Axes: b sample · t token · d width. A program takes a run of tokens of one sample, so that the sums
over tokens, which the gradients of gate, scale and shift are, stay in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmdit.nn import EPSILON
from mmdit.nn.fused.ops import launch, operator

PROGRAMS = 528  # about; each leaves its sums to a last reduction
EPS = tl.constexpr(EPSILON)


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
    STAGES: tl.constexpr,
):
    part, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, D)
    inside = columns < width
    gates = tl.load(gate + sample * gate_step + columns, mask=inside, other=0.0).to(tl.float32)
    shifts = tl.load(shift + sample * shift_step + columns, mask=inside, other=0.0).to(tl.float32)
    scales = 1 + tl.load(scale + sample * scale_step + columns, mask=inside, other=0.0).to(
        tl.float32
    )
    for token in tl.range(part * run, tl.minimum((part + 1) * run, tokens), num_stages=STAGES):
        row = (sample * tokens + token) * width + columns
        added = tl.load(change + row, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + row, mask=inside, other=0.0)
        value = value + (gates * added).to(value.dtype)
        tl.store(summed + row, value, mask=inside)
        value = value.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(value * value, 0) / width + EPS)
        tl.store(y + row, (value * inverse * scales + shifts).to(y.dtype.element_ty), mask=inside)


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
    STAGES: tl.constexpr,
):
    part, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, D)
    inside = columns < width
    gates = tl.load(gate + sample * gate_step + columns, mask=inside, other=0.0).to(tl.float32)
    scales = 1 + tl.load(scale + sample * scale_step + columns, mask=inside, other=0.0).to(
        tl.float32
    )
    gate_sum, shift_sum = tl.zeros((D,), tl.float32), tl.zeros((D,), tl.float32)
    scale_sum = tl.zeros((D,), tl.float32)
    for token in tl.range(part * run, tl.minimum((part + 1) * run, tokens), num_stages=STAGES):
        row = (sample * tokens + token) * width + columns
        value = tl.load(summed + row, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_y + row, mask=inside, other=0.0).to(tl.float32)
        passed = tl.load(grad_stream + row, mask=inside, other=0.0)
        added = tl.load(change + row, mask=inside, other=0.0)
        inverse = tl.rsqrt(tl.sum(value * value, 0) / width + EPS)
        value = value * inverse
        shift_sum += grad
        scale_sum += grad * value
        grad = grad * scales
        total = passed.to(tl.float32) + (grad - value * (tl.sum(grad * value, 0) / width)) * inverse
        tl.store(grad_x + row, total.to(passed.dtype), mask=inside)
        gate_sum += total * added.to(tl.float32)
        tl.store(grad_change + row, (total * gates).to(added.dtype), mask=inside)
    target = sums + (sample * tl.num_programs(0) + part) * 3 * width + columns
    tl.store(target, gate_sum, mask=inside)
    tl.store(target + width, shift_sum, mask=inside)
    tl.store(target + 2 * width, scale_sum, mask=inside)


def _layout(x: Tensor) -> tuple[tuple[int, int], tuple[int, int, int], dict]:
    """Return the grid of programs; the tokens of a sample and of a program, and the width; options.
    Rows are fetched some steps ahead: without that a program waits for each."""
    samples, width = len(x), x.shape[-1]
    tokens = x.numel() // (samples * width)
    run = triton.cdiv(tokens * samples, PROGRAMS)
    side = triton.next_power_of_2(width)
    options = {"STAGES": 4, "num_warps": 4} if side <= 2048 else {"STAGES": 2, "num_warps": 8}
    return (triton.cdiv(tokens, run), samples), (tokens, run, width), {"D": side, **options}


@operator
def add_norm(
    x: Tensor, change: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Take the stream `x (b, …, d)`, `change` like it, `gate`, `shift`, `scale (b, d)` with
    adjacent columns; return the new stream, and its modulated norm in the type `dtype`."""
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
