"""Identify source files: decide whether the source of a cached item is still the one that the item
was made from.

A stamp is `{"place", "stat", "content"}`: hashes of the source's path; of its files' names, sizes
and times; and of all their bytes. At each start, place and stat are compared, for which no file is
opened. Only where they differ are the bytes read: a source that was copied, moved or touched is
still the same, and gets a new stamp; any other is encoded anew.

For a member of an archive, `place` and `stat` use the path and times of the archive. Its content is
hashed like that of a file, so that pictures keep their identity when they are moved into a tar.

Training without a cache reads sizes and both ends of files instead, see `crc_of_ends`.

Older caches hold less: the size of a picture or video file, or the number of pictures in a folder.
Then only that is compared.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import zlib
from typing import Literal

from mmdit.data.dataset.frames import SUFFIXES, list_frames
from mmdit.data.dataset.members import Member, Source, VideoSpan, open_source
from mmdit.data.dataset.problems import Unusable
from mmdit.files import hashed

State = Literal["same", "renewed", "older", "changed", "gone", "missing"]

ENDS = 1 << 20  # bytes at each end of a file that `crc_of_ends` reads


def stamp_of(path: str | Member | VideoSpan, fps: float = 0.0) -> dict[str, str]:
    """Return the stamp of a picture, a folder of pictures or, with the wanted `fps`, a video file.
    OSError if it cannot be read."""
    return _source(path, fps).stamp()


def compare_stamp(
    path: str | Member | VideoSpan, stored: dict | int | str | None, fps: float = 0.0
) -> tuple[State, dict[str, str] | None]:
    """Compare the source at `path` with the stamp that was `stored`; return the state, and a new
    stamp if one is needed.

    "same"; "renewed": at another place or with other times, but with the same bytes; "older": the
    same, as far as an older stamp can tell; "changed"; "gone": there was a file, but there is none
    any more; "missing": there is no file, nor was one at this path."""
    try:
        source = _source(path, fps)
    except OSError:
        return ("missing" if is_elsewhere(path, stored) else "gone"), None
    if not isinstance(stored, dict):
        same = stored is not None and stored == source.older_stamp()
        return ("older", source.stamp()) if same else ("changed", None)
    if source.quick_stamp().items() <= stored.items():
        return "same", None
    try:
        stamp = source.stamp()
    except (OSError, Unusable):
        return "changed", None  # the error is reported when it is decoded
    return ("renewed", stamp) if stamp["content"] == stored.get("content") else ("changed", None)


def is_elsewhere(path: str | Member | VideoSpan, stored: object) -> bool:
    """Return whether the stamp that was `stored` is of a file at another place than `path`."""
    file = path.path if isinstance(path, Member | VideoSpan) else path
    return isinstance(stored, dict) and stored.get("place") != _place(file)


def crc_of_ends(path: str | Member | VideoSpan) -> int:
    """Return a CRC-32 that tells a picture, a folder of pictures or a video from others, wherever
    it is stored: of the size of each file and of its first and last `ENDS` bytes, and of the
    numbers of a range of frames. OSError or ValueError if it cannot be read."""
    files: list[Source] = [path]
    if isinstance(path, str) and os.path.isdir(path):
        files = [*list_frames(path)]
    total = zlib.crc32(f"{path.first} {path.end}".encode()) if isinstance(path, VideoSpan) else 0
    for name in files:
        with open_source(name) as file:
            size = file.seek(0, os.SEEK_END)
            total = zlib.crc32(f"{size}".encode(), total)
            for place in (0, max(ENDS, size - ENDS)):
                file.seek(place)
                total = zlib.crc32(file.read(ENDS), total)
    return total


def _source(path: str | Member | VideoSpan, fps: float) -> _Source | _Inside:
    if isinstance(path, VideoSpan):
        return _Frames(path, fps)
    return _Inside(path, fps) if isinstance(path, Member) else _Source(path, fps)


class _Inside:
    """A picture or a video file in an archive. The hash of its content equals that of a file with
    the same bytes; its quick stamp comes from the state of the archive."""

    def __init__(self, member: Member, fps: float):
        self.member, self.rate = member, f"{fps:g} fps" if fps else ""

    def quick_stamp(self) -> dict[str, str]:
        """Return the parts of the stamp for which no file is opened."""
        archive = self.member.archive
        state = "/".join(map(str, ("", archive.size, *archive.times)))
        return {"place": _place(self.member.path), "stat": _hash(self.rate, state)}

    def stamp(self) -> dict[str, str]:
        """Return the complete stamp."""
        digest = hashlib.sha256(self.rate.encode())
        with self.member.open_binary() as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            digest.update(_hash("", str(size)).encode())
            hashed(digest, file)
        return self.quick_stamp() | {"content": digest.hexdigest()[:16]}

    def older_stamp(self) -> None:
        """Return None: older versions read no archives."""


class _Source:
    """A picture, a video file or a folder of pictures in the file system. OSError if it is gone."""

    def __init__(self, path: str, fps: float):
        self.path, self.fps = path, fps
        status = os.stat(path)
        self.is_folder = stat.S_ISDIR(status.st_mode)
        self.files = _pictures_in(path) if self.is_folder else [("", status)]
        self.rate = f"{fps:g} fps" if fps and not self.is_folder else ""

    def quick_stamp(self) -> dict[str, str]:
        """Return the parts of the stamp for which no file is opened."""
        lines = [
            f"{name}/{status.st_size}/{status.st_mtime_ns}/{status.st_ctime_ns}"
            for name, status in self.files
        ]
        return {"place": _place(self.path), "stat": _hash(self.rate, *lines)}

    def stamp(self) -> dict[str, str]:
        """Return the complete stamp. Only regular files are opened (a pipe would never end)."""
        digest = hashlib.sha256(self.rate.encode())
        for name, status in self.files:
            if not stat.S_ISREG(status.st_mode):
                continue
            digest.update(_hash(name, str(status.st_size)).encode())
            with open(os.path.join(self.path, name) if name else self.path, "rb") as file:
                hashed(digest, file)
        return self.quick_stamp() | {"content": digest.hexdigest()[:16]}

    def older_stamp(self) -> int | str:
        """Return the stamp as older versions stored it."""
        if self.is_folder:
            return len(self.files)
        size = self.files[0][1].st_size
        return f"{size} bytes at {self.fps:g} fps" if self.fps else size


class _Frames(_Source):
    """A range of frames in a video file. It is another source if the file or the numbers change."""

    def __init__(self, span: VideoSpan, fps: float):
        super().__init__(span.path, fps)
        self.numbers = f"frames {span.first} to {span.end}"

    def quick_stamp(self) -> dict[str, str]:
        """Return the parts of the stamp for which no file is opened."""
        whole = super().quick_stamp()
        return whole | {"stat": _hash(whole["stat"], self.numbers)}

    def stamp(self) -> dict[str, str]:
        """Return the complete stamp. A file that holds many clips is read only once."""
        content = _content_of(self.path, self.fps, super().quick_stamp()["stat"])
        return self.quick_stamp() | {"content": _hash(content, self.numbers)}

    def older_stamp(self) -> str:
        """Return "", which no stored stamp equals: older versions had no such clips."""
        return ""


@functools.lru_cache(maxsize=8)
def _content_of(path: str, fps: float, state: str) -> str:
    """Return the hash of a video file's bytes; computed once for each `state` of the file."""
    return _Source(path, fps).stamp()["content"]


def _pictures_in(folder: str) -> list[tuple[str, os.stat_result]]:
    """Return the pictures in a folder by name, with the status of the file that a link leads to, or
    of the link itself if it leads nowhere."""
    pictures = []
    with os.scandir(folder) as entries:
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith(".") or suffix not in SUFFIXES:
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:
                status = entry.stat(follow_symlinks=False)
            pictures.append((entry.name, status))
    return sorted(pictures)


def _place(path: str) -> str:
    return _hash(os.path.abspath(path))


def _hash(*texts: str) -> str:
    parts = [text.encode("utf-8", "surrogateescape") for text in texts]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
