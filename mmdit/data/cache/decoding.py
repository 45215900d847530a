"""From records to cropped pictures, in workers: open, choose a size, crop. Records that cannot be
used become a `Skip`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.dataset.buckets import VideoConfig
from mmdit.data.dataset.clips import cached_frames
from mmdit.data.dataset.frames import (
    Box,
    PreprocessConfig,
    boxes_of,
    check_same_size,
    cut,
    load_frames,
)
from mmdit.data.dataset.jpegs import CodedPicture, decode_jpegs, read_plain
from mmdit.data.dataset.pictures import load_image
from mmdit.data.dataset.problems import Skip
from mmdit.data.dataset.records import Media, Record
from mmdit.data.dataset.stamps import stamp_of
from mmdit.data.dataset.videos import read_video
from mmdit.data.dataset.workers import each

IMAGES_AT_ONCE = 16  # that a worker takes; it takes clips one at a time


@dataclass
class Meta:
    """The data stored beside the latents of one item."""

    id: str
    caption: str
    facts: dict
    source: dict
    repeated: list[str]  # ids of crops of the same picture that are not written, being repetitions


@dataclass
class Coded:
    """A JPEG file that the device will decode."""

    record: Record
    picture: CodedPicture
    metas: list[Meta]  # of its crops


@dataclass
class Decoded:
    """The result of decoding a few records."""

    records: int
    groups: list[tuple[Tensor, list[Meta]]] = field(default_factory=list)  # uint8 (B, F, 3, H, W)
    skips: list[Skip] = field(default_factory=list)
    same_crops: int = 0  # crops left out because they repeat another one of their picture
    coded: list[Coded] = field(default_factory=list)

    def pin_memory(self) -> Decoded:
        """Return this with pixels in page-locked memory. DataLoader calls the method by this
        name."""
        return replace(self, groups=[(pixels.pin_memory(), metas) for pixels, metas in self.groups])


def decoded(
    records: list[Record],
    media: Media,
    manifest: CacheManifest,
    preprocess: PreprocessConfig,
    video: VideoConfig,
    num_workers: int,
    device: torch.device | str = "cpu",
) -> Iterator[Decoded]:
    """Yield the cropped pictures of the records, decoded by workers, in order. Records during which
    a worker was killed come at the end."""
    chunk = IMAGES_AT_ONCE if media == "image" else 1
    decode = Decode(media, manifest, preprocess, video)
    pin_memory = torch.device(device).type == "cuda"
    for _, result in each(decode, records, chunk, num_workers, pin_memory):
        if isinstance(result, list):  # of a record during which a worker was killed
            result = Decoded(1, skips=result)
        if result.coded:
            decode.finish(result, device)
        yield result


class Decode(Dataset):
    """Maps a few records to their crops, grouped by size. The records are passed as the keys of the
    data set, so that a million of them need not be pickled for, or copied to, every worker."""

    def __init__(
        self,
        media: Media,
        manifest: CacheManifest,
        preprocess: PreprocessConfig,
        video: VideoConfig,
    ):
        self.media, self.choose, self.preprocess = media, manifest.choose, preprocess
        self.fps = video.fps if media == "video" else 0.0
        chosen_here = media == "video" and manifest.clip_plan
        self.video = video if chosen_here else None

    def __getitem__(self, records: list[Record]) -> Decoded:
        result = Decoded(len(records))
        groups: dict[tuple, list[tuple[np.ndarray, Meta]]] = defaultdict(list)
        for record in records:
            try:
                coded = self.coded(record)
                crops = [] if coded else self.crops(record)
            except Exception as error:  # decoders raise almost anything on damaged files
                result.skips.append(Skip.of(record, error))
                continue
            if coded:
                result.coded.append(coded)
            result.same_crops += self.preprocess.num_crops
            result.same_crops -= len(coded.metas) if coded else len(crops)
            for pixels, meta in crops:
                groups[pixels.shape].append((pixels, meta))
        for group in groups.values():
            stacked = torch.from_numpy(np.stack([pixels for pixels, _ in group]))
            result.groups.append((stacked, [meta for _, meta in group]))
        return result

    def crops(self, record: Record) -> list[tuple[np.ndarray, Meta]]:
        """Return uint8 `(F, 3, H, W)` for every crop of the record that repeats no other; all
        frames of a clip have the same box."""
        boxes, frames, source, target = {}, [], (0, 0), (0, 0)
        # taken before decoding: a change during decoding is then noticed at the next run
        stamp = stamp_of(record.source, self.fps)
        animated, notes = False, set()
        for number, (name, image) in enumerate(pictures(record, self.media, self.fps)):
            if number == 0:
                source, target = image.size, self.choose(image.size)
                boxes = boxes_of(source, target, self.preprocess, record.id)
            check_same_size(name, image.size, source)
            frames.append([cut(image, box, target) for box in boxes.values()])
            animated |= image.info["animated"]
            notes |= set(image.info["notes"])
        chosen = cached_frames(len(frames), self.video) if self.video else range(len(frames))
        origin: dict = {"size": list(source), "crops": list(boxes), "stamp": stamp}
        origin |= {"fps": self.fps} if self.fps and not record.is_folder else {}
        origin |= {"span": [record.span.first, record.span.end]} if record.span else {}
        origin |= {"frames": chosen} if self.video else {}
        origin |= {"animated": True} if animated else {}
        origin |= {"notes": sorted(notes)} if notes else {}
        crops = []
        for place, meta in enumerate(self.metas(record, boxes, origin)):
            crops.append((np.stack([frames[number][place] for number in chosen]), meta))
        return crops

    def metas(self, record: Record, boxes: dict[int, Box], origin: dict) -> list[Meta]:
        """Return the data to store with each crop of a record."""
        ids = self.preprocess.item_ids(record.id)
        repeated = [id for crop, id in enumerate(ids) if crop not in boxes]
        metas = []
        for crop, box in boxes.items():
            source = origin | {"crop": rounded(box)}
            metas.append(Meta(ids[crop], record.caption, record.facts, source, repeated))
        return metas

    def coded(self, record: Record) -> Coded | None:
        """Return a picture that the device will decode, or None if Pillow decodes it."""
        wanted = self.media == "image" and self.preprocess.jpeg_decoder == "torchvision"
        named = record.member is not None or record.path.lower().endswith((".jpg", ".jpeg"))
        if not wanted or not named:
            return None
        stamp = stamp_of(record.source)
        plain = read_plain(record.source)
        if plain is None:
            return None
        data, size = plain
        target = self.choose(size)
        boxes = boxes_of(size, target, self.preprocess, record.id)
        origin = {"size": list(size), "crops": list(boxes), "stamp": stamp}
        picture = CodedPicture(data, target, list(boxes.values()))
        return Coded(record, picture, self.metas(record, boxes, origin))

    def finish(self, result: Decoded, device: torch.device | str) -> None:
        """Decode on the device the pictures that workers left to it. Those that it cannot decode
        are decoded by Pillow here, or skipped with Pillow's reason."""
        decoded_crops = decode_jpegs([coded.picture for coded in result.coded], device)
        for coded, crops in zip(result.coded, decoded_crops, strict=True):
            try:
                pairs = (
                    self.crops(coded.record)
                    if crops is None
                    else [(crop[None], meta) for crop, meta in zip(crops, coded.metas, strict=True)]
                )
            except Exception as error:  # decoders raise almost anything on damaged files
                result.skips.append(Skip.of(coded.record, error))
                continue
            for pixels, meta in pairs:
                result.groups.append((torch.as_tensor(pixels)[None], [meta]))


def rounded(box: Box) -> list[float]:
    """Return a box in the form that is stored, rounded to thousandths of a pixel."""
    return [round(side, 3) for side in box]


def pictures(record: Record, media: Media, fps: float) -> Iterator[tuple[str, Image.Image]]:
    """Yield (name, picture) for every frame of a record; a video file gives `fps` frames a second.
    ValueError or OSError if it is unusable."""
    if media == "image":
        yield record.path, load_image(record.source)
    elif record.is_folder:
        yield from load_frames(record.path)
    else:
        for number, image in enumerate(read_video(record.source, fps)):
            yield f"frame {number}", image
