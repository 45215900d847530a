"""Pictures from files: decoded as a viewer would show them, resized to cover a size, cropped to it. Pixels are uint8 RGB here
(a quarter of the traffic of floats from worker to device); `to_unit` makes the `[0, 1]` that every other part sees."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from mmdit import rng
from mmdit.config import ConfigError
from mmdit.data.buckets import Size

BACKGROUND = (255, 255, 255)  # under transparent pixels
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2", ".avif"}
Box = tuple[float, float, float, float]  # left, top, right, bottom in source pixels


@dataclass(frozen=True)
class PreprocessConfig:
    """YAML section `preprocess:`. A picture is scaled to cover its size; what hangs over on the longer axis is cropped.

    `shifted` moves the crop off the centre by up to `shift_fraction` of half the overhang, by an offset that is a function of
    (seed, id, crop index): the shifted crop of HDM (Home-made Diffusion Model, 2025), which takes several crops of an image.
    """

    crop: Literal["center", "shifted"] = "center"
    shift_fraction: float = 1.0
    num_crops: int = 1
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.shift_fraction <= 1:
            raise ConfigError("shift_fraction", f"is {self.shift_fraction}; must be from 0 (centre) to 1 (anywhere)")
        if self.num_crops < 1:
            raise ConfigError("num_crops", f"is {self.num_crops}; must be at least 1")
        if self.num_crops > 1 and (self.crop == "center" or self.shift_fraction == 0):
            raise ConfigError("num_crops", f"is {self.num_crops} but crop is {self.crop!r} by {self.shift_fraction}: the "
                              "copies would be identical; set num_crops: 1, or crop: shifted with shift_fraction > 0")

    def describe(self) -> dict:
        """What decides the pixels, for the cache's manifest."""
        return asdict(self) if self.crop == "shifted" else {"crop": "center"}

    def item_id(self, id: str, crop: int) -> str:
        """The id of one crop: `<id>_c<k>` when there are several."""
        return f"{id}_c{crop}" if self.num_crops > 1 else id


def load_image(path: str | Path) -> Image.Image:
    """The picture as mode RGB: EXIF rotation applied, transparency laid on white, CMYK, palette and 16-bit converted, the first
    frame of an animation (`info["animated"]` says so). OSError (or whatever a decoder raises): missing, truncated, no image."""
    with Image.open(path) as image:
        animated = image.format not in ("MPO", "TIFF") and getattr(image, "is_animated", False)  # those hold other pictures
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else only a copy
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits per pixel (or 16 in 32): Pillow would clip at 255
            values = np.asarray(image).astype(np.float64)
            wide = image.mode.startswith("I;16") or values.max() > 255
            image = Image.fromarray((values / (257 if wide else 1)).round().clip(0, 255).astype(np.uint8))
        if image.mode == "F":
            raise ValueError("floating-point images have no stated range; save as 8 or 16 bits")
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image)
        image = image if image.mode == "RGB" and not animated else image.convert("RGB")  # a copy is a tenth of the work
        image.info = {"animated": animated}
        return image


def load_first_frame(path: str | Path, size: Size) -> Tensor:
    """A picture cut to `size` (width, height) from its middle: `(3, H, W)` in [0, 1]."""
    image = load_image(path)
    return to_unit(torch.tensor(cut(image, crop_box(image.size, size, PreprocessConfig(), ""), size)))


def crop_box(source: Size, target: Size, preprocess: PreprocessConfig, id: str, crop: int = 0) -> Box:
    """The part of the source that becomes the picture: the largest of the target's aspect ratio, so that no resized overhang is
    ever made (a 30000x10 panorama costs as little as its crop). Deterministic in (seed, id, crop)."""
    scale = max(target[0] / source[0], target[1] / source[1])
    box, offsets = [target[0] / scale, target[1] / scale], []
    for axis in (0, 1):
        slack = max(source[axis] - box[axis], 0.0)
        place = 0.5
        if preprocess.crop == "shifted":
            first = (rng.key(preprocess.seed, "crop", id, axis) >> 11) * 2.0**-53 % 1.0
            drawn = (first + crop * 0.6180339887498949) % 1.0  # golden ratio: several crops of an image lie apart
            place += preprocess.shift_fraction * (drawn - 0.5)
        offsets.append(slack * place)
    left, top = offsets
    return left, top, min(left + box[0], source[0]), min(top + box[1], source[1])


def crop_shares(source: dict) -> Box:
    """What part of its picture an item shows: left, top, right, bottom as shares of it. `source` as an item stores it; all of
    the picture where no crop was stored (generated items)."""
    if "crop" not in source:
        return 0.0, 0.0, 1.0, 1.0
    (width, height), (left, top, right, bottom) = source["size"], source["crop"]
    return left / width, top / height, right / width, bottom / height


def cut(image: Image.Image, box: Box, target: Size) -> np.ndarray:
    """`box` of the image at size `target`: uint8 `(3, H, W)`, antialiased bicubic."""
    part = image.resize(target, Image.Resampling.BICUBIC, box=box)
    return np.asarray(part).transpose(2, 0, 1)


def list_frames(folder: str | Path) -> list[Path]:
    """The pictures of a folder in natural order (`2.png` before `10.png`). OSError if it is no folder."""
    files = [Path(entry.path) for entry in os.scandir(folder) if not entry.name.startswith(".")]
    frames = [file for file in files if file.suffix.lower() in SUFFIXES]
    return sorted(frames, key=lambda file: [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in
                                            re.split(r"(\d+)", file.name)])


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in `[0, 1]`."""
    return pixels.to(torch.float32) / 255
