"""Draw pictures during training: with the sampler of `mmdit.scripts.sample` and fixed seeds, one
folder a step, and an HTML page over all steps."""

from __future__ import annotations

import contextlib
import html
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmdit.files import objects_in, read_text, write_atomically
from mmdit.training.errors import record_failure
from mmdit.training.media import (
    contact_sheet,
    grid_video,
    save_image,
    save_video,
    sheet_holds,
)
from mmdit.training.pipeline import Pipeline, SampleSettings
from mmdit.training.run_folder import previews_in
from mmdit.training.trackers import Tracker
from mmdit.training.train_config import TrainConfig
from mmdit.training.train_state import TrainState

SCORES = "scores.jsonl"  # of previews, beside them


@dataclass
class Previews:
    """Callable on a `TrainState`. A failure is reported and never stops the training, whose random
    numbers are not touched."""

    pipeline: Pipeline
    config: TrainConfig
    run_dir: Path
    width: int
    height: int
    frames: int
    fps: int
    use_ema: bool
    writes: bool = True  # False: only takes part in drawing (all processes of a sharded model must)
    tracker: Tracker | None = None
    # scores samples `(B, F, 3, H, W)` and their captions; returns numbers by name
    score: Callable[[Tensor, list[str]], dict[str, float]] | None = None

    def __post_init__(self):
        self.settings = SampleSettings.of(self.config)

    def __call__(self, state: TrainState) -> None:
        try:
            weights = (
                state.ema.applied() if state.ema and self.use_ema else contextlib.nullcontext()
            )
            with weights:
                self._write(state.step)
        except Exception as error:  # whatever fails in a picture, hours of training go on
            settings, size = asdict(self.settings), [self.width, self.height, self.frames]
            path = record_failure(
                self.run_dir,
                "preview",
                state.step,
                0,
                error,
                prompts=self.config.sample_prompts,
                size=size,
                settings=settings,
            )
            print(
                f"the preview of step {state.step} failed and is left out ({type(error).__name__}:"
                f" {error}), see {path}",
                flush=True,
            )
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()

    def is_missing(self, step: int) -> bool:
        """Return whether a preview was due at this step and does not exist."""
        config = self.config
        folder = self._folder(step)
        failed = self.run_dir / "failures" / f"preview_{step:08d}_0.json"
        due = step > 0 and (step % config.sample_every_steps == 0 or step == config.max_steps)
        there = (folder / "grid.png").exists() and (self.frames == 1 or any(folder.glob("video.*")))
        return due and not failed.exists() and not there

    def _folder(self, step: int) -> Path:
        return self.run_dir / "samples" / f"step_{step:08d}"

    def _write(self, step: int) -> None:
        prompts = self.config.sample_prompts
        count = min(
            self.config.sample_num_images, sheet_holds(self.width, self.height, self.frames)
        )
        captions = [prompts[i % len(prompts)] for i in range(count)]
        pixels = self.pipeline(
            captions, self.width, self.height, self.frames, self.settings, batch_size=16
        )
        if not self.writes:
            return
        folder = self._folder(step)
        columns = 1 if self.frames > 1 else 8
        sheet = save_image(contact_sheet(pixels, captions, columns), folder / "grid.png")
        clip = None
        if self.frames > 1:
            clip = save_video(grid_video(pixels, 4), folder / "video.mp4", self.fps)
        if self.score:
            self._record(step, self.score(pixels, captions))
        self._page()
        if self.tracker:
            self.tracker.preview(step, sheet, clip)

    def _record(self, step: int, values: dict[str, float]) -> None:
        """Add a line to samples/scores.jsonl, in place of later lines of a run that was killed."""
        path = self.run_dir / "samples" / SCORES
        rows = [row for row in read_scores(path) if row["step"] < step] + [{"step": step} | values]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        print(f"preview of step {step}: {_score_text(values)}", flush=True)
        if self.tracker:
            self.tracker.figures(rows[-1])

    def _page(self) -> None:
        """Write samples/index.html, the newest step first."""
        rows = []
        scores = {row.pop("step"): row for row in read_scores(self.run_dir / "samples" / SCORES)}
        for preview in reversed(previews_in(self.run_dir)):
            folder, video = preview["folder"], preview["video"]
            clip = ""
            if video:  # without H.264 an animated picture
                place = f'src="{folder}/{video}"'
                clip = f"<img {place}>"
                if video.endswith(".mp4"):
                    clip = f"<video {place} autoplay loop muted></video>"
            title = html.escape(folder)
            if values := scores.get(preview["step"]):
                title += f": {_score_text(values)}"
            rows.append(f'<h3>{title}</h3><img src="{folder}/grid.png">{clip}')
        page = "<!doctype html><meta charset=utf-8>" + "\n".join(rows)
        write_atomically(self.run_dir / "samples" / "index.html", page)


def read_scores(path: Path) -> list[dict]:
    """Return the lines of samples/scores.jsonl, in the order of steps; an empty list if there is no
    file. A torn line is left out."""
    rows = objects_in(read_text(path)) if path.is_file() else ()
    return [row for row in rows if isinstance(row.get("step"), int)]


def _score_text(values: dict[str, float]) -> str:
    """Return the scores in words for a person."""
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())
