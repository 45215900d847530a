"""Where the fused kernels (Triton) can run: on CUDA, or anywhere under TRITON_INTERPRET=1, which is
for tests. Elsewhere the plain paths beside each call compute the same."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from mmdit.nn import INTERPRETED

CAPABILITY = (8, 0)  # compute capability of the first GPUs with bfloat16 (A100)
CODES = (8, 9)  # of the first GPUs with products of 8-bit floats
_able = importlib.util.find_spec("triton") is not None and (
    INTERPRETED or torch.cuda.is_available()
)
_codes = INTERPRETED
# The modules of kernels by the names that they get here.
MODULES = {
    "attention": "mmdit.nn.fused.attention_kernels",
    "heads": "mmdit.nn.fused.heads",
    "residual": "mmdit.nn.fused.residual",
    "swiglu": "mmdit.nn.fused.swiglu",
    "rounding": "mmdit.nn.fused.rounding",
}


def _imported(name: str) -> Any:
    return importlib.import_module(MODULES[name]) if _able else None


attention, heads = _imported("attention"), _imported("heads")
residual = _imported("residual")
swiglu, rounding = _imported("swiglu"), _imported("rounding")


def can_run(x: Tensor) -> bool:
    """Return whether kernels can take `x`."""
    return _able and (x.is_cuda or INTERPRETED) and x.dtype != torch.float64


def can_encode(x: Tensor) -> bool:
    """Return whether 8-bit floats may take the place of `x` in a product."""
    return _codes and can_run(x) and x.dtype == torch.bfloat16


def warn_without_codes(device: torch.device) -> None:
    """Warn if `model.products: float8` changes nothing on `device`."""
    if not can_encode(torch.empty(0, dtype=torch.bfloat16, device=device)):
        warnings.warn(
            f"model.products is float8, but no kernels of it serve on {device}: autocast's are"
            " used",
            stacklevel=2,
        )


def check_device(device: torch.device) -> None:
    """Switch the kernels off on a GPU that cannot run them, with a warning."""
    global _able, _codes
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    _codes = capability >= CODES
    reason = ""
    if residual is None:
        reason = "Triton is not installed"
    elif capability < CAPABILITY:
        reason = f"it has compute capability {capability}, they need {CAPABILITY}"
    if reason:
        _able = False
        warnings.warn(
            f"no fused kernels on {device}: {reason}; the plain path computes the same, slower",
            stacklevel=2,
        )
