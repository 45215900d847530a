"""The folder that `sample` fills: each batch is written when it is drawn, existing samples are kept
when drawing continues, and nothing is replaced unasked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.config import differences
from mmdit.data.dataset.sources import is_sheet
from mmdit.files import (
    check_creatable,
    expanded,
    open_regular,
    read_object,
    real_path,
    write_atomically,
)
from mmdit.training.media import (
    contact_sheet,
    read_back,
    read_facts,
    save_image,
    save_sample,
    sheet_holds,
    sheet_strip,
)
from mmdit.training.requests import Request, batches

STORY, GRID = "samples.json", "grid.png"
NAME = re.compile(r"\d{4,}\.(png|mp4)")  # files that this module writes, and may therefore remove
WRITTEN = (b"{", b"\x89PNG", b"<!doctype html>")  # beginnings of files that options name as outputs
ELEMENTS = 4096  # of each weight that enter `weights_digest`, about


def check_writable(path: str | Path, folder: bool, option: str = "out") -> None:
    """Raise ValueError, before hours of work, if the file or folder `path` of this option cannot be
    created, or if the file would replace one that no such command wrote."""
    path = Path(path)
    if path.exists() and path.is_dir() != folder:
        there, wanted = ("a file", "a folder") if folder else ("a folder", "a file")
        raise ValueError(
            f"--{option} {path} is {there}, but {wanted} is to be written there; choose another"
        )
    if path.is_file() and not folder:
        with open_regular(path) as file:
            head = file.read(len(max(WRITTEN, key=len)))
        if head and not head.startswith(WRITTEN):
            raise ValueError(
                f"--{option} {path} is there, and is no report, sheet or page that a command wrote:"
                " it would be lost; choose another name, or remove it"
            )
    check_creatable(path, option)


def check_files(**paths: str | None) -> None:
    """Raise ValueError, before hours of work, if a file, given by the name of its option, cannot be
    written (see `check_writable`), or if two options name the same file."""
    options: dict[Path, str] = {}
    for name, path in paths.items():
        if not path:
            continue
        check_writable(path, False, name)
        other = options.setdefault(real_path(path), name)
        if other != name:
            raise ValueError(
                f"--{other} and --{name} both are {path}, and one would replace the other: give"
                " each its name"
            )


def check_outside(sheets: Mapping[str, str | None], sources: Mapping[str, str | None]) -> None:
    """Raise ValueError if a sheet would be written into a folder whose pictures are compared: the
    next call would take it for one of them. Both are given by the names of their options."""
    for option, sheet in sheets.items():
        for name, source in sources.items():
            if not sheet or not source or is_sheet(sheet):
                continue
            folder = real_path(expanded(source))
            cached = (folder / "manifest.json").is_file()
            if folder.is_dir() and not cached and folder in real_path(Path(sheet)).parents:
                raise ValueError(
                    f"--{option} is {sheet}, in the folder of --{name}, of whose pictures it would"
                    " be one the next time; choose a place outside"
                )


@torch.no_grad()
def weights_digest(networks: dict[str, nn.Module], *more: Tensor | None) -> str:
    """Return a hash that tells these weights, and pictures `more` on which samples depend, from
    others. It covers names, shapes, about ELEMENTS evenly spread elements of each weight, and all
    of each picture. This suffices because training, an average and an adapter change weights
    everywhere, while pictures may differ in a corner alone."""
    digest = hashlib.sha256()
    tensors = [
        (f"{part}.{name}", value, max(1, value.numel() // ELEMENTS))
        for part, network in networks.items()
        for name, value in network.state_dict().items()
    ]
    tensors += [(f"picture {i}", value, 1) for i, value in enumerate(more) if value is not None]
    for name, value, stride in tensors:
        some = value.detach().reshape(-1)[::stride]
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(
            some.to("cpu", torch.float64 if value.is_floating_point() else value.dtype)
            .numpy()
            .tobytes()
        )
    return digest.hexdigest()[:32]


@dataclass
class SampleFolder:
    """A folder with a PNG or MP4 for each of `requests`, grid.png, and samples.json, which holds
    the `story` (all that decides a sample except its request and number) and the list of existing
    `samples`. `size`: width, height and frames for requests without their own. `replace`: draw
    samples of another story anew. ValueError if there are such samples, or foreign files under
    names to be written, and they may not be replaced."""

    folder: Path
    story: dict
    requests: dict[int, Request]  # by number
    size: tuple[int, int, int]
    fps: int
    columns: int | None = None
    replace: bool = False
    files: dict[int, str] = field(default_factory=dict, init=False)  # by number
    said: list[str] = field(default_factory=list, init=False)  # lines to print before drawing
    grid_note: str = field(default="", init=False)
    strips: dict[int, Tensor] = field(
        default_factory=dict, init=False
    )  # of the first samples, for the grid

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        old = _stored_story(self.folder)
        rows = old.pop("samples", [])
        if not old:
            self._refuse_files_of_others()
        changed = differences(old, self.story) if old else []
        ours = [row for row in rows if NAME.fullmatch(row["file"])]
        for row in ours:
            number = int(Path(row["file"]).stem)
            if not changed and self._is_current(number, row):
                self.files[number] = row["file"]
        lost = [row["file"] for row in ours if row["file"] not in self.files.values()]
        lost = [name for name in lost if (self.folder / name).is_file()]
        self._report(lost, changed)
        self._refuse_unlisted({row["file"] for row in ours})
        for name in lost:
            (self.folder / name).unlink(missing_ok=True)
        self._write()

    def _refuse_files_of_others(self) -> None:
        """Raise ValueError if files would be replaced that no samples.json here lists."""
        names = sorted(path.name for path in self.folder.iterdir())
        taken = [name for name in names if NAME.fullmatch(name) or name in (GRID, STORY)]
        if taken and not self.replace:
            raise ValueError(
                f"{self.folder} holds {len(taken)} files by the names of samples ({taken[0]} …), "
                f"and no {STORY} that says how they were drawn; choose another --out, or give "
                "--replace"
            )

    def _refuse_unlisted(self, listed: set[str]) -> None:
        """Raise ValueError if samples would be written over files that samples.json does not list.
        A file that was drawn for the same request was left by a killed process, and is drawn
        again."""
        for path in sorted(self.folder.iterdir()):
            if not NAME.fullmatch(path.name) or path.name in listed or self.replace:
                continue
            request = self.requests.get(int(path.stem))
            if request and not self._was_left(path, request):
                raise ValueError(
                    f"{path} would be replaced, which is not among the samples of {STORY} there;"
                    " choose another --out, move the file, or give --replace"
                )

    def _was_left(self, path: Path, request: Request) -> bool:
        try:
            facts = read_facts(path)
        except ValueError:
            return False
        kept = (facts.get("prompt"), facts.get("weights"))
        return kept == (request.prompt, self.story.get("weights"))

    def _is_current(self, number: int, row: dict) -> bool:
        """Return whether the file of a sample exists and was drawn for an equal request."""
        request = self.requests.get(number)
        if request is None or _row(row["file"], request) != row:
            return False
        path = self.folder / row["file"]
        return path.is_file() and not path.is_symlink() and path.stat().st_size > 0

    def _report(self, lost: list[str], changed: list[str]) -> None:
        """Note what is kept and what is replaced. ValueError if replacing was not asked for."""
        if self.files:
            self.said.append(
                f"{len(self.files)} of {len(self.requests)} samples are in {self.folder} already, "
                "drawn with the same settings"
            )
        if not lost:
            return
        why = "are of other prompts"
        if changed:
            why = f"were drawn otherwise ({'; '.join(changed[:4])[:600]})"
        what = f"{len(lost)} samples in {self.folder} {why}"
        left = sum(int(Path(name).stem) not in self.requests for name in lost)
        also = f"; {left} of them are not asked for now, and removed" if left else ""
        if not self.replace:
            raise ValueError(
                f"{what}: choose another --out, or give --replace to draw them anew{also}"
            )
        self.said.append(f"{what}: they are replaced{also}")

    def missing(self, batch_size: int) -> Iterator[list[int]]:
        """Yield the numbers of every batch that lacks a sample. Batches are cut as without an
        interruption, because the size of a batch decides how its samples are rounded."""
        for numbers in batches(self.requests, batch_size):
            if any(number not in self.files for number in numbers):
                yield numbers

    def next_number(self) -> int:
        """Return a number above those of all requests and of all files that have names of
        samples."""
        names = [path.name for path in self.folder.iterdir() if NAME.fullmatch(path.name)]
        taken = [*self.requests, *(int(Path(name).stem) for name in names)]
        return max(taken, default=-1) + 1

    def add(self, numbers: Sequence[int], pixels: Tensor, facts: Sequence[Mapping[str, Any]]):
        """Write the samples `numbers` of `pixels (B, F, 3, H, W)` with their `facts` inside, and
        then list them in samples.json."""
        for number, clip, known in zip(numbers, pixels, facts, strict=True):
            path = save_sample(clip, self.folder / f"{number:04d}", self.fps, known)
            self.files[number] = path.name
            if number < self._held():
                self.strips[number] = sheet_strip(clip)
        self._write()

    def _held(self) -> int:
        """Return how many samples the sheet holds, for the largest size among them."""
        sizes = [self.size, *(request.size(self.size) for request in self.requests.values())]
        return sheet_holds(*map(max, zip(*sizes)))

    def _write(self) -> None:
        rows = [_row(self.files[i], self.requests[i]) for i in sorted(self.files)]
        text = json.dumps(self.story | {"samples": rows}, indent=1, ensure_ascii=False)
        write_atomically(self.folder / STORY, text.encode())

    def finish(self) -> list[str]:
        """Write grid.png with as many samples as a sheet holds; return the names of all files."""
        shown = sorted(self.files)[: self._held()]
        for number in shown:
            if number not in self.strips:
                self.strips[number] = sheet_strip(read_back(self.folder / self.files[number]))
        strips = _framed([self.strips[number] for number in shown])
        columns = self.columns or (4 if strips.shape[1] == 1 else 1)
        captions = [self.requests[number].prompt for number in shown]
        save_image(contact_sheet(strips, captions, columns), self.folder / GRID)
        if len(shown) < len(self.files):
            self.grid_note = f", which shows the first {len(shown)}"
        return [self.files[i] for i in sorted(self.files)]


def _row(file: str, request: Request) -> dict[str, Any]:
    """Return the entry of a sample in samples.json."""
    return {"file": file, "prompt": request.prompt, **request.overrides}


def _stored_story(folder: Path) -> dict:
    """Return the contents of samples.json; an empty dict if this module did not write it."""
    old = read_object(folder / STORY)
    rows = old.get("samples")
    good = isinstance(rows, list) and all(
        isinstance(row, dict) and isinstance(row.get("file"), str) for row in rows
    )
    return old if good else {}


def stored_requests(folder: Path) -> dict[int, Request]:
    """Return the requests of the samples in `folder`, by number."""
    requests = {}
    for row in _stored_story(folder).get("samples", []):
        if NAME.fullmatch(row["file"]):
            asked = {name: value for name, value in row.items() if name != "file"}
            requests[int(Path(row["file"]).stem)] = Request.read(asked, f"{folder / STORY}")
    return requests


def _framed(strips: list[Tensor]) -> Tensor:
    """Return strips `(f, 3, h, w)` of any sizes as one tensor, padded with white."""
    frames, _, height, width = map(max, zip(*(strip.shape for strip in strips)))
    padded = []
    for strip in strips:
        right, below, after = (
            width - strip.shape[3],
            height - strip.shape[2],
            frames - strip.shape[0],
        )
        padded.append(F.pad(strip, (0, right, 0, below, 0, 0, 0, after), value=255))
    return torch.stack(padded)
