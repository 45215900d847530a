"""How kernels (Triton) become operators of torch, and the sum that several of them end with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton
from triton.runtime.jit import JITFunction

COLUMNS, TALLEST = 128, 16  # of a program's tile


def operator(function: Callable) -> Callable:
    """`function`, which launches kernels through `launch`, as the operator `mmdit::<its name>`. A compiled block launches them
    itself, in a fifth of the time that torch takes to call an operator written in Python."""
    compiles = isinstance(_fold, JITFunction)  # not under TRITON_INTERPRET
    return (triton_op if compiles else custom_op)(f"mmdit::{function.__name__}", function, mutates_args=())


def launch(kernel: Callable) -> Callable:
    """To be launched by `[grid](…)` within an operator. For Inductor's sake no argument of the kernel may be called `stream`, and
    numbers that are not whole must be `tl.constexpr`: it would pass them as float64."""
    return wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel


@triton.jit
def _fold(parts, result, count, size, ROWS: tl.constexpr, D: tl.constexpr):
    outer, place = tl.program_id(1).to(tl.int64), tl.program_id(0) * D + tl.arange(0, D)
    rows, inside = tl.arange(0, ROWS), place < size
    total = tl.zeros((ROWS, D), tl.float32)
    for first in range(0, count, ROWS):
        row = outer * count + first + rows
        there = (first + rows < count)[:, None] & inside[None, :]
        total += tl.load(parts + row[:, None] * size + place[None, :], mask=there, other=0.0)
    tl.store(result + outer * size + place, tl.sum(total, 0).to(result.dtype.element_ty), mask=inside)


def fold(parts: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sums of `parts (o, p, …)` float32, which the programs of a kernel left, over p → `(o, …)` of `dtype`; one launch, where
    torch's sum of few long rows takes three times as long and clears a counter before it."""
    outer, count, *shape = parts.shape
    result = parts.new_empty((outer, *shape), dtype=dtype)
    size, rows = result.numel() // outer, min(TALLEST, triton.next_power_of_2(count))
    launch(_fold)[(triton.cdiv(size, COLUMNS), outer)](parts, result, count, size, rows, COLUMNS)
    return result
