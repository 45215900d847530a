"""Process groups, as torchrun's environment describes them; without it, one process."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from mmdit.config import ConfigError
from mmdit.nn import kernels
from mmdit.nn.context_parallel import Context

T = TypeVar("T")
# Beside a GPU: on machines with many cores, waking threads for small copies costs milliseconds a
# step.
CPU_THREADS = 4


@dataclass(frozen=True)
class World:
    """This process's place in the job."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    store: dist.Store | None = None  # shared by the processes of the job
    group: dist.ProcessGroup | None = None  # of collectives; None is the default group
    context: Context | None = None  # the neighbours that share each clip with it; None: nobody
    torchrun: tuple[str, ...] = ()  # names of what started the job, see `torchrun_names`

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def context_size(self) -> int:
        """Return how many processes share each clip, and so see the same samples."""
        return self.context.size if self.context else 1

    @property
    def data_size(self) -> int:
        """Return how many processes see different samples; neighbours that share clips count as
        one."""
        return self.size // self.context_size

    @property
    def data_rank(self) -> int:
        """Return the number of this process, or of its neighbours that share clips, among
        `data_size`."""
        return self.rank // self.context_size

    def print(self, *words) -> None:
        if self.is_main:
            print(*words, flush=True)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.group)

    def share(self, make: Callable[[], T]) -> T:
        """Return on every rank what `make` returns on the main rank. If it raises there, every rank
        raises."""
        if self.size == 1:
            return make()
        message: list = [None, ""]  # the value, or what went wrong
        try:
            if self.is_main:
                message[0] = make()
        except Exception as error:
            message[1] = str(error) or type(error).__name__
            raise
        finally:
            dist.broadcast_object_list(message, src=0, group=self.group, device=torch.device("cpu"))
        if message[1]:
            raise ValueError(message[1])
        return message[0]

    def gather(self, value: T) -> list[T]:
        """Return the value of every rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def any(self, flag: bool) -> bool:
        """Return True on every rank if `flag` is true on any. The flags are exchanged on the CPU,
        so that no rank waits for the work queued on its GPU."""
        if self.size == 1:
            return flag
        votes = torch.tensor([float(flag)])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.group)
        return bool(votes.item())

    def sum_(self, *tensors: torch.Tensor) -> None:
        """Sum each tensor over all ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.group)

    def apart(self) -> World:
        """Return the same processes with a further group, on the CPU, which a thread can use at the
        same time as this one. Every process must call."""
        if self.size == 1:
            return self
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)  # a rank outside gets a number
        return replace(self, group=group)


def torchrun_names(processes: Callable[[str], list[str]] = lambda name: [name]) -> tuple[str, ...]:
    """Return the rendezvous id (`none` where the user gave none) and the names of the torchruns,
    one a machine, that started the processes of this job; an empty tuple without torchrun. These
    names stay the same when torchrun restarts its processes, and never equal those of another
    torchrun, even one with the same id. `processes` maps the name of this process's torchrun to the
    names of the torchruns of all processes."""
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    if job is None:
        return ()
    return (job, *sorted(set(processes(_name_of(os.getppid())))))


def _name_of(process: int) -> str:
    """Return a name for a process that no other process has. Host and process number do not
    suffice, since numbers repeat where containers count from 1: the time at which the process
    began, in ticks since the host started, is added."""
    name = f"{socket.gethostname()}:{process}"
    try:
        stat = Path(f"/proc/{process}/stat").read_bytes()
        began = stat.rpartition(b")")[2].split()[19].decode()
        start = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{name}:{began}:{start}"
    except (OSError, ValueError, IndexError):
        return name  # not a Linux


def choose_device(name: str) -> torch.device:
    """Return the device that `auto`, `cpu`, `cuda` or `cuda:N` names. ValueError if it does not
    exist here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device is {name!r}, must be auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}, must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device is {name!r} but this torch ({torch.__version__}) sees no CUDA GPU; use"
            " --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device is {name!r}, but this machine has {torch.cuda.device_count()} GPUs, from"
            " cuda:0 on"
        )
    if "LOCAL_RANK" not in os.environ:  # under torchrun: later, with its GPU chosen
        kernels.check_device(device)
    return device


def _end_with_parent() -> None:
    """Send this process SIGTERM when its parent has ended. Otherwise the ranks of a killed torchrun
    would train on, and interfere with the next start."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, name="parent", daemon=True).start()


def _of_this_start(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Return the part of `store` that belongs to the processes of this start. Torchrun gives a
    restart the store of the previous start, in which a process would find the addresses of dead
    ones. So each process asks under a newly drawn name, and rank 0 answers with one name for
    all."""
    mine, asked = secrets.token_hex(8), "start/asked/{}".format
    joined = "start/joined/{}/{}".format
    if rank > 0:
        store.set(asked(rank), mine)
        name = store.get(f"start/answer/{mine}").decode()
        store.set(joined(name, rank), "")
        return dist.PrefixStore(name, store)
    missing, end = set(range(1, size)), time.monotonic() + timeout.total_seconds()
    while missing:
        for other in missing:
            if store.check([asked(other)]):  # by this start, or by one before: both are answered
                store.set(f"start/answer/{store.get(asked(other)).decode()}", mine)
        missing = {other for other in missing if not store.check([joined(mine, other)])}
        if time.monotonic() > end:
            raise RuntimeError(f"ranks {sorted(missing)} did not join within {timeout}")
        time.sleep(0.01)
    return dist.PrefixStore(mine, store)


def _context(rank: int, size: int, timeout: timedelta) -> Context | None:
    """Return the `size` neighbours among which the process `rank` shares clips; None if `size` is
    1. Every process must call."""
    if size == 1:
        return None
    group, _ = dist.new_subgroups(size, timeout=timeout)
    return Context(group.group_name, rank % size, size)


def place_in_job() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, as torchrun or another launcher
    states them in the environment; (0, 1) without one. ValueError if the statements are impossible,
    since parts of the work would be left out."""
    stated = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    said = ", ".join(f"{name} is {value or 'not set'}" for name, value in stated.items())
    remedy = "start the processes with torchrun, or unset both"
    try:
        size = int(stated["WORLD_SIZE"] or 1)
        rank = int(stated["RANK"] or (0 if size == 1 else -1))
    except ValueError:
        raise ValueError(f"in the environment {said}, must be whole numbers: {remedy}") from None
    if not 0 <= rank < size:
        raise ValueError(f"in the environment {said}, which is no process of a job: {remedy}")
    return rank, size


@contextmanager
def process_group(
    device_name: str = "auto", timeout_minutes: float = 30.0, context_parallel: int = 1
):
    """Join the process group that torchrun describes (gloo for tensors on a CPU, nccl on CUDA),
    yield a `World`, and leave the group at the end. Collectives time out after 1.5 times
    `timeout_minutes`, so that `training.watch` reports first and names the missing ranks.
    `context_parallel`: how many neighbours share each clip.
    """
    device, (_, size) = choose_device(device_name), place_in_job()
    if size % context_parallel:
        raise ConfigError(
            "parallel.context_parallel",
            f"is {context_parallel}, but {size} processes do not split into groups of that many;"
            f" start a multiple of it (torchrun --nproc_per_node={context_parallel}), or set it to"
            " 1",
        )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_parent()
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        kernels.check_device(device)
        torch.set_num_threads(min(torch.get_num_threads(), CPU_THREADS))
    if size == 1:
        yield World(device=device, torchrun=torchrun_names())
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=1.5 * timeout_minutes)
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ValueError(
            f"in the environment WORLD_SIZE is {size}, and {' and '.join(missing)} not set, where"
            " the processes meet: start them with torchrun, or unset WORLD_SIZE and RANK"
        )
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    if torchrun_names():
        store = _of_this_start(store, rank, size, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        world = World(rank, size, device, store, context=_context(rank, context_parallel, timeout))
        yield replace(world, torchrun=torchrun_names(world.gather))
    finally:
        dist.destroy_process_group()
