"""Hidden tokens of a network in training, for alignments."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdit.config import ConfigError
from mmdit.models import VideoMMDiT
from mmdit.nn.norm import add_gated
from tests.drivers.arms.wrapped import wrap

EARLY = 1 / 3  # the part of the blocks below the student's hidden tokens


def reveal(model: VideoMMDiT, count: int) -> None:
    """Have calls of `model` in training return its prediction and, behind it along the last axis,
    the stream after the first `count` blocks: `(b, f, r, c, channels + d)`. One tensor, so that
    steps are still replayed as graphs."""
    if model.span is not None:
        raise ConfigError("tread.enabled", "is true, but alignments need the tokens of every place")
    wrap(model.blocks[count - 1], behind=keep_stream)
    model.revealed = count - 1
    wrap(model, behind=append_stream)


def keep_stream(block: nn.Module, output: tuple) -> tuple:
    if block.training:
        block.stream = add_gated(*output)
    return output


def append_stream(model: VideoMMDiT, prediction: Tensor) -> Tensor:
    if not model.training:
        return prediction
    block, grid = model.blocks[model.revealed], model.windows(*prediction.shape[2:4])
    stream, block.stream = block.stream, None
    return torch.cat([prediction, grid.merge(stream).to(prediction.dtype)], -1)


def projector(dim: int, width: int) -> nn.Sequential:
    """Return the small network between the student's hidden tokens and what they are aligned
    with."""
    return nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, width))
