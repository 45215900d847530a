"""From long videos to clips: films are measured one by one and cut, and the clips are written as
lines that caching can read. No pictures are written: a clip is a file and a range of its frames.

    train_videos.jsonl ─► [frames → numbers, kept in films/] ─► cuts ─► clips → train_videos.jsonl

The lines are a function of the films and the settings. So a run can stop at any moment, and changed
settings are applied to all films in seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from mmdit.config import differences
from mmdit.data.dataset.problems import Skip, Unusable, list_skipped, skipped_lines
from mmdit.data.dataset.records import Record, check_id
from mmdit.data.dataset.sources import hashed_id
from mmdit.data.dataset.written_lines import write_lines
from mmdit.data.preparing.film_signals import FilmSignals
from mmdit.data.preparing.shots import ShotSettings, columns, cut_into_clips, duration
from mmdit.files import (
    clean,
    held_folder,
    is_full,
    read_object,
    write_atomically,
)
from mmdit.signals import interruptible

WRITE_SECONDS = 10.0  # between two writes of the lines while films are measured
NOTE = "clips.json"  # the settings with which the lines in a folder were made
REPLACED = ("frames_dir", "num_frames", "frames_fps")  # facts of a film that its clips do not share


@dataclass
class ClipReport:
    """Counts over the films of one run."""

    films: int = 0
    already: int = 0  # films measured by an earlier run
    changed_films: list[str] = field(default_factory=list)  # ids: other files than before
    changed_settings: list[str] = field(default_factory=list)
    waiting: int = 0  # films that are not measured yet
    clips: int = 0
    seconds: float = 0.0  # of all clips together
    left_out: dict[str, float] = field(default_factory=dict)  # problem → seconds
    damaged: Counter = field(default_factory=Counter)  # id of a film → frames
    skipped: list[Skip] = field(default_factory=list)
    edited: str = ""  # a sentence about lines that somebody edited
    interrupted: bool = False

    def text(self) -> str:
        """Return the report for people."""
        measured = self.films - len(self.skipped) - self.waiting
        lines = [
            f"{self.films} films: {measured} cut into {self.clips} clips of together"
            f" {_length(self.seconds)} ({self.already} were measured before),"
            f" {len(self.skipped)} skipped"
        ]
        for problem, seconds in sorted(self.left_out.items()):
            lines.append(f"  left out, {problem}: {_length(seconds)}")
        for id, count in self.damaged.most_common(5):
            lines.append(f"  {id}: {count} frames cannot be decoded, no clip holds them")
        if self.changed_settings:
            lines.append("other settings than before; films that are measured were cut anew:")
            lines += [f"  {line}" for line in self.changed_settings]
        if self.changed_films:
            lines.append(
                f"{len(self.changed_films)} films are others than before, and were measured anew,"
                f" for example {self.changed_films[0]}"
            )
        lines += skipped_lines(self.skipped)
        if not self.clips and not self.waiting:
            lines.append("no clip is left: shots may be shorter than --min_seconds, or still")
        if self.waiting:
            lines.append(f"{self.waiting} films are not measured yet")
        lines += filter(None, [self.edited])
        return "\n".join(lines)


def _length(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.1f} s"


@dataclass
class ClipPreparation:
    """Cuts the films of `records` into clips, and writes their lines to `<out_dir>/<name>`. Call
    `run()` once."""

    records: list[Record]
    out_dir: Path
    name: str
    settings: ShotSettings

    def run(self) -> ClipReport:
        """Measure and cut the films; return a report. After Ctrl-C or SIGTERM, it is a report with
        `interrupted`, and the same call continues from there. ValueError if no film could be used,
        or another process writes into the folder."""
        self.report = ClipReport(len(self.records))
        self.rows: dict[str, list[dict]] = {}  # id of a film → the lines of its clips
        refusal = f"another process is cutting films into {self.out_dir}; wait for it"
        with held_folder(self.out_dir, refusal):
            self._run()
        return self.report

    def _run(self) -> None:
        clean(self.out_dir, self.out_dir / "films")
        self._compare_settings()
        with interruptible():
            pending = self._look()
            try:
                self._measure(pending)
            except KeyboardInterrupt:
                self.report.interrupted = True
            if self.rows:  # else the lines of an earlier run stay: its films may be away for now
                self._write()
        self.report.waiting = len(self.records) - len(self.rows) - len(self.report.skipped)
        if not self.rows and not self.report.interrupted:
            examples = [f"  {skip.path}: {skip.reason}" for skip in self.report.skipped[:5]]
            raise ValueError("\n".join(["none of the films could be used:", *examples]))
        list_skipped(self.out_dir / "skipped.jsonl", self.report.skipped)

    # ── the work ──────────────────────────────────────────────────────────────────────────────────
    def _look(self) -> list[tuple[Record, FilmSignals]]:
        """Cut the films that earlier runs measured; return those that are not completely
        measured."""
        pending = []
        bar = tqdm(self.records, "looking for measured films", unit="film", delay=2)
        for record in bar:
            try:
                if record.is_folder or record.span or record.member:
                    raise Unusable("a clip already", "only whole video files are cut")
                file = self.out_dir / "films" / f"{record.id}.safetensors"
                film, changed = FilmSignals.of_film(record.path, file)
            except (OSError, ValueError) as error:
                if is_full(error):
                    raise
                self._skip(record, error)
                continue
            if changed:
                self.report.changed_films.append(record.id)
            if film.complete:
                self.report.already += 1
                self._cut(record, film)
            else:
                pending.append((record, film))
        return pending

    def _measure(self, pending: list[tuple[Record, FilmSignals]]) -> None:
        """Measure the pending films, and cut each one when it is measured."""
        sizes = {record.id: os.path.getsize(record.path) for record, _ in pending}
        written = time.monotonic()
        bar = tqdm(
            total=sum(sizes.values()),
            desc=f"cutting {len(pending)} films",
            unit="B",
            unit_scale=True,
            disable=not pending,
        )
        with bar:
            before = 0
            for record, film in pending:
                try:
                    with contextlib.closing(film.measure()) as shares:
                        for share in shares:
                            bar.update(before + int(share * sizes[record.id]) - bar.n)
                    self._cut(record, film)
                except (OSError, ValueError) as error:
                    if is_full(error):
                        raise
                    self._skip(record, error)
                before += sizes[record.id]
                bar.update(before - bar.n)
                bar.set_postfix(clips=self.report.clips, refresh=False)
                if time.monotonic() - written > WRITE_SECONDS:
                    self._write()
                    written = time.monotonic()

    def _cut(self, record: Record, film: FilmSignals) -> None:
        """Note the clips of a measured film."""
        numbers = columns(film.signals)
        rows = []
        for piece in cut_into_clips(numbers, self.settings):
            seconds = duration(numbers["time"], piece.first, piece.end)
            if piece.problem:
                before = self.report.left_out.get(piece.problem, 0.0)
                self.report.left_out[piece.problem] = before + seconds
                continue
            start = float(numbers["time"][piece.first])
            rows.append(self._row(record, piece.first, piece.end, start, seconds))
            self.report.seconds += seconds
        self.rows[record.id] = rows
        self.report.clips += len(rows)
        if film.damaged:
            self.report.damaged[record.id] = film.damaged

    def _row(self, record: Record, first: int, end: int, start: float, seconds: float) -> dict:
        """Return the line of one clip. Its id names its first frame, so that it stays the same if
        cuts elsewhere in the film change."""
        id = f"{record.id}_{first:06d}"
        try:
            check_id(id)
        except ValueError:  # too long
            id = hashed_id(record.id, id)
        facts = {name: value for name, value in record.facts.items() if name not in REPLACED}
        return {
            "id": id,
            "video_path": Path(os.path.relpath(record.path, self.out_dir)).as_posix(),
            "video_span": [first, end],
            "caption": record.caption,
            **facts,
            "film": record.id,
            "start_seconds": round(start, 3),
            "seconds": round(seconds, 3),
        }

    def _skip(self, record: Record, error: Exception) -> None:
        self.report.skipped.append(Skip.of(record, error))

    # ── files ─────────────────────────────────────────────────────────────────────────────────────
    def _write(self) -> None:
        """Write the lines of all clips so far, in the order of the films."""
        rows = [row for record in self.records for row in self.rows.get(record.id, [])]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        edited = write_lines(self.out_dir / self.name, "".join(lines))
        self.report.edited = edited or self.report.edited

    def _compare_settings(self) -> None:
        """Note which settings differ from those of the last run, and store the present ones."""
        path = self.out_dir / NOTE
        settings = asdict(self.settings)
        before = read_object(path)
        if before:
            self.report.changed_settings = differences(before, settings)
        write_atomically(path, json.dumps(settings, indent=1) + "\n")
