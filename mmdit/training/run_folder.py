"""Read the state of a training from the files in its run folder: configuration, progress and
previews."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from mmdit.config import ConfigError, parse_yaml
from mmdit.files import LOCK, open_regular, real_path

PREVIEW = re.compile(r"step_(\d{8,})")
VIDEOS = ("video.mp4", "video.png")
QUIET_SECONDS = 120  # a run counts as running for so long if nothing else is known
LARGEST_TEXT = 1 << 20
ENDED_BY = "ended_by"  # in the last record of a run that a rule ended before max_steps: the rule


@dataclass(frozen=True)
class RunState:
    """`word`: running, finished, stopped or failed; `reason`: a sentence, or ""."""

    word: str
    reason: str = ""


@dataclass(frozen=True)
class RunFolder:
    """A run folder below the folder `runs`, by its relative path `name`, which addresses use.
    ValueError if there is no such run."""

    runs: Path
    name: str
    folder: Path = field(init=False)

    def __post_init__(self):
        root, parts = real_path(self.runs), Path(self.name).parts
        folder = real_path(root / self.name)
        hidden = any(part.startswith(".") for part in parts)
        inside = folder != root and folder.is_relative_to(root) and "\0" not in self.name
        if hidden or not inside or not is_run(folder):
            raise ValueError(f"there is no run {self.name!r} in {self.runs}")
        object.__setattr__(self, "folder", folder)

    def config_text(self) -> str:
        """Return the text of config.yaml, or ""."""
        return text_of(self.folder / "config.yaml")

    def config(self) -> dict:
        """Return config.yaml as plain data; an empty dict if it cannot be read."""
        path = self.folder / "config.yaml"
        try:
            return _parsed(str(path), path.stat().st_mtime_ns)
        except OSError:
            return {}

    def max_steps(self) -> int | None:
        """Return the configured number of steps, or None if the config does not say."""
        train = self.config().get("train")
        steps = train.get("max_steps") if isinstance(train, dict) else None
        return steps if isinstance(steps, int) else None

    def prompts(self) -> list[str]:
        """Return the prompts of the previews."""
        train = self.config().get("train")
        prompts = train.get("sample_prompts") if isinstance(train, dict) else None
        return [str(prompt) for prompt in prompts] if isinstance(prompts, list) else []

    def previews(self) -> list[dict]:
        """Return the steps that have a preview, in order, with the names of the files."""
        return previews_in(self.folder)

    def state(self, last: dict, held: set[int] | None) -> RunState:
        """Return the state of the training. `last`: its newest record of metrics; `held`: the
        inodes of locked files, None where the system does not tell."""
        last_step = last.get("step")
        if self._is_held(held):
            return RunState("running")
        failure = self._failure(last_step)
        if failure:
            return RunState("failed", failure)
        wanted = self.max_steps()
        if last_step is not None and wanted is not None and last_step >= wanted:
            return RunState("finished")
        if last.get(ENDED_BY):
            return RunState("finished", str(last[ENDED_BY]))
        if os.path.exists(self.folder / LOCK):
            return RunState("failed", "the process was killed; it goes on with --resume")
        return RunState("stopped", "it goes on with --resume")

    def _is_held(self, held: set[int] | None) -> bool:
        lock = self.folder / LOCK
        try:
            inode = lock.stat().st_ino
        except OSError:
            return False
        if held is not None:
            return inode in held
        newest = max(modified(self.folder / "metrics.jsonl"), modified(lock))
        # in both directions: a clock may have been set back
        return abs(time.time() - newest) < QUIET_SECONDS

    def _failure(self, last_step: float | None) -> str:
        """Return the error that ended the training, if one was recorded at its last step."""
        newest = max((self.folder / "failures").glob("*.json"), key=modified, default=None)
        if newest is None or newest.name.startswith("preview_"):
            return ""
        try:
            row = json.loads(text_of(newest))
            step, error = row["step"], str(row["error"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return ""
        if last_step is not None and isinstance(step, int) and step < last_step:
            return ""  # the run went on after it
        first_line = error.partition("\n")[0]
        return f"{row.get('kind')}, step {step}: {first_line}"

    def skipped(self) -> list[str]:
        """Return the last lines about skipped steps, newest first, at most 20."""
        return text_of(self.folder / "skipped.jsonl").splitlines()[:-21:-1]


def previews_in(run: Path) -> list[dict]:
    """Return `step`, `folder` and `video` (a file name or None) of each preview of a run, in the
    order of steps."""
    shown = []
    try:
        entries = list(os.scandir(run / "samples"))
    except OSError:
        return []
    for entry in entries:
        match = PREVIEW.fullmatch(entry.name)
        if not match:
            continue
        try:
            files = set(os.listdir(entry.path))
        except OSError:  # not a folder, or not readable
            continue
        video = next((name for name in VIDEOS if name in files), None)
        if "grid.png" in files:
            shown.append({"step": int(match[1]), "folder": entry.name, "video": video})
    return sorted(shown, key=lambda preview: preview["step"])


def sheets_in(run: Path) -> list[tuple[int, Path, Path | None]]:
    """Return the step, the sheet and the clip (or None) of each preview of a run, in order. The
    training of a tokenizer has sheets alone."""
    folder = run / "samples"
    shown: list[tuple[int, Path, Path | None]] = []
    for preview in previews_in(run):
        place = folder / preview["folder"]
        clip = place / preview["video"] if preview["video"] else None
        shown.append((preview["step"], place / "grid.png", clip))
    for sheet in folder.glob("step_*.png"):
        if sheet.stem[5:].isdecimal():
            shown.append((int(sheet.stem[5:]), sheet, None))
    return sorted(shown, key=lambda row: row[0])


def is_run(folder: Path) -> bool:
    """Return whether a folder holds a training; False if it may not be read."""
    return any(os.path.isfile(folder / name) for name in ("config.yaml", "metrics.jsonl"))


def modified(path: Path) -> float:
    """Return when a file was last modified, in seconds since the epoch; 0 if it does not exist."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def text_of(path: Path) -> str:
    """Return the text of a file, or "" if it cannot be read; of a large file only the end."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - LARGEST_TEXT))
            return file.read().decode("utf-8", "replace")
    except (OSError, ValueError):
        return ""


@lru_cache(maxsize=512)
def _parsed(path: str, written: int) -> dict:
    """Return a YAML file as plain data; the result is cached until the file's time `written`
    changes."""
    try:
        return parse_yaml(text_of(Path(path)), path)[0]
    except ConfigError:
        return {}
