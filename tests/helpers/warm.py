"""Processes that have done their imports before they begin, for tests that need a process of its
own and not a fresh interpreter: torch and Dynamo take 2.5 s.

    process = Process("-m", "mmdit", "train", …)        what follows `python` in a shell
    done = run("-c", "print(1)")                        as subprocess.run

One server for each process of pytest imports, and forks what it is asked for. It computes nothing,
so that each fork is what a fresh process is after the same imports, except that options of the
interpreter, and what libraries read from the environment while they are imported, are the server's.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATH = os.pathsep.join(map(str, (ROOT, ROOT / "VTP")))


# ── in the process of a test ──
@cache
def _server() -> socket.socket:
    """Start the server of this process; return its end of the line, which ends it when closed."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "tests.helpers.warm", str(theirs.fileno())]
    environment = os.environ | {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()])
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


class Process:
    """Run `python *words` in a fork of the server, with `environment` and that of this process, and
    without input."""

    def __init__(self, *words: str, cwd: Path | str = ROOT, **environment: str):
        self.returncode: int | None = None
        self._outputs = [tempfile.TemporaryFile() for _ in range(2)]
        self._line, theirs = socket.socketpair()
        with open(os.devnull) as nothing, theirs:
            files = (theirs, nothing, *self._outputs)
            socket.send_fds(_server(), [b"x"], [file.fileno() for file in files])
        job = {
            "words": list(map(str, words)),
            "cwd": str(cwd),
            "environment": os.environ | {"PYTHONPATH": PATH} | environment,
        }
        self._file = self._line.makefile("rw")
        print(json.dumps(job), file=self._file, flush=True)
        self.pid = int(self._file.readline())

    def wait(self, timeout: float = 120) -> int:
        """Wait for the end; return the exit code, negative for a signal.

        Raises subprocess.TimeoutExpired after `timeout` seconds.
        """
        if self.returncode is None:
            if not select.select([self._line], [], [], timeout)[0]:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired("python", timeout, *self.outputs())
            self.returncode = int(self._file.readline())
            self._file.close()
            self._line.close()
        return self.returncode

    def ended(self) -> bool:
        return self.returncode is not None or bool(select.select([self._line], [], [], 0)[0])

    def outputs(self) -> list[str]:
        """Return what was written up to now: output, and errors."""
        numbers = [file.fileno() for file in self._outputs]
        return [os.pread(n, os.fstat(n).st_size, 0).decode() for n in numbers]

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def run(*words: str, timeout: float = 120, **options: str) -> subprocess.CompletedProcess:
    """Run `python *words` to its end, as `subprocess.run` does."""
    process = Process(*words, **options)
    status = process.wait(timeout)
    return subprocess.CompletedProcess(words, status, *process.outputs())


# ── in the server ──
def _serve(line: socket.socket) -> dict:
    """Fork whenever it is asked for. Return in the forks alone, with what each of them is to
    run."""
    keepers: set[int] = set()
    while True:
        asked, files, *_ = socket.recv_fds(line, 1, 4)
        if not asked:
            os._exit(0)
        keepers = {keeper for keeper in keepers if not os.waitpid(keeper, os.WNOHANG)[0]}
        answer, *files = files
        process = os.fork()
        if not process:
            break
        keepers.add(process)
        for file in (answer, *files):
            os.close(file)
    line.close()
    with socket.socket(fileno=answer) as keeper, keeper.makefile("rw") as told:
        begin = json.loads(told.readline())
        process = os.fork()
        if process:
            print(process, file=told, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), file=told, flush=True)
            os._exit(0)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    return begin


def _run(words: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Become what `python *words` is."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=environment.get("PYTHONIOENCODING", "utf-8"))
    how, *rest = words
    if how == "-m":
        module, *arguments = rest
        sys.argv, sys.path[0] = ["-m", *arguments], cwd
        sys.modules.pop(module, None)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif how == "-c":
        code, *arguments = rest
        sys.argv, sys.path[0] = ["-c", *arguments], ""
        exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.argv = words
        runpy.run_path(how, run_name="__main__")


def _ended(job: dict) -> int:
    """Run a job; return the status of its end, as the interpreter would."""
    try:
        _run(**job)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.run  # noqa: F401

    # Imports of Dynamo, commands and TensorBoard. It also freezes what is there, which a first
    # garbage collection would walk, and so copy.
    from tests.helpers import forked_runs  # noqa: F401

    with socket.socket(fileno=int(sys.argv[1])) as line:
        job = _serve(line)
    status = _ended(job)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all modules of torch would be cleared, which takes 0.3 s
