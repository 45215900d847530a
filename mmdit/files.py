"""Files and folders that are there whole or not at all: written aside, renamed, never through a
link. And locks.

What is being written has a hidden name of its own, `.writing-<token>.tmp`, beside the final one.
Its writer holds a lock on it, so that `clean` knows what a killed process has left from what
another process is writing just now, on this machine or another.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import stat
import time
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

try:
    import fcntl
except ImportError:  # Windows: no locks, and nothing else depends on them
    fcntl = None  # type: ignore[assignment]

ASIDE = ".writing-*.tmp"
DAY = 24 * 3600.0  # where a file system knows no locks, what is older was left by a killed process
KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
Pieces = str | bytes | memoryview | Iterator[bytes | memoryview]


def write_atomically(path: str | Path, data: Pieces, flush: bool = False) -> None:
    """Write all of `data`, perhaps in pieces, to `path`, or nothing; text as UTF-8. See
    `open_atomically`."""
    if isinstance(data, str):
        data = data.encode()
    with open_atomically(path, flush) as file:
        for piece in (data,) if isinstance(data, bytes | memoryview) else data:
            file.write(piece)


@contextlib.contextmanager
def open_atomically(path: str | Path, flush: bool = False) -> Iterator[IO[bytes]]:
    """Open a hidden neighbour of `path` for writing and rename it when the block ends; after an
    error it is removed, and what stood at `path` stays. `flush`: it survives a power cut. A link at
    `path` is replaced, what it leads to is not touched. ValueError: a device, a pipe or a folder is
    there. An OSError of a write names `path`."""
    if not may_replace(path):
        raise ValueError(
            f"{path} is no regular file, and is not replaced by one; choose another name"
        )
    name, file = "", None
    try:
        name, file = _open_temporary(os.path.dirname(path) or ".")
        yield file
        file.flush()
        if flush:
            os.fsync(file.fileno())
        os.close(os.dup(file.fileno()))  # a network file system tells of a full disk only now
        os.replace(name, path)
        name = ""
    except OSError as error:
        ours = error.filename is None or ".writing-" in str(error.filename)
        if ours and error.errno is not None:
            raise OSError(
                error.errno, error.strerror, str(path)
            ) from None  # the name that a person knows
        raise
    finally:
        if name:
            with contextlib.suppress(OSError):
                os.unlink(name)
        if file is not None:
            _unlock(file)
            with contextlib.suppress(OSError):  # of bytes that could not be written: told above
                file.close()
    if flush:
        flush_to_disk(os.path.dirname(path) or ".")


class Sum:
    """The size and the CRC-32 of bytes that pass by."""

    def __init__(self):
        self.size, self.crc = 0, 0

    def add(self, piece: bytes | memoryview) -> bytes | memoryview:
        """Take in a piece, and return it."""
        self.size += memoryview(piece).nbytes
        self.crc = zlib.crc32(piece, self.crc)
        return piece

    def as_json(self) -> list[int]:
        """Return `[bytes, CRC-32]`, as JSON files keep it."""
        return [self.size, self.crc]

    @staticmethod
    def of_file(path: str | Path) -> Sum:
        """Read a file once; OSError if it cannot be read."""
        result = Sum()
        with open(path, "rb") as file:
            while piece := file.read(1 << 22):
                result.add(piece)
        return result


def may_replace(path: str | Path) -> bool:
    """Return whether nothing or a regular file is at `path`, perhaps by a link."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True


def _open_temporary(folder: str) -> tuple[str, IO[bytes]]:
    while True:
        name = f"{folder}/.writing-{secrets.token_hex(8)}.tmp"
        file = open(name, "xb")
        _wait_for_lock(file)
        if os.fstat(file.fileno()).st_nlink:
            return name, file
        # between making and locking it was taken for left behind and removed: once more
        file.close()


@contextlib.contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Make a hidden folder beside `path` to write into, and rename it when the block ends; after an
    error it is removed. OSError if `path` is there then and is no empty folder."""
    path = Path(path)
    aside = path.with_name(f".writing-{secrets.token_hex(8)}.tmp")
    aside.mkdir(parents=True)
    held = os.open(aside, os.O_RDONLY) if fcntl else None
    try:
        if held is not None:
            _wait_for_lock(held)
        yield aside
        os.replace(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    finally:
        if held is not None:
            os.close(held)


def abandoned_files(folder: str | Path) -> Iterator[Path]:
    """Yield what killed processes left in `folder`, files and folders, each while nobody can write
    to it."""
    for path in sorted(Path(folder).glob(ASIDE)):
        if path.is_symlink() or fcntl is None:
            yield path
            continue
        mode = (
            os.O_RDONLY if path.is_dir() else os.O_RDWR
        )  # locks of network file systems want both
        try:
            held = os.open(path, mode | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue  # it has got its final name meanwhile, or is not ours
        try:
            if _is_left(held):
                yield path
        finally:
            os.close(held)


def _is_left(held: int) -> bool:
    """Lock an open file or folder; whether nobody else holds it."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return time.time() - os.fstat(held).st_mtime > DAY
    return True


def clean(*folders: str | Path) -> None:
    """Remove what killed processes left in these folders."""
    for folder in folders:
        for path in abandoned_files(folder):
            remove(path)


def remove(path: str | Path) -> None:
    """Remove a file, a link or a folder with all that is in it; it may be gone already."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        os.unlink(path)


def flush_to_disk(path: str | Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_file_system(folder: str | Path) -> None:
    """Make all that was written to the file system of `folder` survive a power cut: thousands of
    files at once, at the cost of a few."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None).syncfs(handle) == 0:
            return
    except (AttributeError, OSError, TypeError):
        pass  # no such function on this system
    finally:
        os.close(handle)
    if hasattr(os, "sync"):
        os.sync()


def refuse_link(path: Path) -> Path:
    """Return `path`, which may not be there yet. ValueError if it is a link, by which one would
    write elsewhere."""
    if path.is_symlink():
        raise ValueError(
            f"{path} is a link, and would be written elsewhere: replace it by what it leads to, or"
            " remove it"
        )
    return path


def lock(file: IO, refusal: str = "") -> None:
    """Hold `file` until it is closed; ValueError(`refusal`) if another process does. A forked
    worker lets go of it: one that outlives its killed parent by seconds must not keep the next run
    away."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        told = (
            refusal
            or f"another process is writing to {file.name}; wait for it, or use another folder"
        )
        raise ValueError(told) from None
    except OSError:
        return  # a file system without locks
    known = weakref.ref(file)

    def let_go() -> None:
        held = known()
        if held is not None and not held.closed:
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, held.fileno(), inheritable=False)
            os.close(nothing)

    os.register_at_fork(after_in_child=let_go)


def _wait_for_lock(file: IO | int) -> None:
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)


def _unlock(file: IO) -> None:
    """Let go of a file for all that hold it: a process forked meanwhile has it open, too."""
    if fcntl is not None:
        with contextlib.suppress(OSError, ValueError):
            fcntl.flock(file, fcntl.LOCK_UN)


# ── reading what others wrote ─────────────────────────────────────────────────────────────────────
def open_regular(path: str | Path, buffering: int = -1) -> BinaryIO:
    """Open a regular file of others for reading. ValueError if something else is there, OSError if
    it cannot be opened: a named pipe among pictures would be waited for without end, a device read
    without end."""
    _check_regular(os.stat(path))  # before it is opened: opening a device may already do something
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_regular(os.fstat(handle))  # it may have been exchanged meanwhile
        return os.fdopen(handle, "rb", buffering)
    except BaseException:
        os.close(handle)
        raise


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise ValueError(f"not a regular file: it is {kind}")
