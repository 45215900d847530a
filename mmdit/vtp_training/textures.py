"""Synthetic pictures, generated on the device: gradients, noise, patterns and piles of flat
objects.

Every function takes keyed draws for N pictures (N may be 0) and returns `(N, 3, H, W)` in [0, 1].
Axes: n picture, h row, w column.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.rng import Draws


def pixel_grid(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `x, y (H, W)`: the centres of pixels in units of the short side, with the origin at
    the centre of the picture."""
    short = min(height, width)
    y = (torch.arange(height, device=device) + 0.5 - height / 2) / short
    x = (torch.arange(width, device=device) + 0.5 - width / 2) / short
    return x[None, :].expand(height, width), y[:, None].expand(height, width)


def palette(draws: Draws, purpose: str, count: int) -> Tensor:
    """Return `(N, count, 3)` colours. A third of them are pushed towards the faces of the colour
    cube: real pictures contain black, white and saturated colours, which a uniform draw hardly ever
    gives."""
    colours = draws.uniform(f"{purpose}/colour", count, 3)
    extreme = ((colours - 0.5) * 4 + 0.5).clamp(0, 1)
    return torch.where(draws.uniform(f"{purpose}/extreme", count, 1) < 0.35, extreme, colours)


def _rotate(draws: Draws, purpose: str, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return pixel coordinates `(N, H, W)`, rotated by a random angle for each picture."""
    x, y = pixel_grid(height, width, draws.indices.device)
    return _turned_by(_angle(draws, purpose), x, y)


def _angle(draws: Draws, purpose: str) -> Tensor:
    return draws.uniform(f"{purpose}/angle", 1, 1) * (2 * math.pi)


def _turned_by(angle: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x * torch.cos(angle) + y * torch.sin(angle), y * torch.cos(angle) - x * torch.sin(angle)


def gradients(draws: Draws, height: int, width: int) -> Tensor:
    """Return two linear or radial blends between random colours, one over the other; every fourth
    picture is a single flat colour."""
    colours = palette(draws, "gradient", 3)[..., None, None]
    result = colours[:, 0].expand(-1, -1, height, width)
    for layer in (1, 2):
        u, v = _rotate(draws, f"gradient{layer}", height, width)
        shift = draws.normal(f"gradient/shift{layer}", 2, 1, 1) * 0.4
        radial = torch.hypot(u + shift[:, 0], v + shift[:, 1])
        is_radial = draws.uniform(f"gradient/radial{layer}", 1, 1) < 0.4
        position = torch.where(is_radial, radial * 2 - 1, u + shift[:, 0])
        slope = torch.exp(draws.uniform(f"gradient/slope{layer}", 1, 1) * 3 + 0.5)
        blend = torch.sigmoid(position * slope)
        result = torch.lerp(result, colours[:, layer].expand_as(result), blend[:, None])
    flat = draws.uniform("gradient/flat", 1, 1, 1) < 0.25
    return torch.where(flat, colours[:, 0], result)


def _magnify(grid: Tensor, height: int, width: int) -> Tensor:
    """Interpolate many small grids bicubically, as two matrix products (torch's CUDA kernel
    processes pictures one after the other)."""

    def weights(size: int, length: int) -> Tensor:
        unit = torch.eye(size, device=grid.device)[None, :, :, None]
        return F.interpolate(unit, (length, 1), mode="bicubic", align_corners=False)[0, :, :, 0]

    return weights(grid.shape[-2], height).T @ grid @ weights(grid.shape[-1], width)


def clouds(draws: Draws, height: int, width: int) -> Tensor:
    """Return value noise over octaves, with an amplitude that falls by a random power of frequency:
    from smooth clouds to coarse sand.

    Channels share most of their structure, as in photographs (a random mixing matrix with a strong
    grey component).
    """
    count, device = len(draws.indices), draws.indices.device
    decay = 0.35 + 0.65 * draws.uniform("cloud/decay", 1, 1, 1)
    result = torch.zeros(count, 3, height, width, device=device)
    power = torch.zeros_like(decay)
    cells, octave, short = 2, 0, min(height, width)
    while cells <= short // 2:  # finer noise cannot be compressed, and would only blur the rest
        rows, columns = (max(2, cells * side // short) for side in (height, width))
        grid = draws.normal(f"cloud/{octave}", 3, rows, columns)
        result = result + decay**octave * _magnify(grid, height, width)
        power = power + decay ** (2 * octave)
        cells, octave = cells * 2, octave + 1
    mixing = draws.normal("cloud/mixing", 3, 3) * draws.uniform("cloud/saturation", 1, 1) * 0.6
    grey = draws.normal("cloud/grey", 1, 3).expand(-1, 3, -1)
    result = torch.einsum("nij,njhw->nihw", mixing + grey, result * power.rsqrt())
    contrast = 0.04 + 0.2 * draws.uniform("cloud/contrast", 1, 1, 1)
    colour = palette(draws, "cloud", 1)[:, 0, :, None, None] * 0.7 + 0.15
    return (colour + result * contrast).clamp(0, 1)


def _one_each(choices: Tensor, chance: Tensor) -> Tensor:
    """Return one of `choices (K, N, …)` for each picture, by `chance (N, 1)` in [0, 1)."""
    place = (chance[:, 0] * len(choices)).long()
    return choices[place, torch.arange(len(place), device=place.device)]


def patterns(draws: Draws, height: int, width: int) -> Tensor:
    """Return stripes, checkerboards, rings and plaids in two colours with hard or soft edges, and
    periods of at least five pixels."""
    u, v = _rotate(draws, "pattern", height, width)
    shift = draws.normal("pattern/shift", 2, 1, 1) * 0.3
    u, v = u + shift[:, 0], v + shift[:, 1]
    highest = math.log(min(height, width) / 5)
    frequency = torch.exp(draws.uniform("pattern/frequency", 2, 1, 1) * highest)
    along = torch.sin(2 * math.pi * frequency[:, 0] * u)
    across = torch.sin(2 * math.pi * frequency[:, 1] * v)
    rings = torch.sin(2 * math.pi * frequency[:, 0] * torch.hypot(u, v))
    waves = torch.stack([along, along * across, rings, (along + across) / 2])
    wave = _one_each(waves, draws.uniform("pattern/kind", 1))
    # This is the slope of an edge one pixel wide: the sine crosses zero with 2π·frequency per short
    # side.
    sharp = min(height, width) / (2 * math.pi * frequency.amax(1))
    hardness = torch.where(draws.uniform("pattern/soft", 1, 1) < 0.3, torch.ones_like(sharp), sharp)
    duty = draws.normal("pattern/duty", 1, 1) * 0.3
    blend = (wave * hardness + duty * hardness).clamp(-1, 1) / 2 + 0.5
    colours = palette(draws, "pattern", 2)[..., None, None]
    return torch.lerp(colours[:, 0], colours[:, 1], blend[:, None])


def _object_alpha(draws: Draws, name: str, height: int, width: int) -> Tensor:
    """Return the coverage `(N, H, W)` of one object for each picture: ellipse, polygon, star, ring
    or stroke, with edges one pixel wide."""
    u, v = _rotate(draws, name, height, width)
    size = torch.tensor([width, height], device=u.device)[:, None, None]
    place = (draws.uniform(f"{name}/place", 2, 1, 1) - 0.5) * size / min(height, width)
    right, down = _turned_by(_angle(draws, name), place[:, 0], place[:, 1])
    u, v = u - right, (v - down) * torch.exp(draws.normal(f"{name}/aspect", 1, 1) * 0.35)
    radius = torch.exp(draws.uniform(f"{name}/radius", 1, 1) * 2.3 - 3.0)  # 0.05 … 0.5
    distance = torch.hypot(u, v)
    ellipse = distance - radius
    ring = (distance - radius).abs() - radius * (0.1 + 0.3 * draws.uniform(f"{name}/band", 1, 1))
    sides = (draws.uniform(f"{name}/sides", 1, 1) * 5).floor() + 3
    sector = torch.remainder(torch.atan2(v, u), 2 * math.pi / sides) - math.pi / sides
    polygon = distance * torch.cos(sector) - radius * torch.cos(math.pi / sides)
    inner = 0.35 + 0.3 * draws.uniform(f"{name}/inner", 1, 1)
    reach = torch.lerp(inner, torch.ones_like(inner), sector.abs() * sides / math.pi)
    star = (distance - radius * reach) * 0.6
    thickness = torch.exp(draws.uniform(f"{name}/thick", 1, 1) * 2.0 - 4.6)
    bend = draws.normal(f"{name}/bend", 1, 1) * 0.8
    stroke = torch.hypot((u.abs() - radius).clamp(min=0), v + bend * u * u) - thickness
    shapes = torch.stack([ellipse, polygon, polygon, ring, star, stroke, stroke])
    signed = _one_each(shapes, draws.uniform(f"{name}/kind", 1))
    return (0.5 - signed * min(height, width)).clamp(0, 1)


def piles(draws: Draws, background: Tensor, objects: int) -> Tensor:
    """Return `background (N, 3, H, W)` with up to `objects` random objects over it, flat or shaded,
    some of them half transparent."""
    height, width = background.shape[-2:]
    x, y = pixel_grid(height, width, background.device)
    colours = palette(draws, "pile", objects)
    shown = draws.uniform("pile/count", 1)[:, 0] * objects
    shaded = draws.uniform("pile/shaded", objects, 1, 1) < 0.4
    slopes = draws.normal("pile/slope", objects, 2, 3) * shaded * 0.3
    opaque = torch.where(draws.uniform("pile/clear", objects) < 0.15, 0.5, 1.0)
    result = background
    for index in range(objects):
        slope = slopes[:, index, :, :, None, None]
        fill = (colours[:, index, :, None, None] + slope[:, 0] * x + slope[:, 1] * y).clamp(0, 1)
        present = (index <= shown)[:, None, None]
        alpha = _object_alpha(draws, f"object{index}", height, width) * opaque[:, index, None, None]
        result = torch.lerp(result, fill, (alpha * present)[:, None])
    return result


def jitter(draws: Draws, images: Tensor) -> Tensor:
    """Change contrast, brightness and saturation at random, and add a little grain to every fifth
    picture."""
    contrast = 0.7 + 0.5 * draws.uniform("jitter/contrast", 1, 1, 1)
    brightness = draws.normal("jitter/brightness", 3, 1, 1) * 0.05
    grey = images.mean(1, keepdim=True)
    coloured = torch.lerp(grey, images, 0.3 + draws.uniform("jitter/saturation", 1, 1, 1))
    grainy = draws.uniform("jitter/grainy", 1, 1, 1) < 0.2
    grain = 0.04 * draws.uniform("jitter/grain", 1, 1, 1) * grainy
    noise = draws.normal("jitter/noise", 1, *images.shape[-2:])
    return ((coloured - 0.5) * contrast + 0.5 + brightness + grain * noise).clamp(0, 1)
