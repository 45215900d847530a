"""Matrix products of a block in training: several weights as one product, and 8-bit floats, twice
as fast as those of bfloat16.

In float8 `y = x · Wᵀ` and the gradient of x are products of codes (e4m3: 3 bits after the point, up
to 448), each row of x, of W and of the gradient with a scale of its own (Micikevicius et al. 2022,
2209.05433; scales a row as in torchao's `rowwise_with_gw_hp`). The gradient of W, a sum over all
tokens, is a product of bfloat16. Weights stay float32, and whatever does not train uses them so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.nn import kernels
from mmdit.nn.float8 import encode_rows
from mmdit.nn.norm import working_dtype

FEW = 8192  # rows of x for which coding x, or putting weights together, takes longer than it saves


def codes(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`x (m, k)`, its columns multiplied by `columns (k)` → float8 `(m, k)` and float32 `(m, 1)`
    whose product it is about."""
    if kernels.serve(x):
        return tuple(kernels.rounding.float8_rows(x, columns))
    return encode_rows(x, columns)


def multiply(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor) -> Tensor:
    """`a (m, k) · bᵀ (k, n)` of codes, each with the scales `(·, 1)` of its rows → bfloat16 `(m,
    n)`."""
    if kernels.serve(a):
        return torch._scaled_mm(
            a, b.t(), scale_a, scale_b.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return ((a.float() * scale_a) @ (b.float() * scale_b).t()).bfloat16()


class _Product(torch.autograd.Function):
    """`x (…, k)` times `weights (·, k)`, one below the other, transposed; in float8 if `coded`. The
    gradient of x is one product, too, those of the weights are one each. `x` has the type that
    products are taken in."""

    @staticmethod
    def forward(ctx, x: Tensor, coded: bool, *weights: Tensor) -> Tensor:
        made, ctx.coded = codes(_stacked(weights)) if coded else (), coded
        ctx.save_for_backward(x, *made, *weights)
        if coded:
            return multiply(*codes(x.flatten(0, -2)), *made).unflatten(0, x.shape[:-1])
        return F.linear(x, _stacked([weight.to(x.dtype) for weight in weights]))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        made, weights = saved[: 2 * ctx.coded], saved[2 * ctx.coded :]
        rows, grad_x = grad.flatten(0, -2), None
        if (
            ctx.needs_input_grad[0] and ctx.coded
        ):  # scales of W's rows go with the gradient's columns: one coding serves both ways
            code, scale = made
            ones = scale.new_ones(code.shape[1], 1)
            grad_x = multiply(*codes(rows, scale.flatten()), code.t().contiguous(), ones).view_as(x)
        elif ctx.needs_input_grad[0]:
            grad_x = grad @ _stacked([weight.to(grad.dtype) for weight in weights])
        parts = rows.split([len(weight) for weight in weights], -1)
        own = [
            (part.t() @ x.flatten(0, -2)).to(weight.dtype) if needed else None
            for part, weight, needed in zip(parts, weights, ctx.needs_input_grad[2:], strict=True)
        ]
        return grad_x, None, *own


def _many_rows(x: Tensor) -> bool:
    return x.numel() >= FEW * x.shape[-1]


def _stacked(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


class Float8Linear(nn.Linear):
    """In training, where it may, by codes; both widths must be multiples of 16."""

    def serves(self, x: Tensor) -> bool:
        return self.training and self.bias is None and kernels.codes_serve(x) and _many_rows(x)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, True, self.weight) if self.serves(x) else super().forward(x)


def joinable(x: Tensor, *layers: nn.Module) -> bool:
    """Whether `joined` takes the place of the layers: they are weights and nothing else (not
    adapters), and a compiled block puts them together as it casts them, or `x` is large. (Autocast
    casts a single weight once for many calls.)
    """
    pays = torch.compiler.is_compiling() or _many_rows(x)
    return pays and all(type(layer) in (nn.Linear, Float8Linear) for layer in layers)


def joined(x: Tensor, *layers: nn.Linear, apart: bool = False) -> Tensor:
    """Outputs of layers side by side, `x (…, k)` → `(…, n)`. `apart`: gradients of the weights as
    products of their own."""
    x, weights = x.to(working_dtype(x)), [layer.weight for layer in layers]
    coded = isinstance(layers[0], Float8Linear) and layers[0].serves(x)
    weights = weights if apart else [torch.cat(list(weights))]
    return _Product.apply(x, coded, *weights) if coded or apart else F.linear(x, *weights)
