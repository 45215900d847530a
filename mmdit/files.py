"""Files and folders that are either complete or absent, and are never written through a link; and
locks.

A file that is being written has a hidden name, `.writing-<token>.tmp`, beside the final one, and is
renamed at the end. Its writer holds a lock on it, by which `clean` tells files left by a killed
process from files that another process, on this or another machine, is just writing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import json
import os
import secrets
import shutil
import stat
import time
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows: no locks, and nothing else depends on them
    fcntl = None  # type: ignore[assignment]

UNFINISHED = ".writing-*.tmp"
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
PIECE = 1 << 22  # bytes read at a time
LOCK = ".lock"  # in a folder that belongs to one process at a time
DAY = 24 * 3600.0  # on file systems without locks, older files count as left by a killed process
FILE_TYPES = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def write_atomically(
    path: str | Path,
    data: str | bytes | memoryview | Iterator[bytes | bytearray | memoryview],
    flush: bool = False,
) -> None:
    """Write all of `data`, which may come in pieces, to `path`, or nothing. Text is written as
    UTF-8. See `open_atomically`."""
    if isinstance(data, str):
        data = data.encode()
    with open_atomically(path, flush) as file:
        for piece in (data,) if isinstance(data, bytes | memoryview) else data:
            file.write(piece)


@contextlib.contextmanager
def open_atomically(path: str | Path, flush: bool = False) -> Iterator[IO[bytes]]:
    """Open a hidden file beside `path` for writing, and rename it to `path` when the block ends.
    After an error it is removed, and the file at `path` stays as it was. With `flush`, the file
    survives a power cut. A link at `path` is replaced, and its target is not touched. ValueError if
    a device, a pipe or a folder is there. An OSError of a write names `path`."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(
            f"{path} is no regular file, and is not replaced by one; choose another name"
        )
    name, file = "", None
    try:
        with naming(path):
            name, file = _open_temporary(os.path.dirname(path) or ".")
            yield file
            file.flush()
            if flush:
                os.fsync(file.fileno())
            os.close(os.dup(file.fileno()))  # a network file system reports a full disk only now
            os.replace(name, path)
            name = ""
    finally:
        if name:
            with contextlib.suppress(OSError):
                os.unlink(name)
        if file is not None:
            _unlock(file)
            with contextlib.suppress(OSError):  # of unwritten bytes; the error was raised above
                file.close()
    if flush:
        flush_to_disk(os.path.dirname(path) or ".")


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Put `path` into an OSError of a write that names no file or a hidden one: "No space left on
    device" alone does not say where."""
    try:
        yield
    except OSError as error:
        ours = error.filename is None or ".writing-" in str(error.filename)
        if ours and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


class Sum:
    """Computes the size and the CRC-32 of bytes that are added piece by piece."""

    def __init__(self):
        self.size, self.crc = 0, 0

    def add(self, piece: bytes | memoryview) -> bytes | memoryview:
        """Add a piece to the sum, and return the piece."""
        self.size += memoryview(piece).nbytes
        self.crc = zlib.crc32(piece, self.crc)
        return piece

    def as_json(self) -> list[int]:
        """Return `[bytes, CRC-32]`, the form in JSON files."""
        return [self.size, self.crc]

    @staticmethod
    def of_file(path: str | Path) -> Sum:
        """Return the sum of a file. OSError if it cannot be read."""
        result = Sum()
        with open(path, "rb") as file:
            while piece := file.read(PIECE):
                result.add(piece)
        return result


def _open_temporary(folder: str) -> tuple[str, IO[bytes]]:
    while True:
        name = f"{folder}/.writing-{secrets.token_hex(8)}.tmp"
        file = open(name, "xb")  # noqa: SIM115
        _wait_for_lock(file)
        if os.fstat(file.fileno()).st_nlink:
            return name, file
        # another process removed it as abandoned before it was locked: try again
        file.close()


@contextlib.contextmanager
def hidden_folder(parent: str | Path) -> Iterator[Path]:
    """Create a hidden folder in `parent` to write into. It is removed when the block ends, unless
    it has been renamed by then."""
    unfinished = Path(parent) / f".writing-{secrets.token_hex(8)}.tmp"
    unfinished.mkdir(parents=True)
    held = os.open(unfinished, os.O_RDONLY) if fcntl else None
    try:
        if held is not None:
            _wait_for_lock(held)
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if held is not None:
            os.close(held)


@contextlib.contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Create a hidden folder beside `path` to write into, and rename it to `path` when the block
    ends. After an error it is removed. OSError if `path` is then anything but an empty folder."""
    with hidden_folder(Path(path).parent) as unfinished:
        yield unfinished
        os.replace(unfinished, path)


def check_creatable(path: str | Path, option: str = "out") -> None:
    """Raise ValueError, before hours of work, if the file or folder `path` of this option cannot be
    created in the nearest folder above it that exists."""
    nearest = Path(path) if Path(path).is_dir() else Path(path).parent
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(
            f"--{option} {path} cannot be written: {nearest} is no folder that you may write to; "
            "choose another place"
        )


def refuse_filled_folder(path: str | Path) -> None:
    """Raise ValueError if `path` holds anything that a new folder would replace."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is there already; choose another place")


def abandoned_files(folder: str | Path) -> Iterator[Path]:
    """Yield the files and folders that killed processes left in `folder`. While one is yielded, it
    is locked, so that no process can write to it."""
    for path in sorted(Path(folder).glob(UNFINISHED)):
        if path.is_symlink() or fcntl is None:
            yield path
            continue
        # network file systems only lock files that are open for writing
        mode = os.O_RDONLY if path.is_dir() else os.O_RDWR
        try:
            held = os.open(path, mode | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue  # it has got its final name meanwhile, or belongs to another user
        try:
            if _is_left(held):
                yield path
        finally:
            os.close(held)


def _is_left(held: int) -> bool:
    """Lock an open file or folder; return whether no other process holds it."""
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


def is_full(error: object) -> bool:
    """Return whether an error says that nothing more can be written: the disk or a quota is full,
    or the file system is read-only. Continuing would lose work."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def remove(path: str | Path) -> None:
    """Remove a file, a link or a folder with its contents, if it still exists."""
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
    """Make everything written to the file system of `folder` survive a power cut: thousands of
    files at the cost of a few."""
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
    """Return `path`, which need not exist. ValueError if it is a link, through which another place
    would be written, or a pipe or the like."""
    if path.is_symlink():
        raise ValueError(
            f"{path} is a link, and would be written elsewhere: replace it by what it leads to, or"
            " remove it"
        )
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is no regular file, and is not written to; remove it")
    return path


def lock(file: IO, refusal: str = "") -> None:
    """Hold a lock on `file` until it is closed. ValueError(`refusal`) if another process holds it.
    Forked workers release the lock, because a worker that outlives its killed parent by seconds
    must not block the next run."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        default = f"another process is writing to {file.name}; wait for it, or use another folder"
        raise ValueError(refusal or default) from None
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


@contextlib.contextmanager
def held_folder(folder: Path, refusal: str) -> Iterator[None]:
    """Hold a folder, as `take_folder` does, until the block ends; remove it if it is empty then."""
    held = take_folder(folder, refusal)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may have been removed meanwhile
            os.unlink(folder / LOCK)
            folder.rmdir()  # only if nothing else is in it
        held.close()


def take_folder(folder: Path, refusal: str) -> IO:
    """Create and hold a folder until the returned file is closed. ValueError if another process
    holds it (`refusal`), if nothing can be written there, or if the name of the lock is a link."""
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = refuse_link(path).open("ab")
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            raise ValueError(
                f"nothing can be written into {folder} ({error.strerror}: {error.filename}); choose"
                " another folder"
            ) from None
        try:
            lock(file, refusal)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()  # the process that held it has just removed it


def _wait_for_lock(file: IO | int) -> None:
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)


def _unlock(file: IO) -> None:
    """Release the lock on a file for all processes that have it open, including ones forked
    meanwhile."""
    if fcntl is not None:
        with contextlib.suppress(OSError, ValueError):
            fcntl.flock(file, fcntl.LOCK_UN)


def with_tilde(value: Any) -> Any:
    """Return a path, or lists of paths and options, with `~` in place of the home folder, so that
    shared files do not reveal who wrote them. Other values stay as they are."""
    if isinstance(value, list | tuple):
        return [with_tilde(item) for item in value]
    if not isinstance(value, str):
        return value
    option, equals, path = value.rpartition("=")
    home = os.path.expanduser("~")
    if home in ("~", "/") or not (path == home or path.startswith(f"{home}/")):
        return value
    return f"{option}{equals}~{path[len(home) :]}"


def expanded(path: str | Path) -> Path:
    """Return a path with `~` expanded to the home folder. `~name` stays if this machine has no such
    user: it may be the name of a file."""
    return Path(os.path.expanduser(path))


def real_path(path: str | Path) -> Path:
    """Return the path that `path` leads to. A ring of links leads to itself, and cannot be
    opened."""
    return Path(os.path.realpath(path))


# ── reading what others wrote ─────────────────────────────────────────────────────────────────────
def open_regular(path: str | Path, buffered: bool = True) -> io.BufferedReader | io.FileIO:
    """Open a regular file for reading. ValueError for anything else: reading a named pipe among
    pictures would wait for ever, and reading a device might never end."""
    _check_regular(os.stat(path))  # before opening, which may already have an effect on a device
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_regular(os.fstat(handle))  # it may have been replaced meanwhile
        file = io.FileIO(handle)
        return io.BufferedReader(file) if buffered else file
    except BaseException:
        os.close(handle)
        raise


@contextlib.contextmanager
def regular_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a regular file as `open_regular` does, but raise an OSError with its name for anything
    else."""
    try:
        file = open_regular(path)
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    with file:
        yield file


def read_bytes(path: str | Path) -> bytes:
    """Return the bytes of a regular file; see `regular_file`."""
    with regular_file(path) as file:
        return file.read()


def read_text(path: str | Path, errors: str = "strict") -> str:
    """Return the text of a regular file in UTF-8; see `regular_file`."""
    return read_bytes(path).decode("utf-8", errors)


def lines_of(text: str) -> list[str]:
    """Return the lines of a text as an editor shows them. (`str.splitlines` also splits at form
    feeds and Unicode separators, which may occur in captions and within JSON.)"""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def read_object(path: str | Path) -> dict:
    """Return the JSON object in a file; an empty dict if there is none, or it cannot be read."""
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def objects_in(text: str) -> Iterator[dict]:
    """Yield the JSON objects on the lines of a text. Lines without one, such as a line torn by a
    kill, are left out."""
    for line in lines_of(text):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def hashed(digest: Any, file: IO[bytes]) -> Any:
    """Update a hash of hashlib with an open file up to its end; return the hash."""
    while piece := file.read(PIECE):
        digest.update(piece)
    return digest


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        file_type = FILE_TYPES.get(stat.S_IFMT(status.st_mode), "something else")
        raise ValueError(f"not a regular file: it is {file_type}")
