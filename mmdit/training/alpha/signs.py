"""Measure how consistent gradients are: the share of their elements that have the same sign as the
last time. 0.5 is chance, and below it steps are too long. One bit is kept for each parameter and
expert, so that each expert is compared with its own history.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdit.training.memory.shards import whole


def pack(flags: Tensor) -> Tensor:
    """Pack `(n,)` bool into `(⌈n / 8⌉,)` uint8. Eight bytes of 0 or 1 are read as one integer; the
    product moves byte i to bit 56 + i of it."""
    eight = nn.functional.pad(flags.view(torch.uint8), (0, -len(flags) % 8)).view(torch.int64)
    return (eight * 0x0102040810204080 >> 56).to(torch.uint8)


def unpack(bits: Tensor, count: int) -> Tensor:
    """Undo `pack`; return `(count,)` bool."""
    table = (
        torch.arange(256, device=bits.device)[:, None] >> torch.arange(8, device=bits.device) & 1
    )
    return table.bool()[bits.int()].flatten()[:count]


class _SignHistory:
    """Remembers, for every element of `parameters`, the sign of its last gradient that was not 0. A
    tensor whose gradients have all been 0 (LoRA's A in the first step) has no signs yet; an element
    whose gradient is 0 is not counted, and keeps its bit. Sharded gradients are gathered."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        device = parameters[0].device
        self.sizes = torch.tensor([p.numel() for p in parameters], device=device)
        self.count = int(self.sizes.sum())
        self.bits = torch.zeros(-(-self.count // 8), dtype=torch.uint8, device=device)
        self.seen = torch.zeros(len(parameters), dtype=torch.uint8, device=device)

    def compare(self, skipped: Tensor) -> Tensor:
        gradients = [
            whole(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
            for p in self.parameters
        ]
        flat = torch.cat(gradients)
        positive, nonzero = flat > 0, flat != 0
        old = unpack(self.bits, self.count)
        known = nonzero & torch.repeat_interleave(
            self.seen.bool(), self.sizes, output_size=self.count
        )
        result = torch.stack(
            [torch.count_nonzero(known & (positive == old)), torch.count_nonzero(known)]
        ).double()
        keep = skipped.bool()
        self.bits = torch.where(keep, self.bits, pack(torch.where(nonzero, positive, old)))
        moved = torch.stack(torch._foreach_norm(gradients, float("inf"))) > 0
        self.seen = torch.where(keep, self.seen, self.seen | moved.to(torch.uint8))
        return torch.where(keep, 0.0, result)


class Signs:
    """Compares the signs of gradients. `groups`: expert → its parameters, at least one. Nothing
    waits for the device."""

    def __init__(self, groups: dict[str, list[nn.Parameter]]):
        self.history = {name: _SignHistory(parameters) for name, parameters in groups.items()}

    @torch.no_grad()
    def compare(self, expert: str, skipped: Tensor) -> Tensor:
        """Compare the gradients of a backward pass with the last signs; return `(2,)` float64, the
        numbers of elements that agree and that were compared. A skipped step changes nothing."""
        return self.history[expert].compare(skipped)

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}::{part}": getattr(history, part)
            for name, history in self.history.items()
            for part in ("bits", "seen")
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` returned. ValueError if it belongs to other parameters."""
        current = self.tensors()
        shapes = {name: tensor.shape for name, tensor in current.items()}
        if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
            raise ValueError(
                "the stored signs are of other adapters: resume with the run's lora: and experts:"
                " sections"
            )
        for name, tensor in tensors.items():
            current[name].copy_(tensor)
