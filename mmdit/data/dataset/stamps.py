"""Which file is which: by what a cached item knows whether its source is still the one that it was
made from.

A stamp is `{"place", "stat", "content"}`, hashes of the source's path; of its files' names, sizes
and times; and of all their bytes. Place and stat are compared at each start, which opens no file.
Only where they differ are the bytes read: a source that was copied, moved or touched is the same
one, and gets a new stamp; any other is encoded anew.

Older caches hold less: the bytes of a picture or video file, the number of a folder's pictures.
That is compared as it was.
"""

from __future__ import annotations

import hashlib
import os
import stat
from typing import Literal

from mmdit.data.dataset.frames import SUFFIXES

State = Literal["same", "renewed", "older", "changed", "gone", "missing"]
PIECE = 1 << 20  # bytes read at once


def _hash(*texts: str | bytes) -> str:
    parts = [
        text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text for text in texts
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _files(path: str) -> list[tuple[str, os.stat_result]]:
    """(name, what the file system knows of it), of a file itself or of a folder's pictures.
    OSError: it is gone."""
    found = os.stat(path)
    if not stat.S_ISDIR(found.st_mode):
        return [("", found)]
    with os.scandir(path) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
    pictures = [entry for entry in shown if os.path.splitext(entry.name)[1].lower() in SUFFIXES]
    return sorted((entry.name, _known(entry)) for entry in pictures)


def _known(entry: os.DirEntry) -> os.stat_result:
    """Of a file or what a link leads to; of the link itself, where that is nothing."""
    try:
        return entry.stat()
    except FileNotFoundError:
        return entry.stat(follow_symlinks=False)


def place_of(path: str) -> str:
    return _hash(os.path.abspath(path))


def _stat_of(files: list[tuple[str, os.stat_result]], rate: str) -> str:
    lines = [
        f"{name}/{found.st_size}/{found.st_mtime_ns}/{found.st_ctime_ns}" for name, found in files
    ]
    return _hash(rate, *lines)


def _content_of(path: str, files: list[tuple[str, os.stat_result]], rate: str) -> str:
    """The names and bytes of regular files; nothing else is opened (a pipe would never end)."""
    whole = hashlib.sha256(rate.encode())
    for name, found in files:
        if not stat.S_ISREG(found.st_mode):
            continue
        whole.update(_hash(name, str(found.st_size)).encode())
        with open(os.path.join(path, name) if name else path, "rb", buffering=0) as file:
            for piece in iter(lambda: file.read(PIECE), b""):  # noqa: B023 (used before the next file)
                whole.update(piece)
    return whole.hexdigest()[:16]


def _rate_of(files: list[tuple[str, os.stat_result]], fps: float) -> str:
    """Return what the frame rate makes of a video file; nothing for pictures."""
    return f"{fps:g} fps" if fps and len(files) == 1 and not files[0][0] else ""


def stamp_of(path: str, fps: float = 0.0) -> dict:
    """The stamp of a picture, a folder of pictures or, with the `fps` asked for, a video file.
    OSError: it cannot be read."""
    files = _files(path)
    rate = _rate_of(files, fps)
    return {
        "place": place_of(path),
        "stat": _stat_of(files, rate),
        "content": _content_of(path, files, rate),
    }


def compare_stamp(
    path: str, stored: dict | int | str | None, fps: float = 0.0
) -> tuple[State, dict | None]:
    """Whether the source at `path` is the one that was `stored`, and its new stamp, if it needs
    one: "same"; "renewed" (other place or times, the same bytes); "older" (the same as far as an
    older stamp can tell); "changed"; "gone" (no file is there, but one was); "missing" (no file is
    there, nor was)."""
    try:
        files = _files(path)
    except OSError:
        elsewhere = isinstance(stored, dict) and stored.get("place") != place_of(path)
        return ("missing" if elsewhere else "gone"), None
    rate = _rate_of(files, fps)
    if not isinstance(stored, dict):
        return (
            ("older", stamp_of(path, fps))
            if stored is not None and stored == _older(path, files, fps)
            else ("changed", None)
        )
    quick = {"place": place_of(path), "stat": _stat_of(files, rate)}
    if quick.items() <= stored.items():
        return "same", None
    try:
        content = _content_of(path, files, rate)
    except OSError:
        return "changed", None  # whoever decodes it will say why
    return (
        ("renewed", quick | {"content": content})
        if content == stored.get("content")
        else ("changed", None)
    )


def _older(path: str, files: list[tuple[str, os.stat_result]], fps: float) -> int | str:
    """The stamp that older versions stored."""
    if os.path.isdir(path):
        return len(files)
    return f"{files[0][1].st_size} bytes at {fps:g} fps" if fps else files[0][1].st_size
