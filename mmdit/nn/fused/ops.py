"""Make operators of torch from kernels (Triton)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.library import custom_op, triton_op, wrap_triton

from mmdit.nn import INTERPRETED


def operator(function: Callable) -> Any:
    """Register `function`, which launches kernels through `launch`, as the operator `mmdit::<its
    name>`. A compiled block launches the kernels itself, because calling an operator written in
    Python costs torch 0.1 ms of CPU time."""
    return (custom_op if INTERPRETED else triton_op)(
        f"mmdit::{function.__name__}", function, mutates_args=()
    )


def launch(kernel: Callable) -> Any:
    """Return `kernel` in the form that is launched, by `[grid](…)`, within an operator. Inductor
    demands that no argument of the kernel is called `stream`, and that numbers that are not whole
    are `tl.constexpr`: it would pass them as float64."""
    return kernel if INTERPRETED else wrap_triton(kernel)
