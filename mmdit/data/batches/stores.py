"""The stores that batches are gathered from: a whole cache in memory, or its files."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.data.batches import kept_cache
from mmdit.data.batches.batch_plan import Grid, by_shape
from mmdit.data.cache.latent_cache import LatentCache
from mmdit.data.dataset.captions import all_captions

Part = tuple[slice, slice, slice]  # frames (all), rows and columns
Text = tuple[list[str], str, dict]  # all captions of an item, its id, its facts
TEXTS = 1 << 17  # items whose texts are kept in memory; those of further items are read again
LOADERS = 8  # threads that load a cache into memory
LARGE = 1 << 18  # bytes of an item from which loading in threads pays
MEMORY_SHARE = 0.25  # of the machine's memory, for caches held in it


def open_store(
    cache: LatentCache, in_memory: Literal["auto", True, False], progress: bool
) -> InMemory | OnDisk:
    """Return a store for a cache; "auto" holds it in memory if it takes at most a quarter of
    that."""
    if in_memory == "auto":
        in_memory = fits_in_memory(cache.nbytes)
    if not in_memory:
        return OnDisk(cache)
    return kept_cache.in_memory(cache, lambda: InMemory(cache, progress))


def fits_in_memory(size: int) -> bool:
    """Return whether `size` bytes take at most a quarter of the memory if every process on this
    machine holds a copy."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return size * processes <= MEMORY_SHARE * memory_bytes()


def memory_bytes() -> int:
    """Return the memory of the machine in bytes, or that of the container if it is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.exists() else ""
    return min(total, int(text)) if text.isdecimal() else total


def text_of(cache: LatentCache, item: int) -> Text:
    """Return all captions of an item, its id and its facts."""
    facts = cache.facts[item]
    return all_captions(cache.captions[item], facts), cache.ids[item], facts


class InMemory:
    """All latents, in one tensor for each grid, so that making a batch is one gather. Texts are
    kept once they were asked for: reading them anew takes longer than a step of a small network."""

    def __init__(self, cache: LatentCache, progress: bool):
        self.frames: dict[Grid, Tensor] = {}
        # where an item's frames begin in its grid's tensor
        self.first = torch.zeros(len(cache), dtype=torch.int64)
        self._pinned = torch.cuda.is_available()
        self.text = lru_cache(TEXTS)(partial(text_of, cache))
        channels = cache.manifest.spec.channels
        for grid, items in by_shape(cache.shapes[:, 1:3], torch.arange(len(cache))).items():
            counts = cache.shapes[items, 0]
            self.first[items] = counts.cumsum(0) - counts
            self.frames[grid] = torch.empty(int(counts.sum()), *grid, channels, dtype=torch.float16)
        firsts = self.first.tolist()
        ends = (self.first + cache.shapes[:, 0]).tolist()
        grids = cache.shapes[:, 1:3].tolist()

        def take(item: int) -> None:
            place = self.frames[tuple(grids[item])][firsts[item] : ends[item]]
            cache.load(item, out=place)

        # threads help where items are large: reads and check sums then run in parallel
        large = cache.nbytes > LARGE * len(cache)
        with ThreadPoolExecutor(LOADERS, "loading") as pool:
            loaded = (pool.map if large else map)(take, range(len(cache)))
            hidden = not progress
            bar = tqdm(loaded, "loading latents", len(cache), unit="item", disable=hidden, delay=2)
            for _ in bar:
                pass

    def gather(
        self, grid: Grid, items: Tensor, frames: Tensor, tiles: list[Part] | None = None
    ) -> Tensor:
        """Return latents `(B, F, *grid, channels)` of `items (B,)` at their `frames (B, F)`; with
        `tiles`, of each item one tile, all of one size. With CUDA they are in page-locked memory,
        which a GPU can read while it computes."""
        source, rows = self.frames[grid], self.first[items][:, None] + frames
        shape = source.shape if tiles is None else source[tiles[0]].shape
        batch = torch.empty(*frames.shape, *shape[1:], dtype=source.dtype, pin_memory=self._pinned)
        if tiles is None:
            torch.index_select(source, 0, rows.flatten(), out=batch.flatten(0, 1))
            return batch
        for clip, numbers, tile in zip(batch, rows, tiles, strict=True):
            torch.index_select(source[tile], 0, numbers, out=clip)
        return batch


class OnDisk:
    """Latents that are read when they are needed; of a clip, only the frames of the sample."""

    def __init__(self, cache: LatentCache):
        self.cache = cache

    def gather(
        self, grid: Grid, items: Tensor, frames: Tensor, tiles: list[Part] | None = None
    ) -> Tensor:
        """Return latents; see `InMemory.gather`."""
        channels = self.cache.manifest.spec.channels
        clips = torch.empty(*frames.shape, *grid, channels, dtype=torch.float16)
        for item, numbers, clip in zip(items.tolist(), frames, clips, strict=True):
            self.cache.load_frames(item, numbers, clip)
        if tiles is None:
            return clips
        return torch.stack([clip[tile] for clip, tile in zip(clips, tiles, strict=True)])

    def text(self, item: int) -> Text:
        """Return the texts of one item."""
        return text_of(self.cache, item)
