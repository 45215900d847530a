"""End a training that hangs, and report which rank hangs, in which step and phase."""

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

STORE_SECONDS = 5  # time limit for the store, which may itself have died
SHOWN = 8  # ranks named in a message


class Watch:
    """The loop calls `at(step, phase)`; a thread publishes it about once a second and checks the
    time. When one phase takes longer than `minutes`, the process prints what every rank is doing
    and its own stacks, and exits (as the others will: a hanging collective cannot be cancelled).
    When a rank dies, the others fail at once, and name it by the same table.
    """

    def __init__(self, world: World, minutes: float, run_dir: Path | None = None):
        self.world, self.seconds, self.run_dir = world, 60 * minutes, run_dir
        self._now = (0, "starting", time.monotonic())
        self._store = world.store.clone() if world.store else None
        if self._store:
            self._store.set_timeout(timedelta(seconds=STORE_SECONDS))
        self._done = threading.Event()

    def at(self, step: int, phase: str) -> None:
        """Note the current step, counted from 1, and the phase."""
        self._now = (step, phase, time.monotonic())

    @contextlib.contextmanager
    def running(self):
        """Watch within the `with` block. A RuntimeError by which a collective reports a lost
        process is raised as a RunError."""
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
            # Wait for the thread, however long its last call to the store takes: a thread inside a
            # call of torch when the interpreter ends aborts the process ("terminate called without
            # an active exception").
            thread.join()

    def _look(self) -> None:
        pause, woke = min(1.0, self.seconds / 10), time.monotonic()
        while not self._done.wait(pause):
            step, phase, since = self._now
            asleep, woke = time.monotonic() - woke - pause, time.monotonic()
            if asleep > pause:  # SIGSTOP: the whole process slept, and did not hang
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
        """Return what a rank published last, None if nothing. RuntimeError if the store is gone."""
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
        """Return a line for each rank that says where it is, silent ranks and those furthest behind
        first. It takes two seconds: a rank that publishes nothing in them is silent. (Times cannot
        be compared, because the clocks of machines differ.)"""
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
