"""The pages about runs: the list, one run, several runs in the same plots."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route

from mmdit.diagnostics.curves import number_of
from mmdit.files import real_path
from mmdit.training.run_folder import RunFolder, RunState
from mmdit.training.run_start import read_starts
from mmdit.ui.job_files import JobState
from mmdit.ui.metric_series import MetricStore, last_record
from mmdit.ui.run_folders import config_difference, find_runs, held_locks
from mmdit.ui.templating import NotThere, Templates, or_not_there

SHOWN_FILES = {".png": "image/png", ".mp4": "video/mp4", ".gif": "image/gif"}
MOST_RUNS = 8  # in the same plots
FIGURES = {  # of the list: a heading and its name in metrics.jsonl
    "loss, running mean": "loss_ema_100",
    "validation": "val_loss",
    "samples/s": "samples_per_second",
    "memory, GB": "memory_gb",
}


def send_picture(path: Path) -> Response | None:
    """Return a response with a picture or video; None for any other file, which a browser might
    run."""
    media_type = SHOWN_FILES.get(path.suffix.lower())
    if media_type is None or not os.path.isfile(path):
        return None
    return FileResponse(path, media_type=media_type)


def phase_of(record: dict) -> str:
    """Return the texts in a record: the phase of the alpha schedule, and the expert."""
    words = [
        f"{name.replace('_', ' ')} {record[name]}"
        for name in sorted(record)
        if name.startswith(("phase", "expert")) and isinstance(record[name], str)
    ]
    return ", ".join(words)


def command_of(config: dict) -> str:
    """Return the command that trains a run of this config."""
    if "reconstruction" in config:
        return "train-vtp"
    return "posttrain" if config.get("posttrain") else "train"


class RunPages:
    """The pages. `jobs` returns the newest job of each run folder, with its state."""

    def __init__(
        self,
        runs: Path,
        templates: Templates,
        jobs: Callable[[], dict[Path, tuple[str, JobState]]],
    ):
        self.runs, self.templates, self.jobs = runs, templates, jobs
        self.store = MetricStore()

    def routes(self) -> list[BaseRoute]:
        """Return the addresses of these pages."""
        return [
            Route("/", self.overview),
            Route("/compare", self.compare),
            Route("/api/curves", self.curves),
            Route("/api/runs", self.states),
            Route("/run/{name:path}", self.run),
            Route("/files/{name:path}", self.file),
        ]

    def _rows(self, runs: list[RunFolder]) -> list[dict]:
        held, jobs = held_locks(), self.jobs()
        return [self._row(run, held, jobs.get(run.folder)) for run in runs]

    def _row(self, run: RunFolder, held: set[int] | None, job: tuple[str, JobState] | None) -> dict:
        last = last_record(run.folder)
        step = last.get("step")
        state: RunState | JobState = run.state(last, held)
        # the job knows how a process ended; for a run that is going on, its own files know more
        if (
            job
            and state.word != "running"
            and job[1].word in ("failed", "running", "queued", "stopping")
        ):
            state = job[1]
        return {
            "name": run.name,
            "state": state.word,
            "reason": state.reason,
            "step": step,
            "max_steps": run.max_steps(),
            "figures": {title: number_of(last.get(name)) for title, name in FIGURES.items()},
            "job": job[0] if job else None,
            "phase": phase_of(last),
        }

    def overview(self, request: Request) -> Response:
        """Show every run with its state."""
        rows = self._rows(find_runs(self.runs))
        return self.templates.page(
            request, "runs.html", rows=rows, folder=str(self.runs), titles=list(FIGURES)
        )

    def run(self, request: Request) -> Response:
        """Show one run: state, curves, previews, config."""
        with or_not_there():
            run = RunFolder(self.runs, request.path_params["name"])
            other = request.query_params.get("against")
            difference = config_difference(RunFolder(self.runs, other), run) if other else []
        others = [one.name for one in find_runs(self.runs) if one.name != run.name]
        return self.templates.page(
            request,
            "run.html",
            row=self._rows([run])[0],
            previews=run.previews(),
            prompts=run.prompts(),
            config=run.config_text(),
            config_path=str(self.runs / run.name / "config.yaml"),
            checkpoint_path=str(self.runs / run.name),
            command=command_of(run.config()),
            start=(read_starts(run.folder) or [{}])[-1],
            others=others,
            against=other,
            difference=difference,
            skipped=run.skipped(),
        )

    def compare(self, request: Request) -> Response:
        """Show several runs in the same plots, and how their configs differ."""
        runs = self._chosen(request)
        first, *others = runs
        differences = {run.name: config_difference(first, run) for run in others}
        previews = {run.name: run.previews() for run in runs}
        return self.templates.page(
            request,
            "compare.html",
            names=[run.name for run in runs],
            differences=differences,
            previews=previews,
        )

    def _chosen(self, request: Request) -> list[RunFolder]:
        names = request.query_params.getlist("run")
        if not 1 <= len(names) <= MOST_RUNS:
            raise NotThere(f"choose 1 to {MOST_RUNS} runs, not {len(names)}")
        with or_not_there():
            return [RunFolder(self.runs, name) for name in dict.fromkeys(names)]

    def curves(self, request: Request) -> Response:
        """Return the curves of the chosen runs as JSON."""
        runs = self._chosen(request)
        panels = self.store.panels([run.folder for run in runs])
        return JSONResponse({"runs": [run.name for run in runs], "panels": panels})

    def states(self, request: Request) -> Response:
        """Return the state of the chosen runs as JSON, and their newest previews."""
        runs = self._chosen(request)
        rows = self._rows(runs)
        for row, run in zip(rows, runs, strict=True):
            row["previews"] = run.previews()
        return JSONResponse(rows)

    def file(self, request: Request) -> Response:
        """Return a preview of a run: `/files/<run>/samples/step_…/grid.png`."""
        name, _, rest = request.path_params["name"].partition("/samples/")
        with or_not_there():
            run = RunFolder(self.runs, name)
            path = real_path(run.folder / "samples" / rest)
        answer = send_picture(path) if path.is_relative_to(run.folder / "samples") else None
        return answer or JSONResponse({"error": "there is no such picture"}, 404)
