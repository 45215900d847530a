"""Work done by other processes, with results in order. A killed process, or a full /dev/shm, is
reported and survived."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from mmdit.data.dataset.problems import Skip
from mmdit.data.dataset.records import Record
from mmdit.files import naming

KILLED = "the process that read it was killed (out of memory?)"
ITEMS_PER_HELPER = 2048  # with fewer, a process saves less time than it takes to start
LARGE = 1 << 18  # bytes of an item above which sending it to another process does not pay
Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerDied(ValueError):
    """Raised when a worker process was killed. `numbers`: of the keys on which it may have been
    working."""

    def __init__(self, numbers: set[int]):
        super().__init__(
            "a process that reads data was killed, most likely because the memory was full: take"
            " fewer num_workers, or a machine (or container limit) with more memory, and go on from"
            " there with the same command; a training with --resume"
        )
        self.numbers = numbers


def cores() -> int:
    """Return how many cores this process may use; containers can limit them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclasses.dataclass
class _Parcel:
    """A pickled result, for which shared memory had no room."""

    content: bytes


class _Job(Dataset):
    """Wraps a dataset in a worker: it notes in `doing` which process works on which key, and makes
    results ready to be sent."""

    def __init__(self, dataset: Dataset, doing: Any):
        self.dataset, self.doing = dataset, doing

    def __getitem__(self, numbered: tuple[int, Any]) -> Any:
        number, key = numbered
        worker = get_worker_info()
        if worker is None:
            return self.dataset[key]
        self.doing[2 * worker.id], self.doing[2 * worker.id + 1] = os.getpid(), number
        result = self.dataset[key]
        try:
            for tensor in _tensors(result):
                # here, because a failure in the thread that sends it later would be a mere hang
                tensor.share_memory_()
        except RuntimeError:
            return _Parcel(pickle.dumps(result))
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif dataclasses.is_dataclass(value) and hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


def _as_it_is(result: Any) -> Any:
    return result


def _begin(_worker: int) -> None:
    # the parent stops the workers; they need not report it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # when memory runs out, a worker is killed and not the parent, which can report it
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500", encoding="utf-8")


def results(
    dataset: Dataset, keys: Iterable, num_workers: int, pin_memory: bool = False
) -> Iterator[Any]:
    """Yield `dataset[key]` for every key, in order, prepared in advance by worker processes, at
    most as many as there are cores (more would only wait for each other); with 0 workers, by this
    process. WorkerDied if one was killed. ValueError if too many files are open.
    """
    workers = min(num_workers, cores())
    with naming("shared memory, /dev/shm"):
        doing = multiprocessing.RawArray("q", 2 * workers + 1)
    loader = DataLoader(
        _Job(dataset, doing),
        batch_size=None,
        sampler=enumerate(keys),  # may be endless
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_begin,
    )
    with _without_interruption():
        made = iter(loader)
    reported = False
    while True:
        try:
            result = next(made)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            raise _explained(error, doing) from None
        if isinstance(result, _Parcel):
            if not reported:
                size = shutil.disk_usage("/dev/shm").total >> 20 if os.path.isdir("/dev/shm") else 0
                tqdm.write(
                    f"shared memory (/dev/shm, {size} MB) is full: data goes through pipes, which"
                    " is slower; start the container with --shm-size=8g, or take fewer"
                    " --num_workers",
                    file=sys.stderr,
                )
            reported, result = True, pickle.loads(result.content)
        yield result


@contextlib.contextmanager
def _without_interruption() -> Iterator[None]:
    """After this block, remove the signal handler that torch installs within it, which raises an
    error about a killed worker at any point of the program: `next` will report it."""
    main = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    before = signal.getsignal(signal.SIGCHLD) if main else None
    yield
    if main:
        signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)


def _explained(error: Exception, doing: Any) -> Exception:
    text = str(error)
    if "Too many open files" in text:
        return ValueError(
            "too many files are open for so many processes: raise the limit (ulimit -n 4096), or"
            " take fewer num_workers"
        )
    # errors while fetching from a process that is gone
    unsent = isinstance(error, ConnectionError | EOFError | FileNotFoundError)
    if "in DataLoader worker process" in text or not (unsent or "DataLoader worker (pid" in text):
        return error  # an error in the work itself
    alive = {process.pid for process in multiprocessing.active_children()}
    pairs = zip(doing[0:-1:2], doing[1::2], strict=True)
    return WorkerDied({number for pid, number in pairs if pid and pid not in alive})


def _loaded(records: list[Record]) -> list[Record]:
    return [record.loaded() for record in records]


def each(
    dataset: Dataset,
    records: list[Record],
    at_once: int,
    num_workers: int,
    pin_memory: bool = False,
) -> Iterator[tuple[list[Record], Any]]:
    """Yield (part, `dataset[part]`) for parts of `at_once` records, in order. Parts during which a
    worker was killed come at the end, record by record, each in a process of its own; if that is
    killed, too, the result is a list with a `Skip`."""
    parts = [records[i : i + at_once] for i in range(0, len(records), at_once)]
    suspects: list[Record] = []
    while parts:
        done = 0
        try:
            for result in results(dataset, map(_loaded, parts), num_workers, pin_memory):
                done += 1
                yield parts[done - 1], result
            break
        except WorkerDied as death:
            lost = {number for number in death.numbers if number >= done} or {done}
            here = [record for number in sorted(lost) for record in parts[number]]
            names = ", ".join(record.id for record in here)
            tqdm.write(
                f"a worker process was killed (out of memory?) at one of these {len(here)} records,"
                f" which will be done one by one at the end: {names}",
                file=sys.stderr,
            )
            suspects += here
            parts = [
                part for number, part in enumerate(parts) if number >= done and number not in lost
            ]
    for record in suspects:
        try:
            (result,) = results(dataset, [_loaded([record])], 1)
        except WorkerDied:
            result = [Skip.of(record, KILLED)]
        yield [record], result


# ── work that is handed over ──────────────────────────────────────────────────────────────────────
def helper_count(items: int, item_bytes: int, most: int) -> int:
    """Return how many processes, at most `most`, should help to write `items` items of `item_bytes`
    bytes each: none if items are few or large."""
    if item_bytes > LARGE:
        return 0
    return min(most, cores(), items // ITEMS_PER_HELPER)


@contextlib.contextmanager
def helping_processes(count: int) -> Iterator[Executor | None]:
    """Start processes that execute tasks while the block runs, and yield their pool; None if
    `count` is 0. They end when this process does, even if it is killed. ValueError if one of them
    was killed."""
    if not count:
        yield None
        return
    gc.freeze()  # or each process's garbage collector would touch, and so copy, what was imported
    try:
        with ProcessPoolExecutor(count, initializer=_begin_helping) as pool:
            pool.submit(int).result()  # forked now, before this process has more threads
            yield pool
    except BrokenProcessPool:
        raise ValueError(
            "a process that helps was killed, most likely because the memory was full: take a"
            " machine (or container limit) with more memory, and give the same command again, it"
            " goes on from there"
        ) from None
    finally:
        gc.unfreeze()


def _begin_helping() -> None:
    _begin(0)
    torch.set_num_threads(1)
    threading.Thread(target=_end_once_unneeded, daemon=True).start()


def _end_once_unneeded() -> None:
    """End this process when the process that it helps has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def ahead(
    pool: Executor | None, work: Callable[[Task], Result], tasks: Iterable[Task], most: int
) -> Iterator[Result]:
    """Yield `work(task)` for every task, in order, computed by a pool, up to `most` of them in
    advance; without a pool, by this process on demand."""
    if pool is None:
        yield from map(work, tasks)
        return
    waiting: deque[Future[Result]] = deque()
    for task in tasks:
        waiting.append(pool.submit(work, task))
        if len(waiting) > most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
