"""Rows as 8-bit floats with a scale each, in one pass (Triton, CUDA)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmdit.nn import LARGEST, LEAST

PROGRAMS = 528  # at most; each takes every so many rows
TOP, SMALLEST = tl.constexpr(LARGEST), tl.constexpr(LEAST)


@triton.jit
def _rows(x, columns, result, scales, rows, width, COLUMNS: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr):
    place = tl.arange(0, D)
    inside = place < width
    if COLUMNS:
        factor = tl.load(columns + place, mask=inside, other=0.0)
    for row in tl.range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0), num_stages=STAGES):
        start = row * width
        value = tl.load(x + start + place, mask=inside, other=0.0).to(tl.float32)
        if COLUMNS:
            value = value * factor
        scale = tl.maximum(tl.max(tl.abs(value), 0), SMALLEST) / TOP
        tl.store(scales + row, scale)
        tl.store(result + start + place, (value / scale).to(result.dtype.element_ty), mask=inside)


@torch.library.custom_op("mmdit::float8_rows", mutates_args=())
def float8_rows(x: Tensor, columns: Tensor | None) -> list[Tensor]:
    """`products.codes` of `x (m, k)`, `columns (k)` float32."""
    x = x.contiguous()
    rows, width = x.shape
    result, scales = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty((rows, 1), dtype=torch.float32)
    side = triton.next_power_of_2(width)
    options = {"STAGES": 4, "num_warps": 4} if side <= 2048 else {"STAGES": 3, "num_warps": 8}
    _rows[(min(rows, PROGRAMS),)](x, scales if columns is None else columns, result, scales, rows, width, columns is not None, side,
                                  **options)  # fmt: skip
    return [result, scales]


@float8_rows.register_fake
def _(x, columns):
    made = torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    return [made, x.new_empty((len(x), 1), dtype=torch.float32)]
