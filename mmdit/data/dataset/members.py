"""Pictures and clips inside larger files: archives (tar or parquet files) and their members, which
can be opened wherever a path can; and ranges of frames in a long video file.

An archive object records the file's state at the time when it was searched. If the file was
modified since, nothing is read from it, because the bytes of a member may be elsewhere now.
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
    """A file that holds many pictures or clips, in the state in which it was searched."""

    path: str
    size: int
    times: tuple[int, int]  # st_mtime_ns and st_ctime_ns

    @staticmethod
    def of(path: str | Path) -> Archive:
        """Return the archive for a file in its present state. OSError if it does not exist;
        ValueError if it is not a regular file, or only a placeholder for one."""
        with open_regular(path, buffered=False) as file:
            if what := stand_in(file.read(HEAD)):
                raise ValueError(what)
            return Archive(str(path), *_state(os.fstat(file.fileno())))

    @property
    def stem(self) -> str:
        """Return the file's name without folder and suffix."""
        return Path(self.path).stem

    def open_binary(self) -> io.FileIO:
        """Open the file for reading. OSError if it is gone, or was modified since it was
        searched."""
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
        """Return the member's location, for people."""
        return f"{self.archive.path}/{self.name}"

    def open_binary(self) -> BinaryIO:
        """Open the member for reading from its first byte, seekable. Unusable or OSError if that
        fails."""
        raise NotImplementedError

    @property
    def block(self) -> object:
        """Return a value that all members share which are read together; None if each is read
        alone."""
        return None

    def loaded(self) -> Member:
        """Return a member that any process can open cheaply: itself, unless its archive must be
        read in order."""
        return self


@dataclass(frozen=True, slots=True)
class TarMember(Member):
    """A file in a tar, `size` bytes from `offset` on."""

    offset: int
    size: int

    def open_binary(self) -> BinaryIO:
        """Open the member, see `Member.open_binary`."""
        part = _Part(self.archive.open_binary(), self.offset, self.size)
        return cast(BinaryIO, io.BufferedReader(part, READ_AHEAD))


@dataclass(frozen=True, slots=True)
class Unreadable(Member):
    """Stands for a member that is not read; `error` says why."""

    error: Exception

    def open_binary(self) -> BinaryIO:
        """Raise the error."""
        raise self.error


@dataclass(frozen=True, slots=True)
class Loaded(Member):
    """A member whose bytes have been read."""

    data: bytes

    def open_binary(self) -> BinaryIO:
        """Open the member, see `Member.open_binary`."""
        return io.BytesIO(self.data)


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture or clip of an archive, with the texts that belong to it. `key`: its name
    there."""

    key: str
    member: Member
    captions: tuple[str, ...] = ("",)
    facts: dict = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VideoSpan:
    """A range of frames in a video file: from number `first` up to, but not including, number
    `end`, in the order in which they are shown."""

    path: str
    first: int
    end: int


Source = str | Path | Member | VideoSpan  # every form in which a picture or video file can be given


def open_source(source: Source) -> BinaryIO:
    """Open a picture or a video file for reading, seekable. ValueError or OSError if that fails."""
    if isinstance(source, Member):
        return source.open_binary()
    if isinstance(source, VideoSpan):
        source = source.path
    return cast(BinaryIO, open_regular(source))


class _Part(io.RawIOBase):
    """A part of a file, which behaves like a file of its own."""

    def __init__(self, file: io.FileIO, offset: int, size: int):
        self.file, self.offset, self.size, self.place = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        """Fill the buffer up to the end of the part; return the number of bytes read."""
        room = memoryview(buffer).cast("B")[: max(0, self.size - self.place)]
        self.file.seek(self.offset + self.place)
        count = self.file.readinto(room) or 0
        self.place += count
        return count

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        """Move as `io.IOBase.seek` does; return the position, counted from the start of the
        part."""
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
