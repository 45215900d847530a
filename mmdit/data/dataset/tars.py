"""WebDataset tars: find the pictures or clips in them, and the texts that belong to each.

    0001.jpg + 0001.txt, pets/0002.png + pets/0002.json, 0003.mp4 + 0003.txt

The part of a file's name before its first dot is the key; files with the same key belong together,
in whatever order they come. Headers and captions are read here, but no bytes of pictures; nothing
is ever unpacked to disk. Tars may come from strangers: links, devices and names that lead out of
the tar are refused, the size of headers is limited, and damage is reported with its place.
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import FileIO

from mmdit.config import holds_half_a_pair
from mmdit.data.dataset.members import Archive, Sample, TarMember, Unreadable
from mmdit.data.dataset.pictures import SUFFIXES
from mmdit.data.dataset.problems import Unusable
from mmdit.data.dataset.records import (
    MAX_LINE_BYTES,
    Media,
    captions_of,
    decoded_object,
    text_captions,
)
from mmdit.data.dataset.videos import VIDEO_SUFFIXES

BLOCK = 512
END = bytes(BLOCK)
MAX_HEADER = 1 << 20  # bytes of a long name, or of the data of an extended header
MAX_TEXT = 1 << 20  # bytes of a caption; for JSON, the limit of a line of metadata applies
PREFERRED = ("jpg", "jpeg", "png", "webp", "mp4")  # if a key has several pictures or clips, by rank
CAPTION_KEYS = ("caption", "captions", "text", "prompt")
BOTH = ("caption", "captions")  # an item may have both of these
LONG_NAME, EXTENDED, GLOBAL = tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE
ABOUT_NEXT = (LONG_NAME, tarfile.GNUTYPE_LONGLINK, EXTENDED, tarfile.SOLARIS_XHDTYPE, GLOBAL)
TYPES = {
    tarfile.LNKTYPE: "a link",
    tarfile.SYMTYPE: "a link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
}
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
}


TEXTS = {"txt", "json"}


class BrokenTar(Unusable):
    """Raised for a tar whose end is missing or cannot be read."""


# ── the files in a tar ────────────────────────────────────────────────────────────────────────────
@dataclass(slots=True)
class TarEntry:
    """A file in a tar: `size` bytes from `offset` on. `error`: why it is not read, or None."""

    name: str
    offset: int = 0
    size: int = 0
    error: Unusable | None = None


def tar_entries(archive: Archive) -> Iterator[TarEntry]:
    """Yield every file in a tar, in order, reading headers alone. If the tar is damaged, the last
    entry has a `BrokenTar` as its error, under the name of the file that is cut off or a made-up
    one. Folders are left out. OSError if the tar cannot be read."""
    with archive.open_binary() as file:
        try:
            yield from _entries(archive, file)
        except (tarfile.HeaderError, ValueError) as error:
            place = f"{error} at byte {file.tell()} of {archive.size}"
            problem = BrokenTar("damaged tar", f"{place}; what is behind it is lost: get it again")
            yield TarEntry(_end_of(archive), error=problem)


def _entries(archive: Archive, file: FileIO) -> Iterator[TarEntry]:
    place = 0
    about: dict[str, str] = {}  # what earlier headers state about the next file
    while True:
        file.seek(place)
        block = file.read(BLOCK)
        if block == END:
            return
        if not block and place:
            problem = BrokenTar("a tar without an end mark", "perhaps it was cut off: get it again")
            yield TarEntry(_end_of(archive), error=problem)
            return
        if not place:
            _check_beginning(block)
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        size = int(about.get("size", info.size))
        if size < 0:
            raise ValueError(f"a file of {size} bytes")
        start = place + BLOCK
        holds_bytes = info.type not in TYPES and not info.isdir()
        place = start + (-(-size // BLOCK) * BLOCK if holds_bytes else 0)
        if info.type in ABOUT_NEXT:
            if size > MAX_HEADER:
                raise ValueError(f"a header of {size} bytes, more than {MAX_HEADER},")
            if info.type != GLOBAL:
                about |= _said(info.type, file.read(size))
            continue
        name = about.get("path", info.name).removeprefix("./")
        sparse = info.type == tarfile.GNUTYPE_SPARSE or "GNU.sparse.major" in about
        about = {}
        if info.isdir():
            continue
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise ValueError(f"the sparse file {_shown(name)} (make the tar without --sparse)")
        entry = TarEntry(_shown(name), start, size, _refusal(name, info.type, sparse))
        if holds_bytes and start + size > archive.size:
            detail = f"it ends within {entry.name}, at byte {archive.size}: get it again"
            entry.error = BrokenTar("truncated tar", detail)
            yield entry
            return
        yield entry


def _check_beginning(block: bytes) -> None:
    """Raise ValueError if the first bytes show that it is not a tar."""
    if len(block) < BLOCK:
        raise ValueError("no tar: it is too short")
    for start, name in COMPRESSED.items():
        if block.startswith(start):
            raise ValueError(
                f"no tar: it is compressed by {name}, in which no picture can be reached alone"
                " (unpack it to .tar; pictures are compressed already)"
            )


def _end_of(archive: Archive) -> str:
    """Return a name for the missing end of a tar."""
    return archive.stem.replace(".", "_") + "-end"


def _said(header_type: bytes, data: bytes) -> dict[str, str]:
    """Return what a header states about the file behind it: its `path`, its `size`."""
    if header_type == LONG_NAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    values = {}
    while header_type == EXTENDED and data.strip(b"\0"):
        length = data.partition(b" ")[0]
        record, data = data[: int(length)], data[int(length) :]
        name, equals, value = record[len(length) + 1 : -1].partition(b"=")
        if not equals or int(length) != len(record):
            raise ValueError("a header that cannot be read")
        values[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
    return values


def _shown(name: str) -> str:
    """Return a name with characters replaced that cannot be written or printed."""
    return re.sub("[\0-\x1f\x7f\ud800-\udfff]", "\ufffd", name)


def _refusal(name: str, entry_type: bytes, sparse: bool) -> Unusable | None:
    """Return why an entry of a tar is not read, or None if it is."""
    if name.startswith("/") or ".." in name.split("/"):
        return Unusable("a name that leads out of the tar", _shown(name))
    if holds_half_a_pair(name):
        return Unusable("a name that is not UTF-8", _shown(name))
    if entry_type in TYPES:
        return Unusable(
            "no file", f"{_shown(name)} is {TYPES[entry_type]} in the tar; only files are read"
        )
    if sparse:
        return Unusable("a sparse file", f"{_shown(name)}; make the tar without --sparse")
    return None


# ── the samples ───────────────────────────────────────────────────────────────────────────────────
@dataclass(slots=True)
class _Group:
    """The files with one key, by extension in lower case."""

    key: str
    entries: dict[str, TarEntry] = field(default_factory=dict)


def tar_samples(archive: Archive, media: Media, caption_key: str = "") -> Iterator[Sample]:
    """Yield the pictures or clips in a tar, in order. The caption is in a `.txt` file, else in the
    `.json` under a usual key; with `caption_key`, it is in the `.json` under that key. Samples that
    cannot be used are yielded as `Unreadable`. Keys that have only media of the other kind are left
    out. OSError if the tar cannot be read."""
    groups, broken = _groups(archive)
    described = any(TEXTS & group.entries.keys() for group in groups)
    with archive.open_binary() as file:
        for group in groups:
            last = group in groups[-2:]
            if broken and (described or last) and not TEXTS & group.entries.keys():
                problem = BrokenTar("its caption may lie behind the damage of its tar", group.key)
                group.entries["txt"] = TarEntry(group.key, error=problem)
            sample = _sample(archive, file, group, media, caption_key)
            if sample is not None:
                yield sample


def _groups(archive: Archive) -> tuple[list[_Group], bool]:
    """Return the files in a tar grouped by key, and whether its end is missing."""
    groups: dict[str, _Group] = {}
    broken = False
    for entry in tar_entries(archive):
        folder, slash, base = entry.name.rpartition("/")
        stem, _, extension = base.partition(".")
        if base.startswith(".") and entry.error is None:
            continue
        group = groups.setdefault(folder + slash + stem, _Group(folder + slash + stem))
        extension = extension.lower()
        if extension in group.entries and entry.error is None:
            entry.error = Unusable("twice in one tar", f"{entry.name}; give each its name")
        group.entries[extension] = entry
        broken |= isinstance(entry.error, BrokenTar)
    return list(groups.values()), broken


def _sample(
    archive: Archive, file: FileIO, group: _Group, media: Media, caption_key: str
) -> Sample | None:
    """Return the sample of a key; None if it has none of this kind of media."""
    entries = group.entries
    member = next(iter(entries.values())).name
    try:
        for extension, entry in entries.items():
            if entry.error is not None and extension.rpartition(".")[2] != "cls":
                raise entry.error
        extension = _media_extension(group, media)
        if not extension:
            return None
        entry = entries[extension]
        member = entry.name
        if not entry.size:
            raise Unusable("an empty file", member)
        captions, facts = _texts(file, entries, extension, caption_key)
    except Unusable as error:
        return Sample(group.key, Unreadable(archive, member, error))
    place = TarMember(archive, member, entry.offset, entry.size)
    return Sample(group.key, place, tuple(captions), facts)


def _media_extension(group: _Group, media: Media) -> str:
    """Return the extension of the picture or clip of a key; "" if it only has media of the other
    kind. Unusable if there is none, or if it is not clear which one it is."""
    suffixes, others = SUFFIXES, VIDEO_SUFFIXES
    if media == "video":
        suffixes, others = others, suffixes
    ends = {name: "." + name.rpartition(".")[2] for name in group.entries}
    usable = [name for name, end in ends.items() if end in suffixes]
    simple = [name for name in usable if "." not in name]
    for name in (*PREFERRED, *sorted(simple)):
        if name in simple:
            return name
    if len(usable) == 1:
        return usable[0]
    if usable:
        detail = f"{', '.join(usable)}: what is before the first dot of a name is the key; rename"
        raise Unusable("several pictures or clips of one key", detail)
    if any(end in others for end in ends.values()):
        return ""
    raise Unusable("a key without a picture or clip", f"{group.key} has {', '.join(ends)}")


def _texts(
    file: FileIO, entries: dict[str, TarEntry], extension: str, caption_key: str
) -> tuple[list[str], dict]:
    """Return captions and facts of a sample. Unusable if they cannot be read, or if it is not clear
    which text is the caption."""
    before = extension.rpartition(".")[0]
    texts: dict[str, TarEntry] = {}
    for name in ("txt", "json"):
        alike = [other for other in entries if other.rpartition(".")[2] == name]
        only = alike if len(alike) == 1 else []
        for candidate in (name, f"{before}.{name}", *only):
            if candidate in entries:
                texts[name] = entries[candidate]
        if name == "txt" and alike and not texts and not caption_key:
            detail = f"{', '.join(alike)}: name the one that is the caption .txt alone"
            raise Unusable("several texts of one key", detail)
    row, captions = {}, [""]
    try:
        if "json" in texts:
            row = decoded_object(_read(file, texts["json"], MAX_LINE_BYTES))
        key = caption_key or next((name for name in CAPTION_KEYS if name in row), "")
        if "txt" in texts and not caption_key:
            captions = text_captions(_read(file, texts["txt"], MAX_TEXT)) or [""]
            key = ""
        elif caption_key and caption_key not in row:
            keys = ", ".join(row) or "none"
            raise ValueError(f'has no "{caption_key}" in its .json (keys there: {keys})')
        elif key:
            captions = captions_under(row, key)
    except ValueError as error:
        raise Unusable("its caption cannot be read", str(error)) from None
    used = (*BOTH, key)
    facts = {name: value for name, value in row.items() if name not in used}
    facts |= {"captions": captions} if len(captions) > 1 else {}
    return captions, facts


def captions_under(row: dict, key: str) -> list[str]:
    """Return the captions under a key of a row: a text, a list of texts, or nothing; for `caption`
    and `captions` those of both keys. ValueError if the value is something else."""
    captions: list[str] = []
    for name in BOTH if key in BOTH else (key,):
        value = row.get(name)
        if value is not None and value != []:
            form = "captions" if isinstance(value, list) else "caption"
            captions += captions_of({form: value})
    return list(dict.fromkeys(captions)) or [""]


def _read(file: FileIO, entry: TarEntry, limit: int) -> bytes:
    if entry.size > limit:
        raise ValueError(f"{entry.name} has {entry.size} bytes; at most {limit} are read")
    file.seek(entry.offset)
    return file.read(entry.size)


def other_contents(archive: Archive) -> str:
    """Return a text for people that counts the files in a tar by extension."""
    names = (entry.name.rpartition("/")[2] for entry in tar_entries(archive))
    counts = Counter("." + name.partition(".")[2] for name in names)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(5)) or "nothing"
