"""Weights that stay in their files, in the type that they have there, until they are needed: a
process that keeps a part of a model need not hold a copy of all of it."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn

from mmdit.nn.stored_weights import StoredWeight


def left_in_file(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight of `dtype` that takes no memory of its own: `tensor`, which is mapped from a
    file, or what unpacks it. `name` is of no account."""
    if isinstance(tensor, StoredWeight):
        return StoredWeight(tensor.codes, tensor.scale, dtype)
    return tensor if tensor.dtype == dtype else StoredWeight(tensor, None, dtype)


def unpack_weights(module: nn.Module, names: Container[str] | None = None) -> None:
    """Give the weights of `module` that are of another type in their files, or those of them that
    `names` has, memory of their own; in place."""
    for name, weight in list(module.named_parameters()):
        if isinstance(weight, StoredWeight) and (names is None or name in names):
            place, _, leaf = name.rpartition(".")
            plain = nn.Parameter(weight.now(weight.dtype), requires_grad=weight.requires_grad)
            setattr(module.get_submodule(place), leaf, plain)
