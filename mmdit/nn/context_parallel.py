"""Let several processes share one clip: each computes some of its frames, and around attention
along time they exchange frames for places, as Jacobs et al. 2023 (2309.14509) exchange tokens for
heads. All else that a block does stays within one frame.

Every process then has the loss of the whole clip, and gradients go back the way that values came:
to a share come those of the losses of all processes that share the clip. So the mean of the
gradients over all processes, which DDP and FSDP take, is the gradient of the mean loss, without a
further factor.

Axes: b sample · f frame · l place in the frame · d width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd


class Context(NamedTuple):
    """The processes that share each clip: the name of their group, the place of this one among
    them, and how many they are."""

    group: Any  # a name, which compiled blocks can hold
    rank: int
    size: int


def lengths(count: int, size: int) -> list[int]:
    """Return how many of `count` each of `size` processes has, as `Tensor.tensor_split` cuts."""
    each, more = divmod(count, size)
    return [each + 1] * more + [each] * (size - more)


def exchange(parts: Sequence[Tensor], axis: int, joined: list[int], context: Context) -> Tensor:
    """Send `parts[r]` to the process r of `context`, and return what all of them sent here, joined
    along `axis`, where that of process r is `joined[r]` long. Its other sides are those of the part
    that this process keeps."""
    shape = parts[context.rank].shape
    shapes = [(*shape[:axis], length, *shape[axis + 1 :]) for length in joined]
    sizes = [math.prod(shape) for shape in shapes]
    sent = torch.cat([part.flatten() for part in parts])
    received = all_to_all_single_autograd(
        sent, sizes, [part.numel() for part in parts], context.group
    )
    pieces = zip(received.split(sizes), shapes, strict=True)
    return torch.cat([piece.view(shape) for piece, shape in pieces], axis)


class ClipShare(NamedTuple):
    """The part of this process in a clip of so many `frames`. The first processes have a frame or a
    place more than the last where the numbers do not divide."""

    context: Context
    frames: int

    def cut(self, x: Tensor, axis: int) -> Tensor:
        """Return the frames of this process, which lie along `axis`; one for all stays as it is."""
        if x.shape[axis] == 1:
            return x
        return x.tensor_split(self.context.size, axis)[self.context.rank]

    def places(self, count: int) -> int:
        """Return how many of `count` places this process has."""
        return lengths(count, self.context.size)[self.context.rank]

    def to_places(self, x: Tensor) -> Tensor:
        """Exchange this process's frames with all places `x (b, f, l, d)` for all frames with its
        places."""
        parts = x.tensor_split(self.context.size, 2)
        return exchange(parts, 1, lengths(self.frames, self.context.size), self.context)

    def to_frames(self, x: Tensor, places: int) -> Tensor:
        """Undo `to_places`, where a frame has so many places."""
        parts = x.tensor_split(self.context.size, 1)
        return exchange(parts, 2, lengths(places, self.context.size), self.context)

    def whole(self, x: Tensor) -> Tensor:
        """Return the whole clip of the frames `x (b, f, …)` of each process, on every process."""
        parts = [x] * self.context.size
        return exchange(parts, 1, lengths(self.frames, self.context.size), self.context)
