"""Whether the fused kernels (Triton) serve: on CUDA, or anywhere under TRITON_INTERPRET=1, which is for tests. Elsewhere the
plain paths beside each call compute the same."""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_able = importlib.util.find_spec("triton") is not None and (INTERPRETED or torch.cuda.is_available())
attention = importlib.import_module("mmdit.nn.fused_attention") if _able else None
residual = importlib.import_module("mmdit.nn.fused_residual") if _able else None


def serve(x: Tensor) -> bool:
    return _able and (x.is_cuda or INTERPRETED) and x.dtype != torch.float64
