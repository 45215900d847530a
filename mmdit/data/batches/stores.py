"""What batches are gathered from: a whole cache in memory, or its files."""

from __future__ import annotations

import os
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.data.cache.latent_cache import LatentCache
from mmdit.data.dataset.captions import all_captions

Grid = tuple[int, int]  # latent (rows, columns)
Group = tuple[
    int, ...
]  # of items that may share a batch: its grid and, where clips differ in that, its number of frames
Text = tuple[list[str], str, dict]  # all captions of an item, its id, its facts
TEXTS = 1 << 17  # items whose texts are kept; a larger cache costs time, not memory


def by_shape(shapes: Tensor, items: Tensor) -> dict[Group, Tensor]:
    """Which of `items (n,)` have each distinct row of `shapes (N, …)`."""
    unique, inverse = torch.unique(shapes[items], dim=0, return_inverse=True)
    return {tuple(shape): items[inverse == number] for number, shape in enumerate(unique.tolist())}


def memory_bytes() -> int:
    """Of the machine, or of the container if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.exists() else ""
    return min(total, int(text)) if text.isdecimal() else total


def text_of(cache: LatentCache, item: int) -> Text:
    facts = cache.facts[item]
    return all_captions(cache.captions[item], facts), cache.ids[item], facts


class InMemory:
    """All latents, one tensor a grid, so that a batch is one gather; and texts as they are asked
    for, which a small network's step is too short to find anew."""

    def __init__(self, cache: LatentCache, progress: bool):
        self.frames: dict[Grid, Tensor] = {}
        self.first = torch.zeros(
            len(cache), dtype=torch.int64
        )  # place of an item's frame 0 in its grid's tensor
        for grid, items in by_shape(cache.shapes[:, 1:3], torch.arange(len(cache))).items():
            counts = cache.shapes[items, 0]
            self.first[items] = counts.cumsum(0) - counts
            self.frames[grid] = torch.empty(
                int(counts.sum()), *grid, cache.manifest.spec.channels, dtype=torch.float16
            )

        firsts, self._text = self.first.tolist(), lru_cache(TEXTS)(partial(text_of, cache))
        for item in tqdm(
            range(len(cache)),
            "loading latents",
            unit="item",
            disable=not progress or len(cache) < 5000,
        ):
            latents = cache.load(item)
            stored = self.frames[tuple(latents.shape[1:3])][
                firsts[item] : firsts[item] + len(latents)
            ]
            np.copyto(
                stored.numpy(), latents.numpy()
            )  # torch would wake all its threads for each small copy

    def gather(self, grid: Grid, items: Tensor, frames: Tensor) -> Tensor:
        """Latents `(B, F, *grid, channels)` of `items (B,)`, their `frames (B, F)`."""
        rows = self.first[items][:, None] + frames
        return self.frames[grid].index_select(0, rows.flatten()).view(*frames.shape, *grid, -1)

    def texts(self, numbers: list[int]) -> list[Text]:
        """Of the items with these numbers."""
        return list(map(self._text, numbers))


class OnDisk:
    """Latents read when they are needed, of each clip only the part from its first to its last
    frame."""

    def __init__(self, cache: LatentCache):
        self.cache = cache

    def gather(self, grid: Grid, items: Tensor, frames: Tensor) -> Tensor:
        """As `InMemory.gather`."""
        bounds = zip(
            items.tolist(), frames[:, 0].tolist(), frames[:, -1].tolist(), frames, strict=True
        )
        return torch.stack(
            [
                self.cache.load(item, first, last + 1)[chosen - first]
                for item, first, last, chosen in bounds
            ]
        )

    def texts(self, numbers: list[int]) -> list[Text]:
        """As `InMemory.texts`."""
        return [text_of(self.cache, number) for number in numbers]
