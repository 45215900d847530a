"""Read files that other people and other programs wrote: within bounds, and with one sentence of
error, whatever is wrong with them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from mmdit.terminal import shown

HEAD = 512  # bytes that show what lies in place of a file
MOST_BYTES = 64 << 20  # the index of a model of a thousand shards has 5 MB


def stand_in(head: bytes) -> str:
    """Return what a clone or a failed download has left in place of a file, and what to do about
    it, judged by the file's first bytes; "" if it is neither a web page nor a pointer of Git
    LFS."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "it is a web page, which a failed download leaves; get the file again"
    if text.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; get the file itself with git lfs pull"
    return ""


def refuse_stand_in(path: str | Path) -> None:
    """Raise ValueError if `path` holds a `stand_in` instead of the file itself."""
    what = ""
    with contextlib.suppress(OSError), Path(path).open("rb") as file:  # the reader will report that
        what = stand_in(file.read(HEAD))
    if what:
        raise ValueError(f"{path} is not the file itself: {what}")


@contextlib.contextmanager
def explain_errors(path: str | Path, what: str) -> Iterator[None]:
    """Turn whatever the reader of a foreign format raises into a ValueError that names `path` and
    `what` it should be: these formats, and the libraries that read them, fail in dozens of ways."""
    try:
        yield
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise  # it is one sentence already
        reason = shown(f"{type(error).__name__}: {error}".partition("\n")[0][:500])
        raise ValueError(
            f"{path} is no {what}, or is damaged ({reason}); fetch it again, or name another file"
        ) from error


def read_json(path: str | Path, what: str, most_bytes: int = MOST_BYTES) -> dict:
    """Return the JSON object in `path`. ValueError, naming the file, if it cannot be read, is
    larger than `most_bytes`, is nested too deeply, or holds anything but an object. `what` says in
    messages what the file should be."""
    path = Path(path)
    with explain_errors(path, what):
        size = path.stat().st_size
        if size > most_bytes:
            raise ValueError(f"{path} has {size} bytes, too many for {what}; at most {most_bytes}")
        refuse_stand_in(path)
        content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, must be {what}: an object of keys"
        )
    return content


def count_blocks(numbers: set[int], tensors: int, source: object) -> int:
    """Return how many blocks a network has, from the block `numbers` in the names of its tensors.
    ValueError if that is more than its `tensors`, as with one absurd name."""
    blocks = max(numbers) + 1
    if blocks > tensors:
        raise ValueError(f"{source} names block {blocks - 1}, but holds {tensors} tensors in all")
    return blocks
