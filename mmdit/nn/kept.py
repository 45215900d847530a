"""Make tables once, and keep those that were used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

MOST = 256  # at 720p a grid takes 0.7 MB; a cache under pixel_budget may hold hundreds of them


def capturing() -> bool:
    """Return whether the work of the current CUDA stream is being captured in a graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def kept(make: Callable) -> Any:
    """Keep the last MOST results of `make` that were used, by its arguments. A result that is used
    while a CUDA graph is captured stays for good: the graph reads its memory at every replay, and
    holds no reference to it."""
    recent: OrderedDict = OrderedDict()
    pinned: dict = {}

    @wraps(make)
    def get(*key):
        if key in pinned:
            return pinned[key]
        value = recent.pop(key, None)
        if value is None:
            value = make(*key)
        if capturing():
            pinned[key] = value
            return value
        recent[key] = value
        if len(recent) > MOST:
            recent.popitem(last=False)
        return value

    def clear() -> None:
        recent.clear()
        pinned.clear()

    result: Any = get
    result.cache_clear = clear
    result.cache_size = lambda: len(recent) + len(pinned)
    return result
