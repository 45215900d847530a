"""Measure how sharp the edges of an object are, and whether an error gathers along the borders of
tiles.

Axes: f frame · h row · w column · p point of an edge · s step along its normal.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.diffusion.tiling import Tiling

CONTRAST = 0.16  # distance in RGB ([0, 1]) from the background at which an object begins
REACH, STEP = 16.0, 0.25  # how far, and how finely, a profile follows the normal, in pixels
LOW, HIGH = 0.1, 0.9  # an edge is as wide as the way between these shares of its height
GRADIENT = 0.02  # change in a pixel that makes it part of an edge, for `seam_ratio`


def edge_width(image: Tensor) -> float:
    """Return the 10 to 90 % width in pixels of the edge of the object in `image (3, h, w)` in
    [0, 1], along its normal: the median over the edge; nan without an object. The background is
    the colour of the border, the object has one colour."""
    border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1)
    backdrop = border.median(1).values
    distance = (image - backdrop[:, None, None]).norm(dim=0)
    inside = distance > CONTRAST
    if not inside.any():
        return math.nan
    inside = distance > 0.8 * distance[inside].median()
    axis = image[:, inside].median(1).values - backdrop
    height = torch.einsum("chw,c->hw", image - backdrop[:, None, None], axis) / axis.square().sum()
    points, normals = _contour(height)
    if not len(points):
        return math.nan
    steps = torch.arange(-REACH, REACH + STEP, STEP, device=image.device)
    profiles = _sampled(height, points[:, None] + steps[:, None] * normals[:, None])
    numbers = torch.arange(len(steps), device=image.device)
    outside = (profiles <= LOW) & (numbers <= len(steps) // 2)
    low = torch.where(outside, numbers, -1).amax(1)
    beyond = (profiles >= HIGH) & (numbers > low[:, None])
    high = torch.where(beyond, numbers, len(steps)).amin(1)
    met = (low >= 0) & (high < len(steps))
    if not met.any():
        return math.nan
    profiles, low, high = profiles[met], low[met], high[met]
    begin = low + _part_of_step(profiles, low, LOW)
    end = high - 1 + _part_of_step(profiles, high - 1, HIGH)
    return float(STEP * (end - begin).median())


def _part_of_step(profiles: Tensor, before: Tensor, value: float) -> Tensor:
    """Return how far behind the steps `before (p,)` the `profiles (p, s)` reach `value`, as a share
    of a step."""
    first, second = (profiles.gather(1, step[:, None])[:, 0] for step in (before, before + 1))
    return ((value - first) / (second - first)).clamp(0, 1)


def _contour(height: Tensor) -> tuple[Tensor, Tensor]:
    """Return the points `(p, 2)` (row, column) where `height (h, w)` crosses one half, and the
    normals there, which point to where it is larger."""
    smooth = F.avg_pool2d(height[None, None], 5, 1, 2, count_include_pad=False)[0, 0]
    down, across = torch.gradient(smooth)
    high = height >= 0.5
    beside = F.max_pool2d((~high)[None, None].float(), 3, 1, 1)[0, 0] > 0
    points = (high & beside).nonzero()
    normals = torch.stack([down, across], -1)[points[:, 0], points[:, 1]]
    lengths = normals.norm(dim=1, keepdim=True)
    steep = lengths[:, 0] > 1e-3
    return points[steep].float(), (normals / lengths.clamp(min=1e-3))[steep]


def _sampled(height: Tensor, places: Tensor) -> Tensor:
    """Return `height (h, w)` at `places (p, s, 2)` (row, column), bilinear: `(p, s)`."""
    size = torch.tensor(height.shape, device=height.device)
    grid = ((2 * places + 1) / size - 1).flip(-1)
    return F.grid_sample(
        height[None, None], grid[None], align_corners=False, padding_mode="border"
    )[0, 0]


def near_borders(tiling: Tiling, spatial: int) -> tuple[Tensor, Tensor]:
    """Return which pixels `(h, w)` of a frame lie within half a cell of a border between tiles, and
    which latent frames `(f,)` are beside one. `spatial`: pixels of a cell."""
    lines = []
    for axis, cell in ((0, 2), (1, spatial), (2, spatial)):
        whole, length = tiling.whole[axis], tiling.tile[axis]
        near = torch.zeros(whole * cell, dtype=torch.bool)
        for first in {corner[axis] for corner in tiling.corners}:
            for border in {first, first + length} - {0, whole}:
                near[border * cell - cell // 2 : border * cell + cell // 2] = True
        lines.append(near)
    frames, rows, columns = lines
    return rows[:, None] | columns, frames.view(-1, 2).any(1)


def seam_ratio(error: Tensor, reference: Tensor, near: Tensor) -> float:
    """Return how many times larger the `error (f, h, w)` is where `near` (broadcast to it) than
    pixels of the same kind have it elsewhere; nan where nothing is near. Errors lie on edges, so
    edges and flat areas of `reference (f, 3, h, w)` are compared apart."""
    near = near.expand_as(error)
    change = torch.zeros_like(error)
    change[:, 1:] = (reference[:, :, 1:] - reference[:, :, :-1]).abs().amax(1)
    change[..., 1:] += (reference[..., 1:] - reference[..., :-1]).abs().amax(1)
    edge = F.max_pool2d((change > GRADIENT).float(), 17, 1, 8) > 0
    total, expected = 0.0, 0.0
    for alike in (edge, ~edge):
        here, elsewhere = alike & near, alike & ~near
        if here.any() and elsewhere.any():
            total += float(error[here].sum())
            expected += float(error[elsewhere].mean()) * int(here.sum())
    return total / expected if expected else math.nan
