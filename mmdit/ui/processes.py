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


def is_identity(value: object) -> bool:
    """Return whether a value, of a file, is what `identity` returns."""
    pair = value if isinstance(value, list) and len(value) == 2 else [None, None]
    return type(pair[0]) is int and isinstance(pair[1], str | None)


def is_alive(process: list | None) -> bool:
    """Return whether the process with this identity runs."""
    return bool(process) and process[1] is not None and start_of(process[0]) == process[1]


def terminate(process: list, is_launcher: bool = False) -> None:
    """Send SIGTERM to a process, if it is still the one that is meant. In place of a launcher,
    which would leave those that it started 30 seconds, they are asked themselves."""
    if not is_alive(process):
        return
    started = children_of(process[0]) if is_launcher else []
    for pid in started or [process[0]]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def children_of(pid: int) -> list[int]:
    """Return the numbers of the processes that a process has started; none without `ps`."""
    try:
        done = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
    except OSError:
        return []
    pairs = [line.split() for line in done.stdout.splitlines()]
    return [int(child) for child, parent in pairs if int(parent) == pid]
