"""Pictures or clips to compare with others: everything that a folder holds, or a JSONL file lists,
at one size or each at its own, read by workers."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mmdit.data.dataset.buckets import Size, VideoConfig
from mmdit.data.dataset.clips import cached_frames
from mmdit.data.dataset.frames import PreprocessConfig, check_same_size, crop_box, cut, frames_in
from mmdit.data.dataset.members import Source
from mmdit.data.dataset.pictures import SUFFIXES, load_image, open_picture
from mmdit.data.dataset.problems import Skip, Unusable
from mmdit.data.dataset.records import Record, media_of, read_records
from mmdit.data.dataset.sources import files_below, is_sheet
from mmdit.data.dataset.videos import VIDEO_SUFFIXES, probe, read_video
from mmdit.data.dataset.workers import each
from mmdit.files import expanded

AT_ONCE = 16  # pictures that a worker reads at a time
ANIMATIONS = {".gif", ".webp", ".png", ".avif"}


@dataclass(frozen=True)
class Shape:
    """The shape that every item gets. `size`: (width, height), cut from the middle; None: each has
    its own. `frames`: their number, `stride` apart, from the middle of a clip, or spread over all
    of it with `stretch`. `fps`: of video files, None as stored. `animated`: treat an animated
    picture as a clip even for a single frame, instead of taking the picture that it begins with."""

    size: Size | None = None
    frames: int = 1
    stride: int = 1
    fps: float | None = None
    stretch: bool = False
    animated: bool = False

    def __post_init__(self):
        for name in ("frames", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, must be at least 1")
        if self.size is not None and min(self.size) < 1:
            width, height = self.size
            raise ValueError(
                f"the size is {width}x{height}; --width and --height must be at least 1"
            )
        if self.fps is not None and self.fps <= 0:
            raise ValueError(f"--fps is {self.fps:g}, must be above 0")

    def cut(self, image: Image.Image) -> np.ndarray:
        """Return the middle of a picture at this size, uint8 `(3, H, W)`."""
        size = self.size or image.size
        return cut(image, crop_box(image.size, size, PreprocessConfig(), ""), size)

    def places(self, count: int) -> Sequence[int]:
        """Return the numbers of the frames to take from a clip of `count` frames. ValueError if it
        is too short."""
        if self.stretch and self.frames > 1:
            video = VideoConfig(num_frames=self.frames, shrink_video_to_frames=True)
            return cached_frames(count, video)
        needed = (self.frames - 1) * self.stride + 1
        if count < needed:
            raise Unusable("too short", f"{count} frames, {needed} are needed")
        first = (count - needed) // 2
        return range(first, first + needed, self.stride)


def media_records(source: str | Path, frames: int) -> list[Record]:
    """Return the records in `source`, in a fixed order: the lines of a JSONL file; or the pictures
    below a folder; or, with `frames > 1` or if it has no pictures, its video files, animations and
    folders of frames. Files that are left out by this are reported. ValueError if there are no
    records."""
    source = expanded(source)
    if source.suffix == ".jsonl":
        return read_records(source, media_of(source))
    if not source.is_dir():
        raise ValueError(f"{source} is no folder and no .jsonl file")
    files = [Path(name) for name in files_below(source) if not is_sheet(source / name)]
    pictures = [file for file in files if file.suffix.lower() in SUFFIXES]
    videos = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
    names = pictures if frames == 1 else []
    if not names:
        names = videos + _animations(source, pictures)
        folders = {file.parent for file in pictures if len(file.parts) > 1}
        names = sorted({*names, *folders - {file.parent for file in names}})
    if not names:
        what = "picture" if frames == 1 else "clip, nor a folder of frames"
        raise ValueError(f"{source} holds no {what}")
    taken = set(names)
    if left := [one for one in (*pictures, *videos) if not taken & {one, one.parent}]:
        what = "pictures" if frames == 1 else "clips"
        print(
            f"{source}: {len(left)} files are left out, for example {left[0]}: {what} are compared"
            " (--frames)",
            flush=True,
        )
    return [Record(str(name), str(source / name), "") for name in names]


def _animations(source: Path, files: list[Path]) -> list[Path]:
    """Return the animated pictures among `files` that are in the folder itself; deeper ones are
    frames."""
    animated = []
    for file in files:
        if file.suffix.lower() in ANIMATIONS and len(file.parts) == 1:
            with contextlib.suppress(ValueError):
                if is_animated(source / file):
                    animated.append(file)
    return animated


def is_animated(path: Source) -> bool:
    """Return whether a picture has several frames. ValueError if it is not a picture."""
    with open_picture(path) as image:
        return getattr(image, "n_frames", 1) > 1


class _Read(Dataset):
    """Maps each of a few records to its frames, uint8 `(F, 3, H, W)`, or to a `Skip` if it cannot
    be read."""

    def __init__(self, shape: Shape):
        self.shape = shape

    def __getitem__(self, records: list[Record]) -> list[Tensor | Skip]:
        results: list[Tensor | Skip] = []
        for record in records:
            try:
                results.append(self.read(record))
            except Exception as error:  # decoders raise almost anything on damaged files
                results.append(Skip.of(record, error))
        return results

    def read(self, record: Record) -> Tensor:
        frames: list[np.ndarray] = []
        first: Size = (0, 0)
        for image in self.images(record):
            first = first if frames else image.size
            check_same_size(record.path, image.size, first)
            frames.append(self.shape.cut(image))
        return torch.from_numpy(np.stack(frames))

    def is_picture(self, record: Record) -> bool:
        """Return whether a file is read as a picture, and not as a clip from which one frame is
        taken."""
        suffix = Path(record.path).suffix.lower()
        if self.shape.animated and suffix in ANIMATIONS:
            return not is_animated(record.source)
        return suffix not in VIDEO_SUFFIXES

    def images(self, record: Record) -> Iterator[Image.Image]:
        """Yield the frames to take from a record."""
        shape, path = self.shape, Path(record.path)
        if record.is_folder:
            names = frames_in(path)
            for number in shape.places(len(names)):
                yield load_image(names[number])
        elif shape.frames == 1 and not record.span and self.is_picture(record):
            yield load_image(record.path)
        else:  # of a film, perhaps only some frames
            content = probe(record.source)
            fps = shape.fps or content.fps
            places = shape.places(len(content.plan(fps)))
            for number, image in enumerate(read_video(record.source, fps)):
                if number in places:
                    yield image
                if number == places[-1]:
                    return


def read_media(
    records: list[Record], shape: Shape, batch: int, num_workers: int = 0
) -> Iterator[tuple[list[Record], Tensor]]:
    """Yield up to `batch` records of one size, with their frames `(B, F, 3, H, W)` as uint8.
    Records that cannot be read are reported and skipped. ValueError if none can be read."""
    yield from batched(_readable(records, shape, num_workers), batch)


def _readable(
    records: list[Record], shape: Shape, num_workers: int
) -> Iterator[tuple[Record, Tensor]]:
    """Yield the records that can be read, with their frames; report the others."""
    chunk = AT_ONCE if shape.frames == 1 else 1
    count = 0
    for part, results in each(_Read(shape), records, chunk, num_workers):
        for record, result in zip(part, results, strict=True):
            if isinstance(result, Skip):
                print(f"skipped: {record.path}: {result.reason}", flush=True)
                continue
            count += 1
            yield record, result
    if not count:
        raise ValueError(f"none of {len(records)} items could be read, first {records[0].path}")


def batched(
    items: Iterable[tuple[Record, Tensor]], batch: int
) -> Iterator[tuple[list[Record], Tensor]]:
    """Yield groups of up to `batch` items of one size, with their pixels as `(B, F, 3, H, W)`."""
    waiting: dict[tuple, list[tuple[Record, Tensor]]] = defaultdict(list)
    for record, pixels in items:
        group = waiting[tuple(pixels.shape)]
        group.append((record, pixels))
        if len(group) == batch:
            yield _stacked(waiting.pop(tuple(pixels.shape)))
    for group in waiting.values():
        yield _stacked(group)


def _stacked(group: list[tuple[Record, Tensor]]) -> tuple[list[Record], Tensor]:
    records, pixels = zip(*group)
    return list(records), torch.stack(pixels)
