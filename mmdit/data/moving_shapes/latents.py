"""Moving shapes straight into a latent cache, without pictures on disk between renderer and
tokenizer.

    [facts] ─► render ─► encode ─► [copy beside the next] ─► [captions ─► CacheWriter]

A GPU gets its next samples while the last ones are copied and written; nothing here waits for it.
The parts in brackets run beside it: for small items, whose main cost is Python, in processes, and
for large ones in threads.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.data.cache.half_latents import HalfLatents
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.writer import CacheWriter, Row, SavingThreads, explain_disk_errors
from mmdit.data.dataset.buckets import Size
from mmdit.data.dataset.frames import PreprocessConfig
from mmdit.data.dataset.workers import ahead, helper_count, helping_processes
from mmdit.data.moving_shapes.canvases import Canvases
from mmdit.data.moving_shapes.prepare import DESCRIPTION, Recipe, claim
from mmdit.interfaces import Tokenizer
from mmdit.pixels import to_unit

# pixels that are rendered and encoded at once: enough to keep a GPU and the writing threads busy
CHUNK_PIXELS = {"cpu": 1 << 24, "cuda": 1 << 26}
HELPERS = 12  # processes, at most: with so many, the one that they help is the slowest
DRAWN = 256  # samples drawn at a time by a helper
AHEAD = 32  # such portions that are drawn in advance


@dataclass(frozen=True)
class SampleRows:
    """Makes the data that is stored beside the latents of some items, in the process that reads it,
    which is the one that writes the items. `items`: for each, the number of its sample (all drawn
    at one size) and the number of its crop."""

    recipe: Recipe
    canvases: Canvases
    items: list[tuple[int, int]]

    def __getitem__(self, part: slice) -> SampleRows:
        return replace(self, items=self.items[part])

    def __iter__(self) -> Iterator[Row]:
        indices = sorted({i for i, _ in self.items})
        drawn = dict(zip(indices, self.recipe.draw(indices), strict=True))
        for i, crop in self.items:
            text, known = self.recipe.words(i, drawn[i])
            yield text, {"facts": known}, self.canvases.sources(i)[crop]


@explain_disk_errors()
def cache_moving_shapes(
    tokenizer: Tokenizer,
    out_dir: str | Path,
    manifest: CacheManifest,
    recipe: Recipe,
    count: int,
    device: torch.device | str = "cpu",
    prune: bool = False,
    canvases: Canvases | None = None,
) -> int:
    """Cache samples 0 … count - 1 of `recipe` with the ids and captions of `prepare_samples`;
    return how many were made (existing samples are kept). `canvases`: their sizes and crops, in
    place of the recipe's size. `prune`: remove other items. ValueError if the folder is a cache
    made with other settings, or from another recipe."""
    canvases = canvases or Canvases.of(manifest, PreprocessConfig(), recipe)
    recipe = _drawn_on(recipe, canvases.sizes[0])
    item_bytes = manifest.item_bytes(manifest.spec.frames(recipe.frames))
    with (
        helping_processes(helper_count(count, item_bytes, HELPERS)) as helpers,
        CacheWriter(out_dir, manifest, forgiving=True, helpers=helpers) as writer,
        contextlib.closing(SavingThreads()) as saver,
    ):
        if not (Path(out_dir) / DESCRIPTION).exists():
            _check_samples(writer, recipe, canvases, count)
        claim(Path(out_dir), recipe, canvases.describe())
        wanted = {i: canvases.item_ids(i) for i in range(count)}
        if prune:
            kept = {id for ids in wanted.values() for id in ids}
            writer.remove(sorted(writer.entries.keys() - kept))
        missing = {i: ids for i, ids in wanted.items() if not writer.entries.keys() >= set(ids)}
        unknown = writer.admit() if missing else ""
        if unknown:
            print(unknown)
        with tqdm(
            total=count, initial=count - len(missing), desc=f"caching {out_dir}", unit="sample"
        ) as bar:
            for samples, latents in _encoded(tokenizer, recipe, canvases, missing, device, helpers):
                items = [(i, crop) for i in samples for crop in range(len(missing[i]))]
                ids = [missing[i][crop] for i, crop in items]
                rows = SampleRows(_drawn_on(recipe, canvases.canvas(samples[0])), canvases, items)
                saver.submit(writer.add_rows, ids, HalfLatents(latents), rows)
                bar.update(len(samples))
            saver.wait()
    return len(missing)


def _drawn_on(recipe: Recipe, canvas: Size) -> Recipe:
    return replace(recipe, width=canvas[0], height=canvas[1])


def _check_samples(writer: CacheWriter, recipe: Recipe, canvases: Canvases, count: int) -> None:
    """Raise ValueError if the cache holds samples of another recipe. Older caches did not record
    their recipe, so a few samples are compared: nearly every sample of another seed or variant
    differs, and so do half of the captions that may leave out facts."""
    there = [i for i in range(count) if canvases.item_ids(i)[0] in writer.entries]
    frames = writer.manifest.spec.frames(recipe.frames)
    for i in sorted({*there[:8], *there[-8:]}):
        (item,) = _drawn_on(recipe, canvases.canvas(i)).draw([i])
        entry = writer.entries[canvases.item_ids(i)[0]]
        facts = entry.facts.get("facts", {})
        known = {name: facts.get(name) for name in item.to_json()} == item.to_json()
        if not known or entry.caption != recipe.words(i, item)[0] or entry.shape[0] != frames:
            raise ValueError(
                f"{writer.folder} holds moving shapes made otherwise (sample {i:06d} has"
                f" {entry.shape[0]} latent frames, other objects or another caption): choose"
                " another --out_dir, or the --seed, --variant, --frames and --complete_captions of"
                " it"
            )


def _encoded(
    tokenizer: Tokenizer,
    recipe: Recipe,
    canvases: Canvases,
    missing: Iterable[int],
    device: torch.device | str,
    helpers: Executor | None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the missing samples and the latents of their items, in groups that are drawn at one
    size and cut to one size."""
    alike: dict[tuple[Size, Size], list[int]] = defaultdict(list)
    for i in missing:
        alike[canvases.canvas(i), canvases.size(i)].append(i)
    pixels = CHUNK_PIXELS.get(torch.device(device).type, CHUNK_PIXELS["cpu"])
    for (canvas, size), members in alike.items():
        step = max(1, pixels // (canvas[0] * canvas[1] * recipe.frames))
        of_size = _drawn_on(recipe, canvas)
        portions = [members[k : k + DRAWN] for k in range(0, len(members), DRAWN)]
        drawn = chain.from_iterable(ahead(helpers, of_size.draw, portions, AHEAD))
        for start in range(0, len(members), step):
            indices = members[start : start + step]
            with torch.inference_mode():
                whole = of_size.render(list(islice(drawn, len(indices))), device)
                latents = tokenizer.encode(to_unit(_cut(whole, size, canvases, indices)))
            yield indices, latents


def _cut(whole: Tensor, size: Size, canvases: Canvases, indices: list[int]) -> Tensor:
    """Return all crops of the samples `whole (B, F, 3, H, W)`, in order."""
    width, height = size
    if whole.shape[3:] == (height, width):
        return whole
    crops = []
    for sample, i in zip(whole, indices, strict=True):
        for left, top in canvases.corners(i).values():
            crops.append(sample[..., top : top + height, left : left + width])
    return torch.stack(crops)
