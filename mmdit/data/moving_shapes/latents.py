"""Moving shapes straight into a latent cache: no pictures on disk between the renderer and the
tokenizer.

    facts ─► render ─► encode ─► [copy beside the next] ─► [threads: CacheWriter]

A GPU is asked for the next samples while the last are copied and written: nothing here waits for
it.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.data.cache.half_latents import HalfLatents
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.writer import CacheWriter, SavingThreads, explain_disk_errors
from mmdit.data.dataset.buckets import Size
from mmdit.data.dataset.frames import PreprocessConfig
from mmdit.data.moving_shapes.canvases import Canvases
from mmdit.data.moving_shapes.facts import Facts
from mmdit.data.moving_shapes.prepare import DESCRIPTION, Recipe, claim
from mmdit.interfaces import Tokenizer
from mmdit.pixels import to_unit

# rendered and encoded at once: enough to keep a GPU busy, and the writing threads
CHUNK_PIXELS = {"cpu": 1 << 24, "cuda": 1 << 26}


@dataclass
class Encoded:
    """Some samples of one size: the latents of their items, and all that is stored with them."""

    samples: int
    latents: Tensor
    ids: list[str]
    captions: list[str]
    facts: list[dict]
    sources: list[dict]


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
    with (
        CacheWriter(out_dir, manifest, forgiving=True) as writer,
        contextlib.closing(SavingThreads()) as saver,
    ):
        if not (Path(out_dir) / DESCRIPTION).exists():
            _check_samples(writer, recipe, canvases, count)
        claim(Path(out_dir), recipe, canvases.describe())
        wanted = {i: canvases.item_ids(i) for i in range(count)}
        if prune:
            kept = {id for ids in wanted.values() for id in ids}
            writer.remove(sorted(writer.entries.keys() - kept))
        missing = [i for i, ids in wanted.items() if not writer.entries.keys() >= set(ids)]
        unknown = writer.admit() if missing else ""
        if unknown:
            print(unknown)
        with tqdm(
            total=count, initial=count - len(missing), desc=f"caching {out_dir}", unit="sample"
        ) as bar:
            for made in _encoded(tokenizer, recipe, canvases, missing, device):
                latents = HalfLatents(made.latents)
                texts = (made.captions, made.facts, made.sources)
                saver.submit(writer.add_many, made.ids, latents, *texts)
                bar.update(made.samples)
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
    missing: list[int],
    device: torch.device | str,
) -> Iterator[Encoded]:
    """Yield the missing samples, some at a time that are drawn at one size and cut to one."""
    alike: dict[tuple[Size, Size], list[int]] = defaultdict(list)
    for i in missing:
        alike[canvases.canvas(i), canvases.size(i)].append(i)
    pixels = CHUNK_PIXELS.get(torch.device(device).type, CHUNK_PIXELS["cpu"])
    for (canvas, size), members in alike.items():
        step = max(1, pixels // (canvas[0] * canvas[1] * recipe.frames))
        of_size = _drawn_on(recipe, canvas)
        for start in range(0, len(members), step):
            indices = members[start : start + step]
            facts = of_size.draw(indices)
            with torch.inference_mode():
                whole = of_size.render(facts, device)
                latents = tokenizer.encode(to_unit(_cut(whole, size, canvases, indices)))
            yield _described(recipe, canvases, indices, facts, latents)


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


def _described(
    recipe: Recipe,
    canvases: Canvases,
    indices: list[int],
    facts: list[Facts],
    latents: Tensor,
) -> Encoded:
    made = Encoded(len(indices), latents, [], [], [], [])
    for i, item in zip(indices, facts, strict=True):
        ids, (text, known) = canvases.item_ids(i), recipe.words(i, item)
        made.ids += ids
        made.sources += canvases.sources(i)
        made.captions += [text] * len(ids)
        made.facts += [{"facts": known}] * len(ids)
    return made
