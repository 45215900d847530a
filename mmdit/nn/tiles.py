"""Tables that place groups of tokens in the tiles of the fused kernels (nn/fused/).

Axes: g group · k token of a group · l row of a tile, the next power of two."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.nn.context_parallel import Share
from mmdit.nn.kept import kept
from mmdit.nn.position import Rotary, temporal_rotary

NARROWEST, WIDEST = 16, 128  # rows of a tile


class Tiles(NamedTuple):
    """See `group_attention` in nn/fused/attention_kernels.py."""

    index: Tensor  # type: ignore[assignment]  # (g, l) int32, -1 where a row has no token
    names: Tensor  # (g, l) int32: tokens of one name attend to each other
    turns: list[Tensor]  # cosines and sines, each (l, d / 2); or none


class Frames(NamedTuple):
    """The tables of attention along time: rotary ones (None: frames are a set), tiles, and, if
    processes share the clip, this process's part of its frames."""

    rotary: Rotary | None
    tiles: Tiles | None
    share: Share | None = None


def tiles_of(index: Tensor, names: Tensor, turns: list[Tensor]) -> Tiles | None:
    """Pad `index`, `names (g, k)` and `turns (k, d / 2)` to a tile; return None for groups that are
    too large for one."""
    count = index.shape[1]
    rows = max(NARROWEST, 1 << (count - 1).bit_length())
    if rows > WIDEST:
        return None
    extra = rows - count
    index, names = (F.pad(table.int(), (0, extra), value=-1) for table in (index, names))
    return Tiles(index, names, [F.pad(table, (0, 0, 0, extra)) for table in turns])


@kept
def frame_tables(
    frames: int,
    places: int,
    step: float | None,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Frames:
    """Return the tables for clips of `frames` × `places` tokens, frames `step` apart in time (None:
    the frames are a set). A tile holds the frames of one place, or of several places if there are
    few frames."""
    rotary = None if step is None else temporal_rotary(frames, step, head_dim, device, dtype)
    with torch.inference_mode(False):
        columns = max(1, NARROWEST // frames)  # places of a tile
        place = torch.arange(-(-places // columns) * columns, device=device).view(-1, columns, 1)
        index = torch.arange(frames, device=device) * places + place
        index = torch.where(place < places, index, -1).flatten(1)
        names = (
            torch.arange(columns, device=device).repeat_interleave(frames).expand(len(index), -1)
        )
        turns = [table.flatten(0, -2).repeat(columns, 1) for table in rotary] if rotary else []
        return Frames(rotary, tiles_of(index, names, turns))
