"""The latent cache: one `.pt` per item, a manifest that says what made them, and an index so that
opening reads no item.

    <folder>/manifest.json             tokenizer (fingerprint, latent spec), sizes, crop
    <folder>/<id>.pt                   {"latents": float16 (F, H, W, C) raw, "caption": str, "facts"?: dict, "source"?: dict}
    <folder>/<width>x<height>/<id>.pt  the same when bucketing is on
    <folder>/index.jsonl               a line per item; more `index-<rank>.jsonl` where several processes wrote

The `.pt` files are the truth and load with `torch.load(weights_only=True)`; the index is a summary
that is rebuilt from them where it is missing, torn or contradicts itself. Every file is written
aside and renamed, so a kill leaves whole items only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.data.cache.items import (
    SIGNATURE,
    index_entry,
    is_entry,
    item_bytes,
    load_item,
    read_entry,
    running_crcs,
    to_half,
)
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.packed import Columns, Marks, damage_of, is_packed, read_index
from mmdit.data.dataset.records import check_id, check_storable
from mmdit.files import clean, flush_file_system, lock, open_regular, refuse_link, write_atomically

SETTLE_SECONDS = 5.0  # between two flushes to the disk; a power cut costs so much work
THREADS = 4  # that write files; making a file waits more than it computes
_SIZE_FOLDER = re.compile(r"[1-9]\d*x[1-9]\d*")


def _files(folder: Path) -> dict[str, str]:
    """id → file relative to `folder`, from names alone. ValueError for an id in two sizes."""
    found: dict[str, str] = {}
    with os.scandir(folder) as top:
        sizes = sorted(entry.name for entry in top if _SIZE_FOLDER.fullmatch(entry.name))
    for size in ["", *sizes]:
        for file in (f"{size}/{name}" if size else name for name in os.listdir(folder / size)):
            inner = file.rpartition("/")[2]
            if inner.startswith(".") or not inner.endswith(".pt"):
                continue
            other = found.setdefault(inner[:-3], file)
            if other != file:
                raise ValueError(
                    f"id {inner[:-3]!r} is in the cache {folder} twice: {other} and {file}; delete"
                    " the one that the bucketing config does not give, or cache again into a new"
                    " folder"
                )
    return found


def _index_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("index*.jsonl"))


@dataclass
class _Entries:
    """Holds what the files and indices of a cache folder say."""

    by_id: dict[str, dict] = field(default_factory=dict)  # for exactly the files that are there
    rebuilt: list[dict] = field(default_factory=list)  # those of them that no index held
    lost: dict[str, str] = field(
        default_factory=dict
    )  # id → file that an index lists and that is not there
    damaged: dict[str, str] = field(default_factory=dict)  # id → why its file could not be indexed


def _read_entries(folder: Path, channels: int, forgiving: bool = False) -> _Entries:
    """Read a cache folder. Raises ValueError for a damaged item that no index holds, unless
    `forgiving`."""
    files, found, entries, removed = _files(folder), _Entries(), {}, set()
    for path in _index_files(folder):
        mine: dict[str, dict] = {}
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    entry = json.loads(line)
                    if entry.get("removed"):
                        removed.add(entry["id"])
                        mine.pop(entry["id"], None)
                    elif entry["id"] not in files:
                        found.lost[entry["id"]] = entry["file"]
                    elif files[entry["id"]] == entry["file"] and is_entry(entry):
                        mine[entry["id"]] = (
                            entry  # a later line of one writer replaces an earlier one
                        )
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    continue  # a line torn by a kill: its item is read from its file below
        for id, entry in mine.items():
            if entries.setdefault(id, entry) != entry:
                entries[id] = {}  # two writers disagree: the file decides
    missing = [id for id in files if not entries.get(id)]
    for id in tqdm(missing, desc=f"indexing {folder}", unit="file", disable=len(missing) < 1000):
        try:
            entries[id] = read_entry(id, files[id], folder, channels)
            found.rebuilt.append(entries[id])
        except ValueError as error:
            if not forgiving:
                raise
            entries.pop(id, None)
            found.damaged[id] = str(error)
    found.by_id, found.lost = (
        entries,
        {id: file for id, file in sorted(found.lost.items()) if id not in removed},
    )
    return found


def _line(entry: dict) -> str:
    return json.dumps(entry, ensure_ascii=False, separators=(",", ":")) + "\n"


def _removal(id: str, file: str) -> dict:
    """The index line of an item that was taken out."""
    return {"id": id, "file": file, "removed": True}


@contextlib.contextmanager
def told_how_to_go_on() -> Iterator[None]:
    """Say of a write that failed, on a full disk above all, what is lost (nothing) and what to do.
    Also a decorator."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{error}; what is written stays: free disk space, if that is it, and give the same"
            " command again, it goes on from there"
        ) from None


# ── writing ───────────────────────────────────────────────────────────────────────────────────────
class CacheWriter:
    """Adds items to a cache folder, new or begun; used by the caching loop and by renderers that
    make latents directly.

        with CacheWriter(folder, CacheManifest.of(tokenizer, video)) as writer:
            writer.add_many(ids, latents, captions, facts)      # latents (B, F, H, W, C), raw

    A folder made with other settings is an error, as is a second process writing as the same
    `rank`, and an item whose file is damaged; if `forgiving`, it counts as not there (`damaged`
    says why). Lines enter the index when what they promise is on the disk.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: CacheManifest,
        rank: int = 0,
        world: int = 1,
        forgiving: bool = False,
    ):
        self.folder, self.manifest, self.rank, self.world = Path(folder), manifest, rank, world
        self.folder.mkdir(parents=True, exist_ok=True)
        if is_packed(self.folder):
            raise ValueError(
                f"{self.folder} is a packed cache; add items to the cache it was packed from, then"
                " run mmdit.scripts.pack_cache again"
            )
        self._index = refuse_link(
            self.folder / (f"index-{rank}.jsonl" if world > 1 else "index.jsonl")
        ).open("ab")
        lock(self._index)
        self._threads = ThreadPoolExecutor(THREADS, "cache-files")
        if (self.folder / "manifest.json").exists():
            CacheManifest.read(self.folder).check(self.folder, manifest)
        elif any(_files(self.folder)):
            raise ValueError(
                f"{self.folder} holds .pt files but no manifest.json: what made them is unknown;"
                " use a new folder"
            )
        else:
            manifest.write(self.folder)
        for size in manifest.sizes:
            self._place(size)
        clean(self.folder, *filter(Path.is_dir, self.folder.glob("[1-9]*x[1-9]*")))
        if self._index.tell():
            self._index.write(b"\n")  # ends a line torn by a kill
        found = _read_entries(self.folder, manifest.spec.channels, forgiving)
        self.entries, self.damaged = found.by_id, found.damaged
        self._fresh, self._settled = [], time.monotonic()
        self._append(found.rebuilt)
        self._append([_removal(id, file) for id, file in found.lost.items()])

    def _place(self, size: tuple[int, int]) -> Path:
        """The folder of this size, made."""
        place = (
            refuse_link(self.folder / "{}x{}".format(*size))
            if self.manifest.bucketed
            else self.folder
        )
        place.mkdir(exist_ok=True)
        return place

    def _append(self, entries: list[dict]) -> None:
        self._fresh += map(_line, entries)
        if time.monotonic() - self._settled > SETTLE_SECONDS:
            self._settle()

    def _settle(self) -> None:
        """Write the lines of what was written since, once that is on the disk and not only in
        memory."""
        if self._fresh:
            flush_file_system(self.folder)
            self._index.write("".join(self._fresh).encode())
            self._index.flush()
        self._fresh, self._settled = [], time.monotonic()

    def remove(self, ids: Iterable[str]) -> int:
        """Take items out of the cache; returns how many of `ids` were there."""
        entries = [self.entries.pop(id) for id in ids if id in self.entries]
        for entry in entries:
            (self.folder / entry["file"]).unlink(missing_ok=True)
        self._append([_removal(entry["id"], entry["file"]) for entry in entries])
        return len(entries)

    def add(
        self,
        id: str,
        latents: Tensor,
        caption: str,
        facts: dict | None = None,
        source: dict | None = None,
    ) -> None:
        """One item, `latents (F, H, W, C)`; see `add_many`."""
        self.add_many([id], latents[None], [caption], [facts or {}], [source or {}])

    def add_many(
        self,
        ids: list[str],
        latents: Tensor,
        captions: list[str],
        facts: list[dict] | None = None,
        sources: list[dict] | None = None,
        checked: bool = False,
    ) -> None:
        """Items of one shape, `latents (B, F, H, W, C)` raw; `checked`: they come from `to_half`,
        and are finite. `facts`: what is known of each, plain JSON values. `sources`: where it was
        cut from. An id that is there is replaced. ValueError for latents that float16 cannot hold
        or whose size is not in the manifest, or for a text that no index can hold.
        """
        if latents.ndim != 5 or not latents.shape[1]:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}; must be (items, frames, rows, columns,"
                " channels)"
            )
        rows, columns, channels = latents.shape[2:]
        size = (columns * self.manifest.spec.spatial, rows * self.manifest.spec.spatial)
        if channels != self.manifest.spec.channels or not self.manifest.allows(size):
            sizes = ", ".join(f"{w}x{h}" for w, h in self.manifest.sizes)
            sizes = sizes or f"at most {self.manifest.max_pixels_per_frame} pixels"
            raise ValueError(
                f"latents of {channels} channels for {size[0]}x{size[1]} do not belong into"
                f" {self.folder}, which is for {self.manifest.spec.channels} channels and {sizes}"
            )
        half, finite = (latents, None) if checked else to_half(latents)
        if finite is not None and not finite.all():
            bad = [id for id, good in zip(ids, finite.tolist(), strict=True) if not good]
            raise ValueError(
                f"latents of {', '.join(bad[:5])} ({len(bad)} items) are not finite in float16;"
                " look at the tokenizer (its weights and precision)"
            )
        inside = "{}x{}/".format(*size) if self._place(size) != self.folder else ""
        files, numbers = [f"{inside}{check_id(id)}.pt" for id in ids], half.contiguous().numpy()

        def write(thread: int) -> list[dict]:
            entries = []
            for i in range(thread, len(ids), THREADS):
                rest = {"caption": captions[i]}
                rest |= {"facts": facts[i]} if facts and facts[i] else {}
                check_storable(rest, f"item {ids[i]}")
                rest |= {"source": sources[i]} if sources and sources[i] else {}
                entries.append(self._write(ids[i], files[i], numbers[i], rest))
            return entries

        for entries in self._threads.map(write, range(min(THREADS, len(ids)))):
            self._append(entries)

    def _write(self, id: str, file: str, numbers: np.ndarray, rest: dict) -> dict:
        *marks, crc = running_crcs(numbers)
        data, offset, crc = item_bytes(numbers, rest, crc)
        old = self.entries.get(id)
        if old and old["file"] != file:
            (self.folder / old["file"]).unlink(missing_ok=True)  # its size changed
        write_atomically(f"{self.folder}/{file}", data)
        self.entries[id] = index_entry(id, file, numbers.shape, rest, len(data), offset, crc, marks)
        return self.entries[id]

    def close(self) -> None:
        """A lone writer leaves one index, sorted by id: the same bytes whatever the order of the
        work was."""
        if self._index.closed:
            return
        self._threads.shutdown()
        try:
            self._settle()
            if self.world == 1:
                lines = (_line(self.entries[id]) for id in sorted(self.entries))
                write_atomically(self.folder / "index.jsonl", "".join(lines), flush=True)
                for path in _index_files(self.folder):
                    if path.name != "index.jsonl":
                        path.unlink()
        finally:
            with contextlib.suppress(OSError):  # of a full disk, told already
                self._index.close()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()


# ── reading ───────────────────────────────────────────────────────────────────────────────────────
def _columns(entries: dict[str, dict]) -> Columns:
    ordered = [entries[id] for id in sorted(entries)]
    shapes = np.array([entry["shape"] for entry in ordered], np.int64).reshape(-1, 4)
    places = np.array(
        [(entry["bytes"], entry["offset"], entry["crc"]) for entry in ordered], np.int64
    ).reshape(-1, 3)
    ids, captions, files = (
        [entry[name] for entry in ordered] for name in ("id", "caption", "file")
    )
    facts, sources = ([entry.get(name) or {} for entry in ordered] for name in ("facts", "source"))
    rates = {source["fps"] for source in sources if "fps" in source}
    return Columns(
        ids,
        captions,
        facts,
        sources,
        files,
        torch.from_numpy(shapes),
        torch.from_numpy(places),
        rates,
        Marks.of([entry.get("marks", ()) for entry in ordered]),
    )


class LatentCache:
    """An opened cache, packed or not: `ids`, `captions`, `facts` and `shapes (N, 4)` int64 (frames,
    rows, columns, channels), sorted by id: an item's number does not depend on who wrote it when.
    The texts of a packed one are read when asked for.
    """

    def __init__(self, folder: Path, manifest: CacheManifest, columns: Columns):
        self.folder, self.manifest, self._columns = folder, manifest, columns
        self.ids, self.captions, self.facts, self.sources = (
            columns.ids,
            columns.captions,
            columns.facts,
            columns.sources,
        )
        self.shapes, self.rates = columns.shapes, columns.rates
        self._ends = self.shapes[:, 0].cumsum(0).numpy()  # of the frames of each item in:
        self._compared = np.zeros(
            self._ends[-1], bool
        )  # frames whose check sums this process has compared

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Of all latents."""
        return int(self.shapes.prod(1).sum()) * 2

    def crcs(self, items: range) -> list[int]:
        """CRC-32 of the latents of these items, as the index has them."""
        return self._columns.places[items.start : items.stop, 2].tolist()

    def marks(self, items: range) -> list[list[int]]:
        """The CRC-32 up to each frame but the last, of these items; nothing where an older index
        has none."""
        return [self._columns.marks[item].tolist() for item in items]

    def load(self, index: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Latents `(F, H, W, C)` float16 of item `index`, or its frames `start:stop`, read without
        the rest and checked. ValueError names a damaged file or shard."""
        path, shape = f"{self.folder}/{self._columns.files[index]}", self.shapes[index].tolist()
        stop = shape[0] if stop is None else stop
        size, offset, _ = self._columns.places[index].tolist()
        frame = shape[1] * shape[2] * shape[3]
        try:
            with open_regular(path, buffering=0) as file:
                whole = os.fstat(file.fileno()).st_size == size and offset >= 0
                whole = whole and (file.read(4) == SIGNATURE or not path.endswith(".pt"))
                numbers = np.empty((stop - start) * frame if whole else 0, np.float16)
                file.seek(offset + start * frame * 2 if whole else 0)
                whole = whole and file.readinto(numbers) == numbers.nbytes
            if whole and self._is_sound(index, numbers, start, stop, shape[0]):
                return torch.from_numpy(numbers).view(-1, *shape[1:])
        except (OSError, ValueError):
            pass  # explained below
        if not path.endswith(".pt"):
            raise damage_of(path, size, self.ids[index])
        item = load_item(
            path, self.manifest.spec.channels
        )  # replaced by hand or damaged: read it in full
        for what, found, told in (
            ("shape", list(item["latents"].shape), shape),
            ("caption", item["caption"], self.captions[index]),
        ):
            if found != told:
                raise ValueError(
                    f"cache file {path} has the {what} {found!r:.200}, the index says"
                    f" {told!r:.200}; delete {self.folder}/index*.jsonl (it is rebuilt from the"
                    " files)"
                )
        return item["latents"][start:stop]

    def _is_sound(
        self, index: int, numbers: np.ndarray, start: int, stop: int, frames: int
    ) -> bool:
        """Return whether the frames `start:stop` are as they were written; each part of an item is
        compared once."""
        if stop - start == frames:
            return zlib.crc32(numbers) == int(self._columns.places[index, 2])
        first, marks = int(self._ends[index]) - frames, self._columns.marks[index]
        compared = self._compared[first + start : first + stop]
        if compared.all():
            return True
        if not len(marks):  # of an older cache: only all of it can be compared
            self.load(index)
            self._compared[first : first + frames] = True
            return True
        before = int(marks[start - 1]) if start else 0
        after = int(marks[stop - 1]) if stop < frames else int(self._columns.places[index, 2])
        compared[:] = zlib.crc32(numbers, before) == after
        return bool(compared[0])


def open_cache(folder: str | Path, wanted: CacheManifest | None = None) -> LatentCache:
    """The cache in `folder`. With `wanted` (`CacheManifest.of(tokenizer, video, bucketing,
    preprocess)`), ValueError names every setting in which it differs. Reads the index and the
    files' names; items that no index lists are read once.
    """
    folder = Path(folder)
    manifest = CacheManifest.read(folder)
    if wanted is not None:
        manifest.check(folder, wanted)
    if is_packed(folder):
        return LatentCache(folder, manifest, read_index(folder))
    found = _read_entries(folder, manifest.spec.channels)
    if found.lost:
        first = next(iter(found.lost))
        raise ValueError(
            f"{len(found.lost)} items of the cache {folder} have lost their files (the first is"
            f" {first!r}); run the caching command again to make them anew, or delete index*.jsonl"
            " to go on without them"
        )
    if not found.by_id:
        raise ValueError(
            f"the cache {folder} holds no item; run the caching command that made its manifest"
            " again"
        )
    return LatentCache(folder, manifest, _columns(found.by_id))
