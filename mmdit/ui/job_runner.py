"""Run one job from its queue to its end: `python -m mmdit.ui.job_runner FOLDER`.

The runner waits for earlier jobs on its devices, starts the command, passes SIGTERM on, and writes
the job's progress to status.json. It needs no server.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mmdit.files import write_atomically
from mmdit.ui.job_files import STOP, JobStore
from mmdit.ui.processes import identity, terminate

LOOK_SECONDS = 0.25


class Runner:
    """The process of one job."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.store = JobStore(folder.parents[1])
        self.job = self.store.read(folder.name)
        self.status: dict = {"runner": identity(os.getpid()), "queued": time.time()}
        self.asked, self.is_noted = False, False
        self.passed: set[str] = set()  # jobs that will never have to be waited for

    def note(self, **values) -> None:
        """Update the status, and write it beside the job. If the folder of the job was removed,
        nothing is written: a new job may have got its number."""
        self.status |= values
        try:
            if self.store.read(self.folder.name) == self.job:
                self._write()
            self.is_noted = True
        except ValueError:  # it was removed
            self.is_noted = True
        except OSError:  # a full disk
            self.is_noted = False

    def _write(self) -> None:
        write_atomically(self.folder / "status.json", json.dumps(self.status))

    def stop(self, number: int, frame: object) -> None:
        """Remember that the job was asked to stop: it then leaves the queue, or its command gets
        SIGTERM."""
        self.asked = True

    def rest(self) -> None:
        """Wait a moment, and retry a write that failed."""
        time.sleep(LOOK_SECONDS)
        if not self.is_noted:
            self.note()

    def waits(self) -> bool:
        """Return whether an earlier job that shares a device is not over. Jobs that can no longer
        matter are remembered, so that few of thousands are checked again."""
        names = (name for name in self.store.names() if int(name) < int(self.job.id))
        waits = False
        for name in filter(lambda name: name not in self.passed, names):
            # its device is known in a moment; both would take it for free
            if self.job.devices and self.store.is_being_made(name):
                waits = True
            with contextlib.suppress(ValueError):
                job = self.store.read(name)
                shared = bool(job.devices & self.job.devices)
                if not shared or self.store.status(name).get("ended"):
                    self.passed.add(name)
                elif not self.store.state(job).is_over:
                    waits = True
        return waits

    def run(self) -> None:
        """Run the job to its end."""
        signal.signal(signal.SIGTERM, self.stop)
        self.note()
        self.asked = self.asked or (self.folder / STOP).exists()
        while not self.asked and self.waits():
            self.rest()
        if self.asked:
            self.note(stop_asked=time.time(), ended=time.time(), exit=None)
            return
        with contextlib.suppress(OSError):  # a full disk
            print(f"$ {self.job.line}", flush=True)
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        try:
            child = subprocess.Popen(
                self.job.argv, stdin=subprocess.DEVNULL, env=environment, cwd=self.job.cwd
            )
        except OSError as error:  # the working directory is gone
            print(f"error: {error}", flush=True)
            self.end(2)
            return
        started, said = identity(child.pid), False
        self.note(child=started, started=time.time())
        while child.poll() is None:
            if self.asked and not said:
                said = True
                terminate(started, self.job.processes > 1)
                self.note(stop_asked=time.time())
            self.rest()
        self.end(child.returncode)

    def end(self, code: int) -> None:
        """Write that the command ended with this exit code, and retry until the disk has room."""
        self.note(ended=time.time(), exit=code)
        while not self.is_noted:
            self.rest()


if __name__ == "__main__":
    Runner(Path(sys.argv[1])).run()
