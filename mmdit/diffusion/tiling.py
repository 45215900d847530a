"""Grids larger than a network was trained on, drawn in overlapping tiles: at every step each tile
is denoised, and the clean estimates are blended in one shared latent (MultiDiffusion, Bar-Tal et
al. 2302.08113), in space and in time.

Where a tile lies is its place: the first frame, the first row and the first column that it shows,
and the rows and columns of the whole grid, all in latent cells.

Axes: b sample · n tile · f frame · r row · c column · d channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from einops import rearrange
from torch import Tensor

from mmdit.diffusion.objective import Denoise
from mmdit.diffusion.path import Time

Shape = tuple[int, int, int]  # latent (frames, rows, columns)
OVERLAP = 1 / 8  # least share of its length, along each axis, by which a tile overlaps the next one


def starts(whole: int, tile: int) -> list[int]:
    """Return where tiles begin along an axis of `whole` cells: evenly spread, and as few as
    possible with neighbours sharing at least OVERLAP of their length."""
    if tile >= whole:
        return [0]
    shared = math.ceil(OVERLAP * tile) if tile > 1 else 0
    count = math.ceil((whole - shared) / (tile - shared))
    return [round(number * (whole - tile) / (count - 1)) for number in range(count)]


@dataclass(frozen=True)
class Tiling:
    """The grid `whole` cut into overlapping tiles, all of the shape `tile`."""

    whole: Shape
    tile: Shape

    @staticmethod
    def fit(whole: Shape, largest: Shape) -> Tiling:
        """Return the tiling of the grid `whole` by tiles of the shape `largest`, or of the grid's
        along the axes where that is smaller."""
        frames, rows, columns = (min(*sides) for sides in zip(whole, largest, strict=True))
        return Tiling(whole, (frames, rows, columns))

    @cached_property
    def corners(self) -> list[Shape]:
        """Return the first frame, row and column of every tile."""
        frames, rows, columns = (
            starts(*sides) for sides in zip(self.whole, self.tile, strict=True)
        )
        return list(product(frames, rows, columns))

    def cut(self, x: Tensor) -> Tensor:
        """Return the tiles `(b · n, f, r, c, d)` of `x (b, F, R, C, d)`."""
        return torch.stack([x[self._part(corner)] for corner in self.corners], 1).flatten(0, 1)

    def blend(self, tiles: Tensor) -> Tensor:
        """Return `(b, F, R, C, d)`: the weighted mean of the `tiles (b · n, f, r, c, d)` at each
        cell. The weights fall towards a tile's edges, so that no edge shows."""
        tiles = rearrange(tiles, "(b n) f r c d -> n b f r c d", n=len(self.corners))
        total = tiles.new_zeros(tiles.shape[1], *self.whole, tiles.shape[-1])
        weights = total.new_zeros(1, *self.whole, 1)
        weight = self._weight(tiles.device).to(tiles.dtype)
        for tile, corner in zip(tiles, self.corners, strict=True):
            total[self._part(corner)] += weight * tile
            weights[self._part(corner)] += weight
        return total / weights

    def places(self, device: torch.device) -> Tensor:
        """Return the places of the tiles, described in the head of this file, as `(n, 5)` int64."""
        rows = [[*corner, *self.whole[1:]] for corner in self.corners]
        return torch.tensor(rows, device=device)

    def _part(self, corner: Shape) -> tuple[slice, ...]:
        """Return the index of a tile in tensors `(b, F, R, C, …)`."""
        sides = zip(corner, self.tile, strict=True)
        return slice(None), *(slice(first, first + length) for first, length in sides)

    def _weight(self, device: torch.device) -> Tensor:
        """Return the weight of each cell of a tile, `(f, r, c, 1)`: a Hann window along each
        axis, which is nowhere 0."""
        lines = [
            torch.sin((torch.arange(length, dtype=torch.float64) + 0.5) * math.pi / length) ** 2
            for length in self.tile
        ]
        return torch.einsum("f,r,c->frc", *lines)[..., None].to(device)


def tiled(tiling: Tiling, groups: Sequence[tuple[Tensor, Denoise]]) -> Denoise:
    """Return `denoise(x, t)` for the whole grid, with one `t` for all samples. `groups`: indices of
    tiles, in the order of `Tiling.cut`, and the denoiser that is called on these tiles together."""
    order = torch.cat([numbers for numbers, _ in groups]).argsort()

    def denoise(x: Tensor, t: Time) -> Tensor:
        tiles = tiling.cut(x)
        clean = torch.cat([ask(tiles[numbers], t) for numbers, ask in groups])
        return tiling.blend(clean[order])

    return denoise
