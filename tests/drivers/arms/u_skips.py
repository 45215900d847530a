"""Long skips (U-ViT, Bao et al. 2022, 2209.12152): the stream behind a block of the first half is
concatenated to the stream before its mirror image in the second half, and a linear layer makes a
change of both."""

from __future__ import annotations

import torch
from torch import nn

from mmdit.models import VideoMMDiT
from mmdit.nn.norm import add_gated


def u_skips(model: VideoMMDiT) -> None:
    """Change `model` in place. The changes are zero before training."""
    dim, depth = model.config.dim, len(model.blocks)
    count, streams = max(1, (depth - 1) // 2), []
    for block in model.blocks[:count]:
        block.streams = streams
        block.register_forward_hook(push)
    for block in model.blocks[depth - count :]:
        block.streams = streams
        block.skip = nn.Linear(2 * dim, dim, bias=False)
        nn.init.zeros_(block.skip.weight)
        block.register_forward_pre_hook(join)


def push(block: nn.Module, inputs: tuple, output: tuple) -> None:
    block.streams.append(add_gated(*output))


def join(block: nn.Module, inputs: tuple) -> tuple:
    x, change, gate, *rest = inputs
    x = add_gated(x, change, gate)
    x = x + block.skip(torch.cat([x, block.streams.pop()], -1)).to(x.dtype)
    return x, None, None, *rest
