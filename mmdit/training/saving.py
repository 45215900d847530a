"""Checkpoints that are written while the training goes on (`train.save_in_background`)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from mmdit.nn.stored_weights import StoredWeight
from mmdit.training.distributed import World
from mmdit.training.memory.shards import is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@lru_cache(maxsize=1)
def _on_host(mesh: DeviceMesh, group: dist.ProcessGroup | None) -> DeviceMesh:
    """Return the mesh of the same processes on the CPU. It is made once for all tensors and saves:
    where machines copy each other's shards, each one that is made makes process groups, with the
    connections of all of them. `group`: the default one, with which all others end."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", mesh.shape, mesh_dim_names=mesh.mesh_dim_names)


def snapshot(tensor: Tensor) -> Tensor:
    """Return a copy in the memory of the host, which training does not touch; of a sharded tensor
    each process copies its part. A `StoredWeight` is frozen and is returned as it is."""
    if isinstance(tensor, StoredWeight):
        return tensor
    tensor = tensor.detach()
    if is_sharded(tensor):
        mesh = tensor.device_mesh
        if mesh.device_type != "cpu":
            mesh = _on_host(mesh, dist.group.WORLD)
        part = tensor.to_local().to("cpu", copy=True)
        return type(tensor).from_local(
            part, mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
        )
    return tensor.to("cpu", copy=True)


def snapshots(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a `snapshot` of each of `tensors`, by name."""
    return {name: snapshot(tensor) for name, tensor in tensors.items()}


class BackgroundSaves:
    """Runs one save at a time in a thread. Its processes talk in a group of their own, so that they
    never meet the collectives of the training; every process of the job must make one, and start
    the same saves."""

    def __init__(self, world: World):
        self.world = world.apart()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[World], object]) -> None:
        """Call `write` with the world of the saves, once the last save is whole."""
        self.wait()

        def work() -> None:
            try:
                write(self.world)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name="saving")
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a save that failed."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Return when the last save is whole; raise its error."""
        self._join()
        self.check()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Leave the block when the last save is whole, or has failed: then raise its error, unless
        the block itself raised one."""
        try:
            yield
            self.wait()
        finally:
            self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
