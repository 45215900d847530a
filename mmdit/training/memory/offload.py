"""Frozen blocks whose matrices are kept in the memory of the CPU, and are copied to the GPU one
block ahead of the computation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmdit.config import ConfigError
from mmdit.nn.page_locked import PageLocked, aligned, page_locked_bytes
from mmdit.nn.stored_weights import Parts, StoredWeight, linear_layers, parts_of
from mmdit.training.learner import Learner


class Streamer:
    """Streams the frozen weights of the linear layers of `blocks`, in the order in which the blocks
    compute, from CPU to GPU memory. The weights are moved to page-locked memory. On `device` there
    is memory for two blocks: while one block computes, a second CUDA stream fills the other half
    with the next block in the current direction. The direction turns round at the ends, so forward,
    backward and recomputation all find their block there. ValueError if a block has nothing
    frozen."""

    def __init__(self, blocks: list[nn.Module], device: torch.device):
        self.device = device
        # The pinned CPU memory of each block, and the two buffers of GPU memory that alternate.
        memory, sizes = PageLocked(device.type == "cuda"), [*map(_size, blocks)]
        if 0 in sizes:
            raise ValueError(
                f"block {sizes.index(0)} has no frozen linear layer: all its weights are trained"
            )
        self.pinned = []
        for number, (block, size) in enumerate(zip(blocks, sizes, strict=True)):
            piece = memory.take(size, wanted=sizes[number:].count(size))
            self.pinned.append(self._move(number, block, piece[:size]))
        largest = max(map(len, self.pinned))
        self.slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        self.holds: list[int | None] = [None, None]
        self.last, self.direction = -1, 1
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.arrived = [torch.cuda.Event() for _ in range(2)] if self.side else []

    def _move(self, number: int, block: nn.Module, pinned: Tensor) -> Tensor:
        layers = linear_layers(block)
        kept, offsets = _layout(layers)
        places = iter(offsets)
        for layer, parts in zip(layers, kept, strict=True):
            views = []
            for part in parts:
                view = partial(_view, next(places), part.nbytes, part.dtype, part.shape)
                view(pinned).copy_(part)
                views.append(view)
            stored = StoredWeight(
                *_both(views, pinned),
                layer.weight.dtype,
                self.device,
                partial(self._fetch, number, views),
                self.forget,
                getattr(layer.weight, "multiplies_codes", False),
            )
            layer.weight = nn.Parameter(stored, requires_grad=False)
        return pinned

    def _fetch(self, number: int, views: Sequence[Callable[[Tensor], Tensor]]) -> Parts:
        if number != self.last:
            if self.last >= 0:
                self.direction = 1 if number > self.last else -1
            self.last = number
            count = len(self.pinned)
            ahead = next(
                (n for n in (number + self.direction, number - self.direction) if 0 <= n < count),
                number,
            )
            for wanted, other in ((number, ahead), (ahead, number)):
                if wanted not in self.holds:
                    self._copy(wanted, int(self.holds[0] == other))
            if self.side:
                torch.cuda.current_stream(self.device).wait_event(
                    self.arrived[self.holds.index(number)]
                )
        return _both(views, self.slots[self.holds.index(number)])

    def forget(self) -> None:
        """Mark the GPU buffers as empty, because pinned memory is about to be written to."""
        if self.side:
            self.side.synchronize()
        self.holds, self.last = [None, None], -1

    def _copy(self, number: int, slot: int) -> None:
        pinned = self.pinned[number]
        self.holds[slot] = number
        if self.side is None:
            self.slots[slot][: len(pinned)].copy_(pinned)
            return
        # Wait for the work that uses the block in this buffer.
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            self.slots[slot][: len(pinned)].copy_(pinned, non_blocking=True)
            self.arrived[slot].record(self.side)


def _layout(layers: list[nn.Linear]) -> tuple[list[list[Tensor]], list[int]]:
    """Return the tensors to keep of each layer, and the byte offset of each of them, followed by
    the total size."""
    kept = [parts_of(layer.weight) for layer in layers]
    sizes = (aligned(part.nbytes) for parts in kept for part in parts)
    return kept, [0, *accumulate(sizes)]


def _size(block: nn.Module) -> int:
    """Return how many bytes of a block a `Streamer` keeps."""
    return _layout(linear_layers(block))[1][-1]


def _both(views: Sequence[Callable[[Tensor], Tensor]], memory: Tensor) -> Parts:
    """Return the views of codes and scales (None without scales) in `memory`."""
    codes, *scale = (view(memory) for view in views)
    return codes, scale[0] if scale else None


def slot_bytes(blocks: Iterable[nn.Module]) -> tuple[int, int, int]:
    """Return the bytes that a `Streamer` of these blocks would remove from the device, allocate on
    the device, and allocate on the CPU."""
    sizes = [*map(_size, blocks)]
    return sum(sizes), 2 * max(sizes), page_locked_bytes(sizes)


def _view(offset: int, size: int, dtype: torch.dtype, shape: torch.Size, memory: Tensor) -> Tensor:
    return memory[offset : offset + size].view(dtype).view(shape)


def move_to_device(learner: Learner, offload_blocks: int, device: torch.device) -> None:
    """Move `learner` to `device`, but the frozen matrices of its first `offload_blocks` blocks (of
    each expert) to page-locked memory. On a CPU there is nothing to gain, and a warning says so.
    ConfigError if there are fewer blocks, or if one of them has no frozen layer.
    """
    if offload_blocks and device.type == "cuda":
        _offload(learner, offload_blocks, device)
    elif offload_blocks:
        warnings.warn(
            f"train.offload_blocks is {offload_blocks}, but training runs on the {device.type}:"
            " weights stay as they are",
            stacklevel=2,
        )
    learner.to(device)
    # All processes read the same stored weights: DDP must not broadcast them.
    stored = [
        name for name, weight in learner.named_parameters() if isinstance(weight, StoredWeight)
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(learner, stored)


def _offload(learner: Learner, count: int, device: torch.device) -> None:
    networks: list[Any] = [
        part
        for part in learner.model.modules()
        if isinstance(getattr(part, "blocks", None), nn.ModuleList)
    ]
    parameters = sum(len(list(network.parameters())) for network in networks)
    problem = ""
    if parameters > len(list(learner.model.parameters())):
        problem = "two experts share these blocks; set it to 0"
    for network in networks:
        if count > len(network.blocks):
            problem = problem or f"the model has {len(network.blocks)} blocks"
        if not problem:
            try:
                Streamer(list(network.blocks[:count]), device)
            except ValueError as error:
                problem = str(error)
    if problem:
        raise ConfigError("train.offload_blocks", f"is {count}, but {problem}")
