"""The signals that ask a process to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def hang_ups() -> list[int]:
    """Return a list of SIGHUP, the signal that a closed terminal sends; an empty list on systems
    without it, or where it is ignored, as under nohup."""
    hang_up = getattr(signal, "SIGHUP", None)  # not on Windows
    return [hang_up] if hang_up and signal.getsignal(hang_up) is not signal.SIG_IGN else []


@contextmanager
def handling(handler: Callable, *numbers: int) -> Iterator[None]:
    """Call `handler` for these signals while the block runs. In other threads than the main one
    this does nothing: Python delivers signals to the main thread only."""
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
    """Raise KeyboardInterrupt for SIGTERM and SIGHUP, too, while the block runs."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    with handling(interrupt, signal.SIGTERM, *hang_ups()):
        yield
