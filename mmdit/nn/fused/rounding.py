"""Rows as 8-bit floats with a scale each, in one pass (Triton, CUDA)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmdit.nn.float8 import FLOAT8, LARGEST, LEAST
from mmdit.nn.fused.ops import launch, operator

TOP, SMALLEST = tl.constexpr(LARGEST), tl.constexpr(LEAST)


@triton.jit
def _rows(x, columns, result, scales, width, COLUMNS: tl.constexpr, D: tl.constexpr):
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    inside, start = place < width, row * width
    value = tl.load(x + start + place, mask=inside, other=0.0).to(tl.float32)
    if COLUMNS:
        value = value * tl.load(columns + place, mask=inside, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(value), 0), SMALLEST) / TOP
    tl.store(scales + row, scale)
    tl.store(result + start + place, (value / scale).to(result.dtype.element_ty), mask=inside)


@operator
def float8_rows(x: Tensor, columns: Tensor | None) -> list[Tensor]:
    """Return what `float8.encode_rows` returns, for `x (m, k)` and `columns (k)` float32."""
    x = x.contiguous()
    rows, width = x.shape
    result = torch.empty_like(x, dtype=FLOAT8)
    scales = x.new_empty((rows, 1), dtype=torch.float32)
    side = triton.next_power_of_2(width)
    factors = scales if columns is None else columns
    launch(_rows)[(rows,)](
        x,
        factors,
        result,
        scales,
        width,
        columns is not None,
        side,
        num_warps=2 if side <= 2048 else 4,
    )
    return [result, scales]


@float8_rows.register_fake
def _(x, columns):
    codes = torch.empty_like(x, dtype=FLOAT8, memory_format=torch.contiguous_format)
    return [codes, x.new_empty((len(x), 1), dtype=torch.float32)]
