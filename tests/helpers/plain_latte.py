"""A plain factorised diffusion transformer for clips to compare with, after Latte (Ma et al. 2024,
variant 1): blocks that attend within whole frames take turns with blocks that attend along time at
each place. As in its text-to-video model the blocks along time do not read the text. Else it is
the plain DiT.

Axes: b sample · f frame · s place · d width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from einops import rearrange
from torch import Tensor

from tests.helpers.plain_dit import Block, PlainDiT, PlainDiTConfig


@dataclass(frozen=True)
class PlainLatteConfig(PlainDiTConfig):
    """The section `model:` of the plain Latte; `depth` counts both kinds of blocks."""

    type: Literal["plain_latte"] = "plain_latte"


class PlainLatte(PlainDiT):
    def make_block(self, index: int) -> Block:
        config = self.config
        return Block(config.dim, config.num_heads, config.mlp_ratio, reads=index % 2 == 0)

    def run(self, h: Tensor, frames: int, condition: Tensor, *text: Tensor) -> Tensor:
        places = h.shape[1] // frames
        per_frame = [part.repeat_interleave(frames, 0) for part in (condition, *text)]
        per_place = condition.repeat_interleave(places, 0)
        for index, block in enumerate(self.blocks):
            if index % 2 == 0:
                h = block(rearrange(h, "b (f s) d -> (b f) s d", f=frames), *per_frame)
                h = rearrange(h, "(b f) s d -> b (f s) d", f=frames)
            else:
                h = block(rearrange(h, "b (f s) d -> (b s) f d", f=frames), per_place, *text)
                h = rearrange(h, "(b s) f d -> b (f s) d", s=places)
        return h

    def keys(self, index: int, frames: int, cells: int) -> int:
        return frames if index % 2 else cells
