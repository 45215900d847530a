"""Moving shapes straight into a latent cache: no pictures on disk between the renderer and the
tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.writer import CacheWriter, SavingThread, explain_disk_errors
from mmdit.data.moving_shapes.prepare import DESCRIPTION, Recipe, claim
from mmdit.interfaces import Tokenizer
from mmdit.pixels import to_unit

CHUNK_FRAMES = 4096  # rendered and encoded at once


@explain_disk_errors()
def cache_moving_shapes(
    tokenizer: Tokenizer,
    out_dir: str | Path,
    manifest: CacheManifest,
    recipe: Recipe,
    count: int,
    device: torch.device | str = "cpu",
    prune: bool = False,
) -> int:
    """Cache samples 0 … count - 1 of `recipe` with the ids and captions of `prepare_samples`;
    return how many were made (items that are there are kept). `prune`: take other items out.
    ValueError: the folder is a cache made with other settings, or of another recipe."""
    with (
        CacheWriter(out_dir, manifest, forgiving=True) as writer,
        contextlib.closing(SavingThread()) as saver,
    ):
        if not (Path(out_dir) / DESCRIPTION).exists():
            _check_samples(writer, recipe, count)
        claim(Path(out_dir), recipe)
        if prune:
            writer.remove(sorted(writer.entries.keys() - {f"{i:06d}" for i in range(count)}))
        missing = [i for i in range(count) if f"{i:06d}" not in writer.entries]
        with tqdm(
            total=count, initial=count - len(missing), desc=f"caching {out_dir}", unit="sample"
        ) as bar:
            for indices, latents, captions, facts in _encoded(tokenizer, recipe, missing, device):
                names = [f"{i:06d}" for i in indices]
                saver.submit(writer.add_many, names, latents.half().cpu(), captions, facts)
                bar.update(len(indices))
            saver.wait()
    return len(missing)


def _check_samples(writer: CacheWriter, recipe: Recipe, count: int) -> None:
    """Refuse samples that are there if they are of another recipe, which an older cache has not
    written down: a few are looked at, for nearly every sample of another seed or variant
    differs."""
    there = [i for i in range(count) if f"{i:06d}" in writer.entries]
    looked = sorted({*there[:8], *there[-8:]})
    frames = writer.manifest.spec.frames(recipe.frames)
    for i, item in zip(looked, recipe.draw(looked), strict=True):
        entry = writer.entries[f"{i:06d}"]
        facts = entry.facts.get("facts", {})
        known = {name: facts.get(name) for name in item.to_json()}
        if known != item.to_json() or entry.shape[0] != frames:
            raise ValueError(
                f"{writer.folder} holds moving shapes made otherwise (sample {i:06d} has"
                f" {entry.shape[0]} latent frames or other objects): choose another --out_dir,"
                " or the --seed, --variant and --frames of it"
            )


def _encoded(
    tokenizer: Tokenizer, recipe: Recipe, missing: list[int], device: torch.device | str
) -> Iterator[tuple[list[int], Tensor, list[str], list[dict]]]:
    """Yield indices, latents, captions and facts of the missing samples, some at a time."""
    step = max(1, CHUNK_FRAMES * 64 * 64 // (recipe.width * recipe.height) // recipe.frames)
    for start in range(0, len(missing), step):
        indices = missing[start : start + step]
        facts = recipe.draw(indices)
        with torch.inference_mode():
            latents = tokenizer.encode(to_unit(recipe.render(facts, device)))
        texts, known = zip(*map(recipe.words, indices, facts), strict=True)
        yield indices, latents, list(texts), [{"facts": row} for row in known]
