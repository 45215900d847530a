"""Check every byte of a latent cache: find damaged files, contradictions between files and index,
and leftovers of killed processes."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BufferedReader
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.data.cache.items import Entry, load_item, running_crcs
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.packed import (
    INDEX,
    REMEDY,
    index_of,
    is_packed,
    packed_columns,
    read_index,
    read_shard,
    shards_of,
)
from mmdit.data.cache.plain import index_files, index_lines
from mmdit.data.cache.writer import THREADS
from mmdit.data.dataset.problems import Damage, Damaged
from mmdit.files import abandoned_files


def verify_cache(folder: str | Path) -> tuple[int, list[Damage]]:
    """Return how many files (shards, for a packed cache) were read, and the damage. ValueError if
    it is not a cache."""
    folder = Path(folder)
    manifest = CacheManifest.read(folder)
    verify = _verify_packed if is_packed(folder) else _verify_plain
    count, damage = verify(folder, manifest)
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        for path in abandoned_files(place):
            file = path.relative_to(folder).as_posix()
            damage.append(Damage(file, "left by a killed process", delete=True))
    return count, damage


def _unfit(latents: Tensor, manifest: CacheManifest) -> str:
    """Return why readable latents do not belong in this cache, or ""."""
    size, channels = manifest.size_of(latents.shape), latents.shape[-1]
    if not manifest.allows(size):
        return f"its size {size[0]}x{size[1]} does not belong into this cache"
    if channels != manifest.spec.channels:
        return f"it has {channels} channels, the manifest says {manifest.spec.channels}"
    return "" if latents.isfinite().all() else "its latents are not finite"


# ── the plain layout ──────────────────────────────────────────────────────────────────────────────
def _verify_plain(folder: Path, manifest: CacheManifest) -> tuple[int, list[Damage]]:
    damage: list[Damage] = []
    by_id: dict[str, Entry] = {}  # a later line replaces an earlier one
    for path in index_files(folder):
        for number, id, entry in index_lines(path):
            if entry is not None:
                by_id[id] = entry
            elif id:
                by_id.pop(id, None)
            else:
                problem = "the line cannot be read (it is rebuilt when caching goes on)"
                damage.append(Damage(f"{path.name}:{number}", problem))
    entries = {entry.file: entry for entry in by_id.values()}
    paths = sorted(path for path in folder.rglob("*.pt") if not path.name.startswith("."))
    files = [path.relative_to(folder).as_posix() for path in paths]

    with ThreadPoolExecutor(THREADS) as pool:
        look = partial(_item_problem, folder, manifest)
        problems = pool.map(look, files, map(entries.get, files))
        bar = tqdm(problems, f"verifying {folder}", len(files), unit="file", delay=2)
        for file, problem in zip(files, bar, strict=True):
            if problem:
                damage.append(Damage(file, problem, delete=True))
    return len(files), damage + _contradictions(files, entries)


def _item_problem(folder: Path, manifest: CacheManifest, file: str, entry: Entry | None) -> str:
    """Return what is wrong with a file, or ""."""
    try:
        item = load_item(folder / file, manifest.spec.channels)
    except Damaged as error:
        return error.damage.problem
    latents = item["latents"]
    if problem := _unfit(latents, manifest):
        return problem
    size = "{}x{}".format(*manifest.size_of(latents.shape))
    place, _, name = file.rpartition("/")
    if place != (size if manifest.bucketed else ""):
        return f"its size is {size}, its folder is for another"
    if entry is None:
        return ""
    *frame_crcs, crc = running_crcs(latents.contiguous().numpy())
    actual = (list(latents.shape), item["caption"], crc, frame_crcs)
    listed = (entry.shape, entry.caption, entry.crc, entry.frame_crcs or frame_crcs)
    return "" if actual == listed else "the index says otherwise of its contents"


def _contradictions(files: list[str], entries: Iterable[str]) -> list[Damage]:
    """Return contradictions between the files and the index, found from names alone."""
    damage = []
    places: dict[str, list[str]] = defaultdict(list)
    for file in files:
        places[file.rpartition("/")[2]].append(file)
    for same in places.values():
        if len(same) > 1:
            damage += [Damage(file, f"its id is there {len(same)} times") for file in same]
    here, listed = set(files), set(entries)
    damage += [Damage(file, "listed in the index, but missing") for file in sorted(listed - here)]
    unlisted = "not in the index (it is read anew at each start)"
    return damage + [Damage(file, unlisted) for file in sorted(here - listed)]


# ── the packed layout ─────────────────────────────────────────────────────────────────────────────
def _verify_packed(folder: Path, manifest: CacheManifest) -> tuple[int, list[Damage]]:
    damage: list[Damage] = []
    paths = shards_of(folder)

    def readable_shards() -> Iterator[list[Entry]]:
        for path in tqdm(paths, f"verifying {folder}", unit="shard", delay=2):
            try:
                entries = read_shard(path)
            except Damaged as error:
                damage.append(error.damage)
                continue
            with path.open("rb") as file:
                for entry in entries:
                    if problem := _packed_problem(file, entry, manifest):
                        problem = f"item {entry.id!r}: {problem}"
                        damage.append(Damage(path.name, problem, REMEDY))
            yield entries

    columns = index_of(readable_shards())
    if not damage:  # otherwise the damage has been reported already
        damage += _index_damage(folder, columns)
    return len(paths), damage


def _packed_problem(file: BufferedReader, entry: Entry, manifest: CacheManifest) -> str:
    """Return what is wrong with an item of a shard, or ""."""
    numbers = np.empty(entry.shape, np.float16)
    file.seek(entry.offset)
    file.readinto(numbers.data)
    if zlib.crc32(numbers.data) != entry.crc:
        return "its check sum is wrong"
    if entry.frame_crcs and running_crcs(numbers)[:-1] != entry.frame_crcs:
        return "the check sums of its frames are wrong"
    return _unfit(torch.from_numpy(numbers), manifest)


def _index_damage(folder: Path, columns: dict[str, Tensor]) -> list[Damage]:
    """Return the differences between the index and the columns of the shards."""
    try:
        stored = read_index(folder)
        packed_columns(folder)
    except Damaged as error:
        return [error.damage]
    except ValueError as error:  # it is not there
        return [Damage(INDEX, str(error))]
    if any(not torch.equal(column, stored[name]) for name, column in columns.items()):
        return [Damage(INDEX, "it says otherwise than the shards", REMEDY)]
    return []
