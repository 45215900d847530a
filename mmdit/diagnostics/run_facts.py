"""Describe a run in words for a report or a card: its last figures, and its starts."""

from __future__ import annotations

import contextlib
import datetime
from pathlib import Path

from mmdit.diagnostics.curves import number_of
from mmdit.files import read_object
from mmdit.training.checkpoint import complete
from mmdit.training.metrics import clock
from mmdit.training.run_start import read_starts

FIGURES = {  # name in metrics.jsonl: how it is shown
    "loss": "loss {:.4g}",
    "loss_ema_100": "loss, running mean over 100 steps {:.4g}",
    "val_loss_ema": "validation loss, averaged weights {:.4g}",
    "val_loss": "validation loss {:.4g}",
    "held_out_prompt_accuracy": "held-out prompt accuracy {:.3f}",
    "reconstruction": "reconstruction loss {:.4g}",
    "train_psnr": "PSNR of training pictures {:.2f} dB",
    "samples_per_second": "{:.1f} samples a second",
    "tflops_share": "{:.0%} of the matmul rate",
    "memory_gb": "{:.1f} GB at most",
}
STARTED = ("time", "device", "processes", "mmdit", "torch", "python", "commit")


def figures(record: dict, most: int | None) -> list[str]:
    """Return the figures in one record of metrics.jsonl, each in words; `most`: the configured
    number of steps."""
    said = []
    if isinstance(record.get("step"), int | float):
        said.append(f"step {record['step']:g} of {most or '?'}")
    for name, text in FIGURES.items():
        value = number_of(record.get(name))
        if value is not None:
            said.append(text.format(value))
    if number_of(record.get("wall_s")) is not None:
        said.append(f"{clock(record['wall_s'])} of training")
    return said


def start_rows(run: Path) -> list[list[str]]:
    """Return a table of the starts of a run, with versions, commit and device: a row of headings,
    then a row for each start. There are only headings if the run is of an older version, which
    recorded no starts."""
    names = ("step", *STARTED)
    rows = [list(names)]
    for start in read_starts(run):
        when = start.get("time")
        if isinstance(when, int | float):
            with contextlib.suppress(OverflowError, ValueError, OSError):  # no valid time
                start["time"] = datetime.datetime.fromtimestamp(when).strftime("%Y-%m-%d %H:%M")
        rows.append([str(start.get(name)) for name in names])
    return rows


def stored_versions(run: Path) -> str:
    """Return the versions that the newest checkpoint of a run names; "" if no checkpoint can be
    read."""
    for folder in reversed(complete(run)):
        row = read_object(folder / "checkpoint.json")
        if "step" in row and "versions" in row:
            return f"checkpoint of step {row['step']}: {row['versions']}"
    return ""
