"""Frozen matrices that look like any weight and are kept otherwise: as 8-bit floats with a scale per output channel, in the
memory of the CPU, or both. Linear layers and adapters over them need no change.

torchao has such tensors, too, but its products keep the weight that they unpacked for the backward pass, so that a step without
checkpointing holds them all; here each pass unpacks (or fetches) its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.nn.norm import working_dtype

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448


def to_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight (out, in)` → codes `(out, in)` E4M3 (Micikevicius et al. 2022, 2209.05433) and scales `(out, 1)` float32, so that
    codes · scales is the weight to 2⁻⁴ of each element, or to 2⁻¹⁰ of its row's scale where that is more. A row's largest
    element becomes 448."""
    weight = weight.detach().float()
    largest = weight.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    return (weight / scale).clamp(-LARGEST, LARGEST).to(FLOAT8), scale


class StoredWeight(Tensor):
    """A matrix `(out, in)` of `dtype` to the outside, kept as `codes (out, in)`, times `scale (out, 1)` if that is not None.
    `fetch` gives the codes on `device` where they are needed now; None: they lie there. Products with it (`F.linear`) are
    differentiable in the input and the bias; anything else sees a copy that is unpacked for it."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor | None, dtype: torch.dtype, device: torch.device | None = None,
                fetch: Callable[[], Tensor] | None = None):  # fmt: skip
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=device or codes.device)

    def __init__(self, codes: Tensor, scale: Tensor | None, dtype: torch.dtype, device: torch.device | None = None,
                 fetch: Callable[[], Tensor] | None = None):  # fmt: skip
        self.codes, self.scale, self.fetch = codes, scale, fetch

    @staticmethod
    def float8(weight: Tensor) -> StoredWeight:
        return StoredWeight(*to_float8(weight), weight.dtype)

    def unpacked(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Rounded once: codes are exact in bfloat16, and the product with the float32 scale is rounded to `dtype`."""
        return codes.to(dtype) if self.scale is None else codes.to(dtype, copy=True).mul_(self.scale)

    def now(self, dtype: torch.dtype) -> Tensor:
        """For one product: later fetches may overwrite it."""
        return self.unpacked(self.fetch() if self.fetch else self.codes, dtype)

    def whole(self) -> Tensor:
        """A plain copy in `dtype` on `device`."""
        return self.unpacked(self.codes.to(self.device, copy=True), self.dtype)

    def like(self, change: Callable[[Tensor], Tensor]) -> StoredWeight:
        """Of changed parts; fetched ones stay at home."""
        if self.fetch:
            return StoredWeight(self.codes, self.scale, self.dtype, self.device, self.fetch)
        return StoredWeight(change(self.codes), None if self.scale is None else change(self.scale), self.dtype)

    def __tensor_flatten__(self):
        return ["codes"] + ["scale"] * (self.scale is not None), self.dtype

    @staticmethod
    def __tensor_unflatten__(parts, dtype, size, stride):
        return StoredWeight(parts["codes"], parts.get("scale"), dtype)

    def __repr__(self, **_):
        return f"StoredWeight({tuple(self.shape)}, {self.dtype}, kept as {self.codes.dtype} on {self.codes.device})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        own = args[0] if isinstance(args[0], StoredWeight) else None
        if own is not None and func in _SAME:
            return own.like(lambda part: func(part, *args[1:], **kwargs))
        if own is not None and func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, own.dtype):
            return own.like(lambda part: part.to(kwargs.get("device")))
        if own is not None and func is torch.ops.aten.copy_.default:
            parts = (args[1],) if own.scale is None else to_float8(args[1])
            for part, value in zip((own.codes, own.scale), parts, strict=False):
                part.copy_(value)
            return own
        whole = lambda value: value.whole() if isinstance(value, StoredWeight) else value  # noqa: E731
        return func(*map(whole, args), **{name: whole(value) for name, value in kwargs.items()})


_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default)


def _linear(x: Tensor, weight: StoredWeight, bias: Tensor | None = None) -> Tensor:
    dtype = working_dtype(x)
    return _Product.apply(x.to(dtype), None if bias is None else bias.to(dtype), weight)


class _Product(torch.autograd.Function):
    """`x Wᵀ + b`. Neither pass keeps W, and the gradient of x takes the same product as a plain layer's."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, weight: StoredWeight) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.now(x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x = gradient @ ctx.weight.now(gradient.dtype) if ctx.needs_input_grad[0] else None
        return x, gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None


def linear_layers(blocks: nn.Module) -> list[nn.Linear]:
    """The linear layers of `blocks`, adapted or not, whose weight is frozen."""
    return [layer for layer in blocks.modules() if isinstance(layer, nn.Linear) and not layer.weight.requires_grad]


def store_float8(blocks: nn.Module) -> None:
    """Keep the weights of all linear layers of `blocks` as 8-bit floats, frozen; in place, one after the other. Each is
    unpacked in the type that it had."""
    for layer in linear_layers(blocks.requires_grad_(False)):
        layer.weight = nn.Parameter(StoredWeight.float8(layer.weight), requires_grad=False)
