"""Write metrics.jsonl, from which a tracker gets its figures as well, and one readable line per
report."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from math import isfinite
from pathlib import Path

import torch

from mmdit.files import read_text, write_atomically
from mmdit.training.errors import RunError
from mmdit.training.trackers import Tracker

SLOW = 1.5  # times the median of the others; healthy ranks never differ by so much


def clock(seconds: float) -> str:
    """Format seconds: 75 → '1:15', 7300 → '2:01:40'."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def json_line(record: dict) -> str:
    """Return a record as a line of JSON, with null for numbers that are not finite."""
    odd = {k: None for k, v in record.items() if isinstance(v, float) and not isfinite(v)}
    return json.dumps(record | odd) + "\n"


class MetricsLog:
    """Appends one JSON object a line, with strictly increasing steps. When the file is opened,
    lines after `from_step` (of a run that was killed after its last checkpoint) and a torn last
    line are dropped."""

    def __init__(self, run_dir: Path, from_step: int, tracker: Tracker | None = None):
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / "metrics.jsonl"
        kept: list[str] = []
        self.last: dict = {}  # the newest record
        text = ""
        if self.path.exists():
            text = read_text(self.path, "replace")
        for line in text.splitlines():
            try:
                record = json.loads(line)
                if self.last.get("step", -1) < record["step"] <= from_step:
                    kept.append(line)
                    self.last = record
            except (ValueError, KeyError, TypeError):
                continue
        write_atomically(self.path, "".join(line + "\n" for line in kept))
        self.file = self.path.open("a", encoding="utf-8")
        self.tracker = tracker
        if tracker and kept:
            tracker.history(kept)

    def write(self, values: dict) -> None:
        self.last = values
        try:
            self.file.write(json_line(values))
            self.file.flush()
        except OSError as error:
            raise RunError(
                f"could not write {self.path}: {error}; checkpoints are untouched. Free disk space"
                " and start the run again, with --resume if it has a checkpoint"
            ) from error
        if self.tracker:
            self.tracker.figures(values)

    def close(self) -> None:
        self.file.close()


class Timer:
    """Measures the seconds since the last report, and how many of them went into waiting for
    data."""

    def __init__(self):
        self.start = self.last = time.perf_counter()
        self.waited = 0.0

    def waiting(self, iterator):
        """Yield the same items; the time spent getting each one counts as waiting."""
        iterator = iter(iterator)
        while True:
            begin = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - begin
            yield item

    def lap(self) -> tuple[float, float]:
        """Return `(seconds, share spent waiting)` since the last lap."""
        now = time.perf_counter()
        seconds, waited = now - self.last, self.waited
        self.last, self.waited = now, 0.0
        return seconds, waited / max(seconds, 1e-9)


class ForwardTimer:
    """Measures the seconds of forward passes on their device, without waiting for it. Unlike in the
    backward pass, copies of a model do not wait for each other there."""

    def __init__(self, device: torch.device):
        self.seconds = 0.0
        self.is_cuda = device.type == "cuda"
        self.events: list[list[torch.cuda.Event]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Add the time that the block takes."""
        begin = time.perf_counter()
        if self.is_cuda:
            self.events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            self.events[-1][0].record()
        yield
        if self.is_cuda:
            self.events[-1][1].record()
        else:
            self.seconds += time.perf_counter() - begin

    def read(self) -> float:
        """Return the seconds so far. This waits for the device."""
        for begin, end in self.events:
            end.synchronize()
            self.seconds += begin.elapsed_time(end) * 1e-3
        self.events = []
        return self.seconds


def slow_rank(seconds: list[float], step: float) -> int | None:
    """Return the rank for which all others wait, or None. `seconds`: by rank, those of a step in
    which it does not wait for other ranks; `step`: those of a whole step."""
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = statistics.median(seconds[:slowest] + seconds[slowest + 1 :])
    lost = seconds[slowest] - others
    is_slow = seconds[slowest] > SLOW * others and lost > max(0.05 * step, 0.01)
    return slowest if is_slow else None


def report_line(values: dict, max_steps: int) -> str:
    """Format a record of metrics as `step 100/2000  loss 0.81  …  ETA 3:20`."""
    width, speed = len(str(max_steps)), values["samples_per_second"]
    loss = "not finite" if values["loss"] is None else f"{values['loss']:.4f}"
    decimals = 0 if speed >= 10 else 2
    parts = [
        f"step {values['step']:>{width}}/{max_steps}",
        f"loss {loss}",
        f"lr {values['lr']:.2e}",
        f"grad {values['grad_norm']:.2f}",
        f"{speed:.{decimals}f} samples/s",
        f"data wait {values['data_wait']:.0%}",
    ]
    if "tflops_share" in values:
        parts.append(f"{values['tflops']:.0f} TFLOP/s ({values['tflops_share']:.0%})")
    if values.get("val_loss") is not None:
        parts.append(f"validation {values['val_loss']:.4f}")
    if "memory_gb" in values:
        parts.append(f"{values['memory_gb']:.1f} GB")
    if values["skipped"]:
        parts.append(f"skipped {values['skipped']} non-finite")
    return "  ".join([*parts, f"ETA {clock(values['eta_seconds'])}"])
