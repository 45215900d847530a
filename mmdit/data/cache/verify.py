"""Looks at every byte of a latent cache: damaged files, files and index lines that contradict each
other, leftovers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from mmdit.data.cache.items import load_item, running_crcs
from mmdit.data.cache.latent_cache import THREADS
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.packed import is_packed
from mmdit.data.cache.packing import verify_packed
from mmdit.files import abandoned_files


def _index_lines(folder: Path) -> Iterator[tuple[str, dict | None]]:
    """(index file and line number, entry or None if it cannot be read); empty lines are where a
    killed process was resumed."""
    for path in sorted(folder.glob("index*.jsonl")):
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                    whole = isinstance(entry, dict) and (
                        "removed" in entry
                        or {"id", "file", "shape", "caption", "crc", "bytes"} <= entry.keys()
                    )
                except (ValueError, RecursionError):
                    whole = False
                yield f"{path.name}:{number}", entry if whole else None


def verify_cache(folder: str | Path) -> tuple[int, list[dict]]:
    """(files or, of a packed cache, shards looked at; damage found): rows `{"file", "problem",
    "delete"}`, the last true where deleting the file lets the caching command make it anew.
    ValueError: no cache."""
    folder = Path(folder)
    manifest = CacheManifest.read(folder)
    if is_packed(folder):
        return verify_packed(folder)
    files = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.pt")
        if not path.name.startswith(".")
    )
    damage: list[dict] = []
    entries: dict[str, dict] = {}

    def found(file: str, problem: str, delete: bool = False) -> None:
        damage.append({"file": file, "problem": problem, "delete": delete})

    for place, entry in _index_lines(folder):
        if entry is None:
            found(place, "the line cannot be read (it is rebuilt when caching goes on)")
        elif "removed" in entry:
            entries.pop(entry.get("file"), None)
        else:
            entries[entry["file"]] = entry  # a later line replaces an earlier one

    def look(file: str) -> str:
        try:
            item = load_item(folder / file, manifest.spec.channels)
        except ValueError as error:
            return str(error).partition("damaged: ")[2].partition("; delete")[0]
        frames, rows, columns, _ = item["latents"].shape
        size = (columns * manifest.spec.spatial, rows * manifest.spec.spatial)
        if not manifest.allows(size):
            return f"its size {size[0]}x{size[1]} does not belong into this cache"
        if file != (f"{size[0]}x{size[1]}/" if manifest.bucketed else "") + file.rpartition("/")[2]:
            return f"its size is {size[0]}x{size[1]}, its folder is for another"
        if not torch.isfinite(item["latents"]).all():
            return "its latents are not finite"
        entry = entries.get(file)
        if entry is None:
            return ""
        *marks, crc = running_crcs(item["latents"].contiguous().numpy())
        actual = (list(item["latents"].shape), item["caption"], crc, marks)
        told = (entry["shape"], entry["caption"], entry["crc"], entry.get("marks") or marks)
        return "" if actual == told else "the index says otherwise of its contents"

    with ThreadPoolExecutor(THREADS) as pool:
        bar = tqdm(
            pool.map(look, files),
            desc=f"verifying {folder}",
            total=len(files),
            unit="file",
            delay=2,
        )
        for file, problem in zip(files, bar, strict=True):
            if problem:
                found(file, problem, delete=True)
    places: dict[str, list[str]] = {}
    for file in files:
        places.setdefault(file.rpartition("/")[2], []).append(file)
    for several in places.values():
        for file in several if len(several) > 1 else []:
            found(file, f"its id is there {len(several)} times")
    for file in sorted(entries.keys() - set(files)):
        found(file, "listed in the index, but missing")
    for file in sorted(set(files) - entries.keys()):
        found(file, "not in the index (it is read anew at each start)")
    for place in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        for path in abandoned_files(place):
            found(path.relative_to(folder).as_posix(), "left by a killed process", delete=True)
    return len(files), damage
