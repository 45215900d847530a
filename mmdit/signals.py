"""The signals that ask a process to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def hang_ups() -> list[int]:
    """Return SIGHUP, which a closed terminal sends; nothing where there is none, or where it is
    ignored, as nohup asks."""
    hang_up = getattr(signal, "SIGHUP", None)  # not on Windows
    return [hang_up] if hang_up and signal.getsignal(hang_up) is not signal.SIG_IGN else []


@contextmanager
def handling(handler: Callable, *numbers: int) -> Iterator[None]:
    """Have `handler` called for these signals in the block; not in other threads than the main one,
    to which no signal comes."""
    try:
        previous = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block for SIGTERM and SIGHUP, too."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    with handling(interrupt, signal.SIGTERM, *hang_ups()):
        yield
