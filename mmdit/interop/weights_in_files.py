"""Weights that stay in their files, in the type that they have there, until they are needed: a
process that keeps a part of a model need not hold a copy of all of it."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn

from mmdit.nn.encodings import Encoding
from mmdit.nn.stored_weights import StoredWeight


def left_in_file(tensor: Tensor, dtype: torch.dtype, encoding: Encoding | None = None) -> Tensor:
    """Return a weight of `dtype` that takes no memory of its own: `tensor`, which is mapped from a
    file, or what unpacks it. `encoding`: of the weight, whatever it is in the file."""
    codes, scale = tensor, None
    if isinstance(tensor, StoredWeight):
        codes, scale = tensor.codes, tensor.scale
        encoding = None if encoding is tensor.encoding else encoding
    if tensor.dtype == dtype and scale is None and encoding is None:
        return tensor
    result = StoredWeight(codes, scale, dtype)
    result.later = encoding
    return result


def unpack_weights(module: nn.Module, names: Container[str] | None = None) -> None:
    """Give the weights of `module` that are of another type in their files, or those of them that
    `names` has, memory of their own; in place."""
    for name, weight in list(module.named_parameters()):
        if isinstance(weight, StoredWeight) and (names is None or name in names):
            place, _, leaf = name.rpartition(".")
            plain = nn.Parameter(weight.now(weight.dtype), requires_grad=weight.requires_grad)
            setattr(module.get_submodule(place), leaf, plain)
