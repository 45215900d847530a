"""Run commands one after another in this process, instead of starting a process for each.

What is imported, loaded onto the GPU and compiled by Triton is reused by the commands that follow,
and so is the cache of the last training, as long as its files do not change. Everything else is as
if each command ran alone: random states, settings of torch, signal handlers, folder, environment;
and the memory of the command before is freed.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mmdit.data.batches.kept_cache import KeptCache
from mmdit.diagnostics.recipe import DRIVER
from mmdit.signals import handling
from mmdit.training.errors import RunError
from mmdit.training.graphs.common import try_again
from mmdit.training.trainer import StopRequest

# Settings of torch that commands may change: how to read each, and how to set it.
SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
)
FLAGS = ("benchmark", "deterministic")  # in torch.backends.cudnn


def program() -> str:
    """Return the module of the program that runs in this process: mmdit, or a driver of ours that
    knows further configs."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = spec.name if spec else ""
    return name if DRIVER.fullmatch(name) else "mmdit"


class Fresh:
    """The state of this process at the time when the object is made, before any command; `restore`
    returns to it."""

    def __init__(self):
        self.settings = [get() for get, _ in SETTINGS]
        self.flags = {name: getattr(torch.backends.cudnn, name) for name in FLAGS}
        self.seed, self.torch_state = torch.initial_seed(), torch.get_rng_state()
        self.random_state, self.numpy_state = random.getstate(), np.random.get_state()
        self.folder, self.environment = os.getcwd(), dict(os.environ)
        self.words = list(sys.argv)
        root = logging.getLogger()
        self.logging = root.level, list(root.handlers)
        self.handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}

    def restore(self) -> None:
        """Restore the state, and free the memory that the last command used."""
        self._restore_torch()
        random.setstate(self.random_state)
        np.random.set_state(self.numpy_state)
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environment)
        sys.argv[:] = self.words
        root = logging.getLogger()
        root.setLevel(self.logging[0])
        root.handlers[:] = self.logging[1]
        for number, handler in self.handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        gc.collect()
        gc.freeze()  # so that later collections skip imports, which takes half a second
        free_gpus()

    def _restore_torch(self) -> None:
        for (get, put), value in zip(SETTINGS, self.settings, strict=True):
            if get() != value:
                put(value)
        for name, value in self.flags.items():
            setattr(torch.backends.cudnn, name, value)
        torch.set_rng_state(self.torch_state)
        if torch.cuda.is_initialized():
            for generator in torch.cuda.default_generators:
                generator.manual_seed(self.seed)
        try_again()
        # Otherwise graphs of other networks' blocks would count towards the limit of the next ones.
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()


def free_gpus() -> None:
    """Release GPU memory that no tensor uses, and reset its peak."""
    if not torch.cuda.is_initialized():
        return
    torch.cuda.empty_cache()
    for number in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(number)


class InProcess:
    """Runs commands in this process by `run`, which takes their words and returns a status. Make it
    before the first command. `module`: the program of the recipe. ValueError if this process runs
    another program."""

    def __init__(self, run: Callable[[list[str]], int | None], module: str = "mmdit"):
        if module != program():
            typed = "mmdit" if module == "mmdit" else f"python -m {module}"
            raise ValueError(
                f"--in_process runs the commands of the recipe in this process, of {program()}, but"
                f" they are those of {module}: give `{typed} reproduce … --in_process`, or leave"
                " --in_process out"
            )
        self.run, self.module, self.fresh = run, module, Fresh()
        self.cache = KeptCache()

    def __call__(self, words: list[str]) -> None:
        """Run a command to its end. RunError if it failed. KeyboardInterrupt if a signal asked it
        to stop; it has then ended as it would alone, so a training has saved."""
        before = StopRequest.heard
        try:
            with stoppable() as heard, warnings.catch_warnings(), self.cache.used():
                status = status_of(self.run, words)
        finally:
            self.fresh.restore()
        if heard or StopRequest.heard > before:
            raise KeyboardInterrupt
        if status:
            raise RunError(
                f"`{self.module} {shlex.join(words)}` ended with status {status}; see above"
            )


@contextmanager
def stoppable() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt while the block runs for SIGINT and SIGTERM. Yield a list of the
    signals that arrived, without those that a training handles itself."""
    heard: list[int] = []

    def stop(signum, frame):
        heard.append(signum)
        raise KeyboardInterrupt

    with handling(stop, signal.SIGINT, signal.SIGTERM):
        yield heard


def status_of(run: Callable[[list[str]], int | None], words: list[str]) -> int:
    """Return the exit status that a process running `run(words)` would have."""
    try:
        return run(words) or 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
    return 1
