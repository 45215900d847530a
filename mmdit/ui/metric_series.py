"""Curves of runs: metrics.jsonl is read once, then only the lines that were appended; what is sent
to a browser has a limited number of points."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

from mmdit.diagnostics.curves import is_main, number_of, panels_of, thinned
from mmdit.files import open_regular

TAIL = 1 << 14  # bytes at the end of a file in which its last record is searched first
NO_CURVES = {"step", "timestamp", "images_seen", "wall_s", "eta_seconds"}


@dataclass
class Series:
    """The content of one file that was read: steps and values by name."""

    offset: int = 0  # bytes of complete lines that were read
    last: bytes = b""  # the last of these lines
    columns: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)

    def add(self, line: bytes) -> None:
        """Add the record in a line. A line without one is ignored, as a run that was killed can
        leave."""
        record = record_of(line)
        for name, value in record.items():
            number = None if isinstance(value, bool) else number_of(value)
            if name not in NO_CURVES and number is not None:
                steps, values = self.columns.setdefault(name, ([], []))
                steps.append(float(record["step"]))
                values.append(float(number))


def record_of(line: bytes) -> dict:
    """Return the record in a line; an empty dictionary if there is none that has a step."""
    try:
        record = json.loads(line)
        return {} if number_of(record["step"]) is None else record
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def last_record(run: Path) -> dict:
    """Return the newest complete record of a run; an empty dictionary if there is none. Only the
    end of the file is read, and more if that holds no record: a list of runs asks for all of
    them."""
    part = TAIL
    try:
        with open_regular(run / "metrics.jsonl") as file:
            size = os.fstat(file.fileno()).st_size
            while True:
                first = max(0, size - part)
                file.seek(first)
                # the last line is still being written, and the first may be incomplete
                lines = file.read(size - first).split(b"\n")[1 if first else 0 : -1]
                record = next(filter(None, map(record_of, reversed(lines))), {})
                if record or not first:
                    return record
                part *= 8
    except (OSError, ValueError):
        return {}


class MetricStore:
    """The series of all runs that were asked for; several threads may use it."""

    def __init__(self):
        self.lock = threading.RLock()
        self.series: dict[Path, Series] = {}

    def panels(self, runs: list[Path]) -> list[dict]:
        """Return the `curves` of runs. A lock keeps other threads from reading on meanwhile, which
        could give a curve a step without its value."""
        with self.lock:
            return curves([self.read(run) for run in runs])

    def read(self, run: Path) -> Series:
        """Return the series of a run folder, including lines that were appended since the last
        call. A file that was rewritten, as by a resume, is read from the beginning. It is
        recognised by the last line that was read, because it may have the inode number of the old
        file."""
        path = run / "metrics.jsonl"
        with self.lock:
            series = self.series.setdefault(path, Series())
            try:
                with open_regular(path) as file:
                    file.seek(series.offset - len(series.last))
                    if file.read(len(series.last)) != series.last:
                        series = self.series[path] = Series()
                        file.seek(0)
                    for line in file:
                        if not line.endswith(b"\n"):
                            break  # it is still being written
                        series.add(line)
                        series.offset, series.last = series.offset + len(line), line
            except (OSError, ValueError):
                return Series()
            return series


def curves(series: list[Series]) -> list[dict]:
    """Return the panels that have values: for each a title, whether it is a main one, and its
    curves, each with the number of its run, its name, `x` and `y`."""
    known = {name for one in series for name in one.columns}
    result = []
    for title, names in panels_of(known).items():
        drawn = []
        for number, one in enumerate(series):
            for name in names:
                if name in one.columns:
                    steps, values = thinned(*one.columns[name])
                    drawn.append({"run": number, "name": name, "x": steps, "y": values})
        result.append({"title": title, "main": is_main(title), "curves": drawn})
    return result
