"""Open a latent cache of either layout: raw latents with captions, and the settings that made them.

<folder>/manifest.json    tokenizer (fingerprint, latent spec), sizes, crop
<folder>/…                the items, as `plain.py` or `packed.py` describes
"""

from __future__ import annotations

import os
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmdit.data.cache.columns import Columns
from mmdit.data.cache.items import SIGNATURE, damaged_item, load_item
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.packed import damaged_shard, is_packed, packed_columns
from mmdit.data.cache.plain import read_entries
from mmdit.files import open_regular
from mmdit.weights import is_finite

Span = tuple[int, int]  # frames start:stop
# Gaps of up to this many bytes between two wanted frames of a clip are read along, because a
# separate read costs as much. (A sample that takes every fifth frame of 448x256 leaves out gaps of
# 230 kB.)
READ_OVER = 1 << 16


class LatentCache:
    """An opened cache: `ids`, `captions`, `facts` and `shapes (N, 4)` int64 (frames, rows, columns,
    channels), sorted by id, so that an item's number does not depend on when and by whom it was
    written. The texts of a packed cache are read when they are asked for.
    """

    files_crc: int | None = None  # of the files that are encoded during training, if they are

    def __init__(self, folder: Path, manifest: CacheManifest, columns: Columns):
        self.folder, self.manifest, self.columns = folder, manifest, columns
        self.ids, self.captions = columns.ids, columns.captions
        self.facts, self.sources = columns.facts, columns.sources
        self.shapes, self.rates = columns.shapes, columns.rates
        # also as arrays, whose rows cost less to read than those of a tensor
        self._shapes, self._places = self.shapes.numpy(), columns.places.numpy()
        self._frame_bytes = 2 * self._shapes[:, 1:].prod(1)
        self._ends = self._shapes[:, 0].cumsum()  # where the frames of each item end in:
        self._compared = np.zeros(self._ends[-1], bool)  # frames whose check sums were compared

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Return the size of all latents in bytes."""
        return int(self.shapes.prod(1).sum()) * 2

    def load(
        self, index: int, start: int = 0, stop: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Read and check the latents `(F, H, W, C)` float16 of item `index`, or only its frames
        `start:stop`, into `out` if it is given. Damaged names the file or shard."""
        frames, *size = self._shapes[index].tolist()
        stop = frames if stop is None else stop
        if out is None:
            out = torch.empty(stop - start, *size, dtype=torch.float16)
        self._load(index, [(start, stop)], [out.numpy()])
        return out

    def load_finite(self, index: int) -> Tensor:
        """Read all latents of item `index`, as `load` does, for statistics or pictures. Damaged if
        they hold nan or infinity."""
        latents = self.load(index)
        if not is_finite(latents):
            path = self.folder / self.columns.files[index]
            if path.suffix == ".pt":
                raise damaged_item(path, "its latents are not finite")
            raise damaged_shard(path, f"the latents of item {self.ids[index]!r} are not finite")
        return latents

    def load_frames(self, index: int, frames: Tensor, out: Tensor) -> None:
        """Read the ascending frames `(F,)` of item `index` into `out (F, H, W, C)`. Frames between
        them are read along only where that costs less than a separate read. See `load`."""
        if len(frames) == 1:
            self.load(index, int(frames), int(frames) + 1, out)
            return
        wanted, target = frames.numpy(), out.numpy()
        frame_bytes = int(self._frame_bytes[index])
        cuts = np.flatnonzero(np.diff(wanted) > READ_OVER // frame_bytes + 1) + 1
        places = [range(*pair) for pair in pairwise([0, *cuts.tolist(), len(wanted)])]
        spans = [(int(wanted[place[0]]), int(wanted[place[-1]]) + 1) for place in places]
        parts = []
        for place, (start, stop) in zip(places, spans, strict=True):
            whole = stop - start == len(place)
            shape = (stop - start, *target.shape[1:])
            part = target[place.start : place.stop] if whole else np.empty(shape, np.float16)
            parts.append(part)
        self._load(index, spans, parts)
        for place, (start, _), part in zip(places, spans, parts, strict=True):
            if len(part) != len(place):
                target[place.start : place.stop] = part[wanted[place.start : place.stop] - start]

    def _load(self, index: int, spans: list[Span], parts: list[np.ndarray]) -> None:
        """Read the frames `start:stop` of an item for each of `spans`, each into its part."""
        path = f"{self.folder}/{self.columns.files[index]}"
        try:
            read = self._read(path, index, spans, parts)
            checked = zip(parts, spans, strict=True)
            if read and all(self._is_sound(index, part, *span) for part, span in checked):
                return
        except (OSError, ValueError):
            pass  # the cause is found below
        if not path.endswith(".pt"):
            raise damaged_shard(Path(path), self._damage(path, index))
        whole = self._load_whole(path, index).numpy()
        for (start, stop), part in zip(spans, parts, strict=True):
            part[:] = whole[start:stop]

    def _read(self, path: str, index: int, spans: list[Span], parts: list[np.ndarray]) -> bool:
        """Read the numbers of some frames without unpickling; return False if the file is not the
        one that the index lists."""
        size, offset, _ = self._places[index].tolist()
        frame_bytes = int(self._frame_bytes[index])
        with open_regular(path, buffered=False) as file:
            if os.fstat(file.fileno()).st_size != size or offset < 0:
                return False
            if path.endswith(".pt") and file.read(len(SIGNATURE)) != SIGNATURE:
                return False
            for (start, _), part in zip(spans, parts, strict=True):
                file.seek(offset + start * frame_bytes)
                if file.readinto(part.data.cast("B")) != part.nbytes:
                    return False
        return True

    def _is_sound(self, index: int, numbers: np.ndarray, start: int, stop: int) -> bool:
        """Return whether the frames `start:stop` are as they were written. Frames are compared
        once."""
        frames, crc = int(self._shapes[index, 0]), int(self._places[index, 2])
        if stop - start == frames:
            return zlib.crc32(numbers.data) == crc
        first, crcs = int(self._ends[index]) - frames, self.columns.frame_crcs[index]
        compared = self._compared[first + start : first + stop]
        if compared.all():
            return True
        if not len(crcs):  # an older cache: only the whole item can be checked
            self.load(index)
            self._compared[first : first + frames] = True
            return True
        before = int(crcs[start - 1]) if start else 0
        after = int(crcs[stop - 1]) if stop < frames else crc
        compared[:] = zlib.crc32(numbers.data, before) == after
        return bool(compared[0])

    def _load_whole(self, path: str, index: int) -> Tensor:
        """Read all of a file that was replaced by hand; return its latents. ValueError if it is
        damaged, or differs from its entry in the index."""
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
        """Return the reason why an item could not be read from its shard."""
        if not os.path.exists(path):
            return "it is missing"
        actual, size = os.stat(path).st_size, int(self.columns.places[index, 0])
        if actual != size:
            return f"it has {actual} bytes, the index says {size}"
        return f"the check sum of item {self.ids[index]!r} is wrong"


def open_cache(folder: str | Path, wanted: CacheManifest | None = None) -> LatentCache:
    """Open the cache in `folder`. With `wanted` (`CacheManifest.of(tokenizer, video, bucketing,
    preprocess)`), ValueError names every setting that differs. Only the index and the names of
    files are read, and items that no index lists.
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
