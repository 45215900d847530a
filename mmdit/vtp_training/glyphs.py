"""Pictures of letters. Letters of PIL's built-in font are drawn into an atlas once; pages of
letters are then warped on the device."""

from __future__ import annotations

import functools
import math
import string

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mmdit.pixels import to_unit
from mmdit.rng import Draws
from mmdit.vtp_training.textures import palette, pixel_grid

CELL, PAGE = 48, 6  # pixels of an atlas cell; letters along a side of a page
LETTERS = string.ascii_letters + string.digits + "&@#%?!+=*()<>"


@functools.lru_cache(maxsize=4)
def atlas(device: torch.device) -> Tensor:
    """Return every letter as `(letters, CELL, CELL)` coverage in [0, 1]."""
    font = ImageFont.load_default(CELL * 0.8)
    cells = []
    for letter in LETTERS:
        cell = Image.new("L", (CELL, CELL))
        ImageDraw.Draw(cell).text((CELL / 2, CELL / 2), letter, fill=255, font=font, anchor="mm")
        cells.append(np.asarray(cell))
    return to_unit(torch.from_numpy(np.stack(cells)).to(device))


def letters(draws: Draws, background: Tensor) -> Tensor:
    """Return each picture of `background (N, 3, H, W)` with a page of letters over it, each page
    with its own size, angle, shear and colours."""
    count, (height, width) = len(background), background.shape[-2:]
    if not count:
        return background
    cells = atlas(background.device)
    chosen = (draws.uniform("letter/which", PAGE, PAGE) * len(cells)).long()
    density = 0.3 + 0.7 * draws.uniform("letter/density", 1, 1)
    present = draws.uniform("letter/present", PAGE, PAGE) < density
    page = rearrange(cells[chosen] * present[..., None, None], "n r c h w -> n 1 (r h) (c w)")

    short = min(height, width)
    # the cell of a letter covers from 9 pixels to most of the picture
    low, high = math.log(9 / short), math.log(0.7)
    size = torch.exp(low + (high - low) * draws.uniform("letter/size", 1, 1))
    angle = draws.normal("letter/angle", 1, 1) * 0.3
    x, y = pixel_grid(height, width, background.device)
    shear = draws.normal("letter/shear", 1, 1) * 0.15
    u = (x * torch.cos(angle) + y * torch.sin(angle)) / size
    v = (y * torch.cos(angle) - x * torch.sin(angle)) / size
    shift = (draws.uniform("letter/shift", 2, 1, 1) - 0.5) * (PAGE / 2)
    where = torch.stack([u + shear * v + shift[:, 0], v + shift[:, 1]], dim=-1) * (2 / PAGE)
    magnified = size[..., None] * short / CELL  # picture pixels per atlas pixel
    fine = F.grid_sample(page, where, align_corners=False)
    coarse = F.grid_sample(F.avg_pool2d(page, 3), where, align_corners=False)
    steepness = magnified.clamp(min=1)  # large letters would be blurred
    sharp = ((fine - 0.5) * steepness + 0.5).clamp(0, 1)
    alpha = torch.where(magnified < 0.5, coarse, sharp)  # small letters would alias
    first, second = palette(draws, "letter", 2)[..., None, None].unbind(1)
    blended = draws.uniform("letter/blend", 1, 1, 1) < 0.3
    fill = torch.lerp(first, second, (x + 0.5).clamp(0, 1) * blended)
    return torch.lerp(background, fill, alpha)
