"""Matrix products of a block in training: several weights as one product, and products of 8-bit
floats, twice as fast as those of bfloat16.

With float8, `y = x · Wᵀ` and the gradient of x are products of codes (e4m3: 3 bits after the point,
up to 448); each row of x, of W and of the gradient has its own scale (Micikevicius et al. 2022,
2209.05433; scales of rows as in torchao's `rowwise_with_gw_hp`). The gradient of W, a sum over all
tokens, is a product of bfloat16. Weights stay float32 and are used as such outside training.
(Frozen weights that are kept as such codes take part in the same products:
nn/stored_weights.py.)"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.nn import kernels
from mmdit.nn.float8 import encode_rows
from mmdit.nn.norm import working_dtype

FEW = 8192  # rows of x below which encoding x, or joining weights, takes longer than it saves


def codes(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return what `float8.encode_rows` returns, by a kernel where it can run."""
    if kernels.can_run(x):
        return tuple(kernels.rounding.float8_rows(x, columns))
    return encode_rows(x, columns)


def multiply(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor) -> Tensor:
    """Return `a (m, k) · bᵀ (k, n)` of codes, each with the scales `(·, 1)` of its rows, in
    bfloat16 `(m, n)`."""
    if kernels.can_run(a):
        return torch._scaled_mm(
            a, b.t(), scale_a, scale_b.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
    with torch.autocast(a.device.type, enabled=False):
        return ((a.float() * scale_a) @ (b.float() * scale_b).t()).bfloat16()


def input_gradient(grad: Tensor, code: Tensor, scale: Tensor) -> Tensor:
    """Return `grad (m, n) · W (n, k)` in bfloat16, from the codes of W and the scales `(n, 1)` of
    its rows. The scales multiply the columns of the gradient instead, so that the codes of the
    forward pass can be used here, too."""
    ones = scale.new_ones(code.shape[1], 1)
    return multiply(*codes(grad, scale.flatten()), code.t().contiguous(), ones)


class _SharedProduct(torch.autograd.Function):
    """`x (…, k)` times the transposed stack of the `weights (·, k)`; in float8 if `coded`. The
    gradient of x is one product, too, those of the weights are one each. `x` has the type in which
    products are computed."""

    @staticmethod
    def forward(ctx, x: Tensor, coded: bool, *weights: Tensor) -> Tensor:
        ctx.coded = coded
        if not coded:
            ctx.save_for_backward(x, *weights)
            return F.linear(x, _stacked([weight.to(x.dtype) for weight in weights]))
        encoded = codes(_stacked(weights))
        ctx.save_for_backward(x, *weights, *encoded)
        return multiply(*codes(x.flatten(0, -2)), *encoded).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        needs_x, _, *needs_weights = ctx.needs_input_grad
        weights = saved[: len(needs_weights)]
        rows, grad_x = grad.flatten(0, -2), None
        if needs_x and ctx.coded:
            grad_x = input_gradient(rows, *saved[len(weights) :]).view_as(x)
        elif needs_x:
            grad_x = grad @ _stacked([weight.to(grad.dtype) for weight in weights])
        parts = rows.split([len(weight) for weight in weights], -1)
        grads = [
            (part.t() @ x.flatten(0, -2)).to(weight.dtype) if needed else None
            for part, weight, needed in zip(parts, weights, needs_weights, strict=True)
        ]
        return grad_x, None, *grads


def many_rows(x: Tensor) -> bool:
    return x.numel() >= FEW * x.shape[-1]


def _stacked(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


class Float8Linear(nn.Linear):
    """A linear layer whose products in training are those of 8-bit floats where `encodes` allows
    it; both widths must be multiples of 16."""

    def encodes(self, x: Tensor) -> bool:
        """Return whether the product with `x` is one of 8-bit floats."""
        return self.training and self.bias is None and kernels.can_encode(x) and many_rows(x)

    def forward(self, x: Tensor) -> Tensor:
        return _SharedProduct.apply(x, True, self.weight) if self.encodes(x) else super().forward(x)


def joinable(x: Tensor, *layers: nn.Module) -> bool:
    """Return whether `joined` may replace the layers: they are plain linear layers (without
    adapters), and it pays, either because a compiled block joins the weights as it casts them, or
    because `x` is large. (Autocast casts a single weight once for many calls.)
    """
    pays = torch.compiler.is_compiling() or many_rows(x)
    return pays and all(type(layer) in (nn.Linear, Float8Linear) for layer in layers)


def joined(x: Tensor, *layers: nn.Linear, apart: bool = False) -> Tensor:
    """Return the outputs of layers side by side, `x (…, k)` → `(…, n)`. `apart`: the gradient of
    each weight is a separate product."""
    x = x.to(working_dtype(x))
    weights: list[Tensor] = [layer.weight for layer in layers]
    coded = isinstance(layers[0], Float8Linear) and layers[0].encodes(x)
    if not apart:
        weights = [torch.cat(weights)]
    if coded or apart:
        return _SharedProduct.apply(x, coded, *weights)
    return F.linear(x, *weights)
