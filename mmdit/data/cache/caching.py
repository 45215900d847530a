"""From records to a latent cache: workers decode, the device encodes, a thread saves. Stopped at
any moment, it can go on.

    read_records ─► [workers: open, choose size, crop] ─► batches of one size ─► tokenizer.encode ─► [thread: CacheWriter]

A picture that cannot be used is skipped, counted and listed in `skipped.jsonl`, and so is what was
cached of it when it was another; wrong settings stop the run before any work. Under `torchrun` each
rank takes every world-th record: there is no communication, ranks may finish at different times.
"""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.data.cache.decoding import Meta, decoded
from mmdit.data.cache.items import load_item, to_half
from mmdit.data.cache.latent_cache import CacheWriter, told_how_to_go_on
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.dataset.buckets import BucketingConfig, VideoConfig
from mmdit.data.dataset.clips import latent_video, usable_frames
from mmdit.data.dataset.colours import NOTES
from mmdit.data.dataset.frames import PreprocessConfig
from mmdit.data.dataset.jpegs import import_torchvision
from mmdit.data.dataset.problems import Skip, Unusable, by_problem
from mmdit.data.dataset.records import Media, Record
from mmdit.data.dataset.stamps import compare_stamp
from mmdit.files import write_atomically
from mmdit.interfaces import LatentSpec, Tokenizer
from mmdit.pixels import to_unit

HOPELESS = 1000  # so many failures with no success: the paths are wrong, not the pictures


@dataclass
class CacheReport:
    """What became of every record."""

    records: int = 0
    already: int = 0  # records finished by an earlier run
    recaptioned: int = 0  # of those, with a new caption
    renewed: int = 0  # of those, found elsewhere or with other times, and the same bytes
    old_stamps: int = (
        0  # of those, the same as far as an older version of this program had noted it
    )
    gone: list[str] = field(default_factory=list)  # of those, whose source is no longer there
    removed: int = 0  # items taken out: of sources that are now another or unusable
    damaged: dict[str, str] = field(default_factory=dict)  # id → why its file could not be read
    strangers: list[str] = field(default_factory=list)  # items of no record
    pruned: int = 0  # of those, taken out
    too_short: str = ""  # of clips that give no sample
    written: int = 0  # items
    same_crops: int = 0  # crops that would have repeated an earlier one of their picture
    empty_captions: int = 0
    animated: int = 0  # items from an animated picture
    notes: Counter = field(default_factory=Counter)  # items by key of `colours.NOTES`
    older: str = ""  # what to say of a cache that was begun with another version of decoding
    skipped: list[Skip] = field(default_factory=list)
    sizes: dict[str, int] = field(
        default_factory=dict
    )  # items in the cache by size (when one process makes it)
    seconds: float = 0.0
    interrupted: bool = False

    def text(self) -> str:
        renewed = f" ({self.recaptioned} got their new caption)" if self.recaptioned else ""
        renewed += (
            f" ({self.renewed} moved or touched, with the same bytes)" if self.renewed else ""
        )
        lines = [
            f"{self.records} records: {self.written} items written in {self.seconds:.1f} s,"
            f" {self.already} records already there{renewed}, {len(self.skipped)} skipped,"
            f" {self.empty_captions} empty captions (trained as unconditional)"
        ]
        if self.same_crops:
            lines.append(
                f"{self.same_crops} crops not written: without an overhang they would repeat"
                " another crop"
            )
        if self.animated:
            lines.append(
                f"{self.animated} items from animated pictures: their first frame is used "
                "(named as video_path, they are clips)"
            )
        lines += [f"{count} items {NOTES[note]}" for note, count in self.notes.items()]
        lines += [self.older] if self.older else []
        if self.old_stamps:
            lines.append(
                f"{self.old_stamps} records have notes of an older version, which knew only sizes:"
                " a source that was exchanged before now for another of equal size was not"
                " noticed; from now on it will be"
            )
        if self.gone:
            lines.append(
                f"{len(self.gone)} records keep what was cached of them, their files are gone (for"
                f" example {self.gone[0]})"
            )
        if self.removed:
            lines.append(
                f"{self.removed} items taken out of the cache: their sources are others now, or"
                " unusable"
            )
        if self.damaged:
            id, why = next(iter(self.damaged.items()))
            lines.append(
                f"{len(self.damaged)} damaged items counted as not there (for example {id}: {why})"
            )
        if self.strangers:
            told = (
                f"{len(self.strangers)} items of the cache are not in this file (for example"
                f" {self.strangers[0]})"
            )
            lines.append(
                f"{told}: taken out"
                if self.pruned
                else f"{told}: they are trained, too; --prune removes them"
            )
        lines += [self.too_short] if self.too_short else []
        for skips in by_problem(self.skipped).values():
            skip = skips[0]
            place = f"{skip.id}, {skip.place}" if skip.place else skip.id
            lines.append(f"  skipped {len(skips)}, for example: {skip.reason} ({place})")
        lines += [
            f"  {size}: {count} items in the cache" for size, count in sorted(self.sizes.items())
        ]
        return "\n".join(lines)


# ── what is already there ─────────────────────────────────────────────────────────────────────────
def _pending(
    records: list[Record],
    writer: CacheWriter,
    preprocess: PreprocessConfig,
    fps: float,
    report: CacheReport,
) -> list[Record]:
    """Records still to do. A finished one whose source was exchanged is done anew; a changed
    caption is only rewritten, as is the stamp of a source that was moved. `fps`: asked of video
    files."""
    pending = []
    for record in tqdm(records, desc="looking for finished items", disable=len(records) < 20_000):
        ids = [preprocess.item_id(record.id, crop) for crop in range(preprocess.num_crops)]
        source = writer.entries.get(ids[0], {}).get("source", {})
        wanted = [id for crop, id in enumerate(ids) if crop in source.get("crops", [0])]
        items = [writer.entries.get(id) for id in wanted]
        state, stamp = compare_stamp(record.path, source.get("stamp"), fps)
        of_one = all(
            item and item.get("source", {}).get("stamp") == source.get("stamp") for item in items
        )
        if state == "changed" or not of_one:
            pending.append(record)
            continue
        report.removed += writer.remove(
            id for id in ids if id not in wanted
        )  # of a kill between two crops
        if state == "missing":
            absent = Unusable(
                "file not found", "the cache keeps what this id had before, as it was"
            )
            report.skipped.append(Skip.of(record.id, record.path, absent))
            continue
        report.gone += [f"{record.id}: {record.path}"] if state == "gone" else []
        stale = [
            item
            for item in items
            if (item["caption"], item.get("facts", {})) != (record.caption, record.facts)
        ]
        try:
            for item in items if stamp else stale:
                latents = load_item(writer.folder / item["file"], writer.manifest.spec.channels)[
                    "latents"
                ]
                noted = item.get("source", {}) | ({"stamp": stamp} if stamp else {})
                writer.add(item["id"], latents, record.caption, record.facts, noted)
        except ValueError as error:
            report.damaged[item["id"]] = str(error)
            pending.append(record)
            continue
        report.already += 1
        report.recaptioned += bool(stale)
        report.renewed += state == "renewed"
        report.old_stamps += state == "older"
    return pending


def _too_short(entries: Iterable[dict], video: VideoConfig, spec: LatentSpec) -> str:
    """A sentence on the clips that are too short for a sample, if there are any."""
    own, entries = latent_video(video, spec), list(entries)
    needed = own.needed(min((own.num_frames, *own.frame_counts)))
    usable = usable_frames(
        torch.tensor([entry["shape"][0] for entry in entries], dtype=torch.int64), own
    ).tolist()
    short = [entry for entry, frames in zip(entries, usable, strict=True) if not frames]
    if not short or own.image_fraction == 1:
        return ""
    return (
        f"{len(short)} clips are too short for a sample of this config, which takes {needed}"
        f" frames, for example {short[0]['id']} ({short[0]['shape'][0]} frames): no step on clips"
        " will use them"
    )


# ── the loop ──────────────────────────────────────────────────────────────────────────────────────
class _Saver:
    """The thread that writes, at most a few batches behind."""

    def __init__(self, writer: CacheWriter, preprocess: PreprocessConfig, report: CacheReport):
        self.writer, self.preprocess, self.report = writer, preprocess, report
        self.pool, self.waiting = ThreadPoolExecutor(1, "cache-writer"), deque()

    def submit(self, work: Callable, *arguments) -> None:
        self.waiting.append(self.pool.submit(work, *arguments))
        while len(self.waiting) > 4:
            # bounds memory, and hands on a failed write (a full disk)
            self.waiting.popleft().result()

    def wait(self) -> None:
        while self.waiting:
            self.waiting.popleft().result()

    def save(self, latents: Tensor, metas: list[Meta]) -> None:
        half, finite = to_half(latents)
        for meta, good in zip(metas, finite.tolist(), strict=True):
            if not good:
                skip = Skip.of(meta.id, "", "latents are not finite in float16")
                self.report.skipped.append(skip)
                self.remove([meta.id])
        metas = [meta for meta, good in zip(metas, finite.tolist(), strict=True) if good]
        self.writer.add_many(
            [meta.id for meta in metas],
            half[finite],
            [meta.caption for meta in metas],
            [meta.facts for meta in metas],
            [meta.source for meta in metas],
            checked=True,
        )
        self.remove([id for meta in metas for id in meta.repeated])
        self.report.written += len(metas)
        self.report.animated += sum("animated" in meta.source for meta in metas)
        self.report.notes.update(note for meta in metas for note in meta.source.get("notes", ()))

    def remove(self, ids: list[str]) -> None:
        self.report.removed += self.writer.remove(ids)

    def skip(self, skips: list[Skip]) -> None:
        """Note what was skipped. What is unusable now was another source when it was cached: its
        items go."""
        unusable = [skip.id for skip in skips if not skip.unreachable]
        self.report.skipped += skips
        ids = [
            self.preprocess.item_id(id, crop)
            for id in unusable
            for crop in range(self.preprocess.num_crops)
        ]
        if any(id in self.writer.entries for id in ids):
            self.submit(self.remove, ids)


@told_how_to_go_on()
def cache_latents(
    records: list[Record],
    media: Media,
    tokenizer: Tokenizer,
    out_dir: str | Path,
    video: VideoConfig,
    bucketing: BucketingConfig | None = None,
    preprocess: PreprocessConfig | None = None,
    *,
    source: str = "",
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    num_workers: int = 0,
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
    prune: bool = False,
) -> CacheReport:
    """Encode every record that the cache lacks; all frames of a clip are kept (frames are chosen
    when a batch is made). `prune`: take items out that belong to none of the records.

    ValueError: the folder holds a cache made with other settings, or nothing usable is left. Ctrl-C
    returns a report with `interrupted`; what was written stays and the same call goes on from
    there.
    """
    begin = time.monotonic()
    preprocess = preprocess or PreprocessConfig()
    manifest = CacheManifest.of(tokenizer, video, bucketing, preprocess, source)
    expected = {
        preprocess.item_id(record.id, crop)
        for record in records
        for crop in range(preprocess.num_crops)
    }
    if preprocess.jpeg_decoder == "torchvision":
        import_torchvision()  # what is missing shows before any work
    records = records[rank::world]
    writer = CacheWriter(out_dir, manifest, rank, world, forgiving=True)
    report = CacheReport(
        len(records),
        empty_captions=sum(not record.caption for record in records),
        older=CacheManifest.read(out_dir).older(out_dir),
        damaged=writer.damaged,
    )
    saver = _Saver(writer, preprocess, report)
    buffers: dict[tuple, list[tuple[Tensor, list[Meta]]]] = {}

    def flush(key: tuple) -> None:
        parts = buffers.pop(key)
        pixels = torch.cat(
            [part.to(device, non_blocking=True) for part, _ in parts]
        )  # joined there: page-locked here
        metas = [meta for _, group in parts for meta in group]
        for first in range(0, len(metas), batch_size):
            chunk = slice(first, first + batch_size)
            with torch.inference_mode():
                unit = to_unit(pixels[chunk])
                windows = unit.split(video.num_frames, 1) if manifest.clip_plan else [unit]
                latents = torch.cat([tokenizer.encode(window) for window in windows], 1)
            saver.submit(saver.save, latents, metas[chunk])

    try:
        pending = _pending(
            records, writer, preprocess, video.fps if media == "video" else 0.0, report
        )
        parts = decoded(pending, media, manifest, preprocess, video, num_workers, device)
        unit = "image" if media == "image" else "clip"
        bar = tqdm(
            total=len(records),
            initial=report.already,
            desc=f"caching {out_dir}",
            unit=unit,
            disable=not progress,
        )
        with bar:
            for part in parts:
                saver.skip(part.skips)
                report.same_crops += part.same_crops
                for pixels, metas in part.groups:
                    key = tuple(pixels.shape[1:])
                    buffers.setdefault(key, []).append((pixels, metas))
                    if (
                        media == "video"
                        or sum(len(group) for _, group in buffers[key]) >= batch_size
                    ):
                        flush(key)
                bar.update(part.records)
                bar.set_postfix(skipped=len(report.skipped), refresh=False)
                if len(report.skipped) >= HOPELESS and not (
                    report.written or report.already or saver.waiting or buffers
                ):
                    break
            for key in list(buffers):
                flush(key)
            saver.wait()
        if rank == 0:
            report.strangers = sorted(writer.entries.keys() - expected)
            report.pruned = writer.remove(report.strangers) if prune else 0
    except KeyboardInterrupt:
        report.interrupted = True
    finally:
        saver.pool.shutdown(wait=True)
        writer.close()
        _write_skipped(
            Path(out_dir) / (f"skipped-{rank}.jsonl" if world > 1 else "skipped.jsonl"),
            report.skipped,
        )
    if world == 1:
        shapes, spatial = (
            [entry["shape"] for entry in writer.entries.values()],
            tokenizer.spec.spatial,
        )
        report.too_short = (
            _too_short(writer.entries.values(), video, tokenizer.spec) if media == "video" else ""
        )
        report.sizes = dict(
            Counter(f"{columns * spatial}x{rows * spatial}" for _, rows, columns, _ in shapes)
        )
    report.seconds = time.monotonic() - begin
    if records and not writer.entries and not report.interrupted:
        examples = "\n".join(
            f"  {skip.path or skip.id}: {skip.reason}" for skip in report.skipped[:5]
        )
        raise ValueError(
            f"none of the {len(records)} records could be used ({len(report.skipped)} were"
            f" tried):\n{examples}\nPaths in the metadata are relative to the metadata file's own"
            " folder."
        )
    return report


def _write_skipped(path: Path, skips: list[Skip]) -> None:
    """Write the list of this run; an older one is removed, for its items have been tried again."""
    path.unlink(missing_ok=True)
    if skips:
        lines = [json.dumps(skip.to_json(), ensure_ascii=False) + "\n" for skip in skips]
        write_atomically(path, "".join(lines))
