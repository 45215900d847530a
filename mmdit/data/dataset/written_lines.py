"""Metadata lines that a command writes repeatedly, and that people may edit in between."""

from __future__ import annotations

import contextlib
import datetime
import zlib
from pathlib import Path

from mmdit.files import read_bytes, write_atomically


def write_lines(path: Path, text: str) -> str:
    """Write the lines of a JSONL file. If the existing lines were edited since they were last
    written, they are kept in a file beside it. Return a sentence about that, or "" if nobody
    changed them."""
    note, before, noted, message = path.with_name(f".{path.name}.crc32"), b"", "", ""
    with contextlib.suppress(FileNotFoundError):
        before = read_bytes(path)
        noted = read_bytes(note).decode(errors="replace")
    if before not in (b"", text.encode()) and noted != _sum(before):
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        kept = path.with_name(f"{path.stem}.before-{stamp}{path.suffix}")
        write_atomically(kept, before)
        message = (
            f"{path} was changed since it was written, and is written anew; what was there is kept"
            f" as {kept.name}: take over from it what is missing"
        )
    write_atomically(path, text)
    write_atomically(note, _sum(text.encode()))
    return message


def _sum(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"
