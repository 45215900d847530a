"""Write checkpoints while the training goes on (`train.save_in_background`)."""

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
    """Return a mesh of the same processes on the CPU. It is made once for all tensors and saves:
    with several copies of the shards, each new mesh makes process groups, with connections among
    all of their processes. `group`: the default group, whose end makes the mesh invalid."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", mesh.shape, mesh_dim_names=mesh.mesh_dim_names)


def snapshot(tensor: Tensor) -> Tensor:
    """Return a copy in host memory, which the training does not change; of a sharded tensor each
    process copies its part. A `StoredWeight` is frozen and is returned as it is."""
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
    """Runs one save at a time in a thread. The saves use a process group of their own, so that they
    never mix with the collectives of the training. Every process of the job must create one, and
    start the same saves."""

    def __init__(self, world: World):
        self.world = world.apart()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[World], object]) -> None:
        """Call `write` with the world of the saves, after the last save has finished."""
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
        """Wait for the last save; raise its error."""
        self._join()
        self.check()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Wait for the last save at the end of the block. If the save failed, raise its error,
        unless the block itself raised one."""
        try:
            yield
            self.wait()
        finally:
            self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
