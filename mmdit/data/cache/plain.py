"""The plain layout of a cache, the one in which caches are made: a `.pt` file for each item, and an
index.

    <folder>/<id>.pt                   or, when bucketing is on, <folder>/<width>x<height>/<id>.pt
    <folder>/index.jsonl               a line per item; if several processes write, each has an
                                       index-<rank>.jsonl

The files are authoritative. The index only saves opening them: where it is missing, torn, or
contradicts itself, it is rebuilt from the files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from mmdit.data.cache.items import Entry, dump_json, read_entry
from mmdit.data.dataset.problems import Damaged
from mmdit.files import regular_file

_SIZE_FOLDER = re.compile(r"[1-9]\d*x[1-9]\d*")


def item_files(folder: Path) -> dict[str, str]:
    """Return the file of each id, relative to `folder`, from file names alone. ValueError if an id
    exists in two sizes."""
    files: dict[str, str] = {}
    with os.scandir(folder) as top:
        sizes = sorted(entry.name for entry in top if _SIZE_FOLDER.fullmatch(entry.name))
    for prefix in ["", *(f"{size}/" for size in sizes)]:
        for name in os.listdir(folder / prefix):
            if name.startswith(".") or not name.endswith(".pt"):
                continue
            id, file = name.removesuffix(".pt"), prefix + name
            other = files.setdefault(id, file)
            if other != file:
                raise ValueError(
                    f"id {id!r} is in the cache {folder} twice: {other} and {file}; delete the one"
                    " that the bucketing config does not give, or cache again into a new folder"
                )
    return files


def index_files(folder: Path) -> list[Path]:
    """Return the index files of a folder, in a fixed order."""
    return sorted(folder.glob("index*.jsonl"))


def entry_line(entry: Entry) -> str:
    """Return the index line for an item that was written."""
    return dump_json(entry.to_json()) + "\n"


def removal_line(id: str, file: str) -> str:
    """Return the index line for an item that was removed."""
    return dump_json({"id": id, "file": file, "removed": True}) + "\n"


def index_lines(path: Path) -> Iterator[tuple[int, str, Entry | None]]:
    """Yield (line number, id, entry) for each line of an index file. The entry is None if the item
    was removed, and the id "" as well if the line cannot be read. Empty lines, where a killed run
    was resumed, are left out."""
    with regular_file(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
                entry = None if row.get("removed") else Entry.from_json(row)
                yield number, row["id"], entry
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                yield number, "", None


@dataclass
class Entries:
    """The contents of a cache folder, from its files and indices."""

    by_id: dict[str, Entry] = field(default_factory=dict)  # of all items with a file
    rebuilt: list[Entry] = field(default_factory=list)  # those of them that were in no index
    lost: dict[str, str] = field(default_factory=dict)  # id → file in an index that does not exist
    damaged: dict[str, Damaged] = field(default_factory=dict)  # by id; these are in no index either


def read_entries(folder: Path, channels: int, forgiving: bool = False) -> Entries:
    """Read a cache folder. Damaged for an item that is in no index and cannot be read, unless
    `forgiving`."""
    files, removed = item_files(folder), set()
    result = Entries()
    disputed = set()
    for path in index_files(folder):
        entries: dict[str, Entry] = {}  # a later line of the same writer replaces an earlier one
        for _, id, entry in index_lines(path):
            if entry is None:  # removed, or torn by a kill: an existing item is read from its file
                removed.add(id)
                entries.pop(id, None)
            elif id not in files:
                result.lost[id] = entry.file
            elif files[id] == entry.file:
                entries[id] = entry
        for id, entry in entries.items():
            if result.by_id.setdefault(id, entry) != entry:
                disputed.add(id)  # two writers disagree: the file decides
    missing = [id for id in files if id not in result.by_id or id in disputed]
    for id in tqdm(missing, desc=f"indexing {folder}", unit="file", disable=len(missing) < 1000):
        try:
            result.by_id[id] = read_entry(id, files[id], folder, channels)
            result.rebuilt.append(result.by_id[id])
        except Damaged as error:
            if not forgiving:
                raise
            result.by_id.pop(id, None)
            result.damaged[id] = error
    result.lost = {id: file for id, file in sorted(result.lost.items()) if id not in removed}
    return result
