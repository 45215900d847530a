"""Windows over a grid of any size, plain or shifted, in one token layout.

Axes: b sample · f frame · r row · c column · n window · k place in the window · d width.

Tokens are stored window by window, `(b, f, n, k, d)`, from the first block to the last, so plain windows need no copy. A
shifted window holds each place `k` exactly once too, some from its own cell and some from the next one: shifting is one
`where` per axis. Because this is true of any subset of the places, routing (models/routing.py) may keep a subset.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mmdit.nn.kept import kept
from mmdit.nn.position import SPATIAL_BASE, Rotary, rotary_tables
from mmdit.nn.tiles import Tiles, lay


@dataclass(frozen=True)
class WindowGrid:
    """A grid of `rows × columns` cut into equal windows of `height × width`; what sticks out is padding."""

    rows: int
    columns: int
    height: int
    width: int

    @staticmethod
    def fit(rows: int, columns: int, window_size: int) -> WindowGrid:
        """As many windows along each axis as `window_size` asks for, none larger than it needs to be: 28 rows with window
        8 are four windows of 7 (no padding), 9 rows are two of 5 (one row of padding rather than seven)."""
        height = ceil(rows / ceil(rows / window_size))
        width = ceil(columns / ceil(columns / window_size))
        return WindowGrid(rows, columns, height, width)

    @property
    def counts(self) -> tuple[int, int]:
        return ceil(self.rows / self.height), ceil(self.columns / self.width)

    @property
    def places(self) -> int:
        """Tokens in a window."""
        return self.height * self.width

    @property
    def shift(self) -> tuple[int, int]:
        """Rows and columns by which odd blocks shift; 0 along an axis with a single window, which sees everything."""
        down, across = self.counts
        return (self.height // 2 if down > 1 else 0), (self.width // 2 if across > 1 else 0)

    def partition(self, x: Tensor, padding: float = 0) -> Tensor:
        """`(b, f, r, c, d)` → `(b, f, n, k, d)`."""
        down, across = self.counts
        extra = (0, 0, 0, across * self.width - self.columns, 0, down * self.height - self.rows)
        x = F.pad(x, extra, value=padding) if any(extra) else x
        return rearrange(x, "b f (r i) (c j) d -> b f (r c) (i j) d", i=self.height, j=self.width)

    def merge(self, x: Tensor) -> Tensor:
        """`(b, f, n, k, d)` → `(b, f, r, c, d)`, padding removed."""
        x = rearrange(x, "b f (r c) (i j) d -> b f (r i) (c j) d", r=self.counts[0], i=self.height)
        return x[:, :, : self.rows, : self.columns]


class Places(NamedTuple):
    """What attention in plain or in shifted windows must know of its tokens."""

    counts: tuple[int, int]
    rotary: Rotary  # each (k, 1, head_dim / 2)
    same: Tensor | None  # (n, k, k) bool: query and key share a window; None where all do
    rows_moved: Tensor | None  # (k, 1) bool: in shifted windows these places come from the next cell down; None: no shift
    columns_moved: Tensor | None  # likewise from the next cell across
    cells: Tensor  # (n, k): the cell that each place of each window comes from
    names: Tensor  # (n, k): tokens of one name share a window
    tiles: Tiles | None  # for the fused kernel; None where windows are too large for it

    def keep(self, keep: Tensor) -> Places:
        """For the tokens at the places `keep (K,)` alone."""

        def pick(table: Tensor | None) -> Tensor | None:
            return None if table is None else table[keep]

        same = None if self.same is None else self.same[:, keep][:, :, keep]
        rotary = tuple(table[keep] for table in self.rotary)
        cells, names = self.cells[:, keep], self.names[:, keep]
        moved = pick(self.rows_moved), pick(self.columns_moved)
        return Places(self.counts, rotary, same, *moved, cells, names, window_tiles(cells, names, rotary))


def window_tiles(cells: Tensor, names: Tensor, rotary: Rotary) -> Tiles | None:
    count = cells.shape[1]
    index = cells * count + torch.arange(count, device=cells.device)
    return lay(index, names, [table.flatten(0, -2) for table in rotary])


def shift_windows(x: Tensor, places: Places, back: bool = False) -> Tensor:
    """From windows in cell layout `(b, f, n, k, d)` to the shifted ones, or `back`. The last window of an axis wraps round to
    the first cell; `places.same` keeps its two parts apart. No change for plain windows."""
    if places.rows_moved is None and places.columns_moved is None:
        return x
    x = rearrange(x, "b f (r c) k d -> b f r c k d", r=places.counts[0])
    for axis, moved in ((2, places.rows_moved), (3, places.columns_moved)):
        if moved is not None:
            x = torch.where(moved, torch.roll(x, 1 if back else -1, axis), x)
    return rearrange(x, "b f r c k d -> b f (r c) k d")


@kept
def place_tables(grid: WindowGrid, shifted: bool, head_dim: int, device: torch.device, dtype: torch.dtype) -> Places:
    """The tables of plain or `shifted` windows, made once per grid; kept, as those of time and place, for graphs read them."""
    with torch.inference_mode(False):  # tables first made while sampling must also serve training
        offset = grid.shift if shifted else (0, 0)
        row, column = torch.meshgrid(torch.arange(grid.height), torch.arange(grid.width), indexing="ij")
        residues = torch.stack([row.flatten(), column.flatten()], dim=-1)  # (k, 2)
        # Only differences matter to rotary attention, so positions count from the window's first row and column.
        inside = (residues - torch.tensor(offset)) % torch.tensor([grid.height, grid.width])
        rotary = tuple(table[:, None].to(device, dtype) for table in rotary_tables(inside, head_dim, SPATIAL_BASE))
        moved = [(residues[:, i : i + 1] < offset[i]).to(device) if offset[i] else None for i in (0, 1)]
        cells = torch.arange(grid.counts[0] * grid.counts[1], device=device)[None, None, :, None, None]
        cells = cells.expand(1, 1, -1, grid.places, 1)
        result = Places(grid.counts, rotary, None, *moved, cells[0, 0, ..., 0], cells[0, 0, ..., 0], None)
        cells = shift_windows(cells, result)[0, 0, ..., 0]
        # Name every token by its window, padding by -1, and move the names the way tokens move.
        down = (torch.arange(grid.rows) + grid.height - offset[0]) // grid.height
        across = (torch.arange(grid.columns) + grid.width - offset[1]) // grid.width
        names = grid.partition((down[:, None] * (grid.columns + 2) + across)[None, None, ..., None].to(device), padding=-1)
        names = shift_windows(names, result)[0, 0, ..., 0]  # (n, k)
        same = names[:, :, None] == names[:, None, :]
        result = result._replace(cells=cells, names=names, tiles=window_tiles(cells, names, rotary))
        return result if same.all() else result._replace(same=same)


@kept
def coordinates(grid: WindowGrid, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The centre of every token's cell, `(n, k, 2)` as (row, column), the frame spanning [-1, 1] along each axis."""
    with torch.inference_mode(False):
        axes = [(2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1 for size in (grid.rows, grid.columns)]
        centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        return grid.partition(centres[None, None])[0, 0].to(device, dtype)
