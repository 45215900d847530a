"""Synthetic pictures made on the device: gradients, noise, patterns and piles of flat objects.

Every function takes keyed draws for N pictures (0 too) and gives `(N, 3, H, W)` in [0, 1]. Axes: n
picture, h row, w column.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.rng import Draws


def pixel_grid(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`x, y (H, W)` of pixel centres in units of the short side, origin at the picture's centre."""
    short = min(height, width)
    y = (torch.arange(height, device=device) + 0.5 - height / 2) / short
    x = (torch.arange(width, device=device) + 0.5 - width / 2) / short
    return x[None, :].expand(height, width), y[:, None].expand(height, width)


def palette(draws: Draws, purpose: str, count: int) -> Tensor:
    """`(N, count, 3)` colours. A third of them are pushed towards the faces of the colour cube:
    real pictures hold black, white and saturated colours, which a uniform draw never gives."""
    colours = draws.uniform(f"{purpose}/colour", count, 3)
    extreme = ((colours - 0.5) * 4 + 0.5).clamp(0, 1)
    return torch.where(draws.uniform(f"{purpose}/extreme", count, 1) < 0.35, extreme, colours)


def _rotate(draws: Draws, purpose: str, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Pixel coordinates `(N, H, W)` turned by a random angle per picture."""
    x, y = pixel_grid(height, width, draws.indices.device)
    angle = draws.uniform(f"{purpose}/angle", 1, 1) * (2 * math.pi)
    return x * torch.cos(angle) + y * torch.sin(angle), y * torch.cos(angle) - x * torch.sin(angle)


def gradients(draws: Draws, height: int, width: int) -> Tensor:
    """Two linear or radial blends between random colours, laid over each other; one in four is a
    single flat colour."""
    colours = palette(draws, "gradient", 3)[..., None, None]
    result = colours[:, 0].expand(-1, -1, height, width)
    for layer in (1, 2):
        u, v = _rotate(draws, f"gradient{layer}", height, width)
        shift = draws.normal(f"gradient/shift{layer}", 2, 1, 1) * 0.4
        radial = torch.hypot(u + shift[:, 0], v + shift[:, 1])
        position = torch.where(
            draws.uniform(f"gradient/radial{layer}", 1, 1) < 0.4, radial * 2 - 1, u + shift[:, 0]
        )
        blend = torch.sigmoid(
            position * torch.exp(draws.uniform(f"gradient/slope{layer}", 1, 1) * 3 + 0.5)
        )
        result = torch.lerp(result, colours[:, layer].expand_as(result), blend[:, None])
    flat = draws.uniform("gradient/flat", 1, 1, 1) < 0.25
    return torch.where(flat, colours[:, 0], result)


def _magnify(grid: Tensor, height: int, width: int) -> Tensor:
    """Bicubic interpolation of many small grids as two matrix products (torch's CUDA kernel visits
    pictures one after another)."""
    rows, columns = (
        F.interpolate(
            torch.eye(size, device=grid.device)[None, :, :, None],
            (length, 1),
            mode="bicubic",
            align_corners=False,
        )[0, :, :, 0]
        for size, length in ((grid.shape[-2], height), (grid.shape[-1], width))
    )
    return rows.T @ grid @ columns


def clouds(draws: Draws, height: int, width: int) -> Tensor:
    """Value noise over octaves whose amplitude falls by a random power of frequency: smooth clouds
    to coarse sand.

    Channels share most of their structure, as in photographs (a random mixing matrix with a strong
    grey component).
    """
    count, device = len(draws.indices), draws.indices.device
    decay = 0.35 + 0.65 * draws.uniform("cloud/decay", 1, 1, 1)
    result = torch.zeros(count, 3, height, width, device=device)
    power = torch.zeros_like(decay)
    cells, octave = 2, 0
    while (
        cells <= min(height, width) // 2
    ):  # finer noise is incompressible: learning it would only blunt the rest
        rows, columns = (
            max(2, cells * height // min(height, width)),
            max(2, cells * width // min(height, width)),
        )
        grid = draws.normal(f"cloud/{octave}", 3, rows, columns)
        result = result + decay**octave * _magnify(grid, height, width)
        power = power + decay ** (2 * octave)
        cells, octave = cells * 2, octave + 1
    mixing = draws.normal("cloud/mixing", 3, 3) * draws.uniform("cloud/saturation", 1, 1) * 0.6
    grey = draws.normal("cloud/grey", 1, 3).expand(-1, 3, -1)
    result = torch.einsum("nij,njhw->nihw", mixing + grey, result * power.rsqrt())
    contrast = 0.04 + 0.2 * draws.uniform("cloud/contrast", 1, 1, 1)
    return (palette(draws, "cloud", 1)[:, 0, :, None, None] * 0.7 + 0.15 + result * contrast).clamp(
        0, 1
    )


def patterns(draws: Draws, height: int, width: int) -> Tensor:
    """Stripes, checkerboards, rings and plaids of two colours with hard or soft edges; at least
    five pixels a period."""
    count = len(draws.indices)
    u, v = _rotate(draws, "pattern", height, width)
    shift = draws.normal("pattern/shift", 2, 1, 1) * 0.3
    u, v = u + shift[:, 0], v + shift[:, 1]
    highest = math.log(min(height, width) / 5)
    frequency = torch.exp(draws.uniform("pattern/frequency", 2, 1, 1) * highest)
    along, across = (
        torch.sin(2 * math.pi * frequency[:, i] * axis) for i, axis in ((0, u), (1, v))
    )
    rings = torch.sin(2 * math.pi * frequency[:, 0] * torch.hypot(u, v))
    waves = torch.stack([along, along * across, rings, (along + across) / 2])
    kind = (draws.uniform("pattern/kind", 1)[:, 0] * len(waves)).long()
    wave = waves[kind, torch.arange(count, device=kind.device)]
    # An edge one pixel wide has this slope: the sine crosses zero at 2π·frequency per short side.
    sharp = min(height, width) / (2 * math.pi * frequency.amax(1))
    hardness = torch.where(draws.uniform("pattern/soft", 1, 1) < 0.3, torch.ones_like(sharp), sharp)
    blend = (wave * hardness + draws.normal("pattern/duty", 1, 1) * 0.3 * hardness).clamp(
        -1, 1
    ) / 2 + 0.5
    colours = palette(draws, "pattern", 2)[..., None, None]
    return torch.lerp(colours[:, 0], colours[:, 1], blend[:, None])


def _object_alpha(draws: Draws, name: str, height: int, width: int) -> Tensor:
    """Coverage `(N, H, W)` of one object each: ellipse, polygon, star, ring or stroke, edges one
    pixel wide."""
    u, v = _rotate(draws, name, height, width)
    place = (draws.uniform(f"{name}/place", 2, 1, 1) - 0.5) * torch.tensor(
        [width, height], device=u.device
    )[:, None, None]
    angle = draws.uniform(f"{name}/angle", 1, 1) * (
        2 * math.pi
    )  # the angle that _rotate used: places are in its frame
    px, py = (place[:, i] / min(height, width) for i in (0, 1))
    u = u - (px * torch.cos(angle) + py * torch.sin(angle))
    v = (v - (py * torch.cos(angle) - px * torch.sin(angle))) * torch.exp(
        draws.normal(f"{name}/aspect", 1, 1) * 0.35
    )
    radius = torch.exp(
        draws.uniform(f"{name}/radius", 1, 1) * 2.3 - 3.0
    )  # 0.05 … 0.5 of the short side
    distance = torch.hypot(u, v)
    ellipse = distance - radius
    ring = (distance - radius).abs() - radius * (0.1 + 0.3 * draws.uniform(f"{name}/band", 1, 1))
    sides = (draws.uniform(f"{name}/sides", 1, 1) * 5).floor() + 3
    sector = torch.remainder(torch.atan2(v, u), 2 * math.pi / sides) - math.pi / sides
    polygon = distance * torch.cos(sector) - radius * torch.cos(math.pi / sides)
    inner = 0.35 + 0.3 * draws.uniform(f"{name}/inner", 1, 1)
    star = (
        distance
        - radius * torch.lerp(inner, torch.ones_like(inner), sector.abs() * sides / math.pi)
    ) * 0.6
    thickness = torch.exp(draws.uniform(f"{name}/thick", 1, 1) * 2.0 - 4.6)
    bend = draws.normal(f"{name}/bend", 1, 1) * 0.8
    stroke = torch.hypot((u.abs() - radius).clamp(min=0), v + bend * u * u) - thickness
    kinds = torch.stack([ellipse, polygon, polygon, ring, star, stroke, stroke])
    kind = (draws.uniform(f"{name}/kind", 1)[:, 0] * len(kinds)).long()
    signed = kinds[kind, torch.arange(len(kind), device=kind.device)]
    return (0.5 - signed * min(height, width)).clamp(0, 1)


def piles(draws: Draws, background: Tensor, objects: int) -> Tensor:
    """`background (N, 3, H, W)` with up to `objects` random objects on it, each flat or shaded,
    some see-through."""
    height, width = background.shape[-2:]
    x, y = pixel_grid(height, width, background.device)
    colours = palette(draws, "pile", objects)
    shown = draws.uniform("pile/count", 1)[:, 0] * objects
    slopes = (
        draws.normal("pile/slope", objects, 2, 3)
        * (draws.uniform("pile/shaded", objects, 1, 1) < 0.4)
        * 0.3
    )
    opaque = torch.where(draws.uniform("pile/clear", objects) < 0.15, 0.5, 1.0)
    result = background
    for index in range(objects):
        slope = slopes[:, index, :, :, None, None]
        fill = (colours[:, index, :, None, None] + slope[:, 0] * x + slope[:, 1] * y).clamp(0, 1)
        alpha = _object_alpha(draws, f"object{index}", height, width) * opaque[:, index, None, None]
        result = torch.lerp(result, fill, (alpha * (index <= shown)[:, None, None])[:, None])
    return result


def jitter(draws: Draws, images: Tensor) -> Tensor:
    """Random contrast, brightness and saturation, and a little grain on one picture in five."""
    contrast = 0.7 + 0.5 * draws.uniform("jitter/contrast", 1, 1, 1)
    brightness = draws.normal("jitter/brightness", 3, 1, 1) * 0.05
    grey = images.mean(1, keepdim=True)
    coloured = torch.lerp(grey, images, 0.3 + draws.uniform("jitter/saturation", 1, 1, 1))
    grain = (
        0.04
        * draws.uniform("jitter/grain", 1, 1, 1)
        * (draws.uniform("jitter/grainy", 1, 1, 1) < 0.2)
    )
    noise = draws.normal("jitter/noise", 1, *images.shape[-2:])
    return ((coloured - 0.5) * contrast + 0.5 + brightness + grain * noise).clamp(0, 1)
