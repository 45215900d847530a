"""Metadata: one JSON object a line. Images are `{"id", "image_path", "caption"}`, clips `{"id",
"frames_dir", "caption"}` or, for a video file, `{"id", "video_path", "caption"}` (if both are
given, the folder of frames is used). Beside `video_path`, `"video_span": [first, end]` selects
frames of a long video: those from number `first` up to, but not including, number `end`.

Paths are relative to the file's own folder; `~` is your home folder. `"captions": […]` gives
several captions, beside or instead of `caption`; training draws one each time. Further keys are
kept as facts about the item. An empty caption is allowed: such an item trains the unconditional
case. Mistakes are reported with file and line, up to ten at once, before any work.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from mmdit.config import holds_half_a_pair, shortened
from mmdit.data.dataset.members import Member, VideoSpan
from mmdit.files import lines_of, regular_file

Media = Literal["image", "video"]
PATH_KEYS: dict[str, tuple[str, ...]] = {
    "image": ("image_path",),
    "video": ("frames_dir", "video_path"),
}
WHAT = {"image_path": "an image", "frames_dir": "a folder", "video_path": "a video file"}
MAX_ID_BYTES = 240  # most file systems allow names of 255 bytes, and a suffix is added
MAX_LINE_BYTES = 16 << 20  # of one record
ARCHIVES = (".tar", ".parquet")  # read by `inputs`
BLANK = b" \t\r\n\xef\xbb\xbf"  # white space, and the mark that some editors write before UTF-8
UNUSUAL = re.compile(rb"\\u|\d{19}|[eE]\+?\d{3}")  # may be part of a value that cannot be stored
MAX_DEPTH = 32  # of nested lists and objects
ONE_A_LINE = 'write one object a line, like {"id": …, "caption": …}'


@dataclass(frozen=True, slots=True)
class Record:
    """One image file, one folder of frames or one video file. `member`: set if it is inside an
    archive; `span`: set if it is a range of frames of a video file."""

    id: str
    path: str
    caption: str
    facts: dict = field(default_factory=dict)
    member: Member | None = None
    span: VideoSpan | None = None

    @property
    def source(self) -> str | Member | VideoSpan:
        """Return the object to open."""
        return self.member or self.span or self.path

    @property
    def is_folder(self) -> bool:
        """Return whether it is a folder of frames."""
        return self.source is self.path and os.path.isdir(self.path)

    def loaded(self) -> Record:
        """Return the record in a form that another process can open; see `Member.loaded`."""
        if self.member is None:
            return self
        member = self.member.loaded()
        return self if member is self.member else replace(self, member=member)


def check_id(id: object) -> str:
    """Return the id if it can be a file name as it is, so that different ids never share a file.
    Any script is allowed (`猫`); separators, `..` and control characters are not. ValueError says
    what is wrong."""
    if not isinstance(id, str):
        raise ValueError(f'id is {id!r}; must be text (write "{id}")')
    codes = [ord(letter) for letter in id]
    problems = {
        "is empty": not id.strip(),
        "contains a path separator": "/" in id or "\\" in id,
        "starts with a dot (such file names are reserved)": id.startswith("."),
        "contains a control character": any(code < 32 or code == 127 for code in codes),
        "contains half a surrogate pair": holds_half_a_pair(id),
        f"is longer than {MAX_ID_BYTES} bytes": len(id.encode(errors="replace")) > MAX_ID_BYTES,
    }
    for problem, is_so in problems.items():
        if is_so:
            raise ValueError(
                f"id {id[:80]!r} {problem}; ids become file names: use letters of any script,"
                " digits, '_' or '-'"
            )
    return id


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is no JSON number; write null, or leave the key out")


def _without_repeats(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{json.dumps(repeated)[:80]} is there twice, and one would be lost")
    return row


JSON = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_without_repeats)


def check_storable(value: object, name: str, depth: int = 0) -> None:
    """Raise ValueError for decoded JSON that cannot be stored beside latents, where it is read back
    as plain data, or be written as UTF-8 JSON again. `name`: the key that holds it."""
    if isinstance(value, str):
        if holds_half_a_pair(value):
            raise ValueError(
                f"{json.dumps(name)[:80]} holds half a surrogate pair ({ascii(value[-40:])}), which"
                " is no character: the text was cut within one; remove it"
            )
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(
                f'"{name}" holds {value}, which is no JSON number; write null, or leave the key out'
            )
    elif isinstance(value, int):
        if abs(value) >= 1 << 64:
            raise ValueError(
                f'"{name}" holds a whole number of more than 64 bits; write it as text in quotes'
            )
    elif isinstance(value, dict | list | tuple):
        if depth == MAX_DEPTH:
            raise ValueError(
                f'"{name}" holds lists or objects more than {MAX_DEPTH} deep in each other; store'
                " it as text"
            )
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in parts:
            check_storable(key, name or str(key), depth + 1)
            check_storable(part, name or str(key), depth + 1)
    elif value is not None:
        raise ValueError(f'"{name}" holds a {type(value).__name__}, which is no JSON value')


def decoded_object(line: bytes) -> dict:
    """Return the JSON object on one line. ValueError says why there is none."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(
            f"has {len(line)} bytes; at most {MAX_LINE_BYTES} are read (put large values into files"
            " of their own)"
        )
    try:
        text = line.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        place = f"byte 0x{line[error.start]:02x} at place {error.start + 1}"
        raise ValueError(f"is not UTF-8 text ({place}); save the file as UTF-8") from None
    try:
        row = JSON.decode(text)
    except (ValueError, RecursionError) as error:
        hint = ""
        if text.strip() == "{":
            hint = f"; an object may not be spread over lines: {ONE_A_LINE}"
        elif "\r" in text.strip():
            hint = "; its lines end in CR alone: save the file with LF between lines"
        raise ValueError(f"is not valid JSON ({error}){hint}") from None
    if not isinstance(row, dict):
        raise ValueError(f"is not an object; {ONE_A_LINE}")
    if UNUSUAL.search(line) or line.count(b"[") + line.count(b"{") > MAX_DEPTH:
        check_storable(row, "")
    return row


def _parse(line: bytes, media: Media, folder: Path, prefer: str) -> Record:
    row = decoded_object(line)
    preferred = (prefer, *PATH_KEYS[media]) if prefer else PATH_KEYS[media]
    wanted = next((name for name in preferred if name in row), PATH_KEYS[media][0])
    for name in ("id", wanted, "caption"):
        if name in row or (name == "caption" and "captions" in row):
            continue
        hint = ""
        others = [other for other in WHAT if other not in PATH_KEYS[media] and other in row]
        if name == wanted and others:
            command = "cache-latents" if media == "image" else "cache-images"
            hint = f' (it has "{others[0]}": cache it with mmdit {command})'
        raise ValueError(f'has no "{name}"{hint}; keys here: {", ".join(row) or "none"}')
    check_id(row["id"])
    captions = captions_of(row)
    if not isinstance(row[wanted], str):
        raise ValueError(f'"{wanted}" is {row[wanted]!r}; must be text in quotes')
    if not row[wanted] or "\0" in row[wanted]:
        raise ValueError(f'"{wanted}" is {row[wanted]!r}; must be the path of {WHAT[wanted]}')
    path = str(folder / os.path.expanduser(row[wanted]))
    span = _span_of(row, wanted, path)
    used = ("id", wanted, "caption", "captions", "video_span")
    facts = {name: value for name, value in row.items() if name not in used}
    facts |= {"captions": captions} if len(captions) > 1 else {}
    return Record(row["id"], path, captions[0], facts, span=span)


def _span_of(row: dict, wanted: str, path: str) -> VideoSpan | None:
    """Return the range of frames that a line selects; None if it takes all of the video file, or is
    about a folder of frames."""
    if "video_span" not in row:
        return None
    if "video_path" not in row:
        raise ValueError(
            f'"video_span" stands beside "{wanted}", of which it would cut nothing: it names frames'
            ' of a "video_path"; leave it out'
        )
    if wanted != "video_path":
        return None
    span = row["video_span"]
    whole = isinstance(span, list) and all(type(number) is int for number in span)
    if not (whole and len(span) == 2 and 0 <= span[0] < span[1]):
        raise ValueError(
            f'"video_span" is {span!r}; must be [first, end], numbers of frames: the clip ends'
            " before the second"
        )
    return VideoSpan(path, *span)


def captions_of(row: dict) -> list[str]:
    """Return all different captions of a line, that of `caption` first; at least one, which may be
    empty."""
    if not isinstance(row.get("caption", ""), str):
        raise ValueError(
            f'"caption" is {row["caption"]!r}; must be text in quotes (several: "captions": ["…",'
            ' "…"])'
        )
    several = row.get("captions", [])
    if not isinstance(several, list) or not all(isinstance(caption, str) for caption in several):
        raise ValueError(f'"captions" is {several!r}; must be a list of texts')
    captions = [row["caption"], *several] if "caption" in row else several
    return list(dict.fromkeys(caption.strip() for caption in captions)) or [""]


def text_captions(data: bytes, per_line: bool = False) -> list[str]:
    """Return the captions in a text file: one from all of it, or one for each line. ValueError if
    it is not UTF-8."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("the caption is not UTF-8 text") from None
    lines = lines_of(text) if per_line else [text]
    captions = dict.fromkeys(" ".join(line.split()) for line in lines)
    return [caption for caption in captions if caption]


def _check_beginning(line: bytes, where: str) -> None:
    """Raise ValueError for the first line of a file that holds something other than JSON lines."""
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{where}: the file is UTF-16 text; save it as UTF-8")
    if b"\0" in line or line.startswith(b"\x89PNG"):
        raise ValueError(f"{where}: the file is no text; {ONE_A_LINE}")
    if line.strip(BLANK).startswith(b"["):
        raise ValueError(
            f"{where}: the file is a JSON array; {ONE_A_LINE}, without brackets around and commas"
            " between them"
        )


def read_records(path: str | Path, media: Media, prefer: str = "") -> list[Record]:
    """Return all records in a JSONL file, in order. `prefer`: the path key to use in lines that
    have several. ValueError lists wrong lines as `file:line: what`."""
    path = Path(path)
    records: list[Record] = []
    errors: list[str] = []
    lines: dict[str, int] = {}  # id → the line that has it
    if path.suffix in ARCHIVES:
        raise ValueError(
            f"{path} is no JSONL file, and nothing else is read here; cache-images, cache-latents"
            " and inspect-data read tars and parquet files"
        )
    for number, line in enumerate(_lines_in(path), 1):
        if not records and not errors:
            _check_beginning(line, f"{path}:{number}")
        if not line.strip(BLANK):
            continue
        try:
            record = _parse(line, media, path.parent, prefer)
            first = lines.setdefault(record.id, number)
            if first != number:
                raise ValueError(
                    f"id {record.id!r} was already used in line {first}; every id must be used once"
                )
            records.append(record)
        except ValueError as error:
            errors.append(f"{path}:{number}: {shortened(str(error), 600)}")
            if len(errors) == 10:
                errors.append("… and perhaps more; reading stopped at the tenth")
                break
    if errors:
        raise ValueError("\n".join(errors))
    if not records:
        raise ValueError(
            f'{path}: holds no record; write lines as {{"id": …, "{PATH_KEYS[media][0]}": …,'
            ' "caption": …}'
        )
    return records


def _lines_in(path: str | Path) -> Iterator[bytes]:
    """Yield the lines of a file. ValueError if it cannot be read, or is not a regular file (a pipe
    would be empty at a second look)."""
    try:
        with regular_file(path) as file:
            yield from file
    except OSError as error:
        raise ValueError(f"cannot read the metadata {path}: {error.strerror or error}") from None


def media_of(path: str | Path) -> Media:
    """Return whether the lines of a JSONL file are about images or clips, judged by the first one;
    "image" if it does not say."""
    with contextlib.suppress(ValueError):
        row = decoded_object(next((line for line in _lines_in(path) if line.strip(BLANK)), b""))
        if "image_path" not in row and any(key in row for key in PATH_KEYS["video"]):
            return "video"
    return "image"
