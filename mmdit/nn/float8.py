"""Matrix products of 8-bit floats, twice as fast as those of bfloat16, in training.

`y = x · Wᵀ` and the gradient of x are products of codes (e4m3: 3 bits after the point, up to 448), each row of x, of W and of the
gradient with a scale of its own (Micikevicius et al. 2022, 2209.05433; scales a row as in torchao's `rowwise_with_gw_hp`). The
gradient of W, a sum over all tokens, is a product of bfloat16. Weights stay float32, and whatever does not train uses them so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.nn import kernels

LARGEST = 448.0  # of float8_e4m3fn
LEAST = 1e-30  # of a row's largest: rows of zeros have codes, too
FEW = 4096  # rows of x with which coding takes longer than is saved


def codes(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`x (m, k)`, its columns multiplied by `columns (k)` → float8 `(m, k)` and float32 `(m, 1)` whose product it is about."""
    if kernels.serve(x):
        return tuple(kernels.rounding.float8_rows(x, columns))
    x = x.float() if columns is None else x.float() * columns
    scale = x.abs().amax(1, keepdim=True).clamp(min=LEAST) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn), scale


def multiply(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor) -> Tensor:
    """`a (m, k) · bᵀ (k, n)` of codes, each with the scales `(·, 1)` of its rows → bfloat16 `(m, n)`."""
    if a.is_cuda:
        return torch._scaled_mm(a, b.t(), scale_a, scale_b.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
    return ((a.float() * scale_a) @ (b.float() * scale_b).t()).bfloat16()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        coded, scale = codes(weight)
        ctx.save_for_backward(x, coded, scale)
        ctx.kind = weight.dtype
        return multiply(*codes(rows), coded, scale).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, coded, scale = ctx.saved_tensors
        grad_x = grad_weight = None
        rows = grad.flatten(0, -2)
        if ctx.needs_input_grad[0]:  # the scales of W's rows go with the gradient's columns: one coding of W serves both ways
            ones = torch.ones_like(scale[:1]).expand(coded.shape[1], 1).contiguous()
            grad_x = multiply(*codes(rows, scale.flatten()), coded.t().contiguous(), ones).view_as(x)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ x.flatten(0, -2)).to(ctx.kind)
        return grad_x, grad_weight


def linear(x: Tensor, weight: Tensor, layer: nn.Module) -> Tensor:
    """`x (…, k)` times `weight (n, k)` transposed, as `layer` computes."""
    if isinstance(layer, Float8Linear) and layer.training and kernels.codes_serve(x) and x.numel() >= FEW * x.shape[-1]:
        return _Product.apply(x, weight)
    return F.linear(x, weight)


class Float8Linear(nn.Linear):
    """Without bias; both widths multiples of 16."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        if in_features % 16 or out_features % 16 or bias:
            raise ValueError(f"products of float8 need widths that are multiples of 16 and no bias, not {in_features} and {out_features}")
        super().__init__(in_features, out_features, bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self)
