"""`python -m MODULE WORDS`, where each command that `mmdit reproduce` starts is a process that
shares the imports of this one, which computes nothing itself.

    python -m tests.drivers.forked_commands mmdit reproduce NAME ...
"""

import runpy
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from mmdit.commands import reproduce
from tests.helpers.forked_runs import fork, wait


def start(module: str, *words: str) -> None:
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class Forked:
    """What `reproduce.run_command` asks of `subprocess.Popen`."""

    def __init__(self, command: list[str]):
        python, option, *words = command
        assert (python, option) == (sys.executable, "-m")
        self.log = Path(tempfile.mkdtemp()) / "log.txt"
        self.process = fork(lambda: start(*words), self.log)

    def wait(self) -> int:
        status = wait(self.process)
        print(self.log.read_text(), end="", flush=True)
        return status


if __name__ == "__main__":
    with patch.object(reproduce, "subprocess", SimpleNamespace(Popen=Forked)):
        start(*sys.argv[1:])
