"""Let several processes share one clip. Each computes some of its frames or tokens, and attention
that goes beyond them is divided otherwise: by places, where it goes along time, or by heads (Jacobs
et al. 2023, 2309.14509). The processes exchange the ones for the others before and after it.

Every process then has the loss of the whole clip, and gradients go back the way that values came:
to a part come those of the losses of all processes that share the clip. So the mean of the
gradients over all processes, which DDP and FSDP take, is the gradient of the mean loss, without a
further factor.
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


class Share(NamedTuple):
    """The part of this process in what is `length` long along an axis: the frames of a clip, or its
    tokens. Where numbers do not divide, the first processes have one more than the last."""

    context: Context
    length: int

    def cut(self, x: Tensor, axis: int) -> Tensor:
        """Return the part of this process along `axis`; one for all stays as it is."""
        if x.shape[axis] == 1:
            return x
        return x.tensor_split(self.context.size, axis)[self.context.rank]

    def part_of(self, count: int) -> int:
        """Return how many this process has of `count` others, such as places or heads."""
        return lengths(count, self.context.size)[self.context.rank]

    def to_whole(self, x: Tensor, axis: int, other: int) -> Tensor:
        """Exchange `x`, this process's part along `axis`, for what is whole along it, and this
        process's part along `other`."""
        parts = x.tensor_split(self.context.size, other)
        return exchange(parts, axis, lengths(self.length, self.context.size), self.context)

    def to_part(self, x: Tensor, axis: int, other: int, count: int) -> Tensor:
        """Undo `to_whole`, for `count` along `other`."""
        parts = x.tensor_split(self.context.size, axis)
        return exchange(parts, other, lengths(count, self.context.size), self.context)

    def gather(self, x: Tensor, axis: int) -> Tensor:
        """Return the parts of all processes along `axis`, on every process."""
        parts = [x] * self.context.size
        return exchange(parts, axis, lengths(self.length, self.context.size), self.context)
