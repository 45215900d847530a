"""JPEG files decoded and cut by torchvision on the device that encodes, while caching: nvJPEG on a
GPU (`preprocess.jpeg_decoder: torchvision`).

Workers read the files and take sizes from their heads; the process that encodes decodes some at a
time. Pixels then differ from Pillow's by rounding, and a crop begins at a whole pixel, so the
manifest says which decoder made a cache. What nvJPEG might show otherwise than a viewer does, or
might not notice (a turned picture, a colour profile, CMYK, a file cut off), Pillow decodes.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from mmdit.config import ConfigError
from mmdit.data.dataset.buckets import Size
from mmdit.data.dataset.colours import changes_colours
from mmdit.data.dataset.frames import Box
from mmdit.data.dataset.members import Source, open_source
from mmdit.data.dataset.pictures import is_upright, open_picture

END = b"\xff\xd9"  # of a JPEG file


@dataclass
class CodedPicture:
    """A JPEG file, not yet decoded, and what is to be made of it."""

    data: Tensor  # uint8: the bytes of the file
    target: Size
    boxes: list[Box]


def read_plain(path: Source) -> tuple[Tensor, Size] | None:
    """Return the bytes of a JPEG file and the size of its picture; None where Pillow has to decode
    it. Errors as of `open_picture`."""
    with open_source(path) as file:
        data = file.read()
    if not data.startswith(b"\xff\xd8") or not data.endswith(END):
        return None
    with open_picture(io.BytesIO(data)) as image:
        plain = image.format == "JPEG" and image.mode == "RGB" and is_upright(image)
        plain = plain and image.info.get("adobe_transform", 1) == 1  # else the file holds RGB
        if not plain or changes_colours(image.info.get("icc_profile"), "RGB"):
            return None
        return torch.frombuffer(bytearray(data), dtype=torch.uint8), image.size


def decode_jpegs(
    pictures: list[CodedPicture], device: torch.device | str
) -> list[list[Tensor] | None]:
    """Return for every picture its crops, uint8 `(3, H, W)` on the device; None for one that could
    not be decoded. ConfigError: torchvision is not there."""
    decode_jpeg, transforms = import_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torchvision's decoders, from 0.29
        decode = partial(decode_jpeg, device=str(device))
        decoded = _decoded([picture.data for picture in pictures], decode)
    crops: list[list[Tensor] | None] = []
    for picture, whole in zip(pictures, decoded, strict=True):
        if whole is None:
            crops.append(None)
            continue
        parts = []
        for box in picture.boxes:
            left, top, right, bottom = map(round, box)
            part = transforms.resized_crop(
                whole,
                top,
                left,
                max(1, bottom - top),
                max(1, right - left),
                list(picture.target[::-1]),
                interpolation=transforms.InterpolationMode.BICUBIC,
                antialias=True,
            )
            parts.append(part)
        crops.append(parts)
    return crops


def _decoded(files: list[Tensor], decode: Callable) -> list[Tensor | None]:
    """Return the pictures in these files, `(3, H, W)`; each alone where they fail together."""
    try:
        return decode(files)
    except RuntimeError:
        if len(files) == 1:
            return [None]
    return [_decoded([file], decode)[0] for file in files]


def import_torchvision() -> tuple[Callable, ModuleType]:
    """Return torchvision's decoder of lists of JPEG files and its functions on pictures.
    ConfigError: it is missing, of another torch, or too new to have the decoder."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
        from torchvision.transforms.v2 import functional

        return partial(decode_jpeg, mode=ImageReadMode.RGB), functional
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            "preprocess.jpeg_decoder",
            f"is 'torchvision', which cannot be imported ({reason}); install the torchvision that"
            " belongs to this torch (extra jpeg), or set it to pillow",
        ) from None
