"""Work that may be stopped at any time: SIGTERM and a closed terminal do what Ctrl-C does."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block for SIGTERM and SIGHUP, too; not in other threads than
    the main one, to which no signal comes."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    wanted = [signal.SIGTERM]
    hang_up = getattr(signal, "SIGHUP", None)  # not on Windows
    if hang_up and signal.getsignal(hang_up) is not signal.SIG_IGN:  # ignored: by nohup
        wanted.append(hang_up)
    try:
        previous = {number: signal.signal(number, interrupt) for number in wanted}
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
