"""Pictures and clips inside of larger files: an archive (a tar or a parquet file), and its members,
which are opened where a path would be; and some frames of a long video file.

An archive is known as it was when it was looked through. Of one that was written to since, nothing
is read: the bytes of a member may lie elsewhere now.
"""

from __future__ import annotations

import errno
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from mmdit.files import open_regular
from mmdit.foreign import HEAD, stand_in

READ_AHEAD = 1 << 16  # bytes of a member that are read at once


@dataclass(frozen=True, slots=True)
class Archive:
    """A file that holds many pictures or clips, as it was when it was looked through."""

    path: str
    size: int
    times: tuple[int, int]  # st_mtime_ns and st_ctime_ns

    @staticmethod
    def of(path: str | Path) -> Archive:
        """Look at a file. OSError: it is not there; ValueError: it is no regular file, or stands in
        for one."""
        with open_regular(path, buffered=False) as file:
            if what := stand_in(file.read(HEAD)):
                raise ValueError(what)
            return Archive(str(path), *_state(os.fstat(file.fileno())))

    @property
    def stem(self) -> str:
        """Return the name without folder and suffix."""
        return Path(self.path).stem

    def open_binary(self) -> io.FileIO:
        """Open it for reading. OSError: it is gone, or was written to since it was looked through,
        so that nothing is known of what it holds now."""
        file = cast(io.FileIO, open_regular(self.path, buffered=False))
        if _state(os.fstat(file.fileno())) == (self.size, self.times):
            return file
        file.close()
        reason = "it was written to while it was read: run the same command again"
        raise OSError(errno.ESTALE, reason, self.path)


def _state(status: os.stat_result) -> tuple[int, tuple[int, int]]:
    return status.st_size, (status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class Member:
    """One picture or video file of an archive. `name` is unique in it."""

    archive: Archive
    name: str

    @property
    def path(self) -> str:
        """Return where it is, for people."""
        return f"{self.archive.path}/{self.name}"

    def open_binary(self) -> BinaryIO:
        """Open it for reading from its first byte, seekable. Unusable or OSError: it cannot be."""
        raise NotImplementedError

    @property
    def block(self) -> object:
        """Return what all members share that are read together; nothing if each is read alone."""
        return None

    def loaded(self) -> Member:
        """Return a member that any process can open at little cost: itself, unless its archive has
        to be read in order."""
        return self


@dataclass(frozen=True, slots=True)
class TarMember(Member):
    """A file in a tar, `size` bytes from `offset` on."""

    offset: int
    size: int

    def open_binary(self) -> BinaryIO:
        """See `Member.open`."""
        part = _Part(self.archive.open_binary(), self.offset, self.size)
        return cast(BinaryIO, io.BufferedReader(part, READ_AHEAD))


@dataclass(frozen=True, slots=True)
class Unreadable(Member):
    """Stands for a picture of an archive that is not read. `error` says why."""

    error: Exception

    def open_binary(self) -> BinaryIO:
        """Raise the error."""
        raise self.error


@dataclass(frozen=True, slots=True)
class Loaded(Member):
    """A member whose bytes were read."""

    data: bytes

    def open_binary(self) -> BinaryIO:
        """See `Member.open`."""
        return io.BytesIO(self.data)


@dataclass(frozen=True, slots=True)
class Sample:
    """Holds what an archive says of one picture or clip. `key`: its name there."""

    key: str
    member: Member
    captions: tuple[str, ...] = ("",)
    facts: dict = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VideoSpan:
    """Some frames of a video file: from number `first` up to, but not including, number `end`, in
    the order in which they are shown."""

    path: str
    first: int
    end: int


Source = str | Path | Member | VideoSpan  # of a picture or a video file


def open_source(source: Source) -> BinaryIO:
    """Open a picture or a video file for reading, seekable. ValueError or OSError: it cannot be."""
    if isinstance(source, Member):
        return source.open_binary()
    if isinstance(source, VideoSpan):
        source = source.path
    return cast(BinaryIO, open_regular(source))


class _Part(io.RawIOBase):
    """A part of a file, as a file of its own that ends where the part does."""

    def __init__(self, file: io.FileIO, offset: int, size: int):
        self.file, self.offset, self.size, self.place = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        """Fill the buffer as far as the part goes; return how many bytes were read."""
        room = memoryview(buffer).cast("B")[: max(0, self.size - self.place)]
        self.file.seek(self.offset + self.place)
        count = self.file.readinto(room) or 0
        self.place += count
        return count

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        """Move as `io.IOBase.seek` does; return the place, from the start of the part."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        if start + place < 0:
            raise ValueError(f"place {start + place} lies before the file")
        self.place = start + place
        return self.place

    def tell(self) -> int:
        return self.place

    def close(self) -> None:
        self.file.close()
        super().close()
