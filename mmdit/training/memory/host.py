"""Keep the host memory that tensors free, for the tensors that follow."""

from __future__ import annotations

import ctypes
from contextlib import suppress

import torch

# Of mallopt(3), with the values that switch both off.
NO_MAPPING, NO_TRIMMING = (-4, 0), (-1, -1)


def keep_freed_memory(device: torch.device) -> None:
    """Have the C library keep what is freed, for a process that computes on a CPU. Else the system
    maps every tensor of more than 32 MB anew and fills it with zeros. Where the library is not
    glibc, nothing happens.

    A clip of 80 frames at 448x256, two steps of `mmdit sample` on two cores: 82 in place of 144
    seconds of CPU time, 3.4 in place of 2.4 GB."""
    if device.type != "cpu":
        return
    with suppress(OSError, AttributeError, TypeError):  # no such function, or no such library
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in (NO_MAPPING, NO_TRIMMING):
            mallopt(parameter, value)
