"""Write a latent cache in its plain layout. A kill at any moment leaves only complete items."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mmdit.data.cache.half_latents import HalfLatents
from mmdit.data.cache.items import Entry, make_item
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.packed import is_packed
from mmdit.data.cache.plain import (
    entry_line,
    index_files,
    item_files,
    read_entries,
    removal_line,
)
from mmdit.data.dataset.buckets import Size
from mmdit.data.dataset.records import check_id
from mmdit.files import (
    UNWRITABLE,
    clean,
    flush_file_system,
    lock,
    naming,
    refuse_link,
    write_atomically,
)

FLUSH_SECONDS = 5.0  # between two flushes to the disk: the work that a power cut may cost
WAITING = 4  # batches that may wait to be saved
SAVERS = 2  # batches saved at a time: the files of one small batch keep few threads busy
THREADS = 4  # that write files, since writing one takes longer to wait than to compute
PORTION = 256  # items that a thread or process writes before it reports them

Row = tuple[str, dict, dict]  # caption, facts and source of an item


class Rows(Protocol):
    """A list of rows, or an object that makes them on demand; a slice of it is another one."""

    def __getitem__(self, part: slice, /) -> Rows: ...

    def __iter__(self) -> Iterator[Row]: ...


@contextlib.contextmanager
def explain_disk_errors() -> Iterator[None]:
    """Turn a failed write, above all on a full disk, into a ValueError that says what is lost
    (nothing) and what to do. Can be used as a decorator."""
    try:
        yield
    except OSError as error:
        remedy = (
            "what is written stays: free disk space, if that is it, and give the same command"
            " again, it goes on from there"
        )
        if error.errno in UNWRITABLE:  # a folder of others, a file in its place
            remedy = "nothing can be written there; choose another folder"
        raise ValueError(f"{error}; {remedy}") from None


class CacheWriter:
    """Adds items to a cache folder, new or begun. The caching loop uses it, and renderers that make
    latents directly.

        with CacheWriter(folder, CacheManifest.of(tokenizer, video)) as writer:
            writer.add_many(ids, latents, captions, facts)      # latents (B, F, H, W, C), raw

    A folder made with other settings is an error, and so are a second process that writes as the
    same `rank` and an item whose file is damaged. If `forgiving`, a damaged item counts as missing
    instead (`damaged` says why). An index line is written only when the file that it lists is on
    the disk. `helpers`: processes that write the files in place of threads, which pays for
    thousands of small items.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: CacheManifest,
        rank: int = 0,
        world: int = 1,
        forgiving: bool = False,
        helpers: Executor | None = None,
    ):
        self.folder, self.manifest, self.world = Path(folder), manifest, world
        self.folder.mkdir(parents=True, exist_ok=True)
        if is_packed(self.folder):
            raise ValueError(
                f"{self.folder} is a packed cache; add items to the cache it was packed from, then"
                " run mmdit pack-cache again"
            )
        name = f"index-{rank}.jsonl" if world > 1 else "index.jsonl"
        self._index = refuse_link(self.folder / name).open("ab")
        lock(self._index)
        self._threads = ThreadPoolExecutor(THREADS, "cache-files")
        self._helpers = helpers or self._threads
        self._begun = manifest
        if (self.folder / "manifest.json").exists():
            self._begun = CacheManifest.read(self.folder)
            self._begun.check(self.folder, manifest)
        elif (self.folder / "checkpoints").is_dir():
            raise ValueError(f"{self.folder} is the folder of a run: give the cache a new folder")
        elif any(item_files(self.folder)):
            raise ValueError(
                f"{self.folder} holds .pt files but no manifest.json: what made them is unknown;"
                " use a new folder"
            )
        else:
            manifest.write(self.folder)
        for size in manifest.sizes:
            self._make_place(size)
        clean(self.folder, *filter(Path.is_dir, self.folder.glob("[1-9]*x[1-9]*")))
        if self._index.tell():
            self._index.write(b"\n")  # ends a line torn by a kill
        stored = read_entries(self.folder, manifest.spec.channels, forgiving)
        self.entries, self.damaged = stored.by_id, stored.damaged
        self._lock = threading.Lock()  # of the lines
        self._lines: list[str] = []  # of items whose files may not be on the disk yet
        self._flusher = ThreadPoolExecutor(1, "cache-index")
        self._flushing: Future = Future()
        self._flushing.set_result(None)
        self._flushed = time.monotonic()
        self._append(map(entry_line, stored.rebuilt))
        self._append(removal_line(id, file) for id, file in stored.lost.items())

    def _make_place(self, size: Size) -> str:
        """Create the folder of a size; return it relative to the cache: "", or ending with a
        slash."""
        if not self.manifest.bucketed:
            return ""
        place = "{}x{}/".format(*size)
        refuse_link(self.folder / place).mkdir(exist_ok=True)
        return place

    def _append(self, lines: Iterable[str]) -> None:
        with self._lock:
            self._lines += lines
            due = time.monotonic() - self._flushed > FLUSH_SECONDS
            if due and self._flushing.done():
                self._begin_flush()

    def _begin_flush(self) -> None:
        """Start writing the pending lines, while files go on being written. Raises the error of the
        last flush (a full disk)."""
        self._flushing.result()
        lines, self._lines = self._lines, []
        self._flushed = time.monotonic()
        self._flushing = self._flusher.submit(self._flush, lines)

    def _flush(self, lines: list[str]) -> None:
        """Write these index lines, after making sure that the files they list are on the disk and
        not only in memory."""
        if lines:
            flush_file_system(self.folder)
            with naming(self._index.name):
                self._index.write("".join(lines).encode())
                self._index.flush()

    def admit(self) -> str:
        """Check that new latents have the precision of those in the cache; return a sentence if
        that one is not known. ConfigError if they differ."""
        if self.entries:
            return self._begun.check_precision(self.folder, self.manifest)
        if self._begun.precision != self.manifest.precision:  # begun, but nothing was encoded yet
            self._begun = replace(self._begun, precision=self.manifest.precision)
            self._begun.write(self.folder)
        return ""

    def remove(self, ids: Iterable[str]) -> int:
        """Remove items from the cache; return how many of `ids` were in it."""
        entries = [self.entries.pop(id) for id in ids if id in self.entries]
        for entry in entries:
            (self.folder / entry.file).unlink(missing_ok=True)
        self._append(removal_line(entry.id, entry.file) for entry in entries)
        return len(entries)

    def add(
        self,
        id: str,
        latents: Tensor,
        caption: str,
        facts: dict | None = None,
        source: dict | None = None,
    ) -> None:
        """Add one item, `latents (F, H, W, C)`; see `add_many`."""
        self.add_many([id], latents[None], [caption], [facts or {}], [source or {}])

    def add_many(
        self,
        ids: list[str],
        latents: Tensor | HalfLatents,
        captions: list[str],
        facts: list[dict] | None = None,
        sources: list[dict] | None = None,
        leave_out: bool = False,
    ) -> list[str]:
        """Add items of one shape: raw `latents (B, F, H, W, C)`, or some that are still being
        copied here. `facts`: plain JSON values about each item; `sources`: where each was cut from.
        An existing id is replaced. ValueError if the manifest does not list the size, a text cannot
        be stored, or float16 cannot hold the latents; with `leave_out`, items of the last kind are
        left out, and their ids returned.
        """
        nothing: list[dict] = [{}] * len(ids)
        rows = list(zip(captions, facts or nothing, sources or nothing, strict=True))
        return self.add_rows(ids, latents, rows, leave_out)

    def add_rows(
        self, ids: list[str], latents: Tensor | HalfLatents, rows: Rows, leave_out: bool = False
    ) -> list[str]:
        """Add items as `add_many` does. Their rows are read where the files are written, which is
        in a helper if there are any."""
        self._check_shape(latents.shape)
        if isinstance(latents, Tensor):
            latents = HalfLatents(latents)
        half, finite = latents.wait()
        bad = [id for id, good in zip(ids, finite.tolist(), strict=True) if not good]
        if bad and not leave_out:
            raise ValueError(
                f"latents of {', '.join(bad[:5])} ({len(bad)} items) are not finite in float16;"
                " look at the tokenizer (its weights and precision)"
            )
        if bad:
            half, good = half[finite], finite.tolist()
            ids, rows = list(compress(ids, good)), list(compress(rows, good))
        place = self._make_place(self.manifest.size_of(half.shape[1:]))
        for id in ids:
            old = self.entries.get(id)
            if old and old.file != f"{place}{id}.pt":
                (self.folder / old.file).unlink(missing_ok=True)  # its size changed
        size = min(PORTION, max(1, math.ceil(len(ids) / THREADS)))
        parts = [slice(first, first + size) for first in range(0, len(ids), size)]
        portions = [(ids[part], half[part].numpy(), rows[part]) for part in parts]
        work = partial(_write_portion, self.folder, place)
        pool = self._helpers if len(parts) > 1 else self._threads  # one is not worth the sending
        for written in pool.map(work, portions):
            self.entries.update((entry.id, entry) for entry, _ in written)
            self._append(line for _, line in written)
        return bad

    def _check_shape(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless latents of this shape belong in this cache."""
        if len(shape) != 5 or not shape[1]:
            raise ValueError(
                f"latents have shape {tuple(shape)}; must be (items, frames, rows, columns,"
                " channels)"
            )
        size, channels = self.manifest.size_of(shape[1:]), shape[-1]
        if channels != self.manifest.spec.channels or not self.manifest.allows(size):
            sizes = ", ".join("{}x{}".format(*size) for size in self.manifest.sizes)
            sizes = sizes or f"at most {self.manifest.max_pixels_per_frame} pixels"
            raise ValueError(
                f"latents of {channels} channels for {size[0]}x{size[1]} do not belong into"
                f" {self.folder}, which is for {self.manifest.spec.channels} channels and {sizes}"
            )

    def close(self) -> None:
        """Finish the index. If there is only one writer, it is one file sorted by id: the same
        bytes whatever the order of the work was."""
        if self._index.closed:
            return
        self._threads.shutdown()
        try:
            self._begin_flush()
            self._flushing.result()
            if self.world == 1:
                lines = (entry_line(self.entries[id]) for id in sorted(self.entries))
                write_atomically(self.folder / "index.jsonl", "".join(lines), flush=True)
                for path in index_files(self.folder):
                    if path.name != "index.jsonl":
                        path.unlink()
        finally:
            self._flusher.shutdown()
            with contextlib.suppress(OSError):  # of a full disk, which was reported before
                self._index.close()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _write_portion(
    folder: Path, place: str, portion: tuple[list[str], np.ndarray, Rows]
) -> list[tuple[Entry, str]]:
    """Write the files of some items; return their entries and index lines."""
    written = []
    for id, latents, (caption, facts, source) in zip(*portion, strict=True):
        file = f"{place}{check_id(id)}.pt"
        numbers = torch.from_numpy(latents)
        pieces, entry = make_item(id, file, numbers, caption, facts, source)
        write_atomically(f"{folder}/{file}", iter(pieces))
        written.append((entry, entry_line(entry)))
    return written


class SavingThreads:
    """Threads that save, at most a few batches behind the thread that makes them."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(SAVERS, "cache-writer")
        self.waiting: deque[Future] = deque()

    def submit(self, work: Callable, *arguments: object) -> None:
        """Run `work` in a thread, perhaps beside earlier work. Wait while too much work is pending,
        which bounds the memory; raise the error of earlier work (a full disk)."""
        self.waiting.append(self._pool.submit(work, *arguments))
        while len(self.waiting) > WAITING:
            self.waiting.popleft().result()

    def wait(self) -> None:
        """Wait until everything is saved."""
        while self.waiting:
            self.waiting.popleft().result()

    def close(self) -> None:
        """End the threads after they have finished their work."""
        self._pool.shutdown()
