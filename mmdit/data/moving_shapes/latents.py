"""Moving shapes straight into a latent cache: no pictures on disk between the renderer and the
tokenizer.

    [facts] ─► render ─► encode ─► [copy beside the next] ─► [captions ─► CacheWriter]

A GPU is asked for the next samples while the last are copied and written: nothing here waits for
it. What is in brackets is done beside it: of small items, which cost more Python than anything
else, by processes, of large ones by threads.
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

# rendered and encoded at once: enough to keep a GPU busy, and the writing threads
CHUNK_PIXELS = {"cpu": 1 << 24, "cuda": 1 << 26}
HELPERS = 12  # processes at most: then the one that they help is the slowest
DRAWN = 256  # samples drawn at a time by a helper
AHEAD = 32  # portions of them that are drawn ahead


@dataclass(frozen=True)
class SampleRows:
    """Makes what is stored beside the latents of some items, in the process that asks for it: the
    one that writes them. `items`: the sample of each, all drawn at one size, and the number of its
    crop."""

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
    return how many were made (samples that are there are kept). `canvases`: their sizes and crops,
    in place of the recipe's size. `prune`: take other items out. ValueError: the folder is a cache
    made with other settings, or of another recipe."""
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
    """Refuse samples that are there if they are of another recipe, which an older cache has not
    written down: a few are looked at, for nearly every sample of another seed or variant
    differs, and half of the captions that may leave out facts."""
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
    """Yield the missing samples and the latents of their items, some at a time that are drawn at
    one size and cut to one."""
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
    """Return the crops of the samples `whole (B, F, 3, H, W)`, one behind the other."""
    width, height = size
    if whole.shape[3:] == (height, width):
        return whole
    crops = []
    for sample, i in zip(whole, indices, strict=True):
        for left, top in canvases.corners(i).values():
            crops.append(sample[..., top : top + height, left : left + width])
    return torch.stack(crops)
