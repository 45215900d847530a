"""Named tensors in safetensors files: in one file, or in the parts that the processes of a sharded
training wrote."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmdit.files import Sum, read_text
from mmdit.nn.stored_weights import StoredWeight
from mmdit.training.distributed import World
from mmdit.weights import Entry, tensor_pieces

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

SHAPES = "shapes.json"  # beside the parts, the whole shapes: they show if a part is missing
SHARDING, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # in the headers of the parts


# Importing `torch.distributed.tensor` and its tables of operators takes half a second of the start
# of a command. Nothing can be sharded before it is imported, so the checks here look it up without
# importing it.
def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether each process holds only a part of the tensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gathers_weights(module: nn.Module) -> bool:
    """Return whether the module gathers its weights from all processes for each call (FSDP)."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


class Stored(Mapping[str, Tensor]):
    """The tensors, by name, in `name.safetensors`, or else in the parts in the folder `name/`.
    Tensors are read one at a time when they are asked for, so that processes can take their shards
    of what would not fit in memory. ValueError names a damaged or incomplete file; nothing is ever
    unpickled."""

    def __init__(self, path: Path):
        self.path = path
        files = self.files = [path]
        if not path.is_file() and path.with_suffix("").is_dir():
            files = self.files = sorted(path.with_suffix("").glob("*.safetensors"))
        self._parts: dict[str, list[tuple]] = {}  # name → [(file, shape, offsets)]
        self.shapes: dict[str, torch.Size] = {}
        try:
            for file in files:
                self._open(file)
            if files == [path]:
                self.shapes = {name: torch.Size(parts[0][1]) for name, parts in self._parts.items()}
            else:
                self._check_parts(json.loads(read_text(path.with_suffix("") / SHAPES)))
        except (
            SafetensorError,
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(
            f"{self.path} cannot be read as safetensors (damaged, or another format?):"
            f" {str(error)[:1000]}"
        )

    def _check_parts(self, shapes: dict[str, list[int]]) -> None:
        for name, shape in shapes.items():
            self.shapes[name] = torch.Size(shape)
            end = 0  # the parts are runs of rows, one behind the other
            self._parts[name].sort(key=lambda part: part[2])
            for _, sizes, offsets in self._parts[name]:
                if math.prod(sizes) and (
                    offsets != [end, *[0] * len(shape[1:])] or sizes[1:] != shape[1:]
                ):
                    raise ValueError(
                        f"a part of {name!r} of {sizes} lies at {offsets}, expected at row {end} of"
                        f" {shape}"
                    )
                end += sizes[0] if math.prod(sizes) else 0
            if math.prod(shape) and end != shape[0]:
                raise ValueError(
                    f"parts of {name!r} are missing: {end} of {shape[0]} rows are there"
                )
        if len(shapes) != len(self._parts):
            raise ValueError(f"{SHAPES} does not name every tensor")

    def _open(self, path: Path) -> None:
        file = safe_open(path, "pt")
        sharding = (file.metadata() or {}).get(SHARDING)
        where = json.loads(sharding) if sharding else None
        for name in file.keys():  # noqa: SIM118  (no dictionary)
            shape = file.get_slice(name).get_shape()
            offsets = where[name][OFFSETS] if where else [0] * len(shape)
            self._parts.setdefault(name, []).append((file, shape, offsets))

    def __getitem__(self, name: str) -> Tensor:
        try:
            parts = [file.get_tensor(name) for file, *_ in self._parts[name]]
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from None
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # the mixin would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def entries(self) -> dict[str, Entry]:
        """Return the shape of every whole tensor, and its type by the name in the headers."""
        result = {}
        for name, parts in self._parts.items():
            dtype = parts[0][0].get_slice(name).get_dtype()
            result[name] = Entry(self.path, tuple(self.shapes[name]), dtype)
        return result

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Return the `count` rows of a tensor from row `first` on; no other rows are read."""
        pieces = []
        try:
            for file, shape, offsets in self._parts[name]:
                begin = offsets[0] if offsets else 0
                start, stop = max(first - begin, 0), min(first + count - begin, shape[0])
                if start < stop:
                    pieces.append(file.get_slice(name)[start:stop])
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from None
        if not pieces:
            return torch.empty(0, *self.shapes[name][1:])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class Chosen(Mapping[str, Tensor]):
    """Tensors from one or several `Stored` under new names: `places` gives the `Stored` and the
    name in it for each. They are read when they are asked for."""

    def __init__(self, places: Mapping[str, tuple[Stored, str]]):
        self.places = dict(places)
        self.shapes = {name: stored.shapes[key] for name, (stored, key) in self.places.items()}

    def __getitem__(self, name: str) -> Tensor:
        stored, key = self.places[name]
        return stored[key]

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Return rows of a tensor, see `Stored.rows`."""
        stored, key = self.places[name]
        return stored.rows(key, first, count)


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Mapping[str, Tensor]:
    """Return the tensors that `names` lists, a mapping from new names to those in `tensors`.
    Tensors in files are not read yet."""
    if isinstance(tensors, Chosen):
        return Chosen({name: tensors.places[key] for name, key in names.items()})
    return {name: tensors[key] for name, key in names.items()}


def write(
    folder: Path, name: str, tensors: dict[str, Tensor], world: World
) -> dict[str, list[int]]:
    """Write `tensors` as one file, by the main process; or, if a tensor is sharded (then every
    process of `world` must call), as the folder `name/`, by torch.distributed.checkpoint in
    safetensors (its default format is pickled). Returns the file's name and its `[bytes, CRC-32]`;
    the sums of parts are left to whoever reads them. OSError or SafetensorError if that fails."""
    if any(is_sharded(tensor) for tensor in tensors.values()):
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        flat = {
            key: tensor.detach().reshape(1) if tensor.ndim == 0 else tensor.detach()
            for key, tensor in tensors.items()
        }
        try:
            dcp.save(
                flat,
                storage_writer=dcp.HuggingFaceStorageWriter(
                    str(folder / name), save_distributed=True
                ),
                process_group=world.group,
            )
        except CheckpointException as error:
            raise OSError(f"{list(error.failures.values())[0][0]}") from None
        if world.is_main:
            shapes = json.dumps({key: list(tensor.shape) for key, tensor in flat.items()})
            (folder / name / SHAPES).write_text(shapes, encoding="utf-8")
        return {}
    if not world.is_main:
        return {}
    total = Sum()
    file = f"{name}.safetensors"
    with open(folder / file, "xb") as stream:
        for piece in tensor_pieces({key: whole(t.detach()) for key, t in tensors.items()}):
            stream.write(total.add(piece))
    return {file: total.as_json()}


def own_rows(cut: Tensor) -> tuple[int, int]:
    """Return the first of this process's rows of a sharded tensor, and their number."""
    assert is_sharded(cut) and cut.placements[-1].is_shard(0), "FSDP cuts rows"
    rows, mesh = cut.shape[0], cut.device_mesh
    most = -(-rows // mesh.size(mesh.ndim - 1))
    first = min(rows, most * mesh.get_local_rank(mesh.ndim - 1))
    return first, len(local(cut))


def place(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor on the device and in the type of `like`; if `like` is sharded, the part
    of this process."""
    value = value.to(like.device, like.dtype)
    if is_sharded(like):
        from torch.distributed.tensor import distribute_tensor

        shard = distribute_tensor(
            value.reshape(like.shape), like.device_mesh, like.placements, src_data_rank=None
        )
        return shard.clone()  # a clone, or every part would keep the whole alive
    return value


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor gathered (every process must call), a `StoredWeight` unpacked, and
    any other tensor as it is."""
    if isinstance(tensor, StoredWeight):
        return tensor.whole()
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, in the same memory; enough for element-wise
    operations."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@contextmanager
def holding(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let `parameters` hold `values`, sharded like them, within the `with` block."""
    kept = {name: local(p.detach()).clone() for name, p in parameters.items()}
    try:
        _write(parameters, values)
        yield
    finally:
        _write(parameters, kept)
        first = next(iter(parameters.values()))
        if is_sharded(first) and first.device.type == "cuda":
            # The backward pass of a call made before this block gathers weights on other streams,
            # which would not wait for the copies.
            torch.cuda.current_stream(first.device).synchronize()


@torch.no_grad()
def _write(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        local(parameter).copy_(local(values[name]))
