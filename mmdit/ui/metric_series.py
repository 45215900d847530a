"""Curves of runs: metrics.jsonl is read once, then only what was appended; what is sent to a
browser has a bounded number of points."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

from mmdit.diagnostics.curves import is_main, number_of, panels_of, thinned
from mmdit.files import open_regular

TAIL = 1 << 14  # bytes in which the last record is looked for
NO_CURVES = {"step", "timestamp", "images_seen", "wall_s", "eta_seconds"}


@dataclass
class Series:
    """What has been read of one file: by name the steps and the values."""

    offset: int = 0  # bytes of whole lines that were read
    last: bytes = b""  # the last of them
    columns: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)

    def add(self, line: bytes) -> None:
        """Take in a record; a line that is none is left out, as in a run that was killed."""
        record = record_of(line)
        for name, value in record.items():
            number = None if isinstance(value, bool) else number_of(value)
            if name not in NO_CURVES and number is not None:
                steps, values = self.columns.setdefault(name, ([], []))
                steps.append(float(record["step"]))
                values.append(float(number))


def record_of(line: bytes) -> dict:
    """Return the record in a line, or nothing where it holds none with a step."""
    try:
        record = json.loads(line)
        return {} if number_of(record["step"]) is None else record
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def last_record(run: Path) -> dict:
    """Return the newest whole record of a run, or nothing. The end of the file is read, and more
    only where no record is in it: a list of runs asks for all of them."""
    part = TAIL
    try:
        with open_regular(run / "metrics.jsonl") as file:
            size = os.fstat(file.fileno()).st_size
            while True:
                first = max(0, size - part)
                file.seek(first)
                # of the lines the last is being written, and the first may have begun before
                lines = file.read(size - first).split(b"\n")[1 if first else 0 : -1]
                record = next(filter(None, map(record_of, reversed(lines))), {})
                if record or not first:
                    return record
                part *= 8
    except (OSError, ValueError):
        return {}


class MetricStore:
    """The series of every run that was asked for; safe to ask from several threads."""

    def __init__(self):
        self.lock = threading.RLock()
        self.series: dict[Path, Series] = {}

    def panels(self, runs: list[Path]) -> list[dict]:
        """Return the `curves` of runs. No other thread reads on meanwhile, which would give a curve
        a step without its value."""
        with self.lock:
            return curves([self.read(run) for run in runs])

    def read(self, run: Path) -> Series:
        """Return the series of a run folder, with what was appended since the last call. A file
        that was written anew, as a resume does, is read anew: it is known by the last line that was
        read, for it may have got the number (inode) of an earlier one."""
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
                            break  # it is being written
                        series.add(line)
                        series.offset, series.last = series.offset + len(line), line
            except (OSError, ValueError):
                return Series()
            return series


def curves(series: list[Series]) -> list[dict]:
    """Return the panels that have values: a title, whether it is a main one, and the curves, each
    with the number of its run, its name, `x` and `y`."""
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
