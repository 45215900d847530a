"""Keep jobs as files beside the runs: `<runs>/.jobs/<number>/` holds the request (job.json, written
once), its progress (status.json, written by its runner) and log.txt.

Each job has a runner, a process in a session of its own (job_runner.py): so jobs and their queue
outlive the server, and a server that starts finds all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mmdit.files import read_object, read_text, write_atomically
from mmdit.ui.processes import is_alive, is_identity, terminate

FOLDER = ".jobs"
NAME = re.compile(r"\d{5,}")
STOP = "stop"  # a file that asks a runner to stop before it has reported
STOPPED = (0, 130, -signal.SIGTERM, 128 + signal.SIGTERM)  # exit codes after a request to stop
RUNNER = (sys.executable, "-m", "mmdit.ui.job_runner")
START_SECONDS = 30  # within which a runner must have reported
LOG_BYTES = 1 << 16
UP = "\x1b[A"  # moves the cursor up by a line
MOVES = re.compile(r"(\r|\n|\x1b\[A)")
OTHER_CODES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
LATEST = 1e11  # seconds; no clock shows a later time
# Not passed on to jobs: the token is for people.
SECRETS = ("MMDIT_UI_TOKEN",)


@dataclass(frozen=True)
class Job:
    """One job. `words`: the command line after `mmdit`. `device`: jobs that share one of these
    devices wait for each other; a job without one waits for none. `run` and `out`: the folders that
    it fills, if any. `processes`: if more than one, torchrun starts them. `cwd`: the working
    directory; None in files of earlier versions."""

    id: str
    words: list[str]
    device: str | None
    created: float
    run: str | None = None
    out: str | None = None
    processes: int = 1
    cwd: str | None = None

    @property
    def devices(self) -> set[str]:
        """Return the names of the devices that the job uses."""
        return set(self.device.split(",")) if self.device else set()

    @property
    def command(self) -> str:
        """Return the subcommand."""
        return self.words[0]

    @property
    def line(self) -> str:
        """Return the command as a user would type it."""
        return command_line(self.words, self.processes)

    @property
    def argv(self) -> list[str]:
        """Return the arguments of the process, which is started without a shell."""
        launcher: list[str] = []
        if self.processes > 1:
            launcher = ["-m", "torch.distributed.run", *_of_torchrun(self.processes)]
        return [sys.executable, *launcher, "-m", "mmdit", *self.words]


def command_line(words: list[str], processes: int = 1) -> str:
    """Return the words of a command as one line for a shell."""
    if processes > 1:
        return shlex.join(["torchrun", *_of_torchrun(processes), "-m", "mmdit", *words])
    return shlex.join(["mmdit", *words])


def _of_torchrun(processes: int) -> list[str]:
    """Return the options of torchrun for processes on this machine alone."""
    return ["--standalone", f"--nproc_per_node={processes}"]


@dataclass(frozen=True)
class JobState:
    """The state of a job. `word`: queued, running, stopping, finished, stopped, failed or lost."""

    word: str
    reason: str = ""

    @property
    def is_over(self) -> bool:
        """Return whether the state is final."""
        return self.word in ("finished", "stopped", "failed", "lost")


class JobStore:
    """The jobs that lie beside the runs of one folder."""

    def __init__(self, runs: Path):
        self.folder = runs / FOLDER

    def path(self, job: str) -> Path:
        """Return the folder of a job. ValueError if there is no job of that name."""
        path = self.folder / job
        if not NAME.fullmatch(job) or not os.path.isfile(path / "job.json"):
            raise ValueError(f"there is no job {job!r}")
        return path

    def names(self) -> list[str]:
        """Return the names of all jobs, the oldest first."""
        if not os.path.isdir(self.folder):
            return []
        return sorted(filter(NAME.fullmatch, os.listdir(self.folder)), key=int)

    def jobs(self) -> list[Job]:
        """Return all jobs, the oldest first."""
        read = []
        for name in self.names():
            with contextlib.suppress(ValueError):
                read.append(self.read(name))
        return read

    def read(self, job: str) -> Job:
        """Return a job; entries that a later version added are ignored. ValueError if there is no
        job of that name, or its file was not written by this program."""
        path = self.path(job) / "job.json"
        try:
            row = json.loads(read_text(path))
            read = Job(**{one.name: row[one.name] for one in fields(Job) if one.name in row})
        except (OSError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        if not (isinstance(read.words, list) and read.words):
            raise ValueError(f"{path} names no command")
        texts = [
            *read.words,
            *(text for text in (read.device, read.run, read.out, read.cwd) if text),
        ]
        fine = all(isinstance(text, str) and "\0" not in text for text in texts)
        numbers = type(read.processes) is int and isinstance(read.created, int | float)
        if not (read.id == job and fine and numbers and 0 <= read.created < LATEST):
            raise ValueError(f"{path} is none that this program has written")
        return read

    def reserve(self) -> Path:
        """Make and return the folder of a new job, into which its files can be written before it is
        added."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number = max(map(int, self.names()), default=0)
        while True:
            number += 1
            path = self.folder / f"{number:05d}"
            with contextlib.suppress(FileExistsError):  # another process took it at the same time
                path.mkdir()
                return path

    def is_being_made(self, job: str) -> bool:
        """Return whether a folder was reserved a moment ago for a job that is not written yet."""
        folder = self.folder / job
        with contextlib.suppress(OSError):
            age = time.time() - folder.stat().st_mtime
            return abs(age) < START_SECONDS and not (folder / "job.json").exists()
        return False

    def add(
        self,
        path: Path,
        words: list[str],
        device: str | None,
        run: str | None = None,
        out: str | None = None,
        processes: int = 1,
        cwd: str | None = None,
    ) -> Job:
        """Start the job of the reserved folder `path`; it waits for earlier jobs that share its
        devices. `cwd`: the working directory, by default the present one."""
        cwd = cwd or os.getcwd()
        job = Job(path.name, words, device, time.time(), run, out, processes, cwd)
        write_atomically(path / "job.json", json.dumps(asdict(job), indent=1))
        environment = {name: os.environ[name] for name in os.environ if name not in SECRETS}
        with (path / "log.txt").open("ab") as log:
            subprocess.Popen(
                [*RUNNER, str(path.resolve())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        return job

    def status(self, job: str) -> dict:
        """Return the status that the runner of a job has written."""
        return read_status(self.folder / job)

    def state(self, job: Job) -> JobState:
        """Return the state of a job."""
        status = self.status(job.id)
        if not status:
            # abs, because the clock may have been set back
            if abs(time.time() - job.created) < START_SECONDS:
                return JobState("queued", "is being started")
            return JobState("lost", "its process never came to be; the log may say why")
        code, asked = status.get("exit"), status.get("stop_asked")
        if status.get("ended"):
            # torchrun exits with 1 if a process is stopped before it can handle signals
            fine = (*STOPPED, 1) if job.processes > 1 else STOPPED
            return self._ended(job, code, bool(asked) and code in (*fine, None))
        if is_alive(status.get("child")):
            return JobState("stopping" if asked else "running")
        if is_alive(status.get("runner")):
            reason = f"waits for earlier jobs on {job.device}" if job.device else ""
            return JobState("queued", reason)
        return JobState("lost", "its process is gone and did not say how: killed, or a restart")

    def _ended(self, job: Job, code: int | None, as_asked: bool) -> JobState:
        if code is None:
            return JobState("stopped", "before it was started")
        if as_asked:
            return JobState("stopped", "on request; it can be continued")
        if code == 0:
            return JobState("finished")
        if code < 0:
            return JobState("failed", f"ended by signal {-code}: {self.last_error(job.id)}")
        return JobState("failed", self.last_error(job.id) or f"exit code {code}")

    def log(self, job: str) -> str:
        """Return the end of a job's output, as a terminal would show it: for a progress bar, its
        last state."""
        try:
            with (self.path(job) / "log.txt").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_BYTES))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return as_shown(text)

    def last_error(self, job: str) -> str:
        """Return the last line of the log that reports an error; without one, the last line."""
        lines = [line.strip() for line in self.log(job).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or [""])[-1].removeprefix("error: ")

    def stop(self, job: str) -> None:
        """Ask a job to stop by SIGTERM, upon which a training saves and ends. A runner that has not
        reported yet will find a file that asks it to."""
        if not self.status(job):
            (self.path(job) / STOP).touch()
        status = self.status(job)
        runner, child = status.get("runner"), status.get("child")
        if is_alive(runner):
            terminate(runner)
        elif child:
            terminate(child, self.read(job).processes > 1)

    def by_run(self) -> dict[Path, tuple[str, JobState]]:
        """Return, for each run folder, the newest job that trains in it, with its state."""
        newest = {Path(job.run): job for job in self.jobs() if job.run}
        return {run: (job.id, self.state(job)) for run, job in newest.items()}


def as_shown(text: str) -> str:
    """Return `text` as a terminal would show it: a line that is written again replaces the old one,
    and a progress bar below another (tqdm) moves the cursor down to its line and up again. Colours
    are dropped."""
    rows, row, begun = [""], 0, False
    for part in MOVES.split(text):
        if part == "\n":
            row, begun = row + 1, False
            if row == len(rows):
                rows.append("")
        elif part == UP:
            row, begun = max(0, row - 1), False
        elif part == "\r":
            begun = False
        elif part:
            rows[row], begun = (rows[row] if begun else "") + part, True
    return "\n".join(OTHER_CODES.sub("", line).rstrip() for line in rows)


def read_status(folder: Path) -> dict:
    """Return the content of status.json in a job folder, or an empty dictionary; entries that no
    runner writes are dropped."""
    status = read_object(folder / "status.json")
    known = {name: status[name] for name in ("runner", "child") if is_identity(status.get(name))}
    for name in ("queued", "started", "stop_asked", "ended", "exit"):
        if isinstance(status.get(name), int | float | None) and name in status:
            known[name] = status[name]
    return known
