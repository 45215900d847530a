"""Keep the activations of blocks for the backward pass, recompute them there, or offload them to
the memory of the CPU meanwhile."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from mmdit.nn.kept import capturing
from mmdit.nn.page_locked import PageLocked, laid_out


class Settings(Protocol):
    @property
    def checkpointing(self) -> bool: ...
    @property
    def checkpoint_every(self) -> int: ...
    @property
    def offload_activations(self) -> bool: ...


def recompute(block: nn.Module, *inputs: Any) -> Any:
    """Return `block(*inputs)`, and compute it again in the backward pass; until then, only the
    inputs and the state of the random generators are kept. That state cannot be read while a CUDA
    graph is captured, nor is it needed, because a network that draws numbers is not captured."""
    draws = not capturing()
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=draws)


class Activations:
    """Decide what the blocks of one forward pass keep for the backward pass. `settings` have the
    three keys of `Settings`.

    `recomputed(index)` says whether a block keeps its inputs alone: with `checkpointing`, every
    `checkpoint_every`-th block does, where gradients are wanted. `of_block(block, x)` is the
    context in which to call a block with the residual stream `x`. With `offload_activations`,
    tensors at least as large as `x` that the block saves go to the memory of the CPU while the next
    block computes, and come back while the block behind it computes backward. The numbers are the
    same, and the device holds those of at most two blocks.
    """

    def __init__(self, settings: Settings):
        asked = settings.checkpointing and torch.is_grad_enabled()
        self.every = settings.checkpoint_every if asked else 0
        self.offload = settings.offload_activations and torch.is_grad_enabled()
        self.newest: Sent | None = None

    def recomputed(self, index: int) -> bool:
        return self.every > 0 and index % self.every == 0

    def of_block(self, block: nn.Module, x: Tensor) -> AbstractContextManager[object]:
        if not self.offload or not can_offload(x):
            return nullcontext()
        if self.newest is not None and self.newest.before is not None:
            self.newest.before.let_go()
        sent = self.newest = Sent(self.newest)
        size, weights = x.numel(), {storage_of(weight) for weight in block.parameters()}

        def send(kept: Tensor) -> Tensor | Away:
            large = kept.numel() >= size and is_dense(kept) and storage_of(kept) not in weights
            return sent.add(kept) if large else kept

        return saved_tensors_hooks(send, lambda kept: kept.back() if type(kept) is Away else kept)


def checkpointing_options(checkpointing: bool, offload: bool) -> list[str]:
    """Return the options that could still save memory, as overrides of a config."""
    options = [] if checkpointing else ["model.checkpointing=true"]
    return options if offload else [*options, "model.offload_activations=true"]


def can_offload(x: Tensor) -> bool:
    """Return whether `x` may be offloaded: it lies in the memory of a GPU."""
    return x.is_cuda


def storage_of(x: Tensor) -> int:
    """Return an identifier that is the same for tensors that share their memory."""
    return x.untyped_storage()._cdata


def is_dense(x: Tensor) -> bool:
    """Return whether `x` fills its storage, in whatever order of axes."""
    return x.nbytes == x.untyped_storage().nbytes()


def same(x: Tensor, y: Tensor) -> bool:
    """Return whether two dense tensors are the same numbers in the same memory."""
    layouts = ((z.shape, z.stride(), z.dtype, storage_of(z)) for z in (x, y))
    return next(layouts) == next(layouts)


class Sent:
    """The tensors that one block has sent to the CPU, as long as they are needed. `before`: those
    of the block before it, which the backward pass needs next."""

    def __init__(self, before: Sent | None):
        self.before = before
        self.tensors: list[weakref.ref[Away]] = []
        self.returning = False

    def add(self, x: Tensor) -> Away:
        """Send `x` to the CPU, once, however often the block saves it."""
        for away in self.wanted():
            if away.leaving is not None and same(away.leaving, x):
                away.uses += 1
                return away
        away = Away(x, self)
        self.tensors.append(weakref.ref(away))
        return away

    def wanted(self) -> list[Away]:
        tensors = (tensor() for tensor in self.tensors)
        return [away for away in tensors if away is not None]

    def let_go(self) -> None:
        """Release the tensors on the device, once they have been copied."""
        for away in self.wanted():
            away.let_go()

    def come(self) -> None:
        """Start the copies back to the device, once, beginning with the tensor that was sent
        last."""
        if not self.returning:
            self.returning = True
            for away in reversed(self.wanted()):
                away.come()


class Away:
    """Holds the numbers of a dense tensor in the memory of the CPU. `uses`: how often a backward
    pass asks for it.

    `leaving` keeps the tensor on the device alive until later work there is made to wait for the
    copy. So its memory is reused only after the copy, however far ahead the CPU is."""

    def __init__(self, x: Tensor, sent: Sent):
        self.layout, self.dtype, self.sent = (x.shape, x.stride()), x.dtype, sent
        self.uses, self.given = 1, 0
        self.channel = channel(x.device)
        memory = self.channel.memory.take(x.nbytes)
        weakref.finalize(self, self.channel.memory.give, memory)
        self.numbers = laid_out(memory, x)
        self.arriving: Tensor | None = None
        self.leaving: Tensor | None = x
        self.done = self.channel.copy(self.numbers, x)

    def let_go(self) -> None:
        self.channel.wait(self.done)
        self.leaving = None

    def come(self) -> None:
        """Start the copy back, unless the tensor is still on the device or already on its way."""
        if self.leaving is None and self.arriving is None:
            device = self.channel.device
            self.arriving = torch.empty_strided(*self.layout, dtype=self.dtype, device=device)
            self.done = self.channel.copy(self.arriving, self.numbers)

    def back(self) -> Tensor:
        """Return the tensor on its device, and start the copies of the block before it."""
        self.sent.come()
        self.come()
        self.channel.wait(self.done)
        here = self.leaving if self.arriving is None else self.arriving
        assert here is not None
        self.given += 1
        if self.given % self.uses == 0:
            self.leaving = self.arriving = None
        if self.sent.before is not None:
            self.sent.before.come()
        return here


class Channel:
    """Copies between a device and the memory of the CPU, one after another on a CUDA stream of its
    own. All copies to and from `memory` go through it, so a piece may be taken again as soon as it
    is given back."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.memory = PageLocked(pinned=self.stream is not None)

    @torch.no_grad()
    def copy(self, to: Tensor, what: Tensor) -> torch.cuda.Event | None:
        """Copy `what` into `to` after the work that is queued on the device; return an event that
        says when it is done (None on a CPU)."""
        if self.stream is None:
            to.copy_(what)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            to.copy_(what, non_blocking=True)
            return self.stream.record_event()

    def wait(self, done: torch.cuda.Event | None) -> None:
        """Make later work on the device wait for a copy."""
        if done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)


channel = cache(Channel)
