"""Tables that are made once and kept, of the last shapes that came."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

MOST = 256  # at 720p a grid takes 0.7 MB; a cache under pixel_budget may hold hundreds of them


def capturing() -> bool:
    """Return whether a CUDA graph is being made of what runs now."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def kept(make: Callable) -> Any:
    """Keep the last MOST results of `make`, by its arguments. What a CUDA graph was made with
    stays for
    good: the graph reads that memory whenever it is replayed, and knows nothing of who holds it."""
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
