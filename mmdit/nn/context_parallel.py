"""Let several processes share one clip. Each computes a part of its frames or tokens. Attention
that reaches beyond this part is divided along another axis: attention along time by places, other
attention by heads (Jacobs et al. 2023, 2309.14509). Before it, processes exchange their parts for
parts along that axis, and after it they exchange them back.

Every process then has the loss of the whole clip. Gradients take the same exchanges backwards, so
that each part gets the sum of the gradients of all losses of the processes that share the clip. So
the mean of the gradients over all processes, which DDP and FSDP take, is the gradient of the mean
loss, without a further factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd


class Context(NamedTuple):
    """The processes that share each clip: the name of their group, the rank of this one among them,
    and how many they are."""

    group: Any  # the name of a process group, because compiled blocks can hold a name
    rank: int
    size: int


def lengths(count: int, size: int) -> list[int]:
    """Return how many of `count` items each of `size` processes has, as `Tensor.tensor_split`
    cuts."""
    each, more = divmod(count, size)
    return [each + 1] * more + [each] * (size - more)


def exchange(parts: Sequence[Tensor], axis: int, joined: list[int], context: Context) -> Tensor:
    """Send `parts[r]` to process r of `context`, and return the parts that all processes sent to
    this one, joined along `axis`, along which that of process r is `joined[r]` long. Along other
    axes they must be as long as the part that this process keeps."""
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
    """This process's part of an axis of `length` frames or tokens of a clip. Where the length is
    not a multiple of the number of processes, the first of them have one more than the last."""

    context: Context
    length: int

    def cut(self, x: Tensor, axis: int) -> Tensor:
        """Return the part of this process along `axis`; a length of 1 there is for all, and
        stays."""
        if x.shape[axis] == 1:
            return x
        return x.tensor_split(self.context.size, axis)[self.context.rank]

    def part_of(self, count: int) -> int:
        """Return how many of `count` other things, such as places or heads, this process has."""
        return lengths(count, self.context.size)[self.context.rank]

    def to_whole(self, x: Tensor, axis: int, other: int) -> Tensor:
        """Exchange `x`, this process's part along `axis`, for a tensor that is whole along `axis`
        and this process's part along `other`."""
        parts = x.tensor_split(self.context.size, other)
        return exchange(parts, axis, lengths(self.length, self.context.size), self.context)

    def to_part(self, x: Tensor, axis: int, other: int, count: int) -> Tensor:
        """Undo `to_whole`; `count` is the whole length along `other`."""
        parts = x.tensor_split(self.context.size, axis)
        return exchange(parts, other, lengths(count, self.context.size), self.context)

    def gather(self, x: Tensor, axis: int) -> Tensor:
        """Return the parts of all processes, joined along `axis`, on every process."""
        parts = [x] * self.context.size
        return exchange(parts, axis, lengths(self.length, self.context.size), self.context)
