"""Metadata: one JSON object a line. Images `{"id", "image_path", "caption"}`, clips `{"id", "frames_dir", "caption"}` or, for a
video file, `{"id", "video_path", "caption"}` (with both, the folder of frames is used).

Paths are relative to the file's own folder. `"captions": […]` gives several captions, beside or instead of `caption`; training
draws one each time. Further keys are kept as facts about the item. An empty caption is allowed: such an item trains the
unconditional case. What is wrong is reported with file and line, ten at once, before any work.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmdit.config import shortened

Kind = Literal["image", "video"]
PATH_KEYS: dict[str, tuple[str, ...]] = {"image": ("image_path",), "video": ("frames_dir", "video_path")}
WHAT = {"image_path": "an image", "frames_dir": "a folder", "video_path": "a video file"}
MAX_ID_BYTES = 240  # a file name holds 255 bytes on common file systems, and ours adds a suffix


@dataclass(frozen=True, slots=True)
class Record:
    """One image file, one folder of frames or one video file."""

    id: str
    path: str
    caption: str
    facts: dict = field(default_factory=dict)


def check_id(id: object) -> str:
    """The id, fit to be a file name as it is, so that different ids never meet in one file; else ValueError with the reason.
    Any script is fine (`猫`); separators, `..` and control characters are not."""
    if not isinstance(id, str):
        raise ValueError(f'id is {id!r}; must be text (write "{id}")')
    problem = (
        "is empty" if not id.strip()
        else "contains a path separator" if "/" in id or "\\" in id
        else "starts with a dot (such file names are reserved)" if id.startswith(".")
        else "contains a control character" if any(ord(letter) < 32 or ord(letter) == 127 for letter in id)
        else "contains half a surrogate pair" if any(0xD800 <= ord(letter) < 0xE000 for letter in id)
        else f"is longer than {MAX_ID_BYTES} bytes" if len(id.encode()) > MAX_ID_BYTES
        else ""
    )  # fmt: skip
    if problem:
        raise ValueError(f"id {id[:80]!r} {problem}; ids become file names: use letters of any script, digits, '_' or '-'")
    return id


def _parse(line: str, kind: Kind, folder: Path, prefer: str) -> Record:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError('is not an object like {"id": …, "caption": …}')
    wanted = next((name for name in (prefer, *PATH_KEYS[kind]) if name in row), PATH_KEYS[kind][0])
    other = next((name for name in PATH_KEYS["video" if kind == "image" else "image"] if name in row), "")
    for name in ("id", wanted, "caption"):
        if name not in row and not (name == "caption" and "captions" in row):
            hint = f' (it has "{other}": cache it with the other script)' if name == wanted and other else ""
            raise ValueError(f'has no "{name}"{hint}; keys here: {", ".join(map(str, row)) or "none"}')
    check_id(row["id"])
    captions = _captions(row)
    if not isinstance(row[wanted], str):
        raise ValueError(f'"{wanted}" is {row[wanted]!r}; must be text in quotes')
    if not row[wanted] or "\0" in row[wanted]:
        raise ValueError(f'"{wanted}" is {row[wanted]!r}; must be the path of {WHAT[wanted]}')
    facts = {name: value for name, value in row.items() if name not in ("id", wanted, "caption", "captions")}
    facts |= {"captions": captions} if len(captions) > 1 else {}
    return Record(row["id"], str(folder / row[wanted]), captions[0], facts)


def _captions(row: dict) -> list[str]:
    """All different captions of a line, that of `caption` first; at least one, perhaps empty."""
    if not isinstance(row.get("caption", ""), str):
        raise ValueError(f'"caption" is {row["caption"]!r}; must be text in quotes (several: "captions": ["…", "…"])')
    several = row.get("captions", [])
    if not isinstance(several, list) or not all(isinstance(caption, str) for caption in several):
        raise ValueError(f'"captions" is {several!r}; must be a list of texts')
    own = [row["caption"]] if "caption" in row else []
    return list(dict.fromkeys(caption.strip() for caption in own + several)) or [""]


def read_records(path: str | Path, kind: Kind, prefer: str = "") -> list[Record]:
    """All records of a JSONL file, in its order; `prefer`: the path key to use where a line has both. ValueError lists wrong
    lines as `file:line: what`."""
    path = Path(path)
    records, errors, lines = [], [], {}
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = _parse(line, kind, path.parent, prefer)
                    first = lines.setdefault(record.id, number)
                    if first != number:
                        raise ValueError(f"id {record.id!r} was already used in line {first}; every id must be used once")
                    records.append(record)
                except ValueError as error:
                    errors.append(f"{path}:{number}: {shortened(str(error), 600)}")
                    if len(errors) == 10:
                        errors.append("… and perhaps more; reading stopped at the tenth")
                        break
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error}); save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"cannot read the metadata {path}: {error.strerror or error}") from None
    if errors:
        raise ValueError("\n".join(errors))
    if not records:
        raise ValueError(f'{path}: holds no record; write lines as {{"id": …, "{PATH_KEYS[kind][0]}": …, "caption": …}}')
    return records
