"""What caching will make of sources, before anything is encoded: per record its size, rate and
frames, and the size, crop and frames it gets, or the reason why it will be skipped. Every decision
is made by the functions that caching uses.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from mmdit.data.dataset.buckets import Size, VideoConfig
from mmdit.data.dataset.clips import usable_frames
from mmdit.data.dataset.colours import NOTES
from mmdit.data.dataset.frames import PreprocessConfig, boxes_of, check_same_size, frames_in, naming
from mmdit.data.dataset.pictures import load_image, shown_size
from mmdit.data.dataset.problems import Skip
from mmdit.data.dataset.records import Media, Record
from mmdit.data.dataset.videos import probe, read_video
from mmdit.data.dataset.workers import KILLED, each

AT_ONCE = 16  # records a worker takes


@dataclass
class _Look(Dataset):
    """Maps a few records to their rows; see `look_at`."""

    media: Media
    choose: Callable[[Size], Size]
    preprocess: PreprocessConfig
    video: VideoConfig

    def __getitem__(self, records: list[Record]) -> list[dict]:
        return [self.row(record) for record in records]

    def row(self, record: Record) -> dict:
        row = {"id": record.id, "path": record.path}
        try:
            image, found = self.open(record)
            target = self.choose(image.size)
            boxes = boxes_of(image.size, target, self.preprocess, record.id)
        except Exception as error:  # decoders raise almost anything on damaged files
            return _skipped(record, error)
        left, top, right, bottom = next(iter(boxes.values()))
        kept = (right - left) * (bottom - top) / (image.width * image.height)
        used = int(usable_frames(torch.tensor([found["frames"]]), self.video)[0])
        return (
            row
            | found
            | {
                "size": list(image.size),
                "bucket": list(target),
                "kept": round(kept, 4),
                "crops": [[round(side, 3) for side in box] for box in boxes.values()],
                "frames_used": used,
                "enlarged": target[0] > right - left + 0.5 or target[1] > bottom - top + 0.5,
                "animated": image.info["animated"],
                "notes": list(image.info["notes"]),
                "empty_caption": not record.caption,
            }
        )

    def open(self, record: Record) -> tuple[Image.Image, dict]:
        """The first picture, whole, and what is known of the rest from names, headers and packets
        alone."""
        if self.media == "image":
            return load_image(record.path), {"frames": 1}
        if not os.path.isdir(record.path):
            found = probe(record.path)
            taken = len(found.plan(self.video.fps))
            known = {
                "fps": round(found.fps, 3),
                "source_frames": len(found.stamps),
                "frames": taken,
            }
            return next(read_video(record.path, self.video.fps)), known
        paths = frames_in(record.path)
        with naming(paths[0]):
            image = load_image(paths[0])
        for path in paths[1:]:
            with naming(path):
                size = shown_size(path)
            check_same_size(path.name, size, image.size)
        return image, {"frames": len(paths)}


def look_at(
    records: list[Record],
    media: Media,
    choose: Callable[[Size], Size],
    preprocess: PreprocessConfig,
    video: VideoConfig,
    num_workers: int = 0,
) -> list[dict]:
    """A row per record, in their order: `{"id", "path", "reason"}` of one that will be skipped,
    else with `size`, `bucket` (width, height), `crops` (left, top, right, bottom in source pixels),
    `kept` (share of the picture), `frames` cached, `frames_used` in a training sample (0: too few),
    and of a video file its `fps` and `source_frames`.

    Pictures are decoded. Of a clip only the first frame is: damage behind it shows when it is
    cached.
    """
    parts = [records[i : i + AT_ONCE] for i in range(0, len(records), AT_ONCE)]
    rows: dict[str, dict] = {}
    with tqdm(total=len(records), desc="looking", unit="item", delay=2) as bar:
        for part, found in each(_Look(media, choose, preprocess, video), parts, num_workers):
            found = found or [_skipped(record, KILLED) for record in part]
            rows |= {row["id"]: row for row in found}
            bar.update(len(part))
    return [rows[record.id] for record in records]


def _skipped(record: Record, error: Exception | str) -> dict:
    """Return the row of a record that will be skipped."""
    return Skip.of(record.id, record.path, error).to_json()


def totals(rows: list[dict]) -> dict:
    """Sums over the rows of `look_at`, JSON-able."""
    good = [row for row in rows if "reason" not in row]
    kept, frames = sorted(row["kept"] for row in good), sorted(row["frames"] for row in good)
    buckets = Counter("{}x{}".format(*row["bucket"]) for row in good for _ in row["crops"])
    problems = Counter(row["problem"] for row in rows if "problem" in row)
    return {
        "records": len(rows),
        "usable": len(good),
        "skipped": len(rows) - len(good),
        "reasons": dict(problems.most_common()),
        "items": sum(buckets.values()),
        "buckets": dict(buckets.most_common()),
        "kept": {"mean": round(sum(kept) / len(kept), 4), "least": kept[0]} if kept else {},
        "frames": (
            {"shortest": frames[0], "median": frames[len(frames) // 2], "longest": frames[-1]}
            if frames
            else {}
        ),
        "too_short": sum(not row["frames_used"] for row in good),
        **{name: sum(row[name] for row in good) for name in ("enlarged", "animated")},
        "notes": dict(Counter(note for row in good for note in row["notes"])),
        "empty_captions": sum(row["empty_caption"] for row in good),
    }


def look_text(rows: list[dict], sums: dict) -> str:
    """For people: a line per record, the totals behind them."""
    lines = []
    for row in rows:
        if "reason" in row:
            skip = Skip.from_json(row)
            place = f", {skip.place}" if skip.place else ""
            lines.append(f"{skip.id}: SKIPPED, {skip.reason}{place}")
            continue
        rate = f" at {row['fps']:g} fps, {row['source_frames']} frames" if "fps" in row else ""
        boxes = " ".join("[{:g}, {:g}, {:g}, {:g}]".format(*box) for box in row["crops"])
        frames = (
            f", {row['frames']} frames, {row['frames_used'] or 'too few'} for a sample"
            if row["frames"] > 1
            else ""
        )
        source, bucket = ("{}x{}".format(*row[name]) for name in ("size", "bucket"))
        lines.append(
            f"{row['id']}: {source}{rate} → {bucket}, crop {boxes} ({row['kept']:.1%}){frames}"
            f"{', enlarged' if row['enlarged'] else ''}"
            f"{', animated: its first frame' if row['animated'] else ''}"
            f"{''.join(', ' + note for note in row['notes'])}"
        )
    lines.append(
        f"{sums['records']} records: {sums['usable']} usable as {sums['items']} items,"
        f" {sums['skipped']} skipped, {sums['empty_captions']} empty captions, {sums['animated']}"
        f" animated (first frame), {sums['enlarged']} enlarged, {sums['too_short']} too short for a"
        " sample"
    )
    lines += [f"  {size}: {count} items" for size, count in sums["buckets"].items()]
    if sums["usable"]:
        lines.append(
            f"  pixels kept: {sums['kept']['mean']:.1%} on average, {sums['kept']['least']:.1%} at"
            " least; frames: {shortest} to {longest}, median {median}".format(**sums["frames"])
        )
    lines += [f"  {count} {NOTES[note]}" for note, count in sums["notes"].items()]
    lines += [f"  skipped {count}: {reason}" for reason, count in sums["reasons"].items()]
    return "\n".join(lines)
