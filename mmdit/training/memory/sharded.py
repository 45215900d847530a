"""Tell what is cut over processes without importing what cuts it. `torch.distributed.tensor` and
its tables of operators are half a second of the start of a command; nothing is cut where they are
not imported."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether each process holds a part of the tensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gathers_weights(module: nn.Module) -> bool:
    """Return whether the module gathers the weights of its processes for each call."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
