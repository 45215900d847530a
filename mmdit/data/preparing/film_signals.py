"""Keep the measurements of a film in a file: measuring can stop at any frame and continue from
there, and other settings for cuts need no new measurement."""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mmdit.data.dataset.stamps import compare_stamp, stamp_of
from mmdit.data.dataset.videos import probe, thumbnails
from mmdit.data.preparing.shot_signals import HISTORY, NAMES, SIZE, ShotSignals
from mmdit.files import write_atomically

VERSION = "1"  # of the numbers; raised when they change
SAVE_SECONDS = 30.0  # between two saves of measurements


@dataclass
class FilmSignals:
    """The numbers measured for the first frames of a film, `signals (frames, len(NAMES))`. `total`:
    the number of frames of the film; `stamp`: identifies its file."""

    path: str
    file: Path  # where the measurements are kept
    signals: np.ndarray = field(default_factory=lambda: np.zeros((0, len(NAMES)), np.float32))
    total: int = 0  # 0: unknown
    stamp: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Return whether every frame is measured."""
        return bool(self.total) and len(self.signals) == self.total

    @property
    def damaged(self) -> int:
        """Return the number of frames that could not be decoded."""
        return int(np.isnan(self.signals[:, NAMES.index("bright")]).sum())

    @classmethod
    def of_film(cls, path: str, file: Path) -> tuple[FilmSignals, bool]:
        """Return the stored measurements of the film at `path`, and whether measurements of another
        film that was there before were discarded. FileNotFoundError if there is no film."""
        stored = cls._read(path, file)
        state, stamp = compare_stamp(path, stored.stamp or None)
        if state in ("gone", "missing"):
            raise FileNotFoundError(path)
        if state == "changed":
            return cls(path, file), bool(stored.stamp)
        if stamp:
            stored.stamp = stamp
            stored.save()
        return stored, False

    @classmethod
    def _read(cls, path: str, file: Path) -> FilmSignals:
        """Return the measurements in a file; empty ones if it is missing, damaged, or of another
        version."""
        try:
            with safe_open(file, "np") as content:
                facts, signals = content.metadata() or {}, content.get_tensor("signals")
            if facts["version"] != VERSION or signals.shape[1:] != (len(NAMES),):
                return cls(path, file)
            return cls(path, file, signals, int(facts["total"]), json.loads(facts["stamp"]))
        except (OSError, SafetensorError, KeyError, ValueError):
            return cls(path, file)

    def save(self) -> None:
        """Write the measurements; a kill leaves either the old file or the new one."""
        facts = {"version": VERSION, "total": str(self.total), "stamp": json.dumps(self.stamp)}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, save({"signals": self.signals}, facts))

    def measure(self) -> Generator[float, None, None]:
        """Measure the missing frames; yield the share that is done. Measurements are saved from
        time to time, at the end, and when the caller stops. ValueError or OSError if the film
        cannot be used."""
        if not self.stamp:
            self.stamp = stamp_of(self.path)  # before reading: a change meanwhile is noticed
        content = probe(self.path)
        self.total = len(content.stamps)
        done = len(self.signals)
        begin = max(0, done - HISTORY)  # frames on which the next numbers depend
        measurement, rows = ShotSignals(), list(self.signals)
        saved = time.monotonic()
        try:
            frames = thumbnails(self.path, content, SIZE, begin)
            for number, (seconds, thumbnail) in enumerate(frames, begin):
                row = measurement.add(thumbnail, seconds)
                if number < done:
                    continue
                rows.append(row)
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._keep(rows)
                    saved = time.monotonic()
                yield (number + 1) / self.total
        finally:
            self._keep(rows)

    def _keep(self, rows: list[np.ndarray]) -> None:
        if len(rows) > len(self.signals):
            self.signals = np.stack(rows)
            self.save()
