"""The pages about jobs: the list, a form for each command, and one job with its log and its
files."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from mmdit.files import objects_in, real_path
from mmdit.shipped import ROOTS
from mmdit.training.run_folder import is_run, text_of
from mmdit.ui.config_forms import current_fields
from mmdit.ui.job_files import Job, JobStore
from mmdit.ui.job_requests import JobRequest, Workplace, again
from mmdit.ui.run_folders import find_runs
from mmdit.ui.run_pages import SHOWN_FILES, send_picture
from mmdit.ui.templating import Templates, or_not_there, utf8

MOST_PICTURES, MOST_SKIPPED, MOST_CONFIGS = 64, 200, 500


class JobPages:
    """The list of jobs, a form for each command, and a page for each job."""

    def __init__(self, place: Workplace, templates: Templates, runs: Path):
        self.place, self.templates, self.runs = place, templates, runs

    def routes(self) -> list[BaseRoute]:
        """Return the addresses of these pages."""
        return [
            Route("/jobs", self.overview),
            Route("/new/{command}", self.new, methods=["GET", "POST"]),
            Route("/job/{job}", self.job),
            Route("/job/{job}/stop", self.stop, methods=["POST"]),
            Route("/job/{job}/again", self.again, methods=["POST"]),
            Route("/api/job/{job}", self.facts),
            Route("/job-files/{job}/{rest:path}", self.file),
        ]

    def overview(self, request: Request) -> Response:
        """Show every job and the commands that may be started."""
        return self.templates.page(
            request,
            "jobs.html",
            rows=rows_of(self.place.store, self.place.store.jobs()),
            commands=self.place.named(reports=False),
        )

    # ── forms ──
    def new(self, request: Request) -> Response:
        """Show the form of a command, check what was filled in, or start its job."""
        fields = dict(request.query_params)
        if request.method == "POST":
            form = request.scope["form"]
            fields = {name: values[-1] for name, values in form.items()}
        with or_not_there():
            asked = JobRequest(self.place, request.path_params["command"], fields)
        if asked.has_config and not asked.config_path:
            return self.templates.page(
                request,
                "choose_config.html",
                command=asked.command,
                fields=fields,
                configs=self._configs(),
            )
        problem, line, form = "", "", None
        try:
            if asked.has_config:
                form = asked.form()
            if request.method == "POST":
                if fields.get("do") == "start":
                    return RedirectResponse(f"/job/{asked.start().id}", 303)
                line = asked.preview()
        except (ValueError, OSError) as error:
            problem = str(error)
        return self.templates.page(
            request,
            "new_job.html",
            400 if problem and request.method == "POST" else 200,
            command=asked.command,
            about=(asked.parser.description or "").strip(),
            options=asked.options(),
            distributed=asked.offer.distributed,
            beside=asked.beside,
            fields=current_fields(fields),
            config_path=asked.config_path,
            has_overrides=asked.has_overrides,
            form=form,
            problem=problem,
            line=line,
            automatic=self.place.automatic,
        )

    def _configs(self) -> list[str]:
        """Return YAML files from which to start: those that ship, those in the allowed folders,
        those of runs."""
        names: list[str] = []
        for root in ROOTS:
            files = sorted((root / "configs").rglob("*.yaml"))
            names += [path.relative_to(root).as_posix() for path in files]
        for folder in self.place.allowed.folders:
            files = sorted([*folder.glob("*.yaml"), *folder.glob("configs/*.yaml")])
            names += [str(path) for path in files]
        names += [str(run.folder / "config.yaml") for run in find_runs(self.runs)]
        return list(dict.fromkeys(names))[:MOST_CONFIGS]

    # ── one job ──
    def job(self, request: Request) -> Response:
        """Show one job."""
        job = self._job(request)
        return self.templates.page(
            request,
            "job.html",
            job=job,
            state=self.place.store.state(job),
            log=self.place.store.log(job.id),
            pictures=pictures_of(job),
            skipped=skipped_of(Path(job.out)) if job.out else [],
            is_cache=job.out is not None and job.command.startswith("cache-"),
            run=self._run_name(job),
            created=time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.created)),
        )

    def _job(self, request: Request) -> Job:
        with or_not_there():
            return self.place.store.read(request.path_params["job"])

    def _run_name(self, job: Job) -> str | None:
        """Return the name of the run that the job fills, once this server shows that run."""
        root = self.runs.resolve()
        if job.run and Path(job.run).is_relative_to(root) and is_run(Path(job.run)):
            return utf8(Path(job.run).relative_to(root).as_posix())
        return None

    def facts(self, request: Request) -> Response:
        """Return the state, log and pictures of a job as JSON."""
        job = self._job(request)
        state = self.place.store.state(job)
        return JSONResponse(
            {
                "state": state.word,
                "reason": state.reason,
                "over": state.is_over,
                "log": self.place.store.log(job.id),
                "pictures": pictures_of(job),
                "run": self._run_name(job),
            }
        )

    def stop(self, request: Request) -> Response:
        """Ask a job to stop."""
        job = self._job(request)
        try:
            with or_not_there():
                self.place.store.stop(job.id)
        except OSError as error:  # a full disk, or another user's job
            return self.templates.problem(request, str(error))
        return RedirectResponse(f"/job/{job.id}", 303)

    def again(self, request: Request) -> Response:
        """Start a job again, to continue where it was stopped."""
        old = self._job(request)
        try:
            with or_not_there():
                new = again(self.place, old)
        except OSError as error:  # a full disk
            return self.templates.problem(request, str(error))
        return RedirectResponse(f"/job/{new.id}", 303)

    def file(self, request: Request) -> Response:
        """Return a picture that a job has written."""
        answer = None
        with contextlib.suppress(ValueError):
            job = self.place.store.read(request.path_params["job"])
            if job.out:
                folder = real_path(job.out)
                path = real_path(folder / request.path_params["rest"])
                answer = send_picture(path) if path.is_relative_to(folder) else None
        return answer or JSONResponse({"error": "there is no such picture"}, 404)


def rows_of(store: JobStore, jobs: list[Job]) -> list[dict]:
    """Return jobs with their states, the newest first."""
    return [{"job": job, "state": store.state(job)} for job in reversed(jobs)]


def pictures_of(job: Job) -> list[str]:
    """Return the names of the pictures and videos in the folder that a job fills; sheets come
    first."""
    try:
        names = os.listdir(job.out or "")
    except OSError:  # it does not exist, or cannot be read
        return []
    names = [name for name in names if Path(name).suffix.lower() in SHOWN_FILES]
    names = [name for name in names if name == utf8(name)]  # others fit into no address
    names.sort(key=lambda name: (name[:1].isdigit(), name))
    return names[:MOST_PICTURES]


def skipped_of(folder: Path) -> list[dict]:
    """Return the items that were left out of a cache, each with `id` and `reason`."""
    rows = []
    for path in sorted(folder.glob("skipped*.jsonl")):
        for row in objects_in(text_of(path)):
            rows.append({"id": row.get("id"), "reason": row.get("reason")})
    return rows[:MOST_SKIPPED]
