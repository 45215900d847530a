"""JPEG files decoded and cropped while caching by torchvision, on the device that encodes: with
nvJPEG on a GPU (`preprocess.jpeg_decoder: torchvision`).

Workers read the files and their sizes; the process that encodes decodes several files at a time.
Pixels then differ from Pillow's by rounding, and a crop begins at a whole pixel, so the manifest
says which decoder made a cache. Pillow still decodes pictures that nvJPEG might show differently
from a viewer, or whose faults it might not notice: rotated pictures, colour profiles, CMYK,
truncated files.
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

END = b"\xff\xd9"  # the last bytes of a JPEG file


@dataclass
class CodedPicture:
    """A JPEG file that is not decoded yet, and the crops to make from it."""

    data: Tensor  # uint8: the bytes of the file
    target: Size
    boxes: list[Box]


def read_plain(path: Source) -> tuple[Tensor, Size] | None:
    """Return the bytes of a JPEG file and the size of its picture; None if Pillow has to decode it.
    Errors as in `open_picture`."""
    with open_source(path) as file:
        data = file.read()
    if not data.startswith(b"\xff\xd8") or not data.endswith(END):
        return None
    with open_picture(io.BytesIO(data)) as image:
        plain = image.format == "JPEG" and image.mode == "RGB" and is_upright(image)
        plain = plain and image.info.get("adobe_transform", 1) == 1  # otherwise the file holds RGB
        if not plain or changes_colours(image.info.get("icc_profile"), "RGB"):
            return None
        return torch.frombuffer(bytearray(data), dtype=torch.uint8), image.size


def decode_jpegs(
    pictures: list[CodedPicture], device: torch.device | str
) -> list[list[Tensor] | None]:
    """Return the crops of every picture, uint8 `(3, H, W)` on the device; None for a picture that
    could not be decoded. ConfigError if torchvision is missing."""
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
    """Return the pictures in these files, `(3, H, W)`, or None for a damaged one. If decoding them
    together fails, each is decoded alone."""
    try:
        return decode(files)
    except RuntimeError:
        if len(files) == 1:
            return [None]
    return [_decoded([file], decode)[0] for file in files]


def import_torchvision() -> tuple[Callable, ModuleType]:
    """Return torchvision's decoder for lists of JPEG files, and its module of functions on
    pictures. ConfigError if it is missing, belongs to another torch, or is too new to have the
    decoder."""
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
