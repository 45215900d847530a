"""Pictures resized to cover a size and cropped to it, and folders of frames. Pixels are uint8 RGB
here, which takes a quarter of the traffic of floats from worker to device."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdit import rng
from mmdit.config import ConfigError, Section, least
from mmdit.data.dataset.buckets import Size
from mmdit.data.dataset.pictures import SUFFIXES, load_image
from mmdit.data.dataset.problems import Unusable
from mmdit.pixels import to_unit

Box = tuple[float, float, float, float]  # left, top, right, bottom in source pixels
GOLDEN_RATIO = 0.6180339887498949  # its multiples, modulo 1, are spread out, and so are crops


@dataclass(frozen=True)
class PreprocessConfig(Section):
    """The section `preprocess:`. A picture is scaled to cover its size, and the overhang along the
    longer axis is cropped. Several shifted crops of an image are the recipe of HDM (Home-made
    Diffusion Model, 2025)."""

    # `center` crops around the middle; `shifted` moves the crop by an offset keyed with the seed,
    # the item's id and the crop's number.
    crop: Literal["center", "shifted"] = "center"
    # How far a shifted crop may move, as a share of the overhang: 0 stays in the middle, 1 moves
    # anywhere.
    shift_fraction: float = 1.0
    # The number of crops of each picture, each cached as a separate item.
    num_crops: int = 1
    # Keys the offsets of shifted crops.
    seed: int = 0
    # The decoder of plain JPEG pictures while caching (frames of clips: Pillow). `torchvision`
    # works on the GPU, faster for large files; its pixels differ from Pillow's by rounding.
    jpeg_decoder: Literal["pillow", "torchvision"] = "pillow"

    def __post_init__(self):
        if not 0 <= self.shift_fraction <= 1:
            raise ConfigError(
                "shift_fraction",
                f"is {self.shift_fraction}; must be from 0 (centre) to 1 (anywhere)",
            )
        least(self, 1, "num_crops")
        if self.num_crops > 1 and (self.crop == "center" or self.shift_fraction == 0):
            raise ConfigError(
                "num_crops",
                f"is {self.num_crops} but crop is {self.crop!r} by {self.shift_fraction}: the"
                " copies would be identical; set num_crops: 1, or crop: shifted with"
                " shift_fraction > 0",
            )

    def describe(self) -> dict:
        """Return the settings that decide the pixels, for the cache's manifest."""
        stated = asdict(self) if self.crop == "shifted" else {"crop": "center"}
        stated.pop("jpeg_decoder", None)  # manifests of caches made with Pillow never named it
        if self.jpeg_decoder != "pillow":
            stated["jpeg_decoder"] = self.jpeg_decoder
        return stated

    def item_ids(self, id: str) -> list[str]:
        """Return the ids of all crops of a record: `<id>_c<k>` when there are several."""
        if self.num_crops == 1:
            return [id]
        return [f"{id}_c{crop}" for crop in range(self.num_crops)]


def load_first_frame(path: str | Path, size: Size) -> Tensor:
    """Return the middle of a picture at `size` (width, height): `(3, H, W)` in [0, 1]. ValueError
    names a file that cannot be used."""
    try:
        image = load_image(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    box = crop_box(image.size, size, PreprocessConfig(), "")
    return to_unit(torch.tensor(cut(image, box, size)))


def crop_box(
    source: Size, target: Size, preprocess: PreprocessConfig, id: str, crop: int = 0
) -> Box:
    """Return the part of the source that becomes the picture: the largest one with the target's
    aspect ratio, at a place that is a function of (seed, id, crop). Only this part is resized, so a
    panorama of 30000x10 costs as little as its crop."""
    scale = max(target[0] / source[0], target[1] / source[1])
    begins, ends = [], []
    for axis in (0, 1):
        side = target[axis] / scale
        place = 0.5
        if preprocess.crop == "shifted":
            first = rng.uniform(preprocess.seed, "crop", id, axis)
            drawn = (first + crop * GOLDEN_RATIO) % 1.0
            place += preprocess.shift_fraction * (drawn - 0.5)
        begin = max(source[axis] - side, 0.0) * place
        begins.append(begin)
        ends.append(min(begin + side, source[axis]))
    return begins[0], begins[1], ends[0], ends[1]


def boxes_of(source: Size, target: Size, preprocess: PreprocessConfig, id: str) -> dict[int, Box]:
    """Return the boxes of all crops that repeat no earlier one, by the crop's number."""
    boxes: dict[int, Box] = {}
    for crop in range(preprocess.num_crops):
        box = crop_box(source, target, preprocess, id, crop)
        distances = [np.abs(np.subtract(box, other)).max() for other in boxes.values()]
        if min(distances, default=1.0) >= 0.5:
            boxes[crop] = box
    return boxes


def check_same_size(name: str, size: Size, first: Size) -> None:
    """Raise Unusable for a frame that does not have the size of its clip's first frame."""
    if size != first:
        raise Unusable("frames of different sizes", f"{name} is {size}, the first is {first}")


def crop_of(source: dict) -> tuple[Size, Box] | None:
    """Return the size of the picture that an item was cut from, and the crop; None if the item
    stores none, or another program stored something else."""
    size, crop = source.get("size"), source.get("crop")
    if not (isinstance(size, list | tuple) and isinstance(crop, list | tuple)):
        return None
    plain = all(isinstance(value, int | float) and math.isfinite(value) for value in (*size, *crop))
    if not (plain and len(size) == 2 and len(crop) == 4 and min(size) > 0):
        return None
    return (size[0], size[1]), (crop[0], crop[1], crop[2], crop[3])


def crop_shares(source: dict) -> Box:
    """Return the part of its picture that an item shows: left, top, right, bottom as shares of the
    picture. `source`: as stored with the item; generated items have no crop and show all of it."""
    known = crop_of(source)
    if known is None:
        return 0.0, 0.0, 1.0, 1.0
    (width, height), (left, top, right, bottom) = known
    return left / width, top / height, right / width, bottom / height


def cut(image: Image.Image, box: Box, target: Size) -> np.ndarray:
    """Return `box` of the image at size `target`: uint8 `(3, H, W)`, antialiased bicubic."""
    part = image.resize(target, Image.Resampling.BICUBIC, box=box)
    return np.asarray(part).transpose(2, 0, 1)


def load_frames(folder: str | Path) -> Iterator[tuple[str, Image.Image]]:
    """Yield (name, picture) for every frame in a folder, in order. ValueError names a frame that
    cannot be used; OSError if it is not a folder."""
    for path in frames_in(folder):
        with naming(path):
            image = load_image(path)
        yield path.name, image


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the frame's name to errors raised in this block."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise Unusable.of(error, path.name) from None
    except OSError as error:
        raise Unusable(error.strerror or str(error), frame=path.name) from None


def frames_in(folder: str | Path) -> list[Path]:
    """Return the frames of `list_frames`. ValueError if there are none; it says what else there
    is."""
    paths = list_frames(folder)
    if not paths:
        names = [name for name in os.listdir(folder) if not name.startswith(".")]
        others = Counter(os.path.splitext(name)[1].lower() or "without suffix" for name in names)
        if not others:
            raise Unusable("folder without pictures")
        there = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(3))
        raise Unusable("folder without pictures", f"it holds {there}, which are not read")
    return paths


def list_frames(folder: str | Path) -> list[Path]:
    """Return the pictures in a folder in natural order (`2.png` before `10.png`). OSError if it is
    not a folder."""
    files = [Path(entry.path) for entry in os.scandir(folder) if not entry.name.startswith(".")]
    frames = [file for file in files if file.suffix.lower() in SUFFIXES]
    return sorted(
        frames,
        key=lambda file: [
            (0, int(part), part) if part.isdecimal() else (1, 0, part)
            for part in re.split(r"(\d+)", file.name)
        ],
    )
