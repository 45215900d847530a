"""Keep what was measured of a film, in a file of its own: measuring can stop at any frame and go on
from there, and other settings for cuts need no other measurement."""

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

VERSION = "1"  # of the numbers: raised when they change
SAVE_SECONDS = 30.0  # so often what was measured is saved


@dataclass
class FilmSignals:
    """Hold the numbers of the first frames of a film, `signals (frames, len(NAMES))`; the film has
    `total` frames, and its file is known by `stamp`."""

    path: str
    file: Path  # where they are kept
    signals: np.ndarray = field(default_factory=lambda: np.zeros((0, len(NAMES)), np.float32))
    total: int = 0  # 0: not known yet
    stamp: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Return whether every frame is measured."""
        return bool(self.total) and len(self.signals) == self.total

    @property
    def damaged(self) -> int:
        """Return how many frames could not be decoded."""
        return int(np.isnan(self.signals[:, NAMES.index("bright")]).sum())

    @classmethod
    def of_film(cls, path: str, file: Path) -> tuple[FilmSignals, bool]:
        """Return what is known of the film at `path`, and whether what was known is of another one
        that stood there. FileNotFoundError: the film is not there."""
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
        """Return what a file holds; nothing where it is missing, damaged, or of another version."""
        try:
            with safe_open(file, "np") as content:
                facts, signals = content.metadata() or {}, content.get_tensor("signals")
            if facts["version"] != VERSION or signals.shape[1:] != (len(NAMES),):
                return cls(path, file)
            return cls(path, file, signals, int(facts["total"]), json.loads(facts["stamp"]))
        except (OSError, SafetensorError, KeyError, ValueError):
            return cls(path, file)

    def save(self) -> None:
        """Write what is measured; a kill leaves the old file or the new one."""
        facts = {"version": VERSION, "total": str(self.total), "stamp": json.dumps(self.stamp)}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, save({"signals": self.signals}, facts))

    def measure(self) -> Generator[float, None, None]:
        """Measure the frames that are missing; yield the share that is done. What was measured is
        saved now and then, at the end, and when the caller stops. ValueError, OSError: the film
        cannot be used."""
        if not self.stamp:
            self.stamp = stamp_of(self.path)  # before it is read: a change meanwhile is noticed
        content = probe(self.path)
        self.total = len(content.stamps)
        done = len(self.signals)
        begin = max(0, done - HISTORY)  # what the next numbers depend on
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
