"""Pack a latent cache into shards (`mmdit.data.cache.packed`)."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from mmdit.data.cache.items import Entry
from mmdit.data.cache.latent_cache import LatentCache, open_cache
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.packed import (
    INDEX,
    SUFFIXES,
    index_of,
    read_shard,
    shard_header,
    shard_name,
    shard_texts,
    shards_of,
    write_index,
)
from mmdit.data.cache.tar_shards import (
    TEXT_ENCODER,
    Embeddings,
    noted_text_encoder,
    stored_form,
    tar_end,
    tar_item,
)
from mmdit.data.cache.writer import THREADS, explain_disk_errors
from mmdit.data.dataset.captions import all_captions
from mmdit.data.dataset.problems import Damaged
from mmdit.files import clean, lock, real_path, refuse_link, write_atomically

SHARD_ITEMS = 100_000  # of a shard, at most, because the header of a safetensors file is limited
AT_ONCE = 256  # items read ahead


Format = Literal["safetensors", "webdataset"]


@explain_disk_errors()
def pack_cache(
    folder: str | Path,
    out_dir: str | Path,
    shard_bytes: int = 1 << 30,
    shard_format: Format = "safetensors",
    embeddings: Embeddings | None = None,
) -> dict:
    """Write the items of the cache `folder` as shards of about `shard_bytes`, and an index, into
    `out_dir`; return counts. Tars also get `embeddings` of the captions, if given.

    Shards that are there and still up to date are kept: so a killed run continues, and a run after
    the cache has grown only writes what changed. Until it is finished, `out_dir` cannot be opened.
    `folder` is not changed. ValueError if an item is damaged, or if `out_dir` is another cache,
    holds only items that `folder` lacks, or holds shards of unknown origin.
    """
    folder, out = Path(folder), Path(out_dir)
    if shard_bytes < 1:
        raise ValueError(f"a shard of {shard_bytes} bytes holds nothing; take at least 1")
    if real_path(out) == real_path(folder):
        raise ValueError(f"{out} is the cache itself; pack into a folder of its own")
    if out.is_dir() and next(out.rglob("*.pt"), None):
        raise ValueError(f"{out} holds an unpacked cache; pack into a folder of its own")
    if not (out / "manifest.json").exists() and any(shards_of(out)):
        raise ValueError(
            f"{out} holds {shards_of(out)[0].name} but no manifest.json: it is not known to be of a"
            " packed cache, and would be replaced; use a new folder"
        )
    cache = open_cache(folder)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "manifest.json").exists():
        CacheManifest.read(out).check(out, cache.manifest)
    else:
        cache.manifest.write(out)
    with (out / "manifest.json").open("rb") as manifest:
        lock(manifest)
        clean(out)
        gone = _items_gone(cache, out)
        for path in out.glob("skipped*.jsonl"):  # of an earlier packing
            if not (folder / path.name).exists():
                path.unlink(missing_ok=True)
        for path in folder.glob("skipped*.jsonl"):
            write_atomically(refuse_link(out / path.name), path.read_bytes())
        _note_text_encoder(out, embeddings)
        made = _pack(cache, out, shard_bytes, SUFFIXES[shard_format], embeddings)
        return made | {"removed": len(gone)}


def _items_gone(cache: LatentCache, out: Path) -> set[str]:
    """Return the ids of packed items that the cache no longer has, and that packing removes.
    ValueError if all of them are gone: they are of another cache, which may not be there any more.
    """
    packed: set[str] = set()
    for path in shards_of(out):
        with contextlib.suppress(Damaged, OSError):
            packed |= {entry.id for entry in read_shard(path)}
    gone = packed - set(cache.ids)
    if gone and gone == packed:
        raise ValueError(
            f"{out} holds {len(packed)} packed items (one is {min(gone)!r}), and {cache.folder} has"
            " none of them: they would be lost; pack into a folder of its own, or remove that one"
        )
    return gone


def _note_text_encoder(out: Path, embeddings: Embeddings | None) -> None:
    """Note which text encoder made the embeddings in the tars. Tars with embeddings of another one
    are removed, because items do not say it."""
    wanted = embeddings.to_json() if embeddings else None
    noted = noted_text_encoder(out)
    if noted == wanted or (noted and wanted and wanted | noted == wanted):
        return
    for path in (out / INDEX, *out.glob("shard-*.tar"), out / TEXT_ENCODER):
        path.unlink(missing_ok=True)
    if wanted:
        write_atomically(refuse_link(out / TEXT_ENCODER), json.dumps(wanted) + "\n")


def _pack(
    cache: LatentCache, out: Path, shard_bytes: int, suffix: str, embeddings: Embeddings | None
) -> dict:
    beside = _embedding_bytes(cache, embeddings) if embeddings else 0
    parts = [range(*pair) for pair in pairwise(_cuts(cache, shard_bytes, beside))]
    paths = [out / shard_name(number, suffix) for number in range(len(parts))]
    pairs = zip(paths, parts, strict=True)
    stale = {path: part for path, part in pairs if not _is_current(path, cache, part)}
    extra = set(shards_of(out)) - set(paths)
    if extra or stale:
        (out / INDEX).unlink(missing_ok=True)  # it would contradict the shards from here on
    done = len(cache) - sum(map(len, stale.values()))
    bar = tqdm(total=len(cache), initial=done, desc=f"packing {cache.folder}", unit="item", delay=2)
    with bar, ThreadPoolExecutor(THREADS) as pool:
        for path, part in stale.items():
            pieces = _shard(cache, part, pool, bar)
            if suffix == ".tar":
                pieces = _tar(cache, part, pool, bar, embeddings)
            write_atomically(refuse_link(path), pieces, flush=True)
    for path in extra:
        path.unlink()
    if not (out / INDEX).exists():
        write_index(out, index_of(map(read_shard, paths)))
    return {
        "items": len(cache),
        "shards": len(parts),
        "written": len(stale),
        "gigabytes": round(cache.nbytes / 1e9, 3),
    }


def _embedding_bytes(cache: LatentCache, embeddings: Embeddings) -> int:
    """Return about how many bytes of embeddings an item has, measured on the first items."""
    first, size = range(min(len(cache), 32)), 0
    for item in first:
        captions = all_captions(cache.captions[item], cache.facts[item])
        size += sum(stored_form(text).nbytes for text in embeddings.rows(captions))
    return size // len(first)


def _cuts(cache: LatentCache, shard_bytes: int, beside: int) -> list[int]:
    """Return the numbers of the items with which shards begin, and the number of items. An item
    larger than a shard gets one of its own. `beside`: bytes of an item besides its latents."""
    cuts, filled = [0], 0
    for item, size in enumerate((2 * cache.shapes.prod(1) + beside).tolist()):
        if item > cuts[-1] and (filled + size > shard_bytes or item - cuts[-1] == SHARD_ITEMS):
            cuts.append(item)
            filled = 0
        filled += size
    return [*cuts, len(cache)]


def _entries(cache: LatentCache, part: range) -> list[Entry]:
    return [cache.columns.entry(item) for item in part]


def _is_current(path: Path, cache: LatentCache, part: range) -> bool:
    """Return whether the shard exists with these items, texts and check sums of the numbers. Files
    that were modified after the shard are read, because a file that was replaced by hand may not
    match the sum in the index.
    """
    try:
        stored, written = read_shard(path), path.stat().st_mtime_ns
    except (Damaged, OSError):  # or not there
        return False
    entries = _entries(cache, part)
    files = [cache.folder / entry.file for entry in entries]
    for entry in (*stored, *entries):
        entry.file, entry.bytes, entry.offset = "", 0, 0  # where an item is stored does not matter
    if stored != entries:
        return False
    for item, file, entry in zip(part, files, entries, strict=True):
        status = file.stat()  # a copy may keep the time of what it was copied from
        later = max(status.st_mtime_ns, status.st_ctime_ns) > written
        if later and _crc(cache.load(item).numpy()) != entry.crc:
            return False
    return True


def _crc(numbers: np.ndarray) -> int:
    return zlib.crc32(numbers.data.cast("B"))


def _shard(
    cache: LatentCache, part: range, pool: ThreadPoolExecutor, bar: tqdm
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of one safetensors shard, piece by piece."""
    entries = _entries(cache, part)
    yield shard_header(entries)
    for numbers in _loaded(cache, part, entries, pool, bar):
        yield numbers.data.cast("B")
    yield shard_texts(entries)


def _tar(
    cache: LatentCache,
    part: range,
    pool: ThreadPoolExecutor,
    bar: tqdm,
    embeddings: Embeddings | None,
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of one tar shard, piece by piece."""
    entries = _entries(cache, part)
    loaded = _loaded(cache, part, entries, pool, bar)
    for entry, numbers in zip(entries, loaded, strict=True):
        yield from tar_item(entry, numbers, embeddings)
    yield tar_end()


def _loaded(
    cache: LatentCache, part: range, entries: list[Entry], pool: ThreadPoolExecutor, bar: tqdm
) -> Iterator[np.ndarray]:
    """Yield the latents of some items, and store their check sums in the entries."""
    for first in range(0, len(part), AT_ONCE):
        chunk = slice(first, first + AT_ONCE)
        loaded = pool.map(cache.load_finite, part[chunk])
        for entry, latents in zip(entries[chunk], loaded, strict=True):
            numbers = latents.contiguous().numpy()
            entry.crc = _crc(numbers)
            yield numbers
            bar.update()
