"""Page-locked memory of the CPU, which a GPU copies to and from while it computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes, as CUDA's own allocations have it
MOST = 8  # pieces that share one allocation, at most


def host_memory(size: int, pinned: bool) -> Tensor:
    """Return `size` bytes of the memory of the CPU, page-locked ones if `pinned`."""
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)


def laid_out(memory: Tensor, like: Tensor) -> Tensor:
    """Return the first bytes of `memory` as a tensor of the type, shape and strides of `like`,
    which must be dense."""
    return memory[: like.nbytes].view(like.dtype).as_strided(like.shape, like.stride())


def aligned(size: int) -> int:
    """Return `size` bytes rounded up, so that what lies behind them is aligned, too."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def rounded(size: int) -> int:
    """Return how many bytes torch allocates for `size` bytes of page-locked memory: a power of
    two."""
    return 1 << (size - 1).bit_length()


def pieces_together(size: int, wanted: int) -> int:
    """Return how many pieces of `size` bytes, at most `wanted`, should share one allocation to
    waste least of it."""
    return max(range(1, min(wanted, MOST) + 1), key=lambda n: n * size / rounded(n * size))


def page_locked_bytes(sizes: Iterable[int]) -> int:
    """Return how many bytes of page-locked memory pieces of these `sizes` take in all, where it is
    known how many of each are wanted."""
    total = 0
    for size, wanted in Counter(map(aligned, sizes)).items():
        while wanted:
            together = pieces_together(size, wanted)
            total += rounded(together * size)
            wanted -= together
    return total


class PageLocked:
    """Gives out memory of the CPU in pieces, page-locked ones if `pinned`, and takes them back.
    Several pieces share an allocation where that wastes less."""

    def __init__(self, pinned: bool):
        self.pinned = pinned
        self.free: dict[int, list[Tensor]] = {}
        self.made: Counter[int] = Counter()

    def take(self, size: int, wanted: int = 0) -> Tensor:
        """Return a piece of at least `size` bytes, and less than twice as many after alignment.
        `wanted`: how many such pieces will be taken from now on; 0 stands for as many as there are
        already."""
        size = aligned(size)
        unused = [piece for piece, free in self.free.items() if free and size <= piece < 2 * size]
        if unused:
            return self.free[min(unused)].pop()
        together = pieces_together(size, wanted or max(1, self.made[size]))
        self.made[size] += together
        memory = host_memory(together * size, self.pinned)
        first, *others = memory.split(size)
        self.free.setdefault(size, []).extend(others)
        return first

    def give(self, memory: Tensor) -> None:
        self.free.setdefault(len(memory), []).append(memory)
