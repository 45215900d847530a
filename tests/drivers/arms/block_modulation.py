"""A modulation for each block (DiT, Peebles & Xie 2022, 2212.09748): every block has a linear layer
from time and caption to its shifts, scales and gates, where the product has one for all blocks and
a table of each."""

from __future__ import annotations

from torch import Tensor, nn

from mmdit.models import VideoMMDiT
from mmdit.models.video_mmdit import SUBLAYERS
from tests.drivers.arms.wrapped import wrap


def block_modulation(model: VideoMMDiT) -> None:
    """Change `model` in place: the layers of all blocks are one, of which each takes its part."""
    dim, depth = model.config.dim, len(model.blocks)
    model.modulation = nn.Linear(dim, 3 * SUBLAYERS * depth * dim)
    nn.init.zeros_(model.modulation.weight)
    nn.init.zeros_(model.modulation.bias)
    for index, block in enumerate(model.blocks):
        block.part = slice(index * dim, (index + 1) * dim)
        wrap(block, before=take_part)


def take_part(block, x: Tensor, change, gate, modulation: Tensor, *rest) -> tuple:
    if gate is not None and gate.shape[-1] != x.shape[-1]:  # `no_change`, as wide as all parts
        change = gate = None
    return x, change, gate, modulation[..., block.part], *rest
