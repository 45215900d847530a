"""A process is known by its number and its start: numbers are given again, both together never."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path


def start_of(pid: int) -> str | None:
    """Return when a process started, in a form of the system; None if there is none, or if it has
    ended and nobody has asked how."""
    try:
        # the name, in parentheses, may hold blanks and parentheses
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        if os.path.isdir("/proc/self"):
            return None
    done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    return done.stdout.strip() or None


def identity(pid: int) -> list:
    """Return `[number, start]` of a process."""
    return [pid, start_of(pid)]


def is_alive(process: list | None) -> bool:
    """Return whether the process with this identity runs."""
    return bool(process) and process[1] is not None and start_of(process[0]) == process[1]


def terminate(process: list) -> None:
    """Send SIGTERM to a process, if it is still the one that is meant."""
    if is_alive(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process[0], signal.SIGTERM)
