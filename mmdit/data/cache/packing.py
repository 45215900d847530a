"""Packs a latent cache into shards (`mmdit.data.cache.packed`), and looks at every byte of them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mmdit.data.cache.items import running_crcs
from mmdit.data.cache.latent_cache import THREADS, LatentCache, open_cache, told_how_to_go_on
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.packed import (
    INDEX,
    REMEDY,
    index_of,
    read_columns,
    read_index,
    read_shard,
    shard_header,
    shard_name,
    shards_of,
    text_line,
    write_index,
)
from mmdit.files import abandoned_files, clean, lock, refuse_link, write_atomically

SHARD_ITEMS = 100_000  # at most, for the header of a safetensors file is limited
AT_ONCE = 256  # items read ahead


@told_how_to_go_on()
def pack_cache(folder: str | Path, out_dir: str | Path, shard_bytes: int = 1 << 30) -> dict:
    """The items of the cache `folder` as shards of about `shard_bytes` and an index in `out_dir`;
    returns counts. What is there and still true is kept, so a killed run goes on, and one after the
    cache has grown writes what changed; until it is finished the folder cannot be opened. `folder`
    is not touched. ValueError: a damaged item, or `out_dir` is another cache.
    """
    folder, out = Path(folder), Path(out_dir)
    if shard_bytes < 1:
        raise ValueError(f"a shard of {shard_bytes} bytes holds nothing; take at least 1")
    if out.resolve() == folder.resolve() or (out.is_dir() and next(out.rglob("*.pt"), None)):
        raise ValueError(f"{out} holds an unpacked cache; pack into a folder of its own")
    cache = open_cache(folder)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "manifest.json").exists():
        CacheManifest.read(out).check(out, cache.manifest)
    else:
        cache.manifest.write(out)
    with (out / "manifest.json").open("rb") as held:
        lock(held)
        clean(out)
        for path in folder.glob("skipped*.jsonl"):
            write_atomically(refuse_link(out / path.name), path.read_bytes())
        return _pack(cache, out, shard_bytes)


def _pack(cache: LatentCache, out: Path, shard_bytes: int) -> dict:
    cuts = _cuts((2 * cache.shapes.prod(1)).tolist(), shard_bytes)
    parts = [range(*pair) for pair in zip(cuts, cuts[1:], strict=False)]
    names = [shard_name(number) for number in range(len(parts))]
    kept = [_is_current(out / name, cache, part) for name, part in zip(names, parts, strict=True)]
    extra = [path for path in shards_of(out) if path.name not in names]
    if extra or not all(kept):
        (out / INDEX).unlink(missing_ok=True)  # it would contradict the shards from here on
    bar = tqdm(
        total=len(cache),
        initial=sum(len(part) for part, keep in zip(parts, kept, strict=True) if keep),
        desc=f"packing {cache.folder}",
        unit="item",
        delay=2,
    )
    with bar, ThreadPoolExecutor(THREADS) as pool:
        for name, part, keep in zip(names, parts, kept, strict=True):
            if not keep:
                write_atomically(
                    refuse_link(out / name), _shard(cache, part, pool, bar), flush=True
                )
    for path in extra:
        path.unlink()
    if not (out / INDEX).exists():
        write_index(out, index_of((out / name, read_shard(out / name)) for name in names))
    return {
        "items": len(cache),
        "shards": len(parts),
        "written": kept.count(False),
        "gigabytes": round(cache.nbytes / 1e9, 3),
    }


def _cuts(sizes: list[int], shard_bytes: int) -> list[int]:
    """Numbers of the items at which a shard begins, and of the end; an item larger than a shard
    gets one of its own."""
    cuts, filled = [0], 0
    for item, size in enumerate(sizes):
        if item > cuts[-1] and (filled + size > shard_bytes or item - cuts[-1] == SHARD_ITEMS):
            cuts.append(item)
            filled = 0
        filled += size
    return [*cuts, len(sizes)]


def _lines(cache: LatentCache, part: range, crcs: list[int]) -> bytes:
    rows = zip(part, crcs, cache.marks(part), strict=True)
    return b"".join(
        text_line(cache.captions[i], cache.facts[i], cache.sources[i], crc, marks)
        for i, crc, marks in rows
    )


def _header(cache: LatentCache, part: range, text_bytes: int) -> bytes:
    return shard_header(
        [cache.ids[i] for i in part], cache.shapes[part.start : part.stop].tolist(), text_bytes
    )


def _is_current(path: Path, cache: LatentCache, part: range) -> bool:
    """Whether the shard is there with these items, texts and check sums of the numbers."""
    if not path.exists():
        return False
    texts = _lines(cache, part, cache.crcs(part))
    header = _header(cache, part, len(texts))
    with path.open("rb") as file:
        same = file.read(len(header)) == header
        end = len(header) + 2 * int(cache.shapes[part.start : part.stop].prod(1).sum())
        return same and file.seek(end) == end and file.read() == texts


def _shard(
    cache: LatentCache, part: range, pool: ThreadPoolExecutor, bar: tqdm
) -> Iterator[bytes | memoryview]:
    """The bytes of one shard, piece by piece."""
    yield _header(cache, part, len(_lines(cache, part, [0] * len(part))))
    crcs = []
    for first in range(part.start, part.stop, AT_ONCE):
        for latents in pool.map(cache.load, part[first - part.start :][:AT_ONCE]):
            numbers = memoryview(latents.contiguous().numpy()).cast("B")
            crcs.append(zlib.crc32(numbers))
            yield numbers
            bar.update()
    yield _lines(cache, part, crcs)


def verify_packed(folder: Path) -> tuple[int, list[dict]]:
    """`verify_cache` for a packed cache: every item against its check sum, the index against the
    shards."""
    manifest, damage, shards = CacheManifest.read(folder), [], shards_of(folder)

    def found(file: str, problem: str) -> None:
        damage.append({"file": file, "problem": f"{problem}; {REMEDY}", "delete": False})

    def whole() -> Iterator[tuple[Path, list[dict]]]:
        for path in tqdm(shards, desc=f"verifying {folder}", unit="shard", delay=2):
            try:
                rows = read_shard(path)
            except ValueError as error:
                found(path.name, str(error).partition("damaged: ")[2].rpartition("; ")[0])
                continue
            with path.open("rb") as file:
                for row in rows:
                    if problem := _problem(file, row, manifest):
                        found(path.name, f"item {row['id']!r}: {problem}")
            yield path, rows

    columns = index_of(whole())
    try:
        stored = read_columns(folder)
        read_index(folder)
        if not damage and any(
            not torch.equal(column, stored[name]) for name, column in columns.items()
        ):
            found(INDEX, "it says otherwise than the shards")
    except ValueError as error:
        if not damage:
            found(INDEX, str(error).rpartition("; ")[0])
    for path in abandoned_files(folder):
        damage.append({"file": path.name, "problem": "left by a killed process", "delete": True})
    return len(shards), damage


def _are_marks(numbers: bytearray, row: dict) -> bool:
    return (
        running_crcs(np.frombuffer(numbers, np.float16).reshape(row["shape"]))[:-1] == row["marks"]
    )


def _problem(file, row: dict, manifest: CacheManifest) -> str:
    frames, rows, columns, channels = row["shape"]
    size = (columns * manifest.spec.spatial, rows * manifest.spec.spatial)
    file.seek(row["offset"])
    numbers = bytearray(file.read(2 * frames * rows * columns * channels))
    return (
        "its check sum is wrong"
        if zlib.crc32(numbers) != row["crc"]
        else (
            f"its size {size[0]}x{size[1]} does not belong into this cache"
            if not manifest.allows(size)
            else (
                f"it has {channels} channels, the manifest says {manifest.spec.channels}"
                if channels != manifest.spec.channels
                else (
                    "the check sums of its frames are wrong"
                    if row["marks"] and not _are_marks(numbers, row)
                    else (
                        "its latents are not finite"
                        if not torch.frombuffer(numbers, dtype=torch.float16).isfinite().all()
                        else ""
                    )
                )
            )
        )
    )
