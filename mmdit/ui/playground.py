"""The playground: samples of one model, or of two side by side, each drawn by a job."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from mmdit.shipped import shipped_path
from mmdit.ui.job_pages import pictures_of
from mmdit.ui.job_requests import JobRequest, Workplace
from mmdit.ui.run_folders import find_runs
from mmdit.ui.templating import Templates

COMMAND = "sample"
SHOWN = (  # options of `sample`, in this order; the command's own form has all
    *("checkpoint", "lora", "lora_strength", "prompts", "negative", "width", "height", "frames"),
    *("steps", "solver", "guidance", "seed", "refine", "strength", "device"),
)
OTHER = ("checkpoint", "lora")  # options in which the second model may differ, as `other_…`
EXAMPLE = "assets/moving_shapes_64.safetensors"
MOST_JOBS, MOST_LETTERS = 4, 4000


class Playground:
    """The page of the playground: the form, and below it the samples of the jobs that its address
    names."""

    def __init__(self, place: Workplace, templates: Templates, runs: Path):
        self.place, self.templates, self.runs = place, templates, runs

    def routes(self) -> list[BaseRoute]:
        """Return the address of the page."""
        return [Route("/playground", self.page, methods=["GET", "POST"])]

    def page(self, request: Request) -> Response:
        """Show the form and the samples, or start jobs."""
        fields = dict(request.query_params)
        names = request.query_params.getlist("job")[:MOST_JOBS]
        problem, lines = "", []
        if request.method == "POST":
            fields = {name: values[-1] for name, values in request.scope["form"].items()}
            try:
                if not fields.get("checkpoint", "").strip():
                    raise ValueError("--checkpoint is missing: choose what to draw with")
                requests = [JobRequest(self.place, COMMAND, one) for one in models_of(fields)]
                lines = [one.preview() for one in requests]
                if fields.get("do") == "start":
                    names = [one.start().id for one in requests]
                    return RedirectResponse(filled(fields, names), 303)
            except (ValueError, OSError) as error:
                problem = str(error)
        options = {one.name: one for one in JobRequest(self.place, COMMAND, {}).options()}
        return self.templates.page(
            request,
            "playground.html",
            400 if problem else 200,
            options=[options[name] for name in SHOWN],
            beside={},
            fields=fields,
            problem=problem,
            lines=lines,
            jobs=self._jobs(names),
            checkpoints=self._checkpoints(),
            automatic=self.place.automatic,
        )

    def _jobs(self, names: list[str]) -> list[dict]:
        rows = []
        for name in names:
            try:
                job = self.place.store.read(name)
            except ValueError:
                continue
            state = self.place.store.state(job)
            rows.append({"job": job, "state": state, "pictures": pictures_of(job)})
        return rows

    def _checkpoints(self) -> list[str]:
        """Return the models that can be used: runs with a checkpoint, exports, and the shipped
        model."""
        runs = [
            run.folder for run in find_runs(self.runs) if os.path.isdir(run.folder / "checkpoints")
        ]
        exports = [
            path for folder in self.place.allowed.folders for path in folder.glob("*.safetensors")
        ]
        shipped = [EXAMPLE] if shipped_path(EXAMPLE) else []
        return [*shipped, *map(str, runs), *map(str, exports)]


def models_of(fields: dict[str, str]) -> list[dict[str, str]]:
    """Return the fields of one job for each model. The second, if one is named, differs only in its
    checkpoint or adapter."""
    first = {name: fields[name] for name in fields if name in SHOWN}
    others = {name: fields.get(f"other_{name}", "").strip() for name in OTHER}
    if not any(others.values()):
        return [first]
    second = first | {name: text for name, text in others.items() if text}
    if not others["lora"]:
        second |= {"lora": "", "lora_strength": ""}  # no adapter: before and after
    return [second, first]


def filled(fields: dict[str, str], jobs: list[str]) -> str:
    """Return the address of the page with the form filled in as it was, and these jobs below it."""
    names = [*SHOWN, *(f"other_{name}" for name in OTHER)]
    kept = [(name, fields[name]) for name in names if 0 < len(fields.get(name, "")) < MOST_LETTERS]
    return f"/playground?{urlencode([*kept, *(('job', job) for job in jobs)])}"
