"""SPRINT (Park et al. 2025, 2510.21986): what the blocks of `tread:` compute for few tokens is
joined, token by token, with the dense stream before them; a learned token stands where nothing was
computed. Sometimes a sample's deep part is left out altogether. Configs enable it beside
`tread.enabled: true` and `tread.selection_rate: 0.75`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdit.config import ConfigError
from mmdit.models import VideoMMDiT
from mmdit.nn.norm import add_gated
from tests.drivers.arms.wrapped import wrap

PATH_DROP = 0.05  # the share of samples in training that do without the deep part


def sprint(model: VideoMMDiT) -> None:
    """Change `model` in place. At first the two parts count half each."""
    first, end = model.span or (0, 0)
    if not 0 < first < end < len(model.blocks):
        raise ConfigError("tread", "must be enabled for sprint, with blocks before and behind")
    last, block, dim = model.blocks[first - 1], model.blocks[end], model.config.dim
    half = torch.eye(dim) / 2
    block.fuse = nn.Linear(2 * dim, dim, bias=False)
    block.fuse.weight = nn.Parameter(torch.cat([half, half], 1))
    block.mask = nn.Parameter(torch.zeros(dim))
    block.shallow = last.shallow = []
    wrap(model, before=note_computed)
    wrap(last, behind=remember)
    wrap(block, before=join)


def note_computed(model: VideoMMDiT, x: Tensor, t: Tensor, *rest, keep=None, **named) -> tuple:
    """Note for which tokens `(b, k)` the deep part is there."""
    places = model.windows(*x.shape[2:4]).places
    computed = torch.ones(len(x), places, dtype=torch.bool, device=x.device)
    if keep is not None:
        computed = torch.zeros_like(computed).index_fill(1, keep.to(x.device), True)
    if model.training:  # a coin of the last digits of t (a drawn real number), for graphs too
        computed = computed & ((t * 256) % 1 >= PATH_DROP)[:, None]
    model.blocks[model.span[1]].computed = computed[:, None, None, :, None]
    return x, t, *rest


def remember(last: nn.Module, output: tuple) -> tuple:
    last.shallow[:] = [add_gated(*output)]
    return output


def join(block: nn.Module, x: Tensor, change, gate, *rest) -> tuple:
    computed, block.computed = block.computed, None
    deep = torch.where(computed, add_gated(x, change, gate), block.mask.to(x.dtype))
    fused = block.fuse(torch.cat([block.shallow.pop(), deep], -1))
    return fused.to(x.dtype), None, None, *rest
