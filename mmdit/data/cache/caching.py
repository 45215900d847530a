"""From records to a latent cache: workers decode, the device encodes, and threads (or processes,
for thousands of small items) save. It can be stopped at any moment and continued.

    records ─► [workers: decoding] ─► batches of one size ─► encode ─► [CacheWriter]

A picture that cannot be used is skipped, counted and listed in `skipped.jsonl`, and items that were
cached from an earlier content of its file are removed. Wrong settings stop the run before any work.
Under `torchrun` each rank takes every world-th record (or row group of parquet files): there is no
communication, and ranks may finish at different times.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.config import ConfigError
from mmdit.data.cache.caching_report import CacheReport
from mmdit.data.cache.decoding import Decoded, Meta, decoded
from mmdit.data.cache.half_latents import HalfLatents
from mmdit.data.cache.items import load_item
from mmdit.data.cache.look import other_rates
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.writer import CacheWriter, SavingThreads, explain_disk_errors
from mmdit.data.dataset.buckets import BucketingConfig, VideoConfig
from mmdit.data.dataset.clips import latent_video, usable_frames
from mmdit.data.dataset.frames import PreprocessConfig
from mmdit.data.dataset.inputs import dealt
from mmdit.data.dataset.jpegs import import_torchvision
from mmdit.data.dataset.problems import Damaged, Skip, Unusable, list_skipped
from mmdit.data.dataset.records import Media, Record
from mmdit.data.dataset.stamps import compare_stamp, is_elsewhere
from mmdit.data.dataset.workers import helper_count, helping_processes
from mmdit.interfaces import Tokenizer
from mmdit.pixels import to_unit

HOPELESS = 1000  # with as many failures and no success, the paths are wrong, not the pictures
WORKERS_PER_HELPER = 4  # decoding workers a writing process: small pictures decode in 1.5 ms


@dataclass
class Caching:
    """Encodes all records that a cache lacks. All frames of a clip are kept; frames are chosen when
    a batch is made. Call `run()` once."""

    records: list[Record]
    media: Media
    tokenizer: Tokenizer
    out_dir: str | Path
    video: VideoConfig
    bucketing: BucketingConfig = field(default_factory=BucketingConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    source: str = ""  # name of the metadata, noted in the manifest
    device: torch.device | str = "cpu"
    batch_size: int = 64
    num_workers: int = 0
    rank: int = 0
    world: int = 1
    progress: bool = True  # show a bar
    prune: bool = False  # remove items that belong to none of the records

    @explain_disk_errors()
    def run(self) -> CacheReport:
        """Cache the records; return a report. After Ctrl-C it is a report with `interrupted`; what
        was written stays, and the same call continues from there. ValueError if the folder holds a
        cache made with other settings, or if no record can be used."""
        begin = time.monotonic()
        if self.preprocess.jpeg_decoder == "torchvision" and self.media == "video":
            raise ConfigError(
                "preprocess.jpeg_decoder",
                "is torchvision, which decodes pictures alone, and these are clips; leave it out of"
                " this caching",
            )
        if self.preprocess.jpeg_decoder == "torchvision":
            import_torchvision()  # a missing library shows before any work
        self.manifest = CacheManifest.of(
            self.tokenizer, self.video, self.bucketing, self.preprocess, self.source
        )
        mine = dealt(self.records, self.rank, self.world)
        most = 0 if self.media == "video" else self.num_workers // WORKERS_PER_HELPER
        with helping_processes(
            helper_count(len(mine), self.manifest.item_bytes(frames=1), most)
        ) as helpers:
            self._run(mine, helpers)
        self.report.seconds = time.monotonic() - begin
        return self.report

    def _run(self, mine: list[Record], helpers: Executor | None) -> None:
        self.writer = CacheWriter(
            self.out_dir, self.manifest, self.rank, self.world, forgiving=True, helpers=helpers
        )
        self.report = CacheReport(
            len(mine),
            older=CacheManifest.read(self.out_dir).older(self.out_dir),
            other_rates=other_rates(mine, self.video.fps) if self.media == "video" else "",
            damaged=self.writer.damaged,
        )
        # pixels waiting to become a batch, by shape
        self.buffers: dict[tuple, list[tuple[Tensor, list[Meta]]]] = defaultdict(list)
        self.saver = SavingThreads()
        self.counting = threading.Lock()  # of the report
        try:
            self._cache(mine)
            self._find_strangers()
        except KeyboardInterrupt:
            self.report.interrupted = True
        finally:
            self.saver.close()
            self.writer.close()
            self._list_skipped()
            skipped = {skip.id for skip in self.report.skipped}
            empty = [record for record in mine if not record.caption and record.id not in skipped]
            self.report.empty_captions = len(empty)
        if self.world == 1:
            self._describe_cache()
        if mine and not self.writer.entries and not self.report.interrupted:
            skips = self.report.skipped
            examples = "\n".join(f"  {skip.path or skip.id}: {skip.reason}" for skip in skips[:5])
            raise ValueError(
                f"none of the {len(mine)} records could be used ({len(skips)} were"
                f" tried):\n{examples}\nPaths in the metadata are relative to the metadata file's"
                " own folder."
            )

    # ── the work ──────────────────────────────────────────────────────────────────────────────────
    def _cache(self, records: list[Record]) -> None:
        looking = "looking for finished items"
        listed = tqdm(records, desc=looking, disable=len(records) < 20_000)
        pending = [record for record in listed if not self._is_finished(record)]
        if pending:
            self.report.precision = self.writer.admit()
        bar = tqdm(
            total=len(records),
            initial=self.report.already,
            desc=f"caching {self.out_dir}",
            unit="image" if self.media == "image" else "clip",
            disable=not self.progress,
        )
        with bar:
            for part in decoded(
                pending,
                self.media,
                self.manifest,
                self.preprocess,
                self.video,
                self.num_workers,
                self.device,
            ):
                self._take(part)
                bar.update(part.records)
                bar.set_postfix(skipped=len(self.report.skipped), refresh=False)
                begun = self.report.written or self.report.already or self.saver.waiting
                if len(self.report.skipped) >= HOPELESS and not (begun or self.buffers):
                    break
            for shape in list(self.buffers):
                self._encode(shape)
            self.saver.wait()

    def _take(self, part: Decoded) -> None:
        """Add the pixels that workers made of a few records to the buffers; encode a buffer that
        holds a whole batch."""
        self._skip(part.skips)
        self.report.same_crops += part.same_crops
        for pixels, metas in part.groups:
            shape = tuple(pixels.shape[1:])
            self.buffers[shape].append((pixels, metas))
            waiting = sum(len(metas) for _, metas in self.buffers[shape])
            if self.media == "video" or waiting >= self.batch_size:
                self._encode(shape)

    def _encode(self, shape: tuple) -> None:
        """Encode the pixels of one shape, and have the latents saved."""
        parts = self.buffers.pop(shape)
        # joined on the device: the parts are page-locked, but the whole would not be
        pixels = torch.cat([part.to(self.device, non_blocking=True) for part, _ in parts])
        metas = [meta for _, group in parts for meta in group]
        for first in range(0, len(metas), self.batch_size):
            chunk = slice(first, first + self.batch_size)
            with torch.inference_mode():
                windows = [to_unit(pixels[chunk])]
                if self.manifest.clip_plan:
                    windows = windows[0].split(self.video.num_frames, 1)
                latents = torch.cat([self.tokenizer.encode(window) for window in windows], 1)
            self.saver.submit(self._save, HalfLatents(latents), metas[chunk])

    def _save(self, latents: HalfLatents, metas: list[Meta]) -> None:
        """Write the items of one batch; runs in the saver's threads."""
        bad = self.writer.add_many(
            [meta.id for meta in metas],
            latents,
            [meta.caption for meta in metas],
            [meta.facts for meta in metas],
            [meta.source for meta in metas],
            leave_out=True,
        )
        reason = "latents are not finite in float16"
        self._remove([*bad, *chain.from_iterable(m.repeated for m in metas if m.id not in bad)])
        with self.counting:
            self.report.skipped += [Skip(id, "", reason, reason) for id in bad]
            for meta in metas:
                if meta.id not in bad:
                    self.report.written += 1
                    self.report.animated += "animated" in meta.source
                    self.report.notes.update(meta.source.get("notes", ()))

    def _remove(self, ids: list[str]) -> None:
        removed = self.writer.remove(ids)
        with self.counting:
            self.report.removed += removed

    def _skip(self, skips: list[Skip]) -> None:
        """Note skipped records. If items of such a record are in the cache, its source was another
        one then, and they are removed; but not if the file system cannot reach the source, since
        nothing is known of it."""
        self.report.skipped += skips
        unusable = [skip.id for skip in skips if not skip.unreachable]
        ids = [item for id in unusable for item in self.preprocess.item_ids(id)]
        if any(id in self.writer.entries for id in ids):
            self.saver.submit(self._remove, ids)

    # ── what is already there ─────────────────────────────────────────────────────────────────────
    def _is_finished(self, record: Record) -> bool:
        """Return whether nothing of a record needs decoding; bring its items up to date. If the
        source was replaced, the record is done anew. If only its caption changed, or the source was
        moved, caption or stamp are rewritten."""
        ids = self.preprocess.item_ids(record.id)
        first = self.writer.entries.get(ids[0])
        source = first.source if first else {}
        wanted = [id for crop, id in enumerate(ids) if crop in source.get("crops", [0])]
        entries = [self.writer.entries[id] for id in wanted if id in self.writer.entries]
        fps = self.video.fps if self.media == "video" else 0.0
        state, stamp = compare_stamp(record.source, source.get("stamp"), fps)
        same_picture = [
            entry for entry in entries if entry.source.get("stamp") == source.get("stamp")
        ]
        if state == "changed" and is_elsewhere(record.source, source.get("stamp")):
            self.report.replaced.append(record.id)
        if state == "changed" or len(same_picture) < len(wanted):
            return False
        # items that a kill between two crops left
        self._remove([id for id in ids if id not in wanted])
        if state == "missing":
            kept = "the cache keeps what this id had before, as it was"
            absent = Unusable("file not found", kept)
            self.report.skipped.append(Skip.of(record, absent))
            return True
        if state == "gone":
            self.report.gone.append(f"{record.id}: {record.path}")
        known = (record.caption, record.facts)
        stale = [entry for entry in entries if (entry.caption, entry.facts) != known]
        for entry in entries if stamp else stale:
            try:
                item = load_item(self.writer.folder / entry.file, self.manifest.spec.channels)
            except Damaged as error:
                self.report.damaged[entry.id] = error
                return False
            source = entry.source | ({"stamp": stamp} if stamp else {})
            self.writer.add(entry.id, item["latents"], *known, source)
        self.report.already += 1
        self.report.recaptioned += bool(stale)
        self.report.renewed += state == "renewed"
        self.report.old_stamps += state == "older"
        return True

    # ── the report ────────────────────────────────────────────────────────────────────────────────
    def _list_skipped(self) -> None:
        """Write the list of records that this process skipped. Lists of an earlier run with another
        number of processes are removed, since all of their records were tried again."""
        names = [f"skipped-{rank}.jsonl" for rank in range(self.world)]
        if self.world == 1:
            names = ["skipped.jsonl"]
        folder = Path(self.out_dir)
        if self.rank == 0 and not self.report.interrupted:
            for path in folder.glob("skipped*.jsonl"):
                if path.name not in names:
                    path.unlink(missing_ok=True)
        list_skipped(folder / names[self.rank], self.report.skipped)

    def _find_strangers(self) -> None:
        """Find the items that belong to none of the records, and remove them if `prune` is set."""
        if self.rank:
            return
        ids = (self.preprocess.item_ids(record.id) for record in self.records)
        expected = set(chain.from_iterable(ids))
        self.report.strangers = sorted(self.writer.entries.keys() - expected)
        if self.prune:
            self.report.pruned = self.writer.remove(self.report.strangers)

    def _describe_cache(self) -> None:
        """Report the sizes of all items, and clips that are too short for a training sample."""
        sizes = [self.manifest.size_of(entry.shape) for entry in self.writer.entries.values()]
        self.report.sizes = dict(Counter("{}x{}".format(*size) for size in sizes))
        video = latent_video(self.video, self.tokenizer.spec)
        if self.media == "image" or video.image_fraction == 1:
            return
        frames = {id: entry.shape[0] for id, entry in self.writer.entries.items()}
        usable = usable_frames(torch.tensor(list(frames.values()), dtype=torch.int64), video)
        short = [id for id, used in zip(frames, usable.tolist(), strict=True) if not used]
        if short:
            needed = video.needed(min((video.num_frames, *video.frame_counts)))
            self.report.too_short = (
                f"{len(short)} clips are too short for a sample of this config, which takes"
                f" {needed} frames, for example {short[0]} ({frames[short[0]]} frames): no step on"
                " clips will use them"
            )
