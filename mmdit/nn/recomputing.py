"""Blocks that are recomputed in the backward pass, and what they start from, which may wait in the
memory of the CPU meanwhile."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


class Settings(Protocol):
    @property
    def checkpointing(self) -> bool: ...
    @property
    def checkpoint_every(self) -> int: ...
    @property
    def checkpoint_offload(self) -> bool: ...


def recompute(block: nn.Module, *inputs: Any) -> Any:
    """Return `block(*inputs)`, which is computed again in the backward pass; only the inputs are
    kept for it."""
    return checkpoint(block, *inputs, use_reentrant=False)


class Recomputing:
    """What a forward pass does with its blocks. `applies(index)`: whether a block is recomputed,
    every `checkpoint_every`-th one with `checkpointing`, where gradients are wanted. `inputs(x)`:
    the context for such a block and for what leads to its input, in which `checkpoint_offload`
    sends away what is kept for the backward pass and has the shape of the stream `x`. In that pass
    each tensor comes back while the block behind it computes: the same numbers, and two of them on
    the device at a time. `settings` have these three, by their names.
    """

    def __init__(self, settings: Settings):
        asked = settings.checkpointing and torch.is_grad_enabled()
        self.every = settings.checkpoint_every if asked else 0
        self.offload = settings.checkpoint_offload
        self.newest: Away | None = None

    def applies(self, index: int) -> bool:
        return self.every > 0 and index % self.every == 0

    def inputs(self, x: Tensor) -> AbstractContextManager[object]:
        if not self.offload or not leaves(x):
            return nullcontext()
        shape = x.shape

        def send(kept: Tensor) -> Tensor | Away:
            if kept.shape != shape or not kept.is_contiguous():
                return kept
            self.newest = Away(kept, self.newest)
            return self.newest

        return saved_tensors_hooks(send, lambda kept: kept.back() if type(kept) is Away else kept)


def checkpointing_options(checkpointing: bool, offload: bool) -> list[str]:
    """Return what is left to try where memory is short, as overrides of a config."""
    options = [] if checkpointing else ["model.checkpointing=true"]
    return options if offload else [*options, "model.checkpoint_offload=true"]


def leaves(x: Tensor) -> bool:
    """Return whether the memory of `x` is scarce: that of a GPU."""
    return x.is_cuda


def page_locked_bytes(size: int) -> int:
    """Return what `size` bytes of page-locked memory take: torch has powers of two of it."""
    return 1 << (size - 1).bit_length()


def host_memory(size: int, pinned: bool) -> Tensor:
    """Return `size` bytes of the memory of the CPU, page-locked ones if `pinned`."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


class Away:
    """The numbers of a contiguous tensor in the memory of the CPU. `before`: what went before it,
    and is wanted after it.

    `leaving` holds the tensor until the work that comes next on the device waits for the copy: so
    its memory is used again in the order of that work, however far the CPU is ahead."""

    def __init__(self, x: Tensor, before: Away | None):
        self.like, self.before = (x.shape, x.dtype, x.device), before
        self.channel = channel(x.device)
        memory = self.channel.take(x.nbytes)
        weakref.finalize(self, self.channel.give, memory)
        self.numbers = memory[: x.nbytes].view(x.dtype).view(x.shape)
        self.arriving: Tensor | None = None
        if before is not None:
            before.let_go()
        self.leaving: Tensor | None = x
        self.done = self.channel.copy(self.numbers, x)

    def let_go(self) -> None:
        """Give up the tensor on the device, once it has been copied."""
        self.channel.wait(self.done)
        self.leaving = None

    def come(self) -> None:
        """Begin the way back."""
        self.let_go()
        shape, dtype, device = self.like
        self.arriving = torch.empty(shape, dtype=dtype, device=device)
        self.done = self.channel.copy(self.arriving, self.numbers)

    def back(self) -> Tensor:
        """Return the tensor on its device again, and let the one before it come."""
        if self.leaving is None and self.arriving is None:
            self.come()
        self.channel.wait(self.done)
        here = self.leaving if self.arriving is None else self.arriving
        assert here is not None
        self.leaving = self.arriving = None
        if self.before is not None and self.before.arriving is None:
            self.before.come()
        return here


class Channel:
    """The way between a device and the memory of the CPU: a stream of its own, on which copies
    follow one another, and memory that was given back, by size. All copies go through it, so memory
    may be taken again as soon as it is given."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.free: dict[int, list[Tensor]] = {}

    def take(self, size: int) -> Tensor:
        """Return at least `size` bytes: all that page-locked memory of that size takes."""
        size = page_locked_bytes(size)
        unused = self.free.get(size)
        return unused.pop() if unused else host_memory(size, self.stream is not None)

    def give(self, memory: Tensor) -> None:
        self.free.setdefault(len(memory), []).append(memory)

    def copy(self, to: Tensor, what: Tensor) -> torch.cuda.Event | None:
        """Copy behind what the device has been told to do; return what says that it is done."""
        if self.stream is None:
            to.copy_(what)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            to.copy_(what, non_blocking=True)
            return self.stream.record_event()

    def wait(self, done: torch.cuda.Event | None) -> None:
        """Have what the device is told next wait for a copy."""
        if done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)


channel = cache(Channel)
