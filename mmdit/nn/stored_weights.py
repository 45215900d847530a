"""Frozen matrices that are used like any weight but are stored differently: in fewer bits
(`nn/encodings.py`), in the memory of the CPU, or both. Linear layers and adapters over them need no
change.

torchao and bitsandbytes have such tensors, too, but theirs cannot wait on the CPU until their block
computes, nor in a file until they are sharded over processes. Also, torchao's products keep the
unpacked weight for the backward pass, so that a step without checkpointing holds all of them at
once. Here the forward and the backward pass each unpack (or fetch) the weight for themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from mmdit.nn import kernels, products
from mmdit.nn.encodings import ENCODINGS, OF_CODES, Encoding
from mmdit.nn.norm import working_dtype

Parts = tuple[Tensor, Tensor | None]  # codes, and their scales if they have some


class StoredWeight(Tensor):
    """A matrix `(out, in)` that looks like one of `dtype` but is kept as `codes`: its numbers in
    another type, or, with `scale`, in the encoding that the type of the codes implies.

    `fetch` returns codes and scale on `device` when they are needed; None: they are there already.
    `changing` is called before they are written to, since others may hold copies.
    `multiplies_codes`: in training, large products are products of 8-bit floats, taken from the
    codes as they are, on GPUs that have them. `later`: the encoding of numbers that are still in a
    file; they are encoded each time they are read.

    Products with it (`F.linear`) are differentiable in the input and the bias; all other operations
    get an unpacked copy. If an operation writes to such a copy, the result is packed again; writing
    into a view of one is refused, because it would be lost.
    """

    @staticmethod
    def __new__(
        cls,
        codes: Tensor,
        scale: Tensor | None,
        dtype: torch.dtype,
        device: torch.device | None = None,
        *_,
    ):
        shape = list(codes.shape)
        if scale is not None:
            shape[-1] *= OF_CODES[codes.dtype].per_code
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device or codes.device)

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor | None,
        dtype: torch.dtype,
        device: torch.device | None = None,
        fetch: Callable[[], Parts] | None = None,
        changing: Callable[[], None] | None = None,
        multiplies_codes: bool = False,
        later: Encoding | None = None,
    ):
        self.codes, self.scale, self.fetch, self.changing = codes, scale, fetch, changing
        self.multiplies_codes, self.later = multiplies_codes, later

    @staticmethod
    def encoded(weight: Tensor, encoding: Encoding) -> StoredWeight:
        return StoredWeight(*encoding.encode(weight.detach()), weight.dtype)

    @property
    def encoding(self) -> Encoding | None:
        """Return the encoding of the numbers, or None if they are not encoded."""
        kept = None if self.scale is None else OF_CODES[self.codes.dtype]
        return self.later or kept

    def parts(self) -> Parts:
        """Return codes and scales on `device`, good for one product: later fetches may overwrite
        them."""
        if self.fetch:
            return self.fetch()
        if self.later:
            return self.later.encode(_unpacked((self.codes, self.scale), self.dtype))
        return self.codes, self.scale

    def now(self, dtype: torch.dtype) -> Tensor:
        """Return the unpacked weight, good for one product: later fetches may overwrite it."""
        return _unpacked(self.parts(), dtype)

    def whole(self) -> Tensor:
        """Return a plain copy in `dtype` on `device`."""
        if self.later:
            return self.now(self.dtype)
        scale = None if self.scale is None else self.scale.to(self.device)
        return _unpacked((self.codes.to(self.device, copy=True), scale), self.dtype)

    def pack(self, value: Tensor) -> None:
        """Replace the stored numbers by `value`, encoded as they are."""
        value = value.whole() if isinstance(value, StoredWeight) else value
        value = value.detach().expand(self.shape)
        if self.changing is not None:
            self.changing()
        parts = (value,) if self.scale is None else OF_CODES[self.codes.dtype].encode(value)
        for part, new in zip((self.codes, self.scale), parts, strict=False):
            if part is not None:
                part.copy_(new)

    def like(self, change: Callable[[Tensor], Tensor]) -> StoredWeight:
        """Return a weight like this one with `change` applied to codes and scale; parts that are
        fetched stay as they are, where they are."""
        codes, scale = self.codes, self.scale
        if not self.fetch:
            codes, scale = change(codes), None if scale is None else change(scale)
        device = self.device if self.fetch else None
        further = self.fetch, self.changing, self.multiplies_codes, self.later
        return StoredWeight(codes, scale, self.dtype, device, *further)

    def __tensor_flatten__(self):
        names = ["codes"] if self.scale is None else ["codes", "scale"]
        return names, (self.dtype, self.multiplies_codes)

    @staticmethod
    def __tensor_unflatten__(parts, context, size, stride):
        dtype, multiplies_codes = context
        result = StoredWeight(parts["codes"], parts.get("scale"), dtype)
        result.multiplies_codes = multiplies_codes
        return result

    def __repr__(self, **_):
        return (
            f"StoredWeight({tuple(self.shape)}, {self.dtype}, kept as {self.codes.dtype} on"
            f" {self.codes.device})"
        )

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        weight = args[0] if args and isinstance(args[0], StoredWeight) else None
        if weight is None:
            return _on_copies(func, args, kwargs)
        if func is torch.ops.aten.clone.default and weight.fetch:
            # Writing into a clone must not change the memory that the original is fetched from.
            scale = weight.scale
            scale = None if scale is None else scale.to(weight.device, copy=True)
            codes = weight.codes.to(weight.device, copy=True)
            further = None, None, weight.multiplies_codes
            return StoredWeight(codes, scale, weight.dtype, None, *further)
        if func in _SAME:
            return weight.like(lambda part: func(part, *args[1:], **kwargs))
        keeps_dtype = kwargs.get("dtype") in (None, weight.dtype)
        if func is torch.ops.aten._to_copy.default and keeps_dtype:
            return weight.like(lambda part: part.to(kwargs.get("device")))
        if func is torch.ops.aten.copy_.default:
            weight.pack(args[1])
            return weight
        return _on_copies(func, args, kwargs)


def _unpacked(parts: Parts, dtype: torch.dtype) -> Tensor:
    codes, scale = parts
    if scale is None:
        return codes.to(dtype)
    return OF_CODES[codes.dtype].decode(codes, scale, dtype)


_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default)


def _on_copies(func, args: tuple, kwargs: dict):
    """Call `func` with unpacked copies of stored weights, and pack those that it writes into."""
    copies: dict[int, tuple[StoredWeight, Tensor]] = {}

    def whole(value):
        if not isinstance(value, StoredWeight):
            return value
        if id(value) not in copies:
            copies[id(value)] = value, value.whole()
        return copies[id(value)][1]

    result = func(*tree_map(whole, args), **tree_map(whole, kwargs))
    written = {id(part) for part in _written(func, args, kwargs) if isinstance(part, StoredWeight)}
    back = {}
    for weight, copy in (copies[key] for key in written):
        weight.pack(copy)
        back[id(copy)] = weight
    if not written and any(answer.alias_info is not None for answer in func._schema.returns):
        return tree_map_only(Tensor, PartOfCopy, result)
    return tree_map(lambda value: back.get(id(value), value), result)


class PartOfCopy(Tensor):
    """Rows, a transpose or another view of a copy of a `StoredWeight`; it can only be read."""

    @staticmethod
    def __new__(cls, values: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device=values.device
        )

    def __init__(self, values: Tensor):
        self.copied = values

    def __repr__(self, **_):
        return f"PartOfCopy({self.copied!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(isinstance(part, PartOfCopy) for part in _written(func, args, kwargs)):
            raise RuntimeError(
                "a part of a weight that is kept in codes, or elsewhere, is a copy: what is"
                " written into it would be lost; write the whole weight, or replace it"
            )
        plain = partial(tree_map_only, PartOfCopy, lambda part: part.copied)
        result = func(*plain(args), **plain(kwargs))
        if any(
            answer.alias_info is not None and not answer.is_write for answer in func._schema.returns
        ):
            return tree_map_only(Tensor, PartOfCopy, result)
        return result


def _written(func, args: tuple, kwargs: dict) -> list:
    """Return the leaves of the arguments that `func` writes into."""
    arguments = func._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, args)} | kwargs
    names = [argument.name for argument in arguments if argument.is_write]
    return tree_leaves([given.get(name) for name in names])


def _linear(x: Tensor, weight: StoredWeight, bias: Tensor | None = None) -> Tensor:
    x = x.to(working_dtype(x))
    bias = None if bias is None else bias.to(x.dtype)
    # In training alone. Checkpointed blocks have gradients enabled in both of their passes.
    trains = weight.multiplies_codes and torch.is_grad_enabled()
    if trains and products.many_rows(x) and kernels.can_encode(x):
        return _CodedProduct.apply(x, bias, weight)
    return _UnpackedProduct.apply(x, bias, weight)


class _UnpackedProduct(torch.autograd.Function):
    """`x Wᵀ + b`. Neither pass keeps the unpacked W, and the gradient of x is the same product as
    in a plain layer."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, weight: StoredWeight) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.now(x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x = gradient @ ctx.weight.now(gradient.dtype) if ctx.needs_input_grad[0] else None
        return x, gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None


class _CodedProduct(torch.autograd.Function):
    """`x Wᵀ + b` and the gradient of x as products of 8-bit floats, in bfloat16: W's codes as they
    are kept, and x and the gradient encoded row by row."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, weight: StoredWeight) -> Tensor:
        ctx.weight = weight
        rows, (code, scale) = products.codes(x.flatten(0, -2)), weight.parts()
        assert scale is not None, "they are encoded"
        result = products.multiply(*rows, code, scale).unflatten(0, x.shape[:-1])
        return result if bias is None else result + bias

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, rows = None, gradient.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            x = products.input_gradient(rows, *ctx.weight.parts())
            x = x.unflatten(0, gradient.shape[:-1])
        return x, rows.sum(0) if ctx.needs_input_grad[1] else None, None


def parts_of(weight: Tensor) -> list[Tensor]:
    """Return the plain tensors that hold a weight, stored or not."""
    if not isinstance(weight, StoredWeight):
        return [weight.detach()]
    return [weight.codes] if weight.scale is None else [weight.codes, weight.scale]


def linear_layers(blocks: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of `blocks`, adapted or not, whose weight is frozen."""
    return [
        layer
        for layer in blocks.modules()
        if isinstance(layer, nn.Linear) and not layer.weight.requires_grad
    ]


def store(blocks: nn.Module, name: str, multiplies_codes: bool = False) -> None:
    """Freeze `blocks`, and keep the weights of all their linear layers in the encoding `name`; in
    place, one layer after the other. Each weight is unpacked to the type that it had.
    `multiplies_codes`: see `StoredWeight`; for float8."""
    for layer in linear_layers(blocks.requires_grad_(False)):
        stored = layer.weight
        if not isinstance(stored, StoredWeight):  # else it was read as it is
            stored = StoredWeight.encoded(stored, ENCODINGS[name])
        stored.multiplies_codes = multiplies_codes
        layer.weight = nn.Parameter(stored, requires_grad=False)


class PutTogether(nn.Module):
    """Makes a stored weight from its codes and scales, for `torch.nn.utils.parametrize`."""

    def __init__(self, dtype: torch.dtype, encoding: Encoding, multiplies_codes: bool):
        super().__init__()
        self.dtype, self.encoding, self.multiplies_codes = dtype, encoding, multiplies_codes

    def forward(self, codes: Tensor, scale: Tensor) -> StoredWeight:
        result = StoredWeight(codes, scale, self.dtype)
        result.multiplies_codes = self.multiplies_codes
        return result

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        if isinstance(weight, StoredWeight):
            codes, scale = weight.parts()
            assert scale is not None, "it is encoded, or will be"
            return codes, scale
        return self.encoding.encode(weight)


def take_apart(block: nn.Module, name: str) -> None:
    """Turn the codes and the scales of the frozen linear layers of `block` into separate
    parameters, in place. Unlike a stored weight, these can be sharded by rows. A layer puts its
    weight together when it computes. `name`: the encoding that the weights have, or get here."""
    for layer in linear_layers(block):
        weight = layer.weight
        multiplies_codes = isinstance(weight, StoredWeight) and weight.multiplies_codes
        parts = PutTogether(weight.dtype, ENCODINGS[name], multiplies_codes)
        parametrize.register_parametrization(layer, "weight", parts)
