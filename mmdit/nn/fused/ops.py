"""Make operators of torch from kernels (Triton)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.library import custom_op, triton_op, wrap_triton

from mmdit.nn import INTERPRETED


def operator(function: Callable) -> Any:
    """Make `function`, which launches kernels through `launch`, the operator `mmdit::<its name>`. A
    compiled block launches them itself: to call an operator written in Python takes torch 0.1 ms of
    the CPU."""
    return (custom_op if INTERPRETED else triton_op)(
        f"mmdit::{function.__name__}", function, mutates_args=()
    )


def launch(kernel: Callable) -> Any:
    """Return `kernel` as it is launched, by `[grid](…)`, within an operator. For Inductor's sake no
    argument of the kernel may be called `stream`, and numbers that are not whole must be
    `tl.constexpr`: it would pass them as float64."""
    return kernel if INTERPRETED else wrap_triton(kernel)
