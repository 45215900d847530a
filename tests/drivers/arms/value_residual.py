"""Value residual (ResFormer, Zhou et al. 2024, 2410.17897): in space, every block attends to a
mixture of its own values and the first block's, whose share each block learns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdit.config import ConfigError
from mmdit.models import VideoMMDiT
from tests.drivers.arms.wrapped import wrap

START = 0.5  # the first block's share before training


class Values(nn.Linear):
    """The values of a block; `first` holds those of the first block, from its call on."""

    def __init__(self, layer: nn.Linear, first: list[Tensor]):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight, self.first = layer.weight, first

    def forward(self, x: Tensor) -> Tensor:
        self.first[:] = [super().forward(x)]
        return self.first[0]


class MixedValues(Values):
    def __init__(self, layer: nn.Linear, first: list[Tensor]):
        super().__init__(layer, first)
        self.share = nn.Parameter(torch.full((1,), START))

    def forward(self, x: Tensor) -> Tensor:
        values = nn.Linear.forward(self, x)
        return torch.lerp(values, self.first[0].view_as(values), self.share.to(values.dtype))


def value_residual(model: VideoMMDiT) -> None:
    """Change `model` in place."""
    if model.span is not None:
        raise ConfigError("tread.enabled", "is true, but value_residual mixes all tokens' values")
    first: list[Tensor] = []
    for index, block in enumerate(model.blocks):
        layer = MixedValues if index else Values
        block.spatial.v = layer(block.spatial.v, first)
    wrap(model.blocks[-1], behind=forget)


def forget(block: nn.Module, output: tuple) -> tuple:
    block.spatial.v.first.clear()
    return output
