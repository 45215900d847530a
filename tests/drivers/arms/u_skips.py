"""Long skips (U-ViT, Bao et al. 2022, 2209.12152): the stream behind a block of the first half is
concatenated to the stream before its mirror image in the second half, and a linear layer makes a
change of both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdit.models import VideoMMDiT
from mmdit.nn.norm import add_gated
from tests.drivers.arms.wrapped import wrap


def u_skips(model: VideoMMDiT) -> None:
    """Change `model` in place. The changes are zero before training."""
    dim, depth = model.config.dim, len(model.blocks)
    count, streams = max(1, (depth - 1) // 2), {}
    for index in range(count):
        block = model.blocks[index]
        block.streams, block.pair = streams, index
        wrap(block, behind=put)
        block = model.blocks[depth - 1 - index]
        block.streams, block.pair = streams, index
        block.skip = nn.Linear(2 * dim, dim, bias=False)
        nn.init.zeros_(block.skip.weight)
        wrap(block, before=join)


def put(block: nn.Module, output: tuple) -> tuple:
    block.streams[block.pair] = add_gated(*output)
    return output


def join(block: nn.Module, x: Tensor, change, gate, *rest) -> tuple:
    x = add_gated(x, change, gate)
    both = torch.cat([x, block.streams.pop(block.pair)], -1)
    x = x + block.skip(both).to(x.dtype)
    return x, None, None, *rest
