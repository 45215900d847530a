"""One job from its queue to its end: `python -m mmdit.ui.job_runner FOLDER`.

The runner waits for earlier jobs of its device, starts the command, passes SIGTERM on, and writes
what became of it to status.json. It needs no server.
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
        self.asked = False

    def note(self, **values) -> None:
        """Write what is new beside the job. Of one whose folder was removed nothing is written:
        the next job may have got its number."""
        self.status |= values
        with contextlib.suppress(ValueError, OSError):
            if self.store.read(self.folder.name) == self.job:
                self._write()

    def _write(self) -> None:
        write_atomically(self.folder / "status.json", json.dumps(self.status))

    def stop(self, number: int, frame: object) -> None:
        """Remember that the job shall stop: it leaves the queue, or its command is asked to end."""
        self.asked = True

    def waits(self) -> bool:
        """Return whether an earlier job that shares a device is not over."""
        earlier = [job for job in self.store.jobs() if int(job.id) < int(self.job.id)]
        return any(
            job.devices & self.job.devices and not self.store.state(job).is_over for job in earlier
        )

    def run(self) -> None:
        """Take the job to its end."""
        signal.signal(signal.SIGTERM, self.stop)
        self.note()
        self.asked = self.asked or (self.folder / STOP).exists()
        while not self.asked and self.waits():
            time.sleep(LOOK_SECONDS)
        if self.asked:
            self.note(stop_asked=time.time(), ended=time.time(), exit=None)
            return
        print(f"$ {self.job.line}", flush=True)
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        child = subprocess.Popen(self.job.argv, stdin=subprocess.DEVNULL, env=environment)
        started, said = identity(child.pid), False
        self.note(child=started, started=time.time())
        while child.poll() is None:
            if self.asked and not said:
                said = True
                terminate(started, self.job.processes > 1)
                self.note(stop_asked=time.time())
            time.sleep(LOOK_SECONDS)
        self.note(ended=time.time(), exit=child.returncode)


if __name__ == "__main__":
    Runner(Path(sys.argv[1])).run()
