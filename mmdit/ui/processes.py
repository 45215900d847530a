"""Identify a process by its number and its start time: numbers are reused, but never with the same
start time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path


def start_of(pid: int) -> str | None:
    """Return when a process started, in the format of the system; None if there is no such process,
    or it has ended and its parent has not yet collected its status."""
    try:
        # the name, in parentheses, may contain spaces and parentheses
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        if os.path.isdir("/proc/self"):
            return None
    done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    return done.stdout.strip() or None


def identity(pid: int) -> list:
    """Return `[number, start]` for a process."""
    return [pid, start_of(pid)]


def is_identity(value: object) -> bool:
    """Return whether a value from a file has the form that `identity` returns."""
    pair = value if isinstance(value, list) and len(value) == 2 else [None, None]
    return type(pair[0]) is int and isinstance(pair[1], str | None)


def is_alive(process: list | None) -> bool:
    """Return whether the process with this identity is running."""
    return bool(process) and process[1] is not None and start_of(process[0]) == process[1]


def terminate(process: list, is_launcher: bool = False) -> None:
    """Send SIGTERM to a process, if it is still the same one. A launcher would leave the processes
    that it started running for 30 seconds, so these get the signal instead."""
    if not is_alive(process):
        return
    started = children_of(process[0]) if is_launcher else []
    for pid in started or [process[0]]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def children_of(pid: int) -> list[int]:
    """Return the numbers of the processes that a process has started; none if there is no `ps`."""
    try:
        done = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
    except OSError:
        return []
    pairs = [line.split() for line in done.stdout.splitlines()]
    return [int(child) for child, parent in pairs if int(parent) == pid]
