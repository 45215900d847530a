"""Triton's interpreter, which runs kernels on a CPU, and how a test asks a process for it."""

import inspect
import os
import subprocess
import sys
from functools import cache

import pytest

READY = "from tests.helpers.interpreter import look_once; look_once()\n"


def interpreted(code: str) -> str:
    """Run Python in a process where kernels run on a CPU; return what it prints."""
    pytest.importorskip("triton")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", READY + code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def look_once() -> None:
    """Let the interpreter look once for what it replaces in the language of kernels. In each call
    of a function it would look at everything that is there: more than half of its time."""
    from triton.runtime import interpreter

    is_builtin = interpreter.tl.core.is_builtin

    @cache
    def builtins(package) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def replace(package, builder, scope) -> None:
        for name in builtins(package):
            member = getattr(package, name)
            if is_builtin(member):  # and not replaced already
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = replace
