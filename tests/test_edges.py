"""Widths of edges against blurs whose width is known, and errors along borders that were put
there."""

import math

import pytest
import torch

from mmdit.data.moving_shapes.prepare import Recipe
from mmdit.diffusion.tiling import Tiling
from mmdit.pixels import to_unit
from tests.helpers.edges import edge_width, near_borders, seam_ratio


def disc(sigma: float, radius: float = 40.0) -> torch.Tensor:
    """Return a red disc on grey whose edge is that of a straight one under a Gaussian blur."""
    lines = torch.arange(128.0) - 63.2
    distance = radius - (lines[:, None] ** 2 + lines**2).sqrt()
    share = 0.5 * (1 + torch.erf(distance / (sigma * math.sqrt(2))))
    colours = torch.tensor([[0.4, 0.4, 0.4], [0.9, 0.1, 0.1]])
    return (1 - share) * colours[0][:, None, None] + share * colours[1][:, None, None]


@pytest.mark.parametrize("sigma", [1.0, 2.0, 4.0])
def test_the_width_of_a_blurred_edge_is_measured(sigma):
    assert edge_width(disc(sigma)) == pytest.approx(2.563 * sigma, rel=0.1, abs=0.3)


def test_shapes_are_sharper_than_what_was_enlarged_and_nothing_has_no_width():
    recipe = Recipe(160, 96, 1, seed=3)
    clip = to_unit(recipe.render(recipe.draw(range(4))))[:, 0]
    enlarged = torch.nn.functional.interpolate(
        clip[..., ::3, ::3], (96, 160), mode="bilinear", align_corners=False
    )
    sharp, blurred = (list(map(edge_width, images)) for images in (clip, enlarged))
    assert all(width < 1.8 for width in sharp)
    assert all(b > 1.5 * a for a, b in zip(sharp, blurred, strict=True))
    assert math.isnan(edge_width(torch.full((3, 32, 32), 0.5)))


def test_an_error_along_borders_is_seen_and_one_that_follows_edges_is_not():
    tiling = Tiling.fit((6, 4, 8), (4, 4, 5))
    near, frames = near_borders(tiling, 16)
    assert near.shape == (64, 128) and not near[:, :40].any() and near[:, 44:52].any()
    assert frames.tolist() == [False, True, True, True, True, False]
    reference = torch.full((6, 3, 64, 128), 0.5)
    reference[:, :, 20:30, 30:60] = 1.0
    error = torch.full((6, 64, 128), 0.01)
    error[:, 12:39, 22:69] = 0.1  # all along the object, also where a border crosses it
    assert seam_ratio(error, reference, near) == pytest.approx(1.0, abs=0.15)
    seams = error.clone()
    seams[:, near] *= 2
    assert seam_ratio(seams, reference, near) == pytest.approx(
        2 * seam_ratio(error, reference, near)
    )
    slow = error.clone()
    slow[frames] *= 1.5
    assert seam_ratio(slow, reference, frames[:, None, None]) == pytest.approx(1.5, abs=0.05)
    assert math.isnan(seam_ratio(error, reference, torch.zeros(64, 128, dtype=torch.bool)))
