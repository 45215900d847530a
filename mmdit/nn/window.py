"""Windows over a grid of any size, plain or shifted, in one token layout.

Axes: b sample · f frame · r row · c column · n window · k place in the window · d width.

Tokens are stored window by window, `(b, f, n, k, d)`, from the first block to the last, so plain
windows need no copy. A shifted window, too, holds each place `k` exactly once, some from the plain
window of its number and some from the next one: shifting is one `where` per axis. Because this is
true of any subset of the places, routing (models/routing.py) may keep a subset.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mmdit.nn.kept import kept
from mmdit.nn.position import SPATIAL_BASE, Rotary, rotary_tables
from mmdit.nn.tiles import Tiles, tiles_of

Pattern = Literal["window", "shifted", "frame"]


@dataclass(frozen=True)
class WindowGrid:
    """A grid of `rows × columns` cut into equal windows of `height × width`; windows that reach
    beyond the grid are padded."""

    rows: int
    columns: int
    height: int
    width: int

    @staticmethod
    def fit(rows: int, columns: int, window_size: int) -> WindowGrid:
        """Cut a grid into as many windows along each axis as `window_size` asks for, none larger
        than it needs to be: 28 rows with window 8 are four windows of 7 (no padding), 9 rows are
        two of 5 (one row of padding rather than seven)."""
        height = ceil(rows / ceil(rows / window_size))
        width = ceil(columns / ceil(columns / window_size))
        return WindowGrid(rows, columns, height, width)

    @property
    def counts(self) -> tuple[int, int]:
        return ceil(self.rows / self.height), ceil(self.columns / self.width)

    @property
    def places(self) -> int:
        """Return the number of tokens in a window."""
        return self.height * self.width

    @property
    def shift(self) -> tuple[int, int]:
        """Return the rows and columns by which odd blocks shift; 0 along an axis with a single
        window, which sees everything."""
        down, across = self.counts
        return (self.height // 2 if down > 1 else 0), (self.width // 2 if across > 1 else 0)

    def partition(self, x: Tensor, padding: float = 0) -> Tensor:
        """Divide `(b, f, r, c, d)` into windows `(b, f, n, k, d)`."""
        down, across = self.counts
        extra = (0, 0, 0, across * self.width - self.columns, 0, down * self.height - self.rows)
        x = F.pad(x, extra, value=padding) if any(extra) else x
        return rearrange(x, "b f (r i) (c j) d -> b f (r c) (i j) d", i=self.height, j=self.width)

    def merge(self, x: Tensor) -> Tensor:
        """Join windows `(b, f, n, k, d)` to `(b, f, r, c, d)`, padding removed."""
        x = rearrange(x, "b f (r c) (i j) d -> b f (r i) (c j) d", r=self.counts[0], i=self.height)
        return x[:, :, : self.rows, : self.columns]


class Places(NamedTuple):
    """The tables that attention in one pattern needs, for tokens in g groups of m: plain or shifted
    windows (g = n, m = k), or whole frames (g = 1, m = n · k)."""

    pattern: Pattern
    counts: tuple[int, int]
    rotary: Rotary  # each (m, 1, head_dim / 2)
    same: Tensor | None  # (g, m, m) bool: query and key may see each other; None where all may
    rows_moved: (
        Tensor | None
    )  # (k, 1) bool: in shifted windows, places from the next plain window down; None: no shift
    columns_moved: Tensor | None  # likewise from the next plain window across
    cells: Tensor  # (n, k): the window whose memory holds each place of each (shifted) window
    names: Tensor  # (g, m): tokens with the same name see each other
    tiles: Tiles | None  # for the fused kernel; None where groups are too large for it
    real: Tensor | None = None  # (m,): the tokens of a whole frame that are not padding; None: all
    padded: Places | None = None  # given with `real`: the tables with padding, masked, for routing

    def keep(self, keep: Tensor) -> Places:
        """Return the tables for only the tokens at the places `keep (K,)` of each window."""
        if self.padded is not None:
            return self.padded.keep(keep)
        windows, places = self.cells.shape
        members = keep
        if self.pattern == "frame":
            members = (torch.arange(windows, device=keep.device)[:, None] * places + keep).flatten()
        cosine, sine = (table[members] for table in self.rotary)
        kept = self._replace(
            rotary=(cosine, sine),
            same=None if self.same is None else self.same[:, members][:, :, members],
            rows_moved=None if self.rows_moved is None else self.rows_moved[keep],
            columns_moved=None if self.columns_moved is None else self.columns_moved[keep],
            cells=self.cells[:, keep],
            names=self.names[:, members],
            real=None,
        )
        return kept._replace(tiles=kept.fused_tiles())

    def without_padding(self) -> Places:
        """Return the tables of whole frames that leave padding out: kernels without a mask are
        faster."""
        real = (self.names[0] >= 0).nonzero()[:, 0]
        cosine, sine = (table[real] for table in self.rotary)
        names = self.names[:, real]
        return self._replace(rotary=(cosine, sine), names=names, same=None, real=real, padded=self)

    def fused_tiles(self) -> Tiles | None:
        """Return the tiles of these groups for the fused kernel, or None where they are too
        large."""
        windows, places = self.cells.shape
        index = self.cells * places + torch.arange(places, device=self.cells.device)
        if self.pattern == "frame":
            index = index.reshape(1, windows * places)
        return tiles_of(index, self.names, [table.flatten(0, -2) for table in self.rotary])


def whole_frames(x: Tensor, places: Places) -> Tensor:
    """Return `x (b, f, n, k, d)` as one group a frame, `(b, f, 1, m, d)`, without padding."""
    x = x.flatten(2, 3)
    return (x if places.real is None else x.index_select(2, places.real)).unsqueeze(2)


def spread(x: Tensor, places: Places) -> Tensor:
    """Undo `whole_frames`; padding comes back as zero."""
    x, (windows, count) = x.squeeze(2), places.cells.shape
    if places.real is not None:
        padded = x.new_zeros(*x.shape[:2], windows * count, x.shape[-1])
        x = padded.index_copy(2, places.real, x)
    return x.unflatten(2, (windows, count))


def gather(x: Tensor, places: Places, back: bool = False) -> Tensor:
    """Return the tokens `x (b, f, n, k, d)` in the groups of `places`, `(b, f, g, m, d)`; `back`
    undoes it. The last shifted window of an axis wraps round to the first cell; `places.same` keeps
    its two parts apart."""
    if places.pattern == "frame":
        return spread(x, places) if back else whole_frames(x, places)
    if places.rows_moved is None and places.columns_moved is None:
        return x
    x = rearrange(x, "b f (r c) k d -> b f r c k d", r=places.counts[0])
    for axis, moved in ((2, places.rows_moved), (3, places.columns_moved)):
        if moved is not None:
            x = torch.where(moved, torch.roll(x, 1 if back else -1, axis), x)
    return rearrange(x, "b f r c k d -> b f (r c) k d")


@kept
def place_tables(
    grid: WindowGrid, pattern: Pattern, head_dim: int, device: torch.device, dtype: torch.dtype
) -> Places:
    """Return the tables of one pattern, made once per grid. Like the tables of time and place they
    are kept, because CUDA graphs read their memory."""
    with torch.inference_mode(False):  # tables made while sampling are used in training, too
        shifted = pattern == "shifted"
        offset = grid.shift if shifted else (0, 0)
        row, column = torch.meshgrid(
            torch.arange(grid.height), torch.arange(grid.width), indexing="ij"
        )
        residues = torch.stack([row.flatten(), column.flatten()], dim=-1)  # (k, 2)
        extent = torch.tensor([grid.height, grid.width])
        # Only differences matter to rotary attention, so positions count from the group's first row
        # and column.
        positions = (residues - torch.tensor(offset)) % extent
        if pattern == "frame":
            down, across = torch.meshgrid(
                *(torch.arange(count) for count in grid.counts), indexing="ij"
            )
            corners = torch.stack([down.flatten(), across.flatten()], dim=-1) * extent  # (n, 2)
            positions = (corners[:, None] + residues).flatten(0, 1)
        cosine, sine = (
            table[:, None].to(device, dtype)
            for table in rotary_tables(positions, head_dim, SPATIAL_BASE)
        )
        rows_moved, columns_moved = (
            (residues[:, i : i + 1] < offset[i]).to(device) if offset[i] else None for i in (0, 1)
        )
        cells = torch.arange(grid.counts[0] * grid.counts[1], device=device)[
            None, None, :, None, None
        ]
        cells = cells.expand(1, 1, -1, grid.places, 1)
        result = Places(
            pattern,
            grid.counts,
            (cosine, sine),
            None,
            rows_moved,
            columns_moved,
            cells[0, 0, ..., 0],
            cells[0, 0, ..., 0],
            None,
        )
        if shifted:
            result = result._replace(cells=gather(cells, result)[0, 0, ..., 0])
        # Name every token by its window, padding by -1, and move the names the way tokens move.
        down = (torch.arange(grid.rows) + grid.height - offset[0]) // grid.height
        across = (torch.arange(grid.columns) + grid.width - offset[1]) // grid.width
        names = (down[:, None] * (grid.columns + 2) + across)[None, None, ..., None].to(device)
        if pattern == "frame":
            names = torch.zeros_like(names)
        names = gather(grid.partition(names, padding=-1), result)[0, 0, ..., 0]  # (g, m)
        same = names[:, :, None] == names[:, None, :]
        result = result._replace(names=names)
        result = result._replace(tiles=result.fused_tiles())
        if same.all():
            return result
        result = result._replace(same=same)
        return result.without_padding() if pattern == "frame" and result.tiles is None else result


@kept
def coordinates(grid: WindowGrid, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the centre of every token's cell, `(n, k, 2)` as (row, column); the frame spans
    [-1, 1] along each axis."""
    with torch.inference_mode(False):
        axes = [
            (2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1
            for size in (grid.rows, grid.columns)
        ]
        centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        return grid.partition(centres[None, None])[0, 0].to(device, dtype)


def coordinates_of_tiles(grid: WindowGrid, places: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the coordinates `(b, n, k, 2)` that the cells of tiles have in their whole frame, in
    the units of `coordinates`. `places (b, 5)`: where the tiles lie, see
    `mmdit.diffusion.tiling`."""
    corner, whole = places.double()[:, None, None, 1:].chunk(2, -1)  # (b, 1, 1, 2)
    lines = [
        torch.arange(size, dtype=torch.float64, device=places.device)
        for size in (grid.rows, grid.columns)
    ]
    cells = torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1)
    centres = (2 * (corner + cells) + 1) / whole - 1
    return grid.partition(centres[:, None])[:, 0].to(dtype)
