"""Training without a cache: all sources are inspected once, then decoded and encoded for each
batch.

Everything is decided, decoded and cut by the functions that caching uses, so batches are the same
up to rounding. This is slow, and meant for trying things out.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from mmdit.data.batches.batch_plan import Grid
from mmdit.data.batches.stores import Part, Text, text_of
from mmdit.data.cache.columns import Columns
from mmdit.data.cache.decoding import Decode, rounded
from mmdit.data.cache.half_latents import HalfLatents
from mmdit.data.cache.items import Entry
from mmdit.data.cache.latent_cache import LatentCache
from mmdit.data.cache.look import look_at, other_rates
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.dataset.buckets import BucketingConfig, VideoConfig
from mmdit.data.dataset.clips import cached_frames
from mmdit.data.dataset.frames import PreprocessConfig, boxes_of
from mmdit.data.dataset.problems import Skip
from mmdit.data.dataset.records import Record, media_of, read_records
from mmdit.data.dataset.stamps import crc_of_ends
from mmdit.interfaces import Tokenizer
from mmdit.pixels import to_unit

FRAMES_AT_ONCE = 256  # frames that are encoded at once


class UnencodedItems(LatentCache):
    """The items that caching would make of the records in a JSONL file, without their latents.
    `skips`: the records that it would skip; `other_rates`: see `look`. ValueError if none is
    left."""

    def __init__(
        self,
        path: Path,
        tokenizer: Tokenizer,
        video: VideoConfig,
        bucketing: BucketingConfig,
        preprocess: PreprocessConfig,
        *,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
    ):
        media = media_of(path)
        records = read_records(path, media, "frames_dir")
        manifest = CacheManifest.of(tokenizer, video, bucketing, preprocess, str(path))
        self.tokenizer, self.device = tokenizer, device
        self.video, self.preprocess = video, preprocess
        self.decode = Decode(media, manifest, preprocess, video)
        # for a tokenizer that joins frames: how many it gets at once
        self.window = video.num_frames if manifest.clip_plan and media == "video" else 0
        self.other_rates = other_rates(records, video.fps) if media == "video" else ""
        self.skips: list[Skip] = []
        self._records: dict[str, Record] = {}
        entries, crcs = [], {}
        rows = look_at(records, media, manifest.choose, preprocess, video, num_workers)
        for record, row in zip(records, rows, strict=True):
            try:
                made = [] if isinstance(row, Skip) else list(self._entries(record, row, manifest))
                if made:
                    crcs[record.id] = crc_of_ends(record.source)
            except (OSError, ValueError) as error:
                # too short for a tokenizer that joins frames, or gone
                row = Skip.of(record, error)
                made = []
            if isinstance(row, Skip):
                self.skips.append(row)
            entries += made
            self._records |= dict.fromkeys((entry.id for entry in made), record)
        if not entries:
            examples = "\n".join(f"  {skip.path}: {skip.reason}" for skip in self.skips[:5])
            raise ValueError(
                f"none of the {len(records)} records of {path} can be used:\n{examples}\nPaths are"
                " relative to the file's own folder."
            )
        super().__init__(path, manifest, Columns.of(entries))
        self.files_crc = zlib.crc32(str(sorted(crcs.items())).encode())

    def _entries(self, record: Record, row: dict, manifest: CacheManifest) -> Iterator[Entry]:
        """Yield the cache entries of all crops of a record; `row`: its row from `look_at`."""
        (width, height), frames, spec = row["bucket"], row["frames"], manifest.spec
        if self.window:
            chosen = len(cached_frames(frames, self.video))
            firsts = range(0, chosen, self.window)
            frames = sum(spec.frames(min(self.window, chosen - first)) for first in firsts)
        shape = [frames, height // spec.spatial, width // spec.spatial, spec.channels]
        boxes = boxes_of(tuple(row["size"]), (width, height), self.preprocess, record.id)
        ids = self.preprocess.item_ids(record.id)
        for crop, box in boxes.items():
            source = {"size": row["size"], "crops": list(boxes), "crop": rounded(box)}
            entry = Entry(ids[crop], record.path, shape, record.caption, 0, -1, 0)
            entry.facts, entry.source = record.facts, source
            yield entry

    def pixels(self, item: int) -> Tensor:
        """Decode an item; return the frames that a cache would hold, uint8 `(F, 3, H, W)`.
        ValueError names a source that cannot be used."""
        id = self.ids[item]
        record = self._records[id]
        result = self.decode[[record]]
        if result.coded:
            self.decode.finish(result, self.device)
        for skip in result.skips:
            raise ValueError(
                f"{skip.path}: {skip.reason}; mend it or take its line out of {self.folder}, or"
                " make a cache, which skips what is damaged"
            )
        for pixels, metas in result.groups:
            for crop, meta in zip(pixels, metas, strict=True):
                if meta.id == id and self._fits(crop, item):
                    return crop
        raise ValueError(f"{record.path} has changed since the training began; start it again")

    def _fits(self, pixels: Tensor, item: int) -> bool:
        """Return whether `pixels (F, 3, H, W)` have the size, and for clips the number of frames,
        that the training was planned with."""
        frames, rows, columns, _ = self.shapes[item].tolist()
        cell = self.manifest.spec.spatial
        same_size = pixels.shape[2:] == (rows * cell, columns * cell)
        return same_size and (bool(self.window) or len(pixels) == frames)


class Encoding:
    """A store that makes latents for each batch: threads decode, then the tokenizer encodes."""

    def __init__(self, items: UnencodedItems, num_workers: int):
        self.items, self.threads = items, max(1, num_workers)

    def text(self, item: int) -> Text:
        """Return the texts of one item."""
        return text_of(self.items, item)

    def gather(
        self, grid: Grid, items: Tensor, frames: Tensor, tiles: list[Part] | None = None
    ) -> Tensor:
        """Return latents; see `InMemory.gather`."""
        with ThreadPoolExecutor(self.threads, "decoding") as pool:
            made = list(pool.map(self._read, items.tolist(), frames))
        clips = self._encode([pixels for pixels, _ in made])
        samples = [clip[chosen] for clip, (_, chosen) in zip(clips, made, strict=True)]
        if tiles is not None:
            samples = [sample[tile] for sample, tile in zip(samples, tiles, strict=True)]
        return torch.stack(samples)

    def _read(self, item: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pixels that must be encoded to get the latent frames `numbers (F,)` of an
        item, and the numbers of these frames in the result."""
        pixels, window = self.items.pixels(item), self.items.window
        if not window:
            return pixels[numbers], torch.arange(len(numbers))
        length = self.items.manifest.spec.frames(window)
        place = int(numbers[0]) // length
        return pixels[place * window : (place + 1) * window], numbers - place * length

    def _encode(self, clips: list[Tensor]) -> list[Tensor]:
        """Return the latents `(F, H, W, C)` of each clip, float16 on the CPU."""
        latents: list[Tensor] = []
        same = all(clip.shape == clips[0].shape for clip in clips)
        at_once = max(1, FRAMES_AT_ONCE // len(clips[0])) if same else 1
        for first in range(0, len(clips), at_once):
            pixels = torch.stack(clips[first : first + at_once]).to(self.items.device)
            with torch.inference_mode():
                half, finite = HalfLatents(self.items.tokenizer.encode(to_unit(pixels))).wait()
            if not finite.all():
                raise ValueError(
                    f"latents of {self.items.folder} are not finite in float16; look at the"
                    " tokenizer (its weights and precision)"
                )
            latents += half
        return latents
