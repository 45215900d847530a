"""Open a latent cache, of whatever layout: raw latents with captions, and what made them.

<folder>/manifest.json    tokenizer (fingerprint, latent spec), sizes, crop
<folder>/…                the items, as `plain.py` or `packed.py` describes
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmdit.data.cache.columns import Columns
from mmdit.data.cache.items import SIGNATURE, load_item
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.packed import damaged_shard, is_packed, packed_columns
from mmdit.data.cache.plain import read_entries
from mmdit.files import open_regular


class LatentCache:
    """An opened cache: `ids`, `captions`, `facts` and `shapes (N, 4)` int64 (frames, rows, columns,
    channels), sorted by id: an item's number does not depend on who wrote it when. The texts of a
    packed one are read when asked for.
    """

    def __init__(self, folder: Path, manifest: CacheManifest, columns: Columns):
        self.folder, self.manifest, self.columns = folder, manifest, columns
        self.ids, self.captions = columns.ids, columns.captions
        self.facts, self.sources = columns.facts, columns.sources
        self.shapes, self.rates = columns.shapes, columns.rates
        self._ends = self.shapes[:, 0].cumsum(0).numpy()  # of the frames of each item in:
        self._compared = np.zeros(self._ends[-1], bool)  # frames whose check sums were compared

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Return the size of all latents."""
        return int(self.shapes.prod(1).sum()) * 2

    def load(self, index: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Read the latents `(F, H, W, C)` float16 of item `index`, or its frames `start:stop`
        without the rest, and check them. Damaged names the file or shard."""
        path, shape = f"{self.folder}/{self.columns.files[index]}", self.shapes[index].tolist()
        stop = shape[0] if stop is None else stop
        try:
            numbers = self._read(path, index, start, stop)
            if numbers is not None and self._is_sound(index, numbers, start, stop):
                return torch.from_numpy(numbers).view(-1, *shape[1:])
        except (OSError, ValueError):
            pass  # explained below
        if not path.endswith(".pt"):
            raise damaged_shard(Path(path), self._damage(path, index))
        return self._load_whole(path, index)[start:stop]

    def _read(self, path: str, index: int, start: int, stop: int) -> np.ndarray | None:
        """Return the numbers of some frames, read without unpickling; None: the file is not the one
        that the index knows."""
        size, offset, _ = self.columns.places[index].tolist()
        frame = int(self.shapes[index, 1:].prod())
        with open_regular(path, buffered=False) as file:
            if os.fstat(file.fileno()).st_size != size or offset < 0:
                return None
            if path.endswith(".pt") and file.read(len(SIGNATURE)) != SIGNATURE:
                return None
            file.seek(offset + start * frame * 2)
            numbers = np.empty((stop - start) * frame, np.float16)
            return numbers if file.readinto(numbers.data) == numbers.nbytes else None

    def _is_sound(self, index: int, numbers: np.ndarray, start: int, stop: int) -> bool:
        """Return whether the frames `start:stop` are as they were written; each part of an item is
        compared once."""
        frames, crc = int(self.shapes[index, 0]), int(self.columns.places[index, 2])
        if stop - start == frames:
            return zlib.crc32(numbers.data) == crc
        first, crcs = int(self._ends[index]) - frames, self.columns.frame_crcs[index]
        compared = self._compared[first + start : first + stop]
        if compared.all():
            return True
        if not len(crcs):  # of an older cache: only all of it can be compared
            self.load(index)
            self._compared[first : first + frames] = True
            return True
        before = int(crcs[start - 1]) if start else 0
        after = int(crcs[stop - 1]) if stop < frames else crc
        compared[:] = zlib.crc32(numbers.data, before) == after
        return bool(compared[0])

    def _load_whole(self, path: str, index: int) -> Tensor:
        """Return the latents of a file that was replaced by hand, read in full. ValueError: it is
        damaged, or not what the index says."""
        item = load_item(path, self.manifest.spec.channels)
        pairs = {
            "shape": (list(item["latents"].shape), self.shapes[index].tolist()),
            "caption": (item["caption"], self.captions[index]),
        }
        for name, (actual, listed) in pairs.items():
            if actual != listed:
                raise ValueError(
                    f"cache file {path} has the {name} {actual!r:.200}, the index says"
                    f" {listed!r:.200}; delete {self.folder}/index*.jsonl (it is rebuilt from the"
                    " files)"
                )
        return item["latents"]

    def _damage(self, path: str, index: int) -> str:
        """Return why an item could not be read from its shard."""
        if not os.path.exists(path):
            return "it is missing"
        actual, size = os.stat(path).st_size, int(self.columns.places[index, 0])
        if actual != size:
            return f"it has {actual} bytes, the index says {size}"
        return f"the check sum of item {self.ids[index]!r} is wrong"


def open_cache(folder: str | Path, wanted: CacheManifest | None = None) -> LatentCache:
    """Open the cache in `folder`. With `wanted` (`CacheManifest.of(tokenizer, video, bucketing,
    preprocess)`), ValueError names every setting in which it differs. Reads the index and the
    files' names; items that no index lists are read once.
    """
    folder = Path(folder)
    manifest = CacheManifest.read(folder)
    if wanted is not None:
        manifest.check(folder, wanted)
    columns = packed_columns(folder) if is_packed(folder) else _plain_columns(folder, manifest)
    return LatentCache(folder, manifest, columns)


def _plain_columns(folder: Path, manifest: CacheManifest) -> Columns:
    entries = read_entries(folder, manifest.spec.channels)
    if entries.lost:
        first = next(iter(entries.lost))
        raise ValueError(
            f"{len(entries.lost)} items of the cache {folder} have lost their files (the first is"
            f" {first!r}); run the caching command again to make them anew, or delete index*.jsonl"
            " to go on without them"
        )
    if not entries.by_id:
        raise ValueError(
            f"the cache {folder} holds no item; run the caching command that made its manifest"
            " again"
        )
    return Columns.of(entries.by_id.values())
