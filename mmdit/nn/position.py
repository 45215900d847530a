"""Positions: rotary tables for attention (relative), Fourier features of place and frame for the
input (absolute)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmdit.nn.kept import kept

# The slowest pair turns one radian in `base` positions: a window is some 8 places wide, a clip up
# to some 100 frames long.
SPATIAL_BASE, TEMPORAL_BASE = 100.0, 1000.0

Rotary = tuple[Tensor, Tensor]


def rotary_tables(positions: Tensor, head_dim: int, base: float) -> Rotary:
    """Return cosines and sines, each `(…, head_dim / 2)` float64, for `positions (…, A)`: each of
    the A axes turns an equal share of the pairs (RoFormer, Su et al. 2021, equation 15; axial as in
    Heo et al. 2024). `head_dim` must be a multiple of 2 A."""
    pairs = head_dim // (2 * positions.shape[-1])
    frequencies = base ** (
        -torch.arange(pairs, dtype=torch.float64, device=positions.device) / pairs
    )
    angles = (positions.double()[..., None] * frequencies).flatten(-2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn the pairs `(i, i + head_dim / 2)` of `x (…, head_dim)`; the tables broadcast over the
    leading axes."""
    cosine, sine = rotary
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


@kept
def temporal_rotary(
    frames: int, step: float, head_dim: int, device: torch.device, dtype: torch.dtype
) -> Rotary:
    """Return tables for frames at the positions 0, `step`, 2 · `step` …, broadcastable to
    `(b, f, n, k, heads, head_dim / 2)`."""
    with torch.inference_mode(False):  # a table made while sampling is used in training, too
        positions = step * torch.arange(frames, dtype=torch.float64)
        tables = rotary_tables(positions[:, None, None, None, None], head_dim, TEMPORAL_BASE)
        cosine, sine = (table.to(device, dtype) for table in tables)
        return cosine, sine


class FrameNumbers(nn.Module):
    """Weights that tell frames apart. They are zero until the first training on clips, for which
    `draw` draws them with the deviation `std`."""

    embed: nn.Linear
    std: float

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Draw the weights, unless they are frozen or already differ from zero."""
        weight = self.embed.weight
        if weight.requires_grad and not weight.any():
            weight.copy_(self.std * torch.randn(weight.shape, generator=generator))


class FourierPosition(nn.Module):
    """Embeds where a place lies in the frame: coordinates `(…, 2)` in [-1, 1] → `(…, dim)`. Windows
    attend by relative position only; this is what tells them apart (features as in NeRF, Mildenhall
    et al. 2020, equation 4).
    """

    octaves = 6

    def __init__(self, dim: int):
        super().__init__()
        self.embed = nn.Linear(4 * self.octaves, dim)

    def forward(self, coordinates: Tensor) -> Tensor:
        return self.embed(place_features(coordinates, self.octaves).to(self.embed.weight.dtype))


class FramePosition(FrameNumbers):
    """Embeds which frame of its clip a token belongs to: `frames` at the positions 0, `step`, 2 ·
    `step` … → `(frames, dim)`; `(b, frames, dim)` for parts of clips that begin with the frames
    `first (b,)`. It is zero for frame 0, so it changes nothing for pictures. Rotary attention sees
    differences of positions only, and at high noise, where motion is decided, all frames look
    alike: an average over equal values cannot tell the first from the last."""

    pairs = 16
    # moving blobs learn left from right within 300 steps with 0.3 and with 1.0, not in 700 with 0.1
    std = 0.5

    def __init__(self, dim: int):
        super().__init__()
        self.embed = nn.Linear(2 * self.pairs, dim, bias=False)

    def forward(self, frames: int, step: float, first: Tensor | None = None) -> Tensor:
        weight = self.embed.weight
        return self.embed(
            frame_features(frames, step, first, self.pairs, weight.device).to(weight.dtype)
        )


class JointPosition(FrameNumbers):
    """Embeds place and frame of a token together, as products of slow features of the place and
    features of the frame: coordinates `(n, k, 2)` → `(frames, n, k, dim)`, or `(b, n, k, 2)` and
    `first (b,)` → `(b, frames, n, k, dim)`; zero in frame 0, as in `FramePosition`.

    Whether an object moves left or right depends on caption, frame and place only together. From
    the sum of their embeddings the network would have to learn a product of three; with the
    products given here, one of two.
    """

    octaves = 2
    std = 0.25  # all products of a feature of the frame together weigh as much as in FramePosition

    def __init__(self, dim: int):
        super().__init__()
        self.embed = nn.Linear(4 * self.octaves * 2 * FramePosition.pairs, dim, bias=False)

    def forward(
        self, coordinates: Tensor, frames: int, step: float, first: Tensor | None = None
    ) -> Tensor:
        weight = self.embed.weight
        when = frame_features(frames, step, first, FramePosition.pairs, weight.device)
        where = place_features(coordinates, self.octaves).to(weight.dtype)
        products = weight.unflatten(1, (where.shape[-1], when.shape[-1]))
        by_frame = torch.einsum("dpq,...fq->...fdp", products, when.to(weight.dtype))
        return torch.einsum("...nkp,...fdp->...fnkd", where, by_frame)


def place_features(coordinates: Tensor, octaves: int) -> Tensor:
    """Return `(…, 4 · octaves)`: sines and cosines of the `coordinates (…, 2)`. The slowest have
    half a period over the frame, and each octave doubles the frequency."""
    ladder = torch.arange(octaves, dtype=coordinates.dtype, device=coordinates.device)
    angles = (coordinates[..., None] * (math.pi / 2 * 2.0**ladder)).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def frame_features(
    frames: int, step: float, first: Tensor | None, pairs: int, device: torch.device
) -> Tensor:
    """Return features of the frames at the positions 0, `step`, 2 · `step` …, `(frames, 2 · pairs)`
    in float64, or `(b, frames, 2 · pairs)` for parts of clips that begin with the frames `first
    (b,)`. Those of frame 0 are zero."""
    ladder = torch.arange(pairs, dtype=torch.float64, device=device) / pairs
    numbers = torch.arange(frames, dtype=torch.float64, device=device)
    if first is not None:
        numbers = first[:, None] + numbers
    angles = step * numbers[..., None] * TEMPORAL_BASE**-ladder
    return torch.cat([angles.sin(), 1 - angles.cos()], dim=-1)
