"""Report what caching will make of sources, before anything is encoded. All decisions are made by
the functions that caching uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from mmdit.data.cache.decoding import rounded
from mmdit.data.dataset.buckets import Size, VideoConfig
from mmdit.data.dataset.clips import usable_frames
from mmdit.data.dataset.colours import NOTES
from mmdit.data.dataset.frames import PreprocessConfig, boxes_of, check_same_size, frames_in, naming
from mmdit.data.dataset.pictures import load_image, shown_size
from mmdit.data.dataset.problems import Skip, by_problem
from mmdit.data.dataset.records import Media, Record
from mmdit.data.dataset.videos import NEAR, probe, read_video
from mmdit.data.dataset.workers import each

AT_ONCE = 16  # records that a worker takes


@dataclass
class _Look(Dataset):
    """Maps a few records to their rows; see `look_at`."""

    media: Media
    choose: Callable[[Size], Size]
    preprocess: PreprocessConfig
    video: VideoConfig

    def __getitem__(self, records: list[Record]) -> list[dict | Skip]:
        return [self.row(record) for record in records]

    def row(self, record: Record) -> dict | Skip:
        try:
            image, length = self.open(record)
            width, height = self.choose(image.size)
            boxes = boxes_of(image.size, (width, height), self.preprocess, record.id)
        except Exception as error:  # decoders raise almost anything on damaged files
            return Skip.of(record, error)
        left, top, right, bottom = next(iter(boxes.values()))
        kept = (right - left) * (bottom - top) / (image.width * image.height)
        return {
            "id": record.id,
            "path": record.path,
            **length,
            "size": list(image.size),
            "bucket": [width, height],
            "kept": round(kept, 4),
            "crops": [rounded(box) for box in boxes.values()],
            "frames_used": int(usable_frames(torch.tensor([length["frames"]]), self.video)[0]),
            "enlarged": width > right - left + 0.5 or height > bottom - top + 0.5,
            "animated": image.info["animated"],
            "notes": list(image.info["notes"]),
            "empty_caption": not record.caption,
        }

    def open(self, record: Record) -> tuple[Image.Image, dict]:
        """Return the first picture, uncropped, and the length, which is known from file names,
        headers and packets."""
        if self.media == "image":
            return load_image(record.source), {"frames": 1}
        if not record.is_folder:
            stream = probe(record.source)
            length = {
                "fps": round(stream.fps, 3),
                "source_frames": len(stream.stamps),
                "frames": len(stream.plan(self.video.fps)),
            }
            return next(read_video(record.source, self.video.fps)), length
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
) -> list[dict | Skip]:
    """Return a row for each record, in order: a `Skip` if it will be skipped, else its `size`,
    `bucket` (width, height), `crops` (left, top, right, bottom in source pixels), `kept` (share of
    the picture), `frames` cached, `frames_used` in a training sample (0: too few), and for a video
    file its `fps` and `source_frames`.

    Pictures are decoded; of a clip only the first frame is, so that damage behind it shows only
    when it is cached.
    """
    rows: dict[str, dict | Skip] = {}
    with tqdm(total=len(records), desc="looking", unit="item", delay=2) as bar:
        look = _Look(media, choose, preprocess, video)
        for part, seen in each(look, records, AT_ONCE, num_workers):
            rows |= {record.id: row for record, row in zip(part, seen, strict=True)}
            bar.update(len(part))
    return [rows[record.id] for record in records]


def other_rates(records: list[Record], fps: float) -> str:
    """Return a sentence about folders of frames that were taken at another rate than `fps`, as
    `prepare-frames` notes it; "" if there are none."""
    rates = {
        record.id: record.facts["frames_fps"]
        for record in records
        if isinstance(record.facts.get("frames_fps"), int | float) and record.is_folder
    }
    others = [id for id, rate in rates.items() if abs(rate - fps) > NEAR * fps]
    if not others:
        return ""
    return (
        f"{len(others)} clips are folders of frames at another rate (for example {others[0]}:"
        f" frames_fps {rates[others[0]]:g}, video.fps {fps:g}). Their frames are used as they are,"
        " so that they move at another speed; set video.fps, or prepare the frames anew"
    )


def totals(rows: list[dict | Skip]) -> dict:
    """Return sums over the rows of `look_at`, as JSON-able values."""
    skips = [row for row in rows if isinstance(row, Skip)]
    good = [row for row in rows if isinstance(row, dict)]
    kept, frames = sorted(row["kept"] for row in good), sorted(row["frames"] for row in good)
    buckets: Counter = Counter()
    notes: Counter = Counter()
    for row in good:
        buckets["{}x{}".format(*row["bucket"])] += len(row["crops"])
        notes.update(row["notes"])
    return {
        "records": len(rows),
        "usable": len(good),
        "skipped": len(skips),
        "reasons": {problem: len(same) for problem, same in by_problem(skips).items()},
        "items": sum(buckets.values()),
        "buckets": dict(buckets.most_common()),
        "kept": {"mean": round(sum(kept) / len(kept), 4), "least": kept[0]} if good else {},
        "frames": (
            {"shortest": frames[0], "median": frames[len(frames) // 2], "longest": frames[-1]}
            if good
            else {}
        ),
        "too_short": sum(not row["frames_used"] for row in good),
        "enlarged": sum(row["enlarged"] for row in good),
        "animated": sum(row["animated"] for row in good),
        "notes": dict(notes),
        "empty_captions": sum(row["empty_caption"] for row in good),
    }


def _row_text(row: dict | Skip) -> str:
    """Return a line about one record."""
    if isinstance(row, Skip):
        return ", ".join(filter(None, (f"{row.id}: SKIPPED", row.reason, row.place)))
    source, bucket = ("{}x{}".format(*row[name]) for name in ("size", "bucket"))
    if "fps" in row:
        source += f" at {row['fps']:g} fps, {row['source_frames']} frames"
    boxes = " ".join("[{:g}, {:g}, {:g}, {:g}]".format(*box) for box in row["crops"])
    parts = [f"{row['id']}: {source} → {bucket}", f"crop {boxes} ({row['kept']:.1%})"]
    if row["frames"] > 1:
        parts += [f"{row['frames']} frames", f"{row['frames_used'] or 'too few'} for a sample"]
    if row["enlarged"]:
        parts.append("enlarged")
    if row["animated"]:
        parts.append("animated: its first frame")
    return ", ".join(parts + row["notes"])


def look_text(rows: list[dict | Skip], sums: dict) -> str:
    """Return a text for people: a line for each record, and the totals below them."""
    lines = [_row_text(row) for row in rows]
    lines.append(
        "{records} records: {usable} usable as {items} items, {skipped} skipped, {empty_captions}"
        " empty captions, {animated} animated (first frame), {enlarged} enlarged, {too_short} too"
        " short for a sample".format(**sums)
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
