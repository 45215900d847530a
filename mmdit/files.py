"""Files and folders that are there whole or not at all, never written through a link; and locks.

What is being written has a hidden name, `.writing-<token>.tmp`, beside the final one, and is
renamed at the end. Its writer holds a lock on it. By that lock `clean` tells what a killed process
has left from what another process is writing just now, on this machine or another.
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
PIECE = 1 << 22  # bytes that are read at once
LOCK = ".lock"  # in a folder that belongs to one process at a time
DAY = 24 * 3600.0  # where a file system knows no locks, what is older was left by a killed process
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
    """Write all of `data`, perhaps in pieces, to `path`, or nothing. Text is written as UTF-8. See
    `open_atomically`."""
    if isinstance(data, str):
        data = data.encode()
    with open_atomically(path, flush) as file:
        for piece in (data,) if isinstance(data, bytes | memoryview) else data:
            file.write(piece)


@contextlib.contextmanager
def open_atomically(path: str | Path, flush: bool = False) -> Iterator[IO[bytes]]:
    """Open a hidden neighbour of `path` for writing, and rename it when the block ends. After an
    error it is removed, and what stood at `path` stays. With `flush` the file survives a power cut.
    A link at `path` is replaced; what it leads to is not touched. ValueError: a device, a pipe or a
    folder is there. An OSError of a write names `path`."""
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
            with contextlib.suppress(OSError):  # of bytes that could not be written: said above
                file.close()
    if flush:
        flush_to_disk(os.path.dirname(path) or ".")


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give an OSError of a write the name that a person knows, where it has none or a hidden one:
    "No space left on device" alone does not say where."""
    try:
        yield
    except OSError as error:
        ours = error.filename is None or ".writing-" in str(error.filename)
        if ours and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


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
        # it was taken for abandoned before it was locked, and removed: once more
        file.close()


@contextlib.contextmanager
def hidden_folder(parent: str | Path) -> Iterator[Path]:
    """Make a hidden folder in `parent` to write into, which is removed when the block ends, unless
    it has got another name by then."""
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
    """Make a hidden folder beside `path` to write into, and rename it when the block ends. After an
    error it is removed. OSError: by then `path` is something else than an empty folder."""
    with hidden_folder(Path(path).parent) as unfinished:
        yield unfinished
        os.replace(unfinished, path)


def refuse_filled_folder(path: str | Path) -> None:
    """Raise ValueError if something is at `path` that a new folder would replace."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is there already; choose another place")


def abandoned_files(folder: str | Path) -> Iterator[Path]:
    """Yield what killed processes left in `folder`, files and folders, each while nobody can write
    to it."""
    for path in sorted(Path(folder).glob(UNFINISHED)):
        if path.is_symlink() or fcntl is None:
            yield path
            continue
        # locks of network file systems want a file that is open for writing, too
        mode = os.O_RDONLY if path.is_dir() else os.O_RDWR
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
    """Lock an open file or folder; return whether nobody else holds it."""
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
    """Return whether an error says that no more can be written: the disk or a quota is full, or the
    file system can only be read. What goes on would lose its work."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


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
    write elsewhere, or a pipe and the like."""
    if path.is_symlink():
        raise ValueError(
            f"{path} is a link, and would be written elsewhere: replace it by what it leads to, or"
            " remove it"
        )
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is no regular file, and is not written to; remove it")
    return path


def lock(file: IO, refusal: str = "") -> None:
    """Hold `file` until it is closed. ValueError(`refusal`): another process holds it. A forked
    worker lets go of it, for one that outlives its killed parent by seconds must not keep the next
    run away."""
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
    """Hold a folder as `take_folder` does until the block ends, and remove it if nothing came to be
    in it."""
    held = take_folder(folder, refusal)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # perhaps the folder was removed meanwhile
            os.unlink(folder / LOCK)
            folder.rmdir()  # only if nothing else is in it
        held.close()


def take_folder(folder: Path, refusal: str) -> IO:
    """Hold a folder, which is made, until what this returns is closed. ValueError: another process
    holds it (`refusal`), nothing can be written there, or there is a link by the name of the
    lock."""
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
    """Let go of a file for every process that holds it: one forked meanwhile has it open, too."""
    if fcntl is not None:
        with contextlib.suppress(OSError, ValueError):
            fcntl.flock(file, fcntl.LOCK_UN)


def with_tilde(value: Any) -> Any:
    """Return a path, or lists of paths and options, with `~` for the home folder: what is handed on
    need not tell who wrote it. Other values stay as they are."""
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
    """Return a path with `~` as the home folder. `~name` of a user whom this machine does not know
    stays: it may be the name of a file."""
    return Path(os.path.expanduser(path))


def real_path(path: str | Path) -> Path:
    """Return where a path leads. A ring of links leads to itself, and nothing can be opened
    there."""
    return Path(os.path.realpath(path))


# ── reading what others wrote ─────────────────────────────────────────────────────────────────────
def open_regular(path: str | Path, buffered: bool = True) -> io.BufferedReader | io.FileIO:
    """Open a regular file for reading. ValueError: something else is there. A named pipe among
    pictures would be waited for without end, a device read without end."""
    _check_regular(os.stat(path))  # before it is opened: opening a device may already do something
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_regular(os.fstat(handle))  # it may have been exchanged meanwhile
        file = io.FileIO(handle)
        return io.BufferedReader(file) if buffered else file
    except BaseException:
        os.close(handle)
        raise


@contextlib.contextmanager
def regular_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a regular file as `open_regular` does. OSError, with its name, where something else is
    there, too."""
    try:
        file = open_regular(path)
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    with file:
        yield file


def read_bytes(path: str | Path) -> bytes:
    """Return what a regular file holds; see `regular_file`."""
    with regular_file(path) as file:
        return file.read()


def read_text(path: str | Path, errors: str = "strict") -> str:
    """Return the text, in UTF-8, of a regular file; see `regular_file`."""
    return read_bytes(path).decode("utf-8", errors)


def lines_of(text: str) -> list[str]:
    """Return the lines of a text as an editor shows them. `str.splitlines` also cuts at form feeds
    and at the separators of Unicode, which may stand in a caption and within JSON."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def read_object(path: str | Path) -> dict:
    """Return the JSON object in a file; nothing where there is none that can be read."""
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def objects_in(text: str) -> Iterator[dict]:
    """Yield the JSON objects in the lines of a text. A line without one, such as one torn by a
    kill, is left out."""
    for line in lines_of(text):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def hashed(digest: Any, file: IO[bytes]) -> Any:
    """Give a hash of hashlib an open file, to its end; return it."""
    while piece := file.read(PIECE):
        digest.update(piece)
    return digest


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        file_type = FILE_TYPES.get(stat.S_IFMT(status.st_mode), "something else")
        raise ValueError(f"not a regular file: it is {file_type}")
