"""The packed layout of a cache: few large safetensors files, for collections of millions.

    <folder>/manifest.json             what made the latents, as in any cache
    <folder>/shard-00000.safetensors   items in the order of their ids: float16 (F, H, W, C) under
                                       each id, then `.texts`, a JSON line per item: {"crc": …,
                                       "caption": …, "marks"?: …, "facts"?: …, "source"?: …}
    <folder>/packed.safetensors        the index: columns over all items

Shards may be tars instead, as `tar_shards.py` describes.

The shards are the truth, and any safetensors reader opens them; the index is made from them alone.
It is mapped into memory, not read: what an opened cache holds does not grow with its texts.
`mmdit.data.cache.packing` makes these files.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mmdit.data.cache.columns import Columns, Lazy, cut_part
from mmdit.data.cache.items import Entry, dump_json, read_crcs, written_crcs
from mmdit.data.cache.tar_shards import read_tar_shard
from mmdit.data.dataset.problems import Damage, Damaged
from mmdit.files import open_regular, write_atomically

INDEX = "packed.safetensors"
SUFFIXES = {"safetensors": ".safetensors", "webdataset": ".tar"}  # of shards, by format
TEXTS = ("ids", "captions", "facts", "sources")
MOST_HEADER = 100_000_000  # bytes, the limit of the safetensors format
REMEDY = "delete it and run mmdit pack-cache again"


def shard_name(number: int, suffix: str = ".safetensors") -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}{suffix}"


def shards_of(folder: Path) -> list[Path]:
    """Return the shards in a folder, in order."""
    return sorted(path for path in folder.glob("shard-*") if path.suffix in SUFFIXES.values())


def is_packed(folder: Path) -> bool:
    """Return whether a folder holds a packed cache, even an unfinished one."""
    return (folder / INDEX).exists() or any(shards_of(folder))


def damaged_shard(path: Path, problem: str) -> Damaged:
    """Return the error for a shard that cannot be used."""
    return Damaged(f"shard {path}", Damage(path.name, problem, REMEDY))


def _damaged_index(path: Path, problem: object) -> Damaged:
    return Damaged(f"the index {path}", Damage(path.name, str(problem), REMEDY))


# ── shards ────────────────────────────────────────────────────────────────────────────────────────
def shard_texts(entries: Iterable[Entry]) -> bytes:
    """Return the JSON lines of some items. Check sums always have eight digits, so that the lines
    have the same length before and after the numbers are known."""
    lines = []
    for entry in entries:
        row = {"crc": f"{entry.crc:08x}", "caption": entry.caption} | written_crcs(entry)
        lines.append(dump_json(row | entry.sections()) + "\n")
    return "".join(lines).encode()


def shard_header(entries: list[Entry]) -> bytes:
    """Return the part of a shard before its numbers. ValueError for an item with the id that the
    format reserves."""
    rows, end = {}, 0
    for entry in entries:
        if entry.id == "__metadata__":
            raise ValueError(
                "id '__metadata__' has a meaning of its own in safetensors files; give that item"
                " another id"
            )
        begin, end = end, end + 2 * math.prod(entry.shape)
        rows[entry.id] = {"dtype": "F16", "shape": entry.shape, "data_offsets": [begin, end]}
    text_bytes = len(shard_texts(entries))
    rows[".texts"] = {"dtype": "U8", "shape": [text_bytes], "data_offsets": [end, end + text_bytes]}
    head = dump_json(rows).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def read_shard(path: Path) -> list[Entry]:
    """Return the entries of a shard, in its order, without reading the numbers. Damaged if it is
    torn, or was not made by this module."""
    try:
        if path.suffix == ".tar":
            return read_tar_shard(path)
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
        entries, place = [], 0
        for (id, tensor), text in zip(header.items(), texts, strict=True):
            row, shape = json.loads(text), tensor["shape"]
            num_bytes = 2 * math.prod(shape)
            wanted = ["F16", 4, [place, place + num_bytes]]
            if [tensor["dtype"], len(shape), tensor["data_offsets"]] != wanted or num_bytes < 2:
                raise ValueError(
                    f"item {id!r} is not a float16 tensor of four axes behind the one before it"
                )
            crcs = read_crcs(row)
            if len(crcs) not in (0, shape[0] - 1):
                raise ValueError(f"item {id!r} has {len(crcs)} check sums of frames")
            crc, offset = int(row["crc"], 16), start + place
            sections = row.get("facts") or {}, row.get("source") or {}
            entries.append(
                Entry(id, path.name, shape, row["caption"], size, offset, crc, crcs, *sections)
            )
            place += num_bytes
        if place != begin:
            raise ValueError("its items do not fill it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged_shard(path, str(error)) from None
    return entries


# ── the index ─────────────────────────────────────────────────────────────────────────────────────
def index_of(shards: Iterable[list[Entry]]) -> dict[str, Tensor]:
    """Return the columns of these shards (each from `read_shard`) in the form of the index."""
    shapes, places, files = array("q"), array("q"), array("q")
    crcs, crc_ends, rates = array("I"), array("q", [0]), set()
    blobs = {name: bytearray() for name in TEXTS}
    ends = {name: array("q", [0]) for name in TEXTS}
    for number, entries in enumerate(shards):
        for entry in entries:
            shapes.extend(entry.shape)
            places.extend((entry.bytes, entry.offset, entry.crc))
            files.append(number)
            crcs.extend(entry.frame_crcs)
            crc_ends.append(len(crcs))
            if entry.fps is not None:
                rates.add(entry.fps)
            facts, source = (dump_json(row) if row else "" for row in (entry.facts, entry.source))
            texts = (entry.id, entry.caption, facts, source)
            for name, text in zip(TEXTS, texts, strict=True):
                blobs[name] += text.encode()
                ends[name].append(len(blobs[name]))

    def tensor(values: array | bytearray, dtype: type) -> Tensor:
        return torch.from_numpy(np.frombuffer(values, dtype).copy())

    columns = {
        "shapes": tensor(shapes, np.int64).view(-1, 4),
        "places": tensor(places, np.int64).view(-1, 3),
        "files": tensor(files, np.int64),
        "marks": tensor(crcs, np.int32),  # the bits of uint32
        "marks.ends": tensor(crc_ends, np.int64),
        "rates": torch.tensor(sorted(rates), dtype=torch.float64),
    }
    for name in TEXTS:
        columns[name] = tensor(blobs[name], np.uint8)
        columns[f"{name}.ends"] = tensor(ends[name], np.int64)
    return columns


def write_index(folder: Path, columns: dict[str, Tensor]) -> None:
    """Write what `index_of` returns."""
    write_atomically(folder / INDEX, save(columns), flush=True)


def read_index(folder: Path) -> dict[str, Tensor]:
    """Return the index as it is stored, mapped into memory, after checking that its numbers stay
    within their files. ValueError if packing was not finished, or the index is damaged."""
    path = folder / INDEX
    if not path.exists():
        raise ValueError(
            f"the packed cache {folder} has no index ({INDEX}): packing was not finished; run "
            "mmdit pack-cache again, it goes on from there"
        )
    try:
        with open_regular(path), safe_open(path, "pt") as stored:
            columns = {name: stored.get_tensor(name) for name in list(stored.keys())}
        # an older version stored no check sums of frames
        columns.setdefault("marks", torch.empty(0, dtype=torch.int32))
        columns.setdefault("marks.ends", torch.zeros(len(columns["files"]) + 1, dtype=torch.int64))
        _check_index(columns)
    except (SafetensorError, OSError, KeyError, RuntimeError, ValueError, IndexError) as error:
        raise _damaged_index(path, error) from None
    return columns


def _check_index(columns: dict[str, Tensor]) -> None:
    """Raise ValueError unless the columns have one length, places lie within files, and texts
    within their blobs."""
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
    for name in (*TEXTS, "marks"):
        ends = columns[f"{name}.ends"]
        whole = len(ends) == count + 1 and ends[0] == 0 and ends[-1] == len(columns[name])
        if not whole or ends.diff().lt(0).any():
            raise ValueError(f"the {name} do not fill their column")
    frames = columns["marks.ends"].diff() + 1
    if columns["marks"].dtype != torch.int32 or ((frames != 1) & (frames != shapes[:, 0])).any():
        raise ValueError("the marks are not one for each frame")


def packed_columns(folder: Path) -> Columns:
    """Open the index and check the size of every shard, but read none of them. ValueError names the
    index or the shard that is missing, damaged or changed."""
    columns, path = read_index(folder), folder / INDEX
    files, places = columns["files"], columns["places"]
    suffix = next((path.suffix for path in shards_of(folder)), ".safetensors")
    firsts = torch.nonzero(files.diff(prepend=files[:1] - 1)).flatten()
    for number, size in zip(files[firsts].tolist(), places[firsts, 0].tolist(), strict=True):
        shard = folder / shard_name(number, suffix)
        actual = shard.stat().st_size if shard.exists() else None
        if actual != size:
            state = "it is missing" if actual is None else f"it has {actual} bytes"
            raise damaged_shard(shard, f"{state}, the index {path} says {size}")

    def lazy(read, name: str) -> Lazy:
        return Lazy(len(files), partial(read, path, columns[name], columns[f"{name}.ends"]))

    crcs, ends = columns["marks"].numpy().view(np.uint32), columns["marks.ends"].numpy()
    return Columns(
        ids=lazy(_text, "ids"),
        captions=lazy(_text, "captions"),
        facts=lazy(_value, "facts"),
        sources=lazy(_value, "sources"),
        files=Lazy(len(files), partial(_file, files, suffix)),
        shapes=columns["shapes"],
        places=places,
        rates=set(columns["rates"].tolist()),
        frame_crcs=Lazy(len(files), partial(cut_part, crcs, ends)),
    )


def _file(files: Tensor, suffix: str, index: int) -> str:
    return shard_name(int(files[index]), suffix)


def _text(path: Path, blob: Tensor, ends: Tensor, index: int) -> str:
    try:
        return cut_part(blob, ends, index).numpy().tobytes().decode()
    except ValueError as error:
        problem = f"a text of item {index} cannot be read ({error})"
        raise _damaged_index(path, problem) from None


def _value(path: Path, blob: Tensor, ends: Tensor, index: int) -> dict:
    text = _text(path, blob, ends, index)
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        problem = f"the facts or source of item {index} are no JSON object"
        raise _damaged_index(path, problem)
    return value
