"""Keep weights in their files, in the dtype that they have there, until they are needed: a process
that needs a part of a model then holds no copy of the whole."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn

from mmdit.nn.encodings import Encoding
from mmdit.nn.stored_weights import StoredWeight


def left_in_file(tensor: Tensor, dtype: torch.dtype, encoding: Encoding | None = None) -> Tensor:
    """Return a weight of `dtype` that takes no memory of its own: `tensor`, which is mapped from a
    file, or a `StoredWeight` that unpacks it. `encoding`: the encoding that the weight shall have
    later, whatever it has in the file."""
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
    """Read the weights of `module` that have another form in their files (only those in `names`, if
    given), and replace them in place by weights with memory of their own."""
    for name, weight in list(module.named_parameters()):
        if isinstance(weight, StoredWeight) and (names is None or name in names):
            place, _, leaf = name.rpartition(".")
            plain = nn.Parameter(weight.now(weight.dtype), requires_grad=weight.requires_grad)
            setattr(module.get_submodule(place), leaf, plain)
