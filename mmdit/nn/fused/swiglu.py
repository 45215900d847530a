"""SwiGLU of gate and up side by side in one matrix, forward and backward (Triton, CUDA).

Axes: m token · h width of gate and of up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmdit.nn.fused.ops import launch, operator

BLOCK = 1024  # columns of a program, which takes them of one token


@triton.jit
def _swiglu(joined, grad, result, width, BACKWARD: tl.constexpr, D: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * D + tl.arange(0, D)
    inside = columns < width
    pair, single = row * 2 * width + columns, row * width + columns
    gate = tl.load(joined + pair, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(joined + pair + width, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    if BACKWARD:
        change = tl.load(grad + single, mask=inside, other=0.0).to(tl.float32)
        gate_grad = change * up * share * (1 + gate * (1 - share))
        tl.store(result + pair, gate_grad.to(result.dtype.element_ty), mask=inside)
        tl.store(
            result + pair + width, (change * gate * share).to(result.dtype.element_ty), mask=inside
        )
    else:
        tl.store(result + single, (gate * share * up).to(result.dtype.element_ty), mask=inside)


def _launch(joined: Tensor, grad: Tensor | None) -> Tensor:
    joined, width = joined.contiguous(), joined.shape[-1] // 2
    if grad is None:
        result = joined.new_empty((*joined.shape[:-1], width))
    else:
        result = torch.empty_like(joined)
    grid = joined.numel() // (2 * width), triton.cdiv(width, BLOCK)
    launch(_swiglu)[grid](
        joined,
        joined if grad is None else grad.contiguous(),
        result,
        width,
        grad is not None,
        BLOCK,
    )
    return result


@operator
def swiglu(joined: Tensor) -> Tensor:
    """Return `silu(gate) · up` of `joined (…, 2h)`, gate before up → `(…, h)`."""
    return _launch(joined, None)


@swiglu.register_fake
def _(joined):
    return joined.new_empty((*joined.shape[:-1], joined.shape[-1] // 2))


@operator
def swiglu_backward(joined: Tensor, grad: Tensor) -> Tensor:
    return _launch(joined, grad)


@swiglu_backward.register_fake
def _(joined, grad):
    return torch.empty_like(joined, memory_format=torch.contiguous_format)


swiglu.register_autograd(
    lambda ctx, grad: swiglu_backward(*ctx.saved_tensors, grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
