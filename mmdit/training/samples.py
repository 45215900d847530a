"""The folder that `sample` fills: each batch is written as it comes, and what is there already
is kept when drawing goes on."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from mmdit.config import differences
from mmdit.files import write_atomically
from mmdit.training.media import (
    contact_sheet,
    read_back,
    save_image,
    save_sample,
    sheet_holds,
    sheet_strip,
)

STORY = "samples.json"
NAME = re.compile(r"\d{4,}\.(png|mp4)")  # what this module writes, and therefore may remove
ELEMENTS = 4096  # of each weight, for `weights_digest`


def check_writable(path: str | Path, folder: bool) -> None:
    """Raise ValueError before hours of work if the file or folder `path` cannot be made where
    it is asked for."""
    path = Path(path)
    if path.exists() and path.is_dir() != folder:
        there, wanted = ("a file", "a folder") if folder else ("a folder", "a file")
        raise ValueError(f"{path} is {there}, but {wanted} is to be written there; choose another")
    nearest = path if folder else path.parent
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(
            f"--out {path} cannot be written: {nearest} is no folder that you may write to; "
            "choose another place"
        )


@torch.no_grad()
def weights_digest(networks: dict[str, nn.Module], *more: Tensor | None) -> str:
    """Return what tells these weights from others, and of pictures `more` that samples depend on:
    a hash of names, shapes and up
    to ELEMENTS elements of each, evenly spread. Training, an average and an adapter move them
    all."""
    digest = hashlib.sha256()
    tensors = [
        (f"{part}.{name}", value)
        for part, network in networks.items()
        for name, value in network.state_dict().items()
    ]
    tensors += [(f"picture {i}", value) for i, value in enumerate(more) if value is not None]
    for name, value in tensors:
        flat = value.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // ELEMENTS)]
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(
            some.to("cpu", torch.float64 if value.is_floating_point() else value.dtype)
            .numpy()
            .tobytes()
        )
    return digest.hexdigest()[:32]


@dataclass
class SampleFolder:
    """`folder` with a PNG or MP4 for each of `prompts`, grid.png, and samples.json: `story`
    (whatever decides a sample but its
    prompt and number), and the `samples` that are there. Samples of another story are drawn
    anew."""

    folder: Path
    story: dict
    prompts: list[str]
    size: tuple[int, int, int]  # width, height and frames of what is written
    fps: int
    columns: int | None = None
    files: dict[int, str] = field(default_factory=dict, init=False)  # by number of the prompt
    said: list[str] = field(default_factory=list, init=False)  # what to tell before drawing
    grid_note: str = field(default="", init=False)
    strips: dict[int, Tensor] = field(
        default_factory=dict, init=False
    )  # of the first samples, for the grid

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        old = self._old()
        rows = old.pop("samples", [])
        changed = differences(old, self.story) if old else []
        ours = [row for row in rows if NAME.fullmatch(row["file"])]
        for row in ours:
            number = int(Path(row["file"]).stem)
            if not changed and self._is_current(number, row):
                self.files[number] = row["file"]
        self._report(rows, changed)
        for row in ours:
            if row["file"] not in self.files.values():
                (self.folder / row["file"]).unlink(missing_ok=True)
        self._write()

    def _old(self) -> dict:
        """Return what samples.json says; nothing if it is none of ours."""
        try:
            old = json.loads((self.folder / STORY).read_text(encoding="utf-8"))
            rows = old["samples"]
            good = isinstance(rows, list) and all(
                isinstance(row, dict) and isinstance(row.get("file"), str) for row in rows
            )
            return old if good else {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}

    def _is_current(self, number: int, row: dict) -> bool:
        """Return whether the file of a sample is there and was drawn from the same prompt."""
        if number >= len(self.prompts) or row.get("prompt") != self.prompts[number]:
            return False
        path = self.folder / row["file"]
        return path.is_file() and not path.is_symlink() and path.stat().st_size > 0

    def _report(self, rows: list, changed: list[str]) -> None:
        kept, gone = len(self.files), len(rows) - len(self.files)
        if kept:
            self.said.append(
                f"{kept} of {len(self.prompts)} samples are in {self.folder} already, drawn with "
                "the same settings"
            )
        if changed:
            lines = "; ".join(changed[:4])[:600]
            self.said.append(
                f"{gone} samples in {self.folder} were drawn otherwise ({lines}): they are replaced"
            )
        elif gone:
            self.said.append(
                f"{gone} samples in {self.folder} are of other prompts, or their files are gone: "
                "they are replaced"
            )

    def missing(self, batch_size: int) -> Iterator[tuple[int, list[str]]]:
        """Yield the number of the first prompt and the prompts of every batch that lacks a sample.
        Batches lie where they lie
        without an interruption, for the size of a batch decides how its samples are rounded."""
        for first in range(0, len(self.prompts), batch_size):
            some = self.prompts[first : first + batch_size]
            if not all(first + i in self.files for i in range(len(some))):
                yield first, some

    def add(self, first: int, pixels: Tensor) -> None:
        """Write the samples `first` … of `pixels (B, F, 3, H, W)`, and then that they are there."""
        for number, clip in enumerate(pixels, first):
            self.files[number] = save_sample(clip, self.folder / f"{number:04d}", self.fps).name
            if number < sheet_holds(*self.size):
                self.strips[number] = sheet_strip(clip)
        self._write()

    def _write(self) -> None:
        rows = [{"file": self.files[i], "prompt": self.prompts[i]} for i in sorted(self.files)]
        text = json.dumps(self.story | {"samples": rows}, indent=1, ensure_ascii=False)
        write_atomically(self.folder / STORY, text.encode())

    def finish(self) -> list[str]:
        """Write grid.png, of as many samples as a sheet holds; return the names of all files."""
        shown = min(len(self.files), sheet_holds(*self.size))
        for number in range(shown):
            if number not in self.strips:
                self.strips[number] = sheet_strip(read_back(self.folder / self.files[number]))
        strips = torch.stack([self.strips[number] for number in range(shown)])
        columns = self.columns or (4 if self.size[2] == 1 else 1)
        save_image(contact_sheet(strips, self.prompts[:shown], columns), self.folder / "grid.png")
        if shown < len(self.files):
            self.grid_note = f", which shows the first {shown}"
        return [self.files[i] for i in sorted(self.files)]
