"""Print any text to any terminal, file or pipe, without letting the text control the terminal.

Names of tensors, keys of stored configs and lines of JSONL files are written by others: an escape
sequence in one of them could set the title, clear the screen or fill the clipboard. And a "→" must
not end a command whose output goes to a file in cp1252.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import sys
from collections.abc import Collection, Iterable, Iterator
from typing import TextIO

BIDIRECTIONAL = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # they reorder what is shown
SEPARATORS = "\u2028\u2029"
COMMANDS = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{BIDIRECTIONAL}{SEPARATORS}]")
MOVES = re.compile("(\n|\x1b\\[A)*")  # what tqdm writes between bars


def _escaped(match: re.Match) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def plain(text: str) -> str:
    """Return `text` with its control characters escaped, as `\\x1b` and the like; line ends and
    tabs stay."""
    return COMMANDS.sub(_escaped, text)


def shown(name: object) -> str:
    """Return a name that comes from a file so that it fits into one line of output: control
    characters are escaped, line ends and tabs included."""
    return plain(str(name)).replace("\n", "\\n").replace("\t", "\\t")


class PlainStream:
    """Wraps `stream` so that any text can be written to it: control characters, and characters that
    its encoding lacks, are escaped."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        if not MOVES.fullmatch(text):
            begins = (
                "\r" if text.startswith("\r") else ""
            )  # a progress bar overwrites the one before
            text = begins + plain(text.removeprefix("\r"))
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        try:
            return self.stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """Send all further output to the null device. Nobody reads it any more (`| head`, a
        terminal that was closed), which is no reason to end hours of work."""
        with contextlib.suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.stream.fileno())
            os.close(nothing)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)


def install() -> None:
    """Make stdout and stderr plain for the rest of the process. A standard stream that is closed is
    opened on the null device: otherwise the next file that is opened would get its number, and
    receive what libraries print there."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        place: str | int = os.devnull
        try:
            os.fstat(number)  # that number belongs to something else by now
        except OSError:
            place = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
        setattr(sys, name, open(place, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, PlainStream):
            setattr(sys, name, PlainStream(stream))


@contextlib.contextmanager
def plain_output() -> Iterator[None]:
    """Make stdout and stderr plain while the block runs, then put the former streams back."""
    before = sys.stdout, sys.stderr
    install()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def typed(name: str, argv: list[str] | None) -> str:
    """Return the command `mmdit NAME …` in a form that can be typed again; `argv` is the argument
    of `main`."""
    return shlex.join(["mmdit", name, *(sys.argv[1:] if argv is None else argv)])


def with_whole_names(words: Iterable[str], options: Collection[str]) -> list[str]:
    """Return the words of a command line in which an option that is shortened to its first letters,
    as argparse allows, has its whole name, one of `options`."""
    result = []
    for word in words:
        name, equals, value = word.partition("=")
        if re.fullmatch(r"--\w+", name) and name not in options:
            meant = [option for option in options if option.startswith(name)]
            word = f"{meant[0]}{equals}{value}" if len(meant) == 1 else word
        result.append(word)
    return result


def typed_text(words: str) -> str:
    """Return `words` of the command line as text, decoded as UTF-8 also where the locale is ASCII
    and Python kept their bytes as they were. ValueError if they are not UTF-8."""
    try:
        return os.fsencode(words).decode()
    except UnicodeError:
        raise ValueError(f"the prompt {words!r} is no text in UTF-8; write it anew") from None


def is_memory_full(error: Exception) -> bool:
    """Return whether the error says that Python or torch got no memory from the system."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator: " in str(error)


def message_of(error: Exception) -> str:
    """Return the message of an error for the user, with a remedy where one is known."""
    text = str(error)
    # an error from a data loader's process: keep its message, without the traceback
    if "Original Traceback" in text:
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    names = sys.getfilesystemencoding()
    if isinstance(error, UnicodeEncodeError) and names != "utf-8":
        text = (
            f"a name or a prompt holds letters that this locale, of {names}, does not have; set"
            " PYTHONUTF8=1, or LC_ALL=C.UTF-8"
        )
    full = is_memory_full(error)
    if full:
        text = f"the memory of this machine is full ({text.strip() or type(error).__name__})."
    # a training step, which can say more, reports its own
    if full or type(error).__name__ == "OutOfMemoryError":
        text = (
            f"{text.splitlines()[0]} Take smaller batches: train.batch_size (with"
            " train.grad_accum_steps raised the step stays the same) or --batch_size;"
            " model.checkpointing=true saves memory in training."
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = f"{text.strip()}. Free disk space, then run the same command again"
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        text = f"{text.strip()}: a file is there, where a folder is to be; choose another place"
    return text.strip()
