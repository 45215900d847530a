"""The packed form of a latent cache: few large safetensors files instead of one file an item, for
collections of millions.

    <folder>/manifest.json             what made the latents, as in any cache
    <folder>/shard-00000.safetensors   items in the order of their ids: float16 (F, H, W, C) under each id, then `.texts`, a
                                       JSON line per item: {"crc": …, "caption": …, "facts"?: …, "source"?: …}
    <folder>/packed.safetensors        the index: columns over all items

The shards are the truth, and any safetensors reader opens them; the index is made from them alone.
It is mapped into memory, not read: what an opened cache holds does not grow with its texts.
`mmdit.data.cache.packing` makes these files.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mmdit.files import open_regular, write_atomically

INDEX = "packed.safetensors"
TEXTS = ("ids", "captions", "facts", "sources")
MOST_HEADER = 100_000_000  # bytes, the limit of the safetensors format
REMEDY = "delete it and run mmdit.scripts.pack_cache again"


class Lazy(Sequence):
    """`count` things, made by `get(number)` when they are asked for."""

    def __init__(self, count: int, get: Callable[[int], Any]):
        self.numbers, self.get = range(count), get

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Any:
        return self.get(self.numbers[index])


@dataclass
class Marks:
    """By an item's number, the CRC-32 up to each of its frames but the last; none where they were
    not stored."""

    values: np.ndarray  # uint32, of all items
    ends: np.ndarray  # int64 (N + 1)

    @staticmethod
    def of(marks: Sequence[Sequence[int]]) -> Marks:
        ends = np.cumsum([0, *map(len, marks)], dtype=np.int64)
        return Marks(np.fromiter(chain.from_iterable(marks), np.uint32, int(ends[-1])), ends)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.ends[index] : self.ends[index + 1]]


@dataclass
class Columns:
    """What is known of every item of a cache, by its number: `shapes (N, 4)` int64, `places (N, 3)`
    int64 (bytes of the file, offset of the numbers in it, their CRC-32), the file relative to the
    folder, the texts. `rates`: frames a second of the video files among the sources."""

    ids: Sequence[str]
    captions: Sequence[str]
    facts: Sequence[dict]
    sources: Sequence[dict]
    files: Sequence[str]
    shapes: Tensor
    places: Tensor
    rates: set[float]
    marks: Marks


# ── shards ────────────────────────────────────────────────────────────────────────────────────────
def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.safetensors"))


def is_packed(folder: Path) -> bool:
    return (folder / INDEX).exists() or any(shards_of(folder))


def shard_header(ids: Sequence[str], shapes: list[list[int]], text_bytes: int) -> bytes:
    """All of a shard before its numbers. ValueError for the one id that the format keeps to
    itself."""
    rows, end = {}, 0
    for id, shape in zip(ids, shapes, strict=True):
        if id == "__metadata__":
            raise ValueError(
                "id '__metadata__' has a meaning of its own in safetensors files; give that item"
                " another id"
            )
        begin, end = end, end + 2 * int(np.prod(shape))
        rows[id] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    rows[".texts"] = {"dtype": "U8", "shape": [text_bytes], "data_offsets": [end, end + text_bytes]}
    head = json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def text_line(
    caption: str, facts: dict, source: dict, crc: int, marks: Sequence[int] = ()
) -> bytes:
    """The check sum has always eight digits: a line is as long before the numbers are known as it
    is after. `marks`: those up to each frame but the last, in one word."""
    row = {"crc": f"{crc:08x}", "caption": caption}
    row |= {"marks": "".join(f"{mark:08x}" for mark in marks)} if len(marks) else {}
    row |= {name: value for name, value in (("facts", facts), ("source", source)) if value}
    return _json(row).encode() + b"\n"


def read_shard(path: Path) -> list[dict]:
    """Rows `{"id", "shape", "offset" (in the file), "crc", "caption", "facts", "source"}` in the
    shard's order, without the numbers. ValueError names a shard that is damaged or none of ours."""
    try:
        size = path.stat().st_size
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MOST_HEADER, size):
                raise ValueError("it ends within its header")
            header, start = json.loads(file.read(length)), 8 + length
            begin, end = header.pop(".texts")["data_offsets"]
            if start + end != size:
                raise ValueError(f"it has {size} bytes, its header says {start + end}")
            file.seek(start + begin)
            texts = file.read(end - begin).splitlines()
        rows, place = [], 0
        for (id, tensor), text in zip(header.items(), texts, strict=True):
            text, shape = json.loads(text), tensor["shape"]
            numbers = 2 * int(np.prod(shape))
            wanted = ["F16", 4, [place, place + numbers]]
            if [tensor["dtype"], len(shape), tensor["data_offsets"]] != wanted or numbers < 2:
                raise ValueError(
                    f"item {id!r} is not a float16 tensor of four axes behind the one before it"
                )
            marks = np.frombuffer(bytes.fromhex(text.get("marks", "")), ">u4").tolist()
            if len(marks) not in (0, shape[0] - 1):
                raise ValueError(f"item {id!r} has {len(marks)} check sums of frames")
            rows.append(
                {
                    "id": id,
                    "shape": shape,
                    "offset": start + place,
                    "crc": int(text["crc"], 16),
                    "marks": marks,
                    "caption": text["caption"],
                    "facts": text.get("facts") or {},
                    "source": text.get("source") or {},
                }
            )
            place += numbers
        if place != begin:
            raise ValueError("its items do not fill it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"shard {path} is damaged: {error}; {REMEDY}") from None
    return rows


# ── the index ─────────────────────────────────────────────────────────────────────────────────────
def index_of(shards: Iterator[tuple[Path, list[dict]]]) -> dict[str, Tensor]:
    """The columns of these shards and their rows (`read_shard`)."""
    shapes, places, files, rates = array("q"), array("q"), array("q"), set()
    marks, mark_ends = array("I"), array("q", [0])
    blobs, ends = {name: bytearray() for name in TEXTS}, {name: array("q", [0]) for name in TEXTS}
    for number, (path, rows) in enumerate(shards):
        size = path.stat().st_size
        for row in rows:
            shapes.extend(row["shape"])
            places.extend((size, row["offset"], row["crc"]))
            files.append(number)
            marks.extend(row.get("marks", ()))
            mark_ends.append(len(marks))
            rates.update({row["source"]["fps"]} if "fps" in row["source"] else ())
            texts = [
                row["id"],
                row["caption"],
                *(_json(row[name]) if row[name] else "" for name in ("facts", "source")),
            ]
            for name, text in zip(TEXTS, texts, strict=True):
                blobs[name] += text.encode()
                ends[name].append(len(blobs[name]))

    def numbers(values: array, *shape: int) -> Tensor:
        return torch.from_numpy(np.frombuffer(values, np.int64).reshape(*shape).copy())

    columns = {
        "shapes": numbers(shapes, -1, 4),
        "places": numbers(places, -1, 3),
        "files": numbers(files, -1),
    }
    columns["marks"] = torch.from_numpy(np.frombuffer(marks, np.int32).copy())  # the bits of uint32
    columns["marks.ends"] = numbers(mark_ends, -1)
    columns["rates"] = torch.tensor(sorted(rates), dtype=torch.float64)
    for name in TEXTS:
        columns[name] = torch.from_numpy(np.frombuffer(bytes(blobs[name]), np.uint8).copy())
        columns[f"{name}.ends"] = numbers(ends[name], -1)
    return columns


def _json(value: dict) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def write_index(folder: Path, columns: dict[str, Tensor]) -> None:
    write_atomically(folder / INDEX, save(columns), flush=True)


def read_columns(folder: Path) -> dict[str, Tensor]:
    """The index as stored, mapped into memory, after a check that no number of it leads outside."""
    path = folder / INDEX
    if not path.exists():
        raise ValueError(
            f"the packed cache {folder} has no index ({INDEX}): packing was not finished; run "
            "mmdit.scripts.pack_cache again, it goes on from there"
        )
    try:
        with open_regular(path), safe_open(path, "pt") as stored:
            columns = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
        columns.setdefault("marks", torch.empty(0, dtype=torch.int32))  # of an older version: none
        columns.setdefault("marks.ends", torch.zeros(len(columns["files"]) + 1, dtype=torch.int64))
        _check(columns)
    except (SafetensorError, OSError, KeyError, RuntimeError, ValueError, IndexError) as error:
        raise ValueError(f"the index {path} is damaged ({error}); {REMEDY}") from None
    return columns


def read_index(folder: Path) -> Columns:
    """Opens the index, and looks at every shard's size but at none of its bytes. ValueError names
    the index or the shard that is missing, damaged or changed."""
    columns, path = read_columns(folder), folder / INDEX
    count, files = len(columns["files"]), columns["files"]
    changes = torch.nonzero(files.diff(prepend=files[:1] - 1)).flatten()
    for number, size in zip(
        files[changes].tolist(), columns["places"][changes, 0].tolist(), strict=True
    ):
        shard = folder / shard_name(number)
        found = shard.stat().st_size if shard.exists() else None
        if found != size:
            raise ValueError(
                f"shard {shard} is"
                f" {'missing' if found is None else f'damaged: it has {found} bytes'}, the index"
                f" {path} says {size}; {REMEDY}"
            )
    text, value = (partial(get, path) for get in (_text, _value))
    ids, captions = (
        Lazy(count, partial(text, columns[name], columns[f"{name}.ends"])) for name in TEXTS[:2]
    )
    facts, sources = (
        Lazy(count, partial(value, columns[name], columns[f"{name}.ends"])) for name in TEXTS[2:]
    )
    return Columns(
        ids,
        captions,
        facts,
        sources,
        Lazy(count, partial(_file, files)),
        columns["shapes"],
        columns["places"],
        set(columns["rates"].tolist()),
        Marks(columns["marks"].numpy().view(np.uint32), columns["marks.ends"].numpy()),
    )


def _check(columns: dict[str, Tensor]) -> None:
    """That no number of the index leads outside: of columns of one length, places within files,
    texts within blobs."""
    shapes, places, files = columns["shapes"], columns["places"], columns["files"]
    count = len(files)
    if not count or shapes.shape != (count, 4) or places.shape != (count, 3) or files.ndim != 1:
        raise ValueError(
            f"it has columns of shapes {tuple(shapes.shape)}, {tuple(places.shape)} and"
            f" {tuple(files.shape)}"
        )
    sizes, offsets = places[:, 0], places[:, 1]
    if (
        shapes.amin() < 1
        or shapes.double().prod(1).amax() > 2**62
        or offsets.amin() < 0
        or (offsets + 2 * shapes.prod(1) > sizes).any()
        or files.diff().lt(0).any()
    ):
        raise ValueError("an item lies outside its shard")
    for name in TEXTS:
        ends = columns[f"{name}.ends"]
        if (
            len(ends) != count + 1
            or ends[0] != 0
            or ends.diff().lt(0).any()
            or ends[-1] != len(columns[name])
        ):
            raise ValueError(f"the {name} do not fill their column")
    marks = columns["marks.ends"].diff()
    if (
        len(marks) != count
        or columns["marks.ends"][0] != 0
        or columns["marks.ends"][-1] != len(columns["marks"])
        or columns["marks"].dtype != torch.int32
        or ((marks != 0) & (marks != shapes[:, 0] - 1)).any()
    ):
        raise ValueError("the marks do not fill their column")


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _file(files: Tensor, index: int) -> str:
    return shard_name(int(files[index]))


def _text(path: Path, blob: Tensor, ends: Tensor, index: int) -> str:
    begin, end = ends[index : index + 2].tolist()
    try:
        return blob[begin:end].numpy().tobytes().decode()
    except ValueError as error:
        raise ValueError(
            f"the index {path} is damaged: a text of item {index} cannot be read ({error});"
            f" {REMEDY}"
        ) from None


def _value(path: Path, blob: Tensor, ends: Tensor, index: int) -> dict:
    text = _text(path, blob, ends, index)
    try:
        value = json.loads(text) if text else {}
        if isinstance(value, dict):
            return value
    except (ValueError, RecursionError):
        pass
    raise ValueError(
        f"the index {path} is damaged: the facts or source of item {index} are no JSON object;"
        f" {REMEDY}"
    )


def damage_of(path: str | os.PathLike, size: int, id: str) -> ValueError:
    """What to say of a shard from which item `id` could not be read."""
    found = os.stat(path).st_size if os.path.exists(path) else None
    why = (
        "it is missing"
        if found is None
        else (
            f"it has {found} bytes, the index says {size}"
            if found != size
            else f"the check sum of item {id!r} is wrong"
        )
    )
    return ValueError(f"shard {path} is damaged: {why}; {REMEDY}")
