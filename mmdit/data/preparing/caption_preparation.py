"""Caption the records in a JSONL file with a captioner, and write lines that caching can read.

Every caption is noted in `captions_made.jsonl` as soon as it is made, with the stamp of its source
and the settings used. So a run can stop at any moment, and no caption is requested twice. The file
of lines is written anew from these notes.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Protocol

import torch
from PIL import Image
from tqdm import tqdm

from mmdit.config import ConfigError, differences, least
from mmdit.data.dataset.problems import Skip, Unusable, list_skipped, skipped_lines
from mmdit.data.dataset.records import (
    BLANK,
    PATH_KEYS,
    Media,
    Record,
    decoded_object,
    read_records,
)
from mmdit.data.dataset.stamps import compare_stamp, stamp_of
from mmdit.data.dataset.written_lines import write_lines
from mmdit.data.preparing.caption_pictures import shown_pictures
from mmdit.data.preparing.caption_server import ServerFailed, ServerRefused
from mmdit.data.preparing.caption_texts import clean_caption
from mmdit.data.preparing.in_threads import done_in_threads
from mmdit.files import clean, is_full, lock, read_bytes, real_path
from mmdit.signals import interruptible

NOTES = "captions_made.jsonl"
WRITE_SECONDS = 10.0  # the least time between two writes of the lines; more if writing takes long
HOPELESS = 20  # consecutive failures of a server after which it counts as gone
FATAL = (ServerRefused, torch.OutOfMemoryError)  # errors that do not depend on the record
PROMPT = "Describe this image in one or two sentences, as a caption."
CLIP_PROMPT = (
    "These are frames of one short video, in order. Describe in one or two sentences, as a caption,"
    " what is seen and how it moves."
)


class Captioner(Protocol):
    """Describes pictures in words."""

    @property
    def identity(self) -> dict[str, object]:
        """Return the settings that decide its captions, besides pictures, prompt and seed."""

    def __call__(self, pictures: list[Image.Image], prompt: str, seed: int) -> tuple[str, bool]:
        """Return a caption, and whether it was cut off because of its length."""


@dataclass(frozen=True)
class CaptionSettings:
    """Describe what a captioner is asked, and how its answers are treated."""

    prompts: tuple[str, ...]  # each gives one caption
    # Captions for each prompt, each with another seed.
    count: int = 1
    # The number of frames of a clip that are shown.
    frames: int = 8
    # The longest side of a picture that is shown.
    side: int = 768
    # The most characters of a caption.
    most_characters: int = 1000
    seed: int = 0

    def __post_init__(self):
        least(self, 1, "count", "frames")
        least(self, 16, "side", "most_characters")
        if not all(prompt.strip() for prompt in self.prompts):
            raise ConfigError("prompts", "one is empty; must say what to describe")


@dataclass
class CaptionReport:
    """Counts over the records of one run."""

    records: int = 0
    kept: int = 0  # records that had a caption
    already: int = 0  # records captioned by an earlier run
    made: int = 0  # records captioned now
    captions: int = 0  # of those
    changed_sources: list[str] = field(default_factory=list)  # ids: other pictures than before
    changed_settings: list[str] = field(default_factory=list)
    waiting: int = 0  # records without a caption yet
    skipped: list[Skip] = field(default_factory=list)
    edited: str = ""  # a sentence about lines that somebody edited
    interrupted: bool = False
    seconds: float = 0.0

    def text(self) -> str:
        """Return the report for people."""
        lines = [
            f"{self.records} records: {self.made} captioned in {self.seconds:.1f} s"
            f" ({self.captions} captions), {self.already} captioned before, {self.kept} had a"
            f" caption, {len(self.skipped)} skipped"
        ]
        if self.changed_settings:
            lines.append(
                "other settings than before; captions made with those are kept in"
                f" {NOTES}, and not used:"
            )
            lines += [f"  {line}" for line in self.changed_settings]
        if self.changed_sources:
            lines.append(
                f"{len(self.changed_sources)} records show something else than before, for example"
                f" {self.changed_sources[0]}: captioned anew"
            )
        lines += skipped_lines(self.skipped)
        if self.waiting:
            lines.append(f"{self.waiting} records have no caption yet, and are not written")
        lines += filter(None, [self.edited])
        return "\n".join(lines)


@dataclass
class Note:
    """The captions of one record in the form in which they are noted."""

    captions: list[str]
    stamp: dict[str, str]


@dataclass
class CaptionPreparation:
    """Captions the records of `meta_jsonl` that have no caption, or, with `replace`, all of them;
    and writes their lines to a file of the same name in `out_dir`. Call `run()` once."""

    meta_jsonl: Path
    media: Media
    out_dir: Path
    captioner: Captioner
    settings: CaptionSettings
    replace: bool = False
    threads: int = 0  # 0: one after the other
    prefer: str = ""  # see `read_records`

    @property
    def out(self) -> Path:
        """Return the file that is written."""
        return self.out_dir / self.meta_jsonl.name

    def run(self) -> CaptionReport:
        """Caption the records, write the lines, and return a report. After Ctrl-C or SIGTERM, it is
        a report with `interrupted`, and the same call continues from there. ValueError if the
        metadata is wrong, or if no record could be captioned."""
        begin = time.monotonic()
        self.records = read_records(self.meta_jsonl, self.media, self.prefer)
        if real_path(self.out) == real_path(self.meta_jsonl):
            raise ValueError(
                f"--out_dir is the folder of {self.out}, which would be replaced; name another"
            )
        self.report = CaptionReport(len(self.records))
        self.captions: dict[str, list[str]] = {}  # by id: captions of earlier runs and of this one
        self.noting = threading.Lock()  # of captions and notes
        self.out_dir.mkdir(parents=True, exist_ok=True)
        clean(self.out_dir)
        with open(self.out_dir / NOTES, "a+b") as notes, interruptible():
            lock(notes, f"another process is captioning into {self.out_dir}; wait for it")
            self.notes: IO[bytes] | None = notes
            pending = self._look(notes)
            try:
                self._caption(pending)
            except KeyboardInterrupt:
                self.report.interrupted = True
            finally:
                with self.noting:
                    self.notes = None  # a thread that still works then writes nothing
                self._write()
                list_skipped(self.out_dir / "skipped.jsonl", self.report.skipped)
        done = self.report.kept + len(self.captions) + len(self.report.skipped)
        self.report.waiting = len(self.records) - done
        self.report.made = len(self.captions) - self.report.already
        self.report.seconds = time.monotonic() - begin
        if not (self.report.kept or self.captions or self.report.interrupted):
            examples = [f"  {skip.path}: {skip.reason}" for skip in self.report.skipped[:5]]
            raise ValueError("\n".join(["none of the records could be captioned:", *examples]))
        return self.report

    # ── the work ──────────────────────────────────────────────────────────────────────────────────
    def _look(self, notes: IO[bytes]) -> list[Record]:
        """Take over the captions of earlier runs; return the records that need one."""
        settings = asdict(self.settings) | self.captioner.identity
        # as JSON returns them: tuples become lists
        settings = json.loads(json.dumps(settings))
        self.made_with = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        before, known = _read_notes(notes, self.made_with)
        if before != settings:
            if before:
                self.report.changed_settings = differences(before, settings)
            _append(notes, {"settings": settings})
        pending = []
        bar = tqdm(self.records, "looking for captions", unit="record", delay=2)
        for record in bar:
            if record.caption and not self.replace:
                self.report.kept += 1
                continue
            note = known.get(record.id)
            if note is None:
                pending.append(record)
                continue
            state, _ = compare_stamp(record.source, note.stamp)
            if state == "changed":
                self.report.changed_sources.append(record.id)
                pending.append(record)
            elif state in ("gone", "missing"):
                self._skip(record, Unusable("file not found"))
            else:
                self.report.already += 1
                self.captions[record.id] = note.captions
        return pending

    def _caption(self, pending: list[Record]) -> None:
        """Caption the pending records."""
        written, takes, failures = time.monotonic(), 0.0, 0
        bar = tqdm(
            total=len(pending),
            desc=f"captioning {self.meta_jsonl.name}",
            unit="image" if self.media == "image" else "clip",
            disable=not pending,
        )
        with bar:
            for record, result in done_in_threads(self._make, pending, self.threads):
                if result is None:
                    failures = 0
                elif isinstance(result, FATAL) or is_full(result):
                    raise result
                else:
                    self._skip(record, result)
                    failures += isinstance(result, ServerFailed)
                if failures >= HOPELESS:
                    raise ValueError(
                        f"{failures} requests failed one after the other, the last: {result}; what"
                        " is captioned stays, and the same command goes on from there"
                    )
                bar.update()
                bar.set_postfix(skipped=len(self.report.skipped), refresh=False)
                if time.monotonic() - written > max(WRITE_SECONDS, 20 * takes):
                    begin = time.monotonic()
                    self._write()
                    written = time.monotonic()
                    takes = written - begin

    def _make(self, record: Record) -> None:
        """Make the captions of a record, and note them at once; runs in several threads."""
        stamp = stamp_of(record.source)  # before it is read, so that a change meanwhile is noticed
        settings, problem = self.settings, Unusable("empty caption")
        pictures = shown_pictures(record, self.media, settings.frames, settings.side)
        captions = []
        for number, prompt in enumerate(settings.prompts):
            for sample in range(settings.count):
                keyed = f"{settings.seed}/{record.id}/{number}/{sample}".encode()
                seed = int.from_bytes(hashlib.sha256(keyed).digest()[:4], "big") >> 1
                text, cut_off = self.captioner(pictures, prompt, seed)
                try:
                    captions.append(clean_caption(text, settings.most_characters, cut_off))
                except Unusable as error:
                    problem = error
        if not captions:
            raise problem
        note = Note(list(dict.fromkeys(captions)), stamp)
        with self.noting:
            if self.notes is not None:
                row = {"id": record.id, "made_with": self.made_with, **asdict(note)}
                _append(self.notes, row)
                self.captions[record.id] = note.captions
                self.report.captions += len(note.captions)

    def _skip(self, record: Record, error: Exception) -> None:
        self.report.skipped.append(Skip.of(record, error))

    # ── files ─────────────────────────────────────────────────────────────────────────────────────
    def _write(self) -> None:
        """Write the lines of all records that have a caption, in order."""
        with self.noting:
            made = dict(self.captions)
        lines = []
        rows = _rows(self.meta_jsonl)
        if [row.get("id") for row in rows] != [record.id for record in self.records]:
            raise ValueError(
                f"{self.meta_jsonl} was changed while its records were captioned; what is captioned"
                " stays, give the same command again"
            )
        for record, row in zip(self.records, rows, strict=True):
            captions = made.get(record.id)
            if captions is None and (self.replace or not record.caption):
                continue
            for key in (key for keys in PATH_KEYS.values() for key in keys):
                if isinstance(row.get(key), str):
                    row[key] = self._moved(row[key])
            if captions:
                row.pop("captions", None)
                row |= {"caption": captions[0], "captioned_by": self.captioner.identity["model"]}
                row |= {"captions": captions} if len(captions) > 1 else {}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        edited = write_lines(self.out, "".join(lines))
        self.report.edited = edited or self.report.edited

    def _moved(self, path: str) -> str:
        """Return a path from the metadata relative to the folder that is written to."""
        path = os.path.expanduser(path)
        if os.path.isabs(path):
            return path
        return Path(os.path.relpath(self.meta_jsonl.parent / path, self.out_dir)).as_posix()


def _rows(path: Path) -> list[dict]:
    """Return the objects in a JSONL file that has been read before."""
    lines = read_bytes(path).split(b"\n")
    return [decoded_object(line) for line in lines if line.strip(BLANK)]


def _append(notes: IO[bytes], row: dict) -> None:
    notes.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    notes.flush()


def _read_notes(notes: IO[bytes], made_with: str) -> tuple[dict | None, dict[str, Note]]:
    """Return the settings of the last run and, by id, the notes that were made with the present
    ones. A last line that a kill cut off is removed; other lines that cannot be read are
    ignored."""
    notes.seek(0)
    data = notes.read()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        notes.truncate(whole)
    notes.seek(0, os.SEEK_END)
    settings, known = None, {}
    for line in data[:whole].splitlines():
        try:
            row = decoded_object(line)
            if "settings" in row:
                settings = row["settings"]
            elif row["made_with"] == made_with and row["captions"]:
                known[row["id"]] = Note(row["captions"], row["stamp"])
        except (ValueError, LookupError, TypeError):
            continue
    return settings, known
