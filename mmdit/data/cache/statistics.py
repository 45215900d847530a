"""Statistics of a cache's latents, from which the latent scale is computed."""

from __future__ import annotations

import torch
from tqdm import tqdm

from mmdit.data.cache.latent_cache import LatentCache


def latent_statistics(cache: LatentCache, max_items: int | None = None) -> dict:
    """Return the per-channel `mean` and `std` over evenly spread items, and the `scale` 1/std over
    all channels together (the single factor of latent diffusion, Rombach et al. 2022). Items are
    merged one by one in float64 (Chan et al. 1983), so the result is exact. Only the latents of the
    clips are counted, not model inputs that are cached beside them. ValueError if all latents are
    one number, or some are not finite.
    """
    _, channels = cache.manifest.plain
    count = min(len(cache), max_items or len(cache))
    chosen = torch.linspace(0, len(cache) - 1, count, dtype=torch.float64).round().long().tolist()
    values = 0
    mean = squares = torch.zeros((), dtype=torch.float64)  # sum of the squared deviations
    for index in tqdm(chosen, desc="reading latents", unit="item", disable=count < 1000):
        rows = cache.load_finite(index)[..., :channels].double().flatten(0, 2)
        delta = rows.mean(0) - mean
        total = values + len(rows)
        squares = squares + (rows - rows.mean(0)).square().sum(0)
        squares = squares + delta.square() * (values * len(rows) / total)
        mean, values = mean + delta * (len(rows) / total), total
    variance = squares / values
    overall = (variance + (mean - mean.mean()).square()).mean().sqrt()
    if not overall:
        raise ValueError(
            f"the latents of {count} items of {cache.folder} are all {float(mean.mean()):g}, and"
            " have no scale: look at its pictures (mmdit inspect-cache) and at its tokenizer"
        )
    return {
        "items": count,
        "values": values,
        "mean": mean.tolist(),
        "std": variance.sqrt().tolist(),
        "scale": 1 / float(overall),
    }
