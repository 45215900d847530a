"""Draw a contact sheet of a cache: decoded samples of every size, so that one sees what the model
will be shown."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmdit.data.cache.latent_cache import LatentCache
from mmdit.interfaces import Tokenizer
from mmdit.training.media import contact_sheet

CELL = 160  # side, in pixels, of the square into which a frame is fitted
FRAMES = 8  # the most frames that are shown of a clip


def spread_items(cache: LatentCache, count: int) -> list[int]:
    """Return the numbers of `count` items (of all, if there are fewer), distributed over all sizes,
    and evenly over the items of each size."""
    sizes, inverse = torch.unique(cache.shapes[:, 1:3], dim=0, return_inverse=True)
    groups = [torch.nonzero(inverse == number).flatten() for number in range(len(sizes))]
    chosen: list[int] = []
    # places that small groups leave free go to larger ones
    for place, group in enumerate(sorted(groups, key=len)):
        share = math.ceil((count - len(chosen)) / (len(groups) - place))
        places = torch.linspace(0, len(group) - 1, min(len(group), share), dtype=torch.float64)
        chosen += group[places.round().long()].tolist()
    return chosen


def fitted(pixels: Tensor) -> Tensor:
    """Return `(F, 3, H, W)` scaled to fit into a white square with a side of `CELL` pixels."""
    scale = CELL / max(pixels.shape[-2:])
    height, width = (max(1, round(side * scale)) for side in pixels.shape[-2:])
    small = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True).clamp(0, 1)
    return F.pad(small, (0, CELL - width, 0, CELL - height), value=1.0)


def cache_sheet(cache: LatentCache, tokenizer: Tokenizer, count: int) -> Image.Image:
    """Draw `count` items with id, size and caption; of clips, up to 8 frames spread evenly over
    their length. Each latent frame is decoded alone, unless the tokenizer joins frames in time:
    then the first ones of a clip are decoded together. ValueError if an item is damaged."""
    items = spread_items(cache, count)
    shown = min(FRAMES, int(cache.shapes[items, 0].max()))
    cells, texts = [], []
    for item in items:
        latents = cache.load_finite(item)
        if tokenizer.spec.temporal > 1:  # a latent frame needs those before it
            decoded = latents[: min(shown, cache.manifest.joined or shown)]
        else:
            decoded = latents[torch.linspace(0, len(latents) - 1, shown).round().long()]
        with torch.inference_mode():
            pixels = tokenizer.decode(decoded[None].float())[0].float().cpu()
        pixels = pixels[torch.linspace(0, len(pixels) - 1, shown).round().long()]
        cells.append(fitted(pixels))
        frames = f", {len(latents)} frames" if len(latents) > 1 else ""
        texts.append(
            f"{cache.ids[item]} {pixels.shape[-1]}x{pixels.shape[-2]}{frames}:"
            f" {cache.captions[item]}"
        )
    return contact_sheet(torch.stack(cells), texts, max(1, 8 // shown), CELL)
