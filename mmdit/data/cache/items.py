"""The file of one cached item: a `.pt` that `torch.load(weights_only=True)` reads, and its line in
the index.

{"latents": float16 (F, H, W, C) raw, "caption": str, "facts"?: dict, "source"?: dict}
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmdit.data.dataset.records import check_storable
from mmdit.files import open_regular

SIGNATURE = b"PK\3\4"  # with which such a file begins
ALIGNMENT = 64  # of the numbers within the file, as torch.save does it


def to_half(latents: Tensor) -> tuple[Tensor, Tensor]:
    """float16 on the CPU, and which items `(B,)` are finite in it (NaN and float16 overflow are
    not)."""
    low, high = latents.detach().float().flatten(1).aminmax(dim=1)
    finite = (low > -65520) & (
        high < 65520
    )  # what rounds to float16's largest number, 65504; False for NaN
    return latents.detach().to(torch.float16).cpu(), finite.cpu()


# ── writing ───────────────────────────────────────────────────────────────────────────────────────
class _Stored:
    """Stands for the tensor (as `shape`) and for its storage (as a number) while an item is
    pickled."""

    def __init__(self, value: tuple[int, ...] | int):
        self.value = value


class _Pickler(pickle.Pickler):
    def persistent_id(self, thing):
        stored = type(thing) is _Stored and isinstance(thing.value, int)
        return ("storage", torch.HalfStorage, "0", "cpu", thing.value) if stored else None

    def reducer_override(self, thing):
        if type(thing) is not _Stored:
            return NotImplemented
        shape = thing.value
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return torch._utils._rebuild_tensor_v2, (
            _Stored(math.prod(shape)),
            0,
            shape,
            strides,
            False,
            OrderedDict(),
        )


def running_crcs(numbers: np.ndarray) -> list[int]:
    """The CRC-32 of the first frame, of the first two, … of all frames `(F, H, W, C)`. Two of them
    check the frames between."""
    crcs, crc = [], 0
    for frame in numbers:
        crc = zlib.crc32(frame, crc)
        crcs.append(crc)
    return crcs


def item_bytes(numbers: np.ndarray, rest: dict, crc: int | None = None) -> tuple[bytes, int, int]:
    """The file of `numbers (F, H, W, C)` float16 and the plain values `rest`; where in it the
    numbers lie; their CRC-32 (`crc`, where it is known).

    The same archive as torch.save's, a third of its time: this runs once an item on the thread that
    feeds the device.
    """
    head = io.BytesIO()
    _Pickler(head, 2).dump({"latents": _Stored(numbers.shape), **rest})
    raw = numbers.tobytes()
    crc = zlib.crc32(raw) if crc is None else crc
    body, directory, position, place = [], [], 0, 0
    for name, data, check in (
        (b"item/data.pkl", head.getvalue(), None),
        (b"item/byteorder", b"little", None),
        (b"item/data/0", raw, crc),
        (b"item/version", b"3\n", None),
    ):
        padding = -(position + 34 + len(name)) % ALIGNMENT
        extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
        check = zlib.crc32(data) if check is None else check
        fields = struct.pack("<HHHHHIIIH", 20, 0, 0, 0, 33, check, len(data), len(data), len(name))
        body += [SIGNATURE, fields, struct.pack("<H", len(extra)), name, extra, data]
        directory += [
            b"PK\1\2\x14\0",
            fields,
            struct.pack("<HHHHII", 0, 0, 0, 0, 0, position),
            name,
        ]
        start = position + 30 + len(name) + len(extra)
        place = start if data is raw else place
        position = start + len(data)
    listing = b"".join(directory)
    end = struct.pack("<HHHHIIH", 0, 0, 4, 4, len(listing), position, 0)
    return b"".join([*body, listing, b"PK\5\6", end]), place, crc


def index_entry(
    id: str,
    file: str,
    shape: tuple[int, ...],
    rest: dict,
    size: int,
    offset: int,
    crc: int,
    marks: list[int] | None = None,
) -> dict:
    """The index line. `offset` and `crc` locate and check the numbers inside the file: batches are
    read without unpickling. `marks`: the `running_crcs` before the last, by which some frames of a
    clip are checked."""
    entry = {
        "id": id,
        "file": file,
        "shape": list(shape),
        **rest,
        "bytes": size,
        "offset": offset,
        "crc": crc,
    }
    return entry | ({"marks": marks} if marks else {})


# ── reading ───────────────────────────────────────────────────────────────────────────────────────
def load_item(path: str | Path, channels: int | None = None) -> dict:
    """One cache file, checked. ValueError names a damaged or foreign file."""
    try:
        with open_regular(path) as file:
            with zipfile.ZipFile(file) as archive:  # torch.load does not compare check sums
                torn = archive.testzip()
            file.seek(0)
            item = torch.load(file, weights_only=True, map_location="cpu")
        latents, caption = item["latents"], item["caption"]
        width = latents.shape[-1] if latents.ndim else 0
        problem = (
            f"the check sum of {torn} is wrong"
            if torn
            else (
                f"its latents have shape {tuple(latents.shape)}, not (frames, rows, columns,"
                " channels)"
                if latents.ndim != 4
                else (
                    "it has no frame"
                    if not len(latents)
                    else (
                        f"its latents are {latents.dtype}, not float16"
                        if latents.dtype != torch.float16
                        else (
                            f"its latents have {width} channels, the manifest says {channels}"
                            if channels not in (None, width)
                            else (
                                "its caption is not text"
                                if not isinstance(caption, str)
                                else (
                                    "its facts or source are no dictionary"
                                    if not _are_sections(item)
                                    else ""
                                )
                            )
                        )
                    )
                )
            )
        )
    except FileNotFoundError:
        problem = "it is missing"
    except Exception as error:  # a damaged zip raises almost anything
        problem = (
            f"it cannot be read ({type(error).__name__}:"
            f" {str(error).splitlines()[0] if str(error) else ''})"
        )
    if problem:
        raise ValueError(
            f"cache file {path} is damaged: {problem}; delete it and run the caching command again"
        )
    return item


def read_entry(id: str, file: str, folder: Path, channels: int) -> dict:
    """The index line of a file that no index lists, perhaps made elsewhere by torch.save.
    ValueError: damaged."""
    item, raw = load_item(folder / file, channels), (folder / file).read_bytes()
    numbers = item["latents"].contiguous().numpy().tobytes()
    offset = raw.find(numbers[:64])
    offset = offset if raw.startswith(numbers, offset) else raw.find(numbers)
    rest = {"caption": item["caption"]} | {
        name: item[name] for name in ("facts", "source") if item.get(name)
    }
    try:
        check_storable(rest, "")
    except ValueError as error:
        raise ValueError(
            f"cache file {folder / file} is damaged: {error}; delete it and run the caching command"
            " again"
        ) from None
    *marks, crc = running_crcs(item["latents"].contiguous().numpy())
    return index_entry(id, file, tuple(item["latents"].shape), rest, len(raw), offset, crc, marks)


def is_entry(entry: dict) -> bool:
    """Of the types that `index_entry` gives, and no larger than its file."""
    shape, size, offset, crc = (entry[name] for name in ("shape", "bytes", "offset", "crc"))
    return (
        len(shape) == 4
        and all(type(number) is int for number in (*shape, size, offset, crc))
        and min(shape) > 0
        and 2 * math.prod(shape) <= size < 1 << 62
        and -1 <= offset < 1 << 62
        and 0 <= crc < 1 << 62
        and isinstance(entry["caption"], str)
        and _are_sections(entry)
        and are_marks(entry.get("marks", []), shape[0])
    )


def are_marks(marks: object, frames: int) -> bool:
    """Return whether these are the marks of a clip of so many frames, or none (of an older
    index)."""
    return (
        isinstance(marks, list)
        and len(marks) in (0, frames - 1)
        and all(type(mark) is int and 0 <= mark < 1 << 32 for mark in marks)
    )


def _are_sections(item: dict) -> bool:
    return all(isinstance(item.get(name, {}), dict) for name in ("facts", "source"))
