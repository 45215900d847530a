"""A training that stands still is ended, and the rank that stands is named: who, in which step,
doing what."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from mmdit.training import checkpoint
from mmdit.training.distributed import World
from mmdit.training.errors import RunError

STORE_SECONDS = 5  # patience with the store: it may be what died
SHOWN = 8  # ranks named in a message


class Watch:
    """The loop calls `at(step, phase)`; a thread publishes it about once a second and looks at the
    clock. When one phase takes longer than `minutes`, the process prints what every rank does and
    its own stacks, and ends (as the others will: a hanging collective cannot be called off). A rank
    that dies makes the others fail at once: they name it by the same table.
    """

    def __init__(self, world: World, minutes: float, run_dir: Path | None = None):
        self.world, self.seconds, self.run_dir = world, 60 * minutes, run_dir
        self._now = (0, "starting", time.monotonic())
        self._store = world.store.clone() if world.store else None
        if self._store:
            self._store.set_timeout(timedelta(seconds=STORE_SECONDS))
        self._done = threading.Event()

    def at(self, step: int, phase: str) -> None:
        """`step` is the one in work, counted from 1."""
        self._now = (step, phase, time.monotonic())

    @contextlib.contextmanager
    def running(self):
        """Watch inside the `with` block, and raise RunError instead of the RuntimeError by which a
        collective reports a lost peer."""
        thread = threading.Thread(target=self._look, name="watch", daemon=True)
        thread.start()
        try:
            yield self
        except RunError:
            raise
        except RuntimeError as error:
            if self.world.size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise RunError(
                    f"rank {self.world.rank} lost another process in step {self._now[0]}"
                    f" ({self._now[1]}):"
                    f" {str(error).splitlines()[0]}\n{self.table()}\n{self._advice()}"
                ) from error
            raise
        finally:
            self._done.set()
            # However long its last word to the store takes: a thread that is inside a call of torch
            # when the interpreter ends takes the process down with it ("terminate called without
            # an active exception").
            thread.join()

    def _look(self) -> None:
        pause, woke = min(1.0, self.seconds / 10), time.monotonic()
        while not self._done.wait(pause):
            step, phase, since = self._now
            asleep, woke = time.monotonic() - woke - pause, time.monotonic()
            if asleep > pause:  # SIGSTOP: the whole process slept, and stood still in nothing
                since += asleep
                self._now = (step, phase, since)
            self._publish(step, phase)
            if time.monotonic() - since > self.seconds:
                message = (
                    f"rank {self.world.rank} stood still for {self.seconds:.0f} s in step {step}"
                    f" ({phase})"
                )
                print(
                    f"error: {message}, the limit of"
                    f" train.timeout_minutes\n{self.table()}\n{self._advice()}",
                    file=sys.stderr,
                    flush=True,
                )
                with contextlib.suppress(Exception):  # stderr may be no real file
                    faulthandler.dump_traceback(all_threads=True)
                os._exit(2)

    def _published(self, rank: int) -> list | None:
        """Return what a rank published last, None for nothing. RuntimeError: no store."""
        assert self._store is not None
        key = f"watch/{rank}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _advice(self) -> str:
        return checkpoint.how_to_go_on(self.run_dir) if self.run_dir else "Continue with --resume"

    def _publish(self, step: int, phase: str) -> None:
        if self._store:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"watch/{self.world.rank}", json.dumps([step, phase, time.time()]))

    def table(self) -> str:
        """Return a line a rank of where it is, the silent and the hindmost first. It takes two
        seconds, in which the silent become known by their silence: clocks of machines differ."""
        if not self._store:
            return "It is the only process."
        try:
            before = [self._published(rank) for rank in range(self.world.size)]
            time.sleep(min(2.0, self.seconds))
            now = [self._published(rank) for rank in range(self.world.size)]
        except RuntimeError:
            return (
                "  The store of the process group is gone, and with it the machine of rank 0 or"
                " its torchrun."
            )
        rows = []
        for rank, (first, second) in enumerate(zip(before, now, strict=True)):
            if second is None:
                rows.append((False, 0, f"  rank {rank}: never heard of"))
                continue
            step, phase, _ = second
            alive = rank == self.world.rank or first != second
            sign = "alive" if alive else "last heard of"
            rows.append((alive, step, f"  rank {rank}: {sign} in step {step} ({phase})"))
        more = [f"  and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
        return "\n".join([line for _, _, line in sorted(rows)[:SHOWN]] + more)
