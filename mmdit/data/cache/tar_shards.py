"""Shards of a packed cache as WebDataset tars, which the public library reads like any other.

    <key>.latents.npy    float16 (F, H, W, C), raw
    <key>.txt            the caption
    <key>.json           {"id": …, "crc": …, "marks"?: …, "facts"?: …, "source"?: …}
    <key>.text.npy       the embedding of the caption (tokens, dim), if asked for; of further
                         captions .text1.npy …

A key is an id in which dots are written as `%2E`, because a dot in a name begins its extension.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmdit.data.cache.items import Entry, dump_json, read_crcs, written_crcs
from mmdit.data.dataset.captions import all_captions
from mmdit.data.dataset.members import Archive
from mmdit.data.dataset.problems import Damage, Damaged
from mmdit.data.dataset.tars import BLOCK, TarEntry, tar_entries
from mmdit.files import open_regular

TEXT_ENCODER = "text_encoder.json"  # which one made the embeddings in the tars of its folder


@dataclass(frozen=True)
class Embeddings:
    """The embeddings that are stored with the captions. `key` changes with the encoder's weights,
    `settings` with its config ("" if it has none); `rows(captions)` returns one tensor `(tokens,
    dim)` of the type `dtype` on the CPU for each caption."""

    key: str
    dtype: str
    rows: Callable[[list[str]], list[Tensor]]
    settings: str = ""

    def to_json(self) -> dict[str, str]:
        """Return the JSON that is written beside the tars."""
        return {"key": self.key, "dtype": self.dtype, "settings": self.settings}


# ── writing ───────────────────────────────────────────────────────────────────────────────────────
def tar_item(
    entry: Entry, latents: np.ndarray, embeddings: Embeddings | None
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of one item of a tar, in a few pieces for each of its files."""
    key = entry.id.replace("%", "%25").replace(".", "%2E")
    head, numbers = _npy(latents)
    row = {"id": entry.id, "crc": f"{entry.crc:08x}"} | written_crcs(entry)
    yield from _file(f"{key}.latents.npy", head, numbers)
    yield from _file(f"{key}.txt", entry.caption.encode())
    yield from _file(f"{key}.json", dump_json(row | entry.sections()).encode())
    if embeddings is None:
        return
    captions = all_captions(entry.caption, entry.facts)
    for number, text in enumerate(embeddings.rows(captions)):
        embedding = stored_form(text).contiguous().numpy()
        yield from _file(f"{key}.text{number or ''}.npy", *_npy(embedding))


def stored_form(text: Tensor) -> Tensor:
    """Return an embedding in the form that a tar stores: numpy has no bfloat16, and float32 holds
    it exactly."""
    return text.float() if text.dtype == torch.bfloat16 else text


def tar_end() -> bytes:
    """Return the bytes that end a tar."""
    return bytes(2 * BLOCK)


def _npy(array: np.ndarray) -> tuple[bytes, memoryview]:
    """Return the head of a `.npy` file and its numbers."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
    return head.getvalue(), array.reshape(-1).view(np.uint8).data


def _file(name: str, *pieces: bytes | memoryview) -> Iterator[bytes | memoryview]:
    info = tarfile.TarInfo(name)
    info.size = sum(len(piece) for piece in pieces)
    yield info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")
    yield from pieces
    yield bytes(-info.size % BLOCK)


# ── reading ───────────────────────────────────────────────────────────────────────────────────────
def read_tar_shard(path: Path) -> list[Entry]:
    """Return the entries of a tar, in its order, without reading the numbers. OSError, ValueError,
    KeyError, TypeError or AttributeError if it is torn, or was not made by this module."""
    archive = Archive.of(path)
    with archive.open_binary() as file:
        return [_entry(archive, file, files) for files in _items(archive)]


def _entry(archive: Archive, file: io.FileIO, files: dict[str, TarEntry]) -> Entry:
    """Return the entry of an item. Errors as in `read_tar_shard`."""
    latents = files["latents.npy"]
    file.seek(latents.offset)
    shape, offset = _npy_head(file)
    row = json.loads(_read(file, files["json"]))
    crcs = read_crcs(row)
    num_bytes = offset - latents.offset + 2 * math.prod(shape)
    if num_bytes != latents.size or len(crcs) not in (0, shape[0] - 1):
        raise ValueError(f"item {row['id']!r} contradicts itself")
    caption = _read(file, files["txt"]).decode()
    sections = row.get("facts") or {}, row.get("source") or {}
    place = archive.size, offset, int(row["crc"], 16)
    return Entry(row["id"], Path(archive.path).name, shape, caption, *place, crcs, *sections)


def _items(archive: Archive) -> Iterator[dict[str, TarEntry]]:
    """Yield the files of each item, by extension."""
    key = ""
    files: dict[str, TarEntry] = {}
    for entry in tar_entries(archive):
        if entry.error is not None:
            raise entry.error
        name, _, extension = entry.name.partition(".")
        if name != key and files:
            yield files
            files = {}
        key = name
        files[extension] = entry
    if files:
        yield files


def _npy_head(file: io.FileIO) -> tuple[list[int], int]:
    """Return the shape of the float16 array in a `.npy` file, and the position of its numbers."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("its latents are no .npy file of version 1.0")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.float16 or by_columns or len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"its latents are {dtype} of shape {shape}, not float16 of four axes")
    return list(shape), file.tell()


def _read(file: io.FileIO, entry: TarEntry) -> bytes:
    file.seek(entry.offset)
    return file.read(entry.size)


def noted_text_encoder(folder: Path) -> dict[str, str] | None:
    """Return what `Embeddings.to_json` noted in a folder (earlier versions noted no settings); None
    if its tars hold no embeddings."""
    try:
        with open_regular(folder / TEXT_ENCODER) as file:
            row = json.loads(file.read())
        noted = {"key": row["key"], "dtype": row["dtype"]}
        return noted | ({"settings": row["settings"]} if "settings" in row else {})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = Damage(TEXT_ENCODER, str(error), "pack the cache again into a new folder")
        raise Damaged(f"{folder / TEXT_ENCODER}", problem) from None


def stored_embeddings(path: Path, dtype: str) -> Iterator[tuple[str, Tensor]]:
    """Yield (caption, embedding) for all captions of a tar; embeddings have the type `dtype`, in
    which the encoder made them. Damaged if the tar cannot be read."""
    archive = Archive.of(path)
    try:
        with archive.open_binary() as file:
            for files in _items(archive):
                entry = _entry(archive, file, files)
                captions = all_captions(entry.caption, entry.facts)
                for number, caption in enumerate(captions):
                    data = io.BytesIO(_read(file, files[f"text{number or ''}.npy"]))
                    array = np.lib.format.read_array(data, allow_pickle=False)
                    yield caption, torch.from_numpy(array).to(getattr(torch, dtype))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = Damage(path.name, str(error), "pack the cache again")
        raise Damaged(f"shard {path}", problem) from None
