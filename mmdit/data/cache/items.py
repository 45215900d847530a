"""One cached item: its `.pt` file, which `torch.load(weights_only=True)` reads, and its entry in
the index.

    {"latents": float16 (F, H, W, C) raw, "caption": str, "facts"?: dict, "source"?: dict}
"""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from torch import Tensor

from mmdit.data.dataset.problems import Damage, Damaged
from mmdit.data.dataset.records import check_storable
from mmdit.files import open_regular

SIGNATURE = b"PK\3\4"  # the first bytes of a `.pt` file
REMEDY = "delete it and run the caching command again"
SHORTEST = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


@dataclass(slots=True)
class Entry:
    """The index entry of one item. Batches are read without unpickling: `offset` and `crc` locate
    and check the numbers inside the file. `frame_crcs` are all `running_crcs` except the last, with
    which single frames of a clip are checked; indices of older versions have none."""

    id: str
    file: str  # relative to the cache
    shape: list[int]
    caption: str
    bytes: int  # size of the file
    offset: int  # -1: the numbers are not there as they are (another program compressed them)
    crc: int
    frame_crcs: list[int] = field(default_factory=list)
    facts: dict = field(default_factory=dict)
    source: dict = field(default_factory=dict)

    def to_json(self) -> dict:
        """Return the entry as a line of `index.jsonl` stores it."""
        head = {"id": self.id, "file": self.file, "shape": self.shape, "caption": self.caption}
        place = {"bytes": self.bytes, "offset": self.offset, "crc": self.crc}
        crcs = {"marks": self.frame_crcs} if self.frame_crcs else {}
        return {**head, **self.sections(), **place, **crcs}

    @property
    def fps(self) -> float | None:
        """Return the rate at which frames were taken from a video file; None for other sources."""
        rate = self.source.get("fps")
        return rate if isinstance(rate, int | float) and math.isfinite(rate) else None

    def sections(self) -> dict[str, dict]:
        """Return facts and source by name, without empty ones."""
        return {name: getattr(self, name) for name in ("facts", "source") if getattr(self, name)}

    @classmethod
    def from_json(cls, row: dict) -> Entry:
        """Read a line of `index.jsonl`. ValueError, KeyError, TypeError or AttributeError if its
        values have wrong types, or if the item does not fit into its file."""
        names = ("id", "file", "shape", "caption", "bytes", "offset", "crc")
        optional = {name: row[name] for name in ("facts", "source") if name in row}
        entry = cls(*(row[name] for name in names), **optional)
        entry.frame_crcs = row.get("marks", [])
        texts = (entry.id, entry.file, entry.caption)
        numbers = (*entry.shape, entry.bytes, entry.offset, entry.crc, *entry.frame_crcs)
        if not (
            all(isinstance(text, str) for text in texts)
            and all(type(number) is int for number in numbers)
            and isinstance(entry.facts, dict)
            and isinstance(entry.source, dict)
            and len(entry.shape) == 4
            and min(entry.shape) > 0
            and 2 * math.prod(entry.shape) <= entry.bytes < 1 << 62
            and -1 <= entry.offset < 1 << 62
            and 0 <= entry.crc < 1 << 62
            and len(entry.frame_crcs) in (0, entry.shape[0] - 1)
            and all(0 <= crc < 1 << 32 for crc in entry.frame_crcs)
        ):
            raise ValueError("no index entry")
        return entry


def written_crcs(entry: Entry) -> dict[str, str]:
    """Return the `frame_crcs` of an item as the JSON of a shard holds them; nothing without any."""
    digits = "".join(f"{crc:08x}" for crc in entry.frame_crcs)
    return {"marks": digits} if digits else {}


def read_crcs(row: dict) -> list[int]:
    """Return the `frame_crcs` that `written_crcs` wrote."""
    return np.frombuffer(bytes.fromhex(row.get("marks", "")), ">u4").tolist()


def running_crcs(numbers: np.ndarray) -> list[int]:
    """Return the CRC-32 of the first frame, of the first two, … of all frames `(F, H, W, C)`. With
    two of them the frames in between can be checked."""
    crcs, crc = [], 0
    for frame in numbers:
        crc = zlib.crc32(frame, crc)
        crcs.append(crc)
    return crcs


def dump_json(value: dict) -> str:
    """Return a value as JSON without spaces, with all characters as they are."""
    return SHORTEST.encode(value)


def make_item(
    id: str, file: str, latents: Tensor, caption: str, facts: dict, source: dict
) -> tuple[list[bytes | memoryview], Entry]:
    """Return an item's file, as pieces to be written one after the other, and its entry, for
    `latents (F, H, W, C)` float16 on the CPU. ValueError if a text cannot be stored."""
    check_storable({"caption": caption, "facts": facts}, f"item {id}")
    # through numpy: of a slice of a batch, torch.save would store the whole batch
    numbers = torch.from_numpy(latents.contiguous().numpy())
    content = {"latents": numbers, "caption": caption}
    content |= {"facts": facts} if facts else {}
    content |= {"source": source} if source else {}
    written = _Pieces(numbers)
    torch.save(content, cast(IO[bytes], written))
    pieces = written.whole()
    place = (sum(map(len, pieces)), written.offset)
    return pieces, _entry(id, file, place, content)


class _Pieces:
    """A file object for torch.save that keeps what is written, and for the latents only refers to
    their memory. Nothing large is copied, so that threads which make items do not block each
    other."""

    def __init__(self, numbers: Tensor):
        self._address, self._numbers = numbers.data_ptr(), numbers.numpy().data.cast("B")
        self._around = [io.BytesIO()]  # what is written before the numbers, and behind them
        self.offset = -1  # of the numbers

    def write(self, data: memoryview) -> int:
        if len(data) == len(self._numbers) and _address(data) == self._address:
            self.offset = self._around[0].tell()
            self._around.append(io.BytesIO())
            return len(data)
        return self._around[-1].write(data)  # copied, because it is valid during this call only

    def flush(self) -> None:
        """Do nothing, since everything is kept in memory; torch.save calls this."""

    def whole(self) -> list[bytes | memoryview]:
        """Return the whole file as pieces, one after the other."""
        before, *behind = (part.getvalue() for part in self._around)
        return [before, self._numbers, *behind] if behind else [before]


def _address(piece: memoryview) -> int:
    return np.frombuffer(piece, np.uint8).__array_interface__["data"][0]


def _entry(id: str, file: str, place: tuple[int, int], item: dict) -> Entry:
    """Return the entry of an item. `place`: the size of its file, and the offset of the numbers."""
    latents = item["latents"].contiguous().numpy()
    *frame_crcs, crc = running_crcs(latents)
    sections = (item.get("facts") or {}, item.get("source") or {})
    shape = list(latents.shape)
    return Entry(id, file, shape, item["caption"], *place, crc, frame_crcs, *sections)


def load_item(path: str | Path, channels: int | None = None) -> dict:
    """Read and check one cache file completely. Damaged if it is torn, or is not an item of this
    cache."""
    try:
        with open_regular(path) as file:
            with zipfile.ZipFile(file) as archive:  # torch.load does not compare check sums
                torn = archive.testzip()
            file.seek(0)
            item = torch.load(file, weights_only=True, map_location="cpu")
        problem = f"the check sum of {torn} is wrong" if torn else _problem(item, channels)
    except FileNotFoundError:
        problem = "it is missing"
    except Exception as error:  # a damaged zip raises almost anything
        first_line = next(iter(str(error).splitlines()), "")
        problem = f"it cannot be read ({type(error).__name__}: {first_line})"
    if problem:
        raise damaged_item(path, problem)
    return item


def _problem(item: dict, channels: int | None) -> str:
    """Return what is wrong with the contents of a file, or ""."""
    latents = item["latents"]
    if latents.ndim != 4:
        shape = tuple(latents.shape)
        return f"its latents have shape {shape}, not (frames, rows, columns, channels)"
    if not len(latents):
        return "it has no frame"
    if latents.dtype != torch.float16:
        return f"its latents are {latents.dtype}, not float16"
    if channels not in (None, latents.shape[-1]):
        return f"its latents have {latents.shape[-1]} channels, the manifest says {channels}"
    if not isinstance(item["caption"], str):
        return "its caption is not text"
    if not all(isinstance(item.get(name, {}), dict) for name in ("facts", "source")):
        return "its facts or source are no dictionary"
    return ""


def damaged_item(path: str | Path, problem: str) -> Damaged:
    """Return the error for a cache file that cannot be used."""
    return Damaged(f"cache file {path}", Damage(Path(path).name, problem, REMEDY, delete=True))


def read_entry(id: str, file: str, folder: Path, channels: int) -> Entry:
    """Return the entry of a file that no index lists, which may have been written elsewhere by
    torch.save. Damaged if it cannot be used."""
    item, data = load_item(folder / file, channels), (folder / file).read_bytes()
    numbers = item["latents"].contiguous().numpy().tobytes()
    entry = _entry(id, file, (len(data), data.find(numbers)), item)
    try:
        check_storable({"caption": entry.caption} | entry.sections(), "")
    except ValueError as error:
        raise damaged_item(folder / file, str(error)) from None
    return entry
