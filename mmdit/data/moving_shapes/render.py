"""Render facts to pixels, in batches. Axes: n samples, f frames, h rows, w columns; distances are
in pixels, negative inside a shape.

Every shape is a signed distance field; coverage falls linearly from 1 to 0 over one pixel across
its edge. Values are whole numbers of 255, so a PNG stores a frame exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmdit.data.moving_shapes.facts import (
    BACKGROUNDS,
    CROSS,
    INNER_STAR,
    RING,
    SQUARE,
    Facts,
    Object,
    check_canvas,
)

# pixels rendered at once: a shape's fields then fit into the CPU's cache, or a small part of GPU
# memory
CHUNK_PIXELS = {"cpu": 1 << 19, "cuda": 1 << 25}


def render(
    facts: list[Facts],
    width: int,
    height: int,
    frames: int = 1,
    device: torch.device | str = "cpu",
    fraction: float = 0.5,
) -> Tensor:
    """Return uint8 `(B, F, 3, height, width)`. Frame f of F shows the motion at `f / (F - 1)`; a
    single frame shows it at `fraction`."""
    check_canvas(width, height)
    if frames < 1:
        raise ValueError(f"frames is {frames}; must be at least 1")
    device = torch.device(device)
    out = torch.empty(len(facts), frames, 3, height, width, dtype=torch.uint8, device=device)
    times = (
        torch.linspace(0, 1, frames, device=device)
        if frames > 1
        else torch.full((1,), fraction, device=device)
    )
    chunk = max(1, CHUNK_PIXELS.get(device.type, 1 << 19) // (frames * width * height))
    # Samples with the same shapes are rendered together, so that each chunk evaluates one field for
    # each object and nothing is wasted.
    alike: dict[tuple[str, ...], list[int]] = {}
    for i, item in enumerate(facts):
        alike.setdefault(tuple(shape.shape for shape in item.objects), []).append(i)
    for members in alike.values():
        for first in range(0, len(members), chunk):
            group = members[first : first + chunk]
            pixels = _render_alike([facts[i] for i in group], width, height, times)
            out.index_copy_(0, _on_device(torch.tensor(group), device), pixels)
    return out


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy CPU values to a device without waiting for the work that a GPU has queued; waiting would
    leave it idle afterwards."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _render_alike(facts: list[Facts], width: int, height: int, times: Tensor) -> Tensor:
    """Render samples whose objects have the same shapes in the same order: uint8 `(n, f, 3, h,
    w)`."""
    side, device = min(width, height), times.device
    values = [BACKGROUNDS[item.background] + _numbers(item.objects) for item in facts]
    table = _on_device(torch.tensor(values, dtype=torch.float32), device)
    image, *parts = table.split([3, *(5, 3) * len(facts[0].objects)], dim=1)
    image = image[:, None, :, None, None]
    for first, numbers, color in zip(facts[0].objects, parts[::2], parts[1::2], strict=True):
        x, y, dx, dy, radius = (numbers * side).T[..., None, None, None]  # each (n, 1, 1, 1)
        progress = times[None, :, None, None]
        columns = torch.arange(width, device=device) + 0.5  # centres of pixels
        rows = torch.arange(height, device=device)[:, None] + 0.5
        across, down = columns - (x + dx * progress), rows - (y + dy * progress)
        coverage = (0.5 - DISTANCE[first.shape](across, down, radius)).clamp_(0, 1)
        color = color[:, None, :, None, None]
        image = image + coverage[:, :, None] * (color - image)
    return image.add_(0.5).to(torch.uint8)


def _numbers(objects: tuple[Object, ...]) -> tuple[float, ...]:
    """Return place, displacement and radius in units of S, and the colour, for one object after the
    other."""
    numbers: tuple[float, ...] = ()
    for item in objects:
        numbers += (item.x, item.y, *item.velocity(), item.radius, *item.rgb)
    return numbers


# ── signed distances: x (n, f, 1, w) and y (n, f, h, 1) from the centre, radius (n, 1, 1, 1) → (n,
def _circle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return (x * x + y * y).sqrt() - radius


def _ring(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    middle = (1 - RING / 2) * radius
    return ((x * x + y * y).sqrt() - middle).abs() - RING / 2 * radius


def _square(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - SQUARE * radius


def _cross(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    x, y, arm = x.abs(), y.abs(), CROSS * radius
    return torch.minimum(torch.maximum(x - radius, y - arm), torch.maximum(x - arm, y - radius))


def _triangle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Return the distance to an upright equilateral triangle with its base half a radius below the
    centre."""
    slope = x.abs() * math.cos(math.radians(30)) - y * math.sin(math.radians(30))
    return torch.maximum(slope, y) - radius / 2


def _star(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Return the distance to a star with five points, one of them upwards: mirroring folds the
    plane into a tenth of the star, in which its edge is a single straight line."""
    x, y = x.abs(), -y  # y upwards; the angle to it is now in [0°, 180°]
    x, y = _fold(x, y, 72)
    x = x.abs()
    x, y = _fold(x, y, 36)
    inner_x = INNER_STAR * math.sin(math.radians(36))
    inner_y = INNER_STAR * math.cos(math.radians(36))
    # normal of the edge from (0, 1), a point of the star, to the inner corner
    normal_x, normal_y = 1 - inner_y, inner_x
    length = math.hypot(normal_x, normal_y)
    return x * (normal_x / length) + (y - radius) * (normal_y / length)


def _fold(x: Tensor, y: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    """Mirror points beyond the ray at `degrees` from the upward axis across that ray."""
    normal_x, normal_y = math.cos(math.radians(degrees)), -math.sin(math.radians(degrees))
    beyond = 2 * (x * normal_x + y * normal_y).clamp_(min=0)
    return x - beyond * normal_x, y - beyond * normal_y


DISTANCE = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
