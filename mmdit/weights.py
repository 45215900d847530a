"""Read the tensors of a checkpoint, whatever files they lie in: one at a time, and without ever
running code that a pickle holds."""

from __future__ import annotations

import difflib
import json
import re
import struct
import zipfile
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmdit.foreign import read_json, refuse_stand_in

SHOWN = 4  # names that a message lists at most
PICKLES = (".pt", ".pth", ".bin")
INDEX = ".safetensors.index.json"
SHARD = re.compile(r"-\d+-of-(\d+)\.safetensors$")
WAN_RELEASE = (  # files and folders, any of which marks one
    "model_index.json",
    "high_noise_model",
    "low_noise_model",
    "transformer",
    "transformer_2",
    "Wan2.*_VAE.pth",
)
SCALES = re.compile(  # tensors that only quantised weights come with
    r"(\.scale_weight|\.weight_scale(_2)?|\.scale_input|\.input_scale|(^|\.)scaled_fp8|\.comfy_quant"
    r"|\.(nested_)?(absmax|quant_map)|\.quant_state\.\w+|\.SCB|\.weight_format"
    r"|\.qweight|\.qzeros|\.g_idx|\.smooth_factor)$"
)
# Tensors that ComfyUI stores with float8 weights: the scale of a weight, or of each of its rows,
# and what is needed only to multiply float8 activations.
WEIGHT_SCALE = re.compile(r"(?P<layer>.+)\.(scale_weight|weight_scale)$")
OF_ACTIVATIONS = re.compile(r"(\.(scale_input|input_scale|comfy_quant)|(^|\.)scaled_fp8)$")
FLOAT8_NAMES = ("F8_E4M3", "float8_e4m3fn")  # as named in safetensors, and in a pickle

Network = TypeVar("Network", bound=nn.Module)
# Turns a stored float8 weight into a weight: (its name, its codes, its scale (out, 1) or ()) → the
# weight
Unpack = Callable[[str, Tensor, Tensor], Tensor]
# Turns a stored tensor into a weight: (its name in the model, the tensor, the dtype that the weight
# should have) → the weight
Keep = Callable[[str, Tensor, torch.dtype], Tensor]


@dataclass(frozen=True)
class Entry:
    """One stored tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as the file names it: F32, BF16, F8_E4M3 …


class Stored(Protocol):
    """What `fill` needs of a checkpoint."""

    entries: dict[str, Entry]

    def tensors(self) -> Iterator[tuple[str, Tensor]]: ...


def shapes_of(entries: Mapping[str, Entry], names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of stored tensors, renamed by `names`; a tensor that `names` lacks keeps
    its name."""
    return {names.get(name, name): entry.shape for name, entry in entries.items()}


def scaled_float8(name: str, codes: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 weight that float8 `codes` and their `scale` stand for."""
    return codes.float() * scale


class Checkpoint:
    """The tensors of one checkpoint. `entries` says what is stored, and is read from the headers;
    `tensors()` reads the tensors themselves, file by file and one at a time. ValueError: a file is
    missing, damaged, of another format, or would run code; or shards lack their index, unless
    `parts`.

    Float8 weights with a scale (ComfyUI's `fp8_scaled` files) are read as ordinary weights:
    `scales` maps the name of each to that of its scale, which is no entry, and `unpack` makes the
    weight.
    """

    def __init__(self, path: str | Path, parts: bool = False, unpack: Unpack = scaled_float8):
        self.path, self.unpack = Path(path), unpack
        self.files = _files(self.path)
        shard = SHARD.search(self.files[0].name)
        if not parts and shard and len(self.files) < int(shard[1]):
            raise ValueError(
                f"{self.path} is {len(self.files)} of {int(shard[1])} shards; name the folder that"
                " holds all of them and their index"
            )
        self.entries: dict[str, Entry] = {}
        self._loaded: dict[Path, dict[str, Tensor]] = {}
        for file in self.files:
            refuse_stand_in(file)
            for name, shape, dtype in self._header(file):
                if name in self.entries:
                    first = self.entries[name].file.name
                    raise ValueError(
                        f"{name} is stored in {first} and in {file.name} of {self.path}; remove one"
                    )
                self.entries[name] = Entry(file, shape, dtype)
        self._check_index()
        self.scales = self._float8_scales()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        wanted = set(self.scales.values())
        scales = {name: value for name, value in self._stored(wanted)} if wanted else {}
        for name, tensor in self._stored(self.entries):
            if name in self.scales:
                scale = scales[self.scales[name]].float()
                scale = scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())
                tensor = self.unpack(name, tensor, scale)
            yield name, tensor

    def _stored(self, names: Container[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors with these names as they are stored."""
        for file in self.files:
            if file.suffix in PICKLES:
                yield from ((n, tensor) for n, tensor in self._loaded[file].items() if n in names)
                continue
            with safe_open(file, "pt") as handle:
                for name in list(handle.keys()):
                    if name in names:
                        yield name, handle.get_tensor(name)

    def _float8_scales(self) -> dict[str, str]:
        """Return the name of the scale of each float8 weight that has one, and remove from
        `entries` the tensors that only accompany float8 weights. If anything is quantised in
        another way, return nothing and remove nothing."""
        scales, beside = {}, []
        for name in filter(SCALES.search, self.entries):
            if match := WEIGHT_SCALE.match(name):
                weight = f"{match['layer']}.weight"
                if not self._scales_float8(weight, name):
                    return {}
                scales[weight] = name
            elif not OF_ACTIVATIONS.search(name):
                return {}
            beside.append(name)
        for name in beside:
            del self.entries[name]
        return scales

    def _scales_float8(self, weight: str, scale: str) -> bool:
        """Return whether `weight` is a float8 matrix, and `scale` holds one number for it or for
        each of its rows."""
        entry = self.entries.get(weight)
        if entry is None or entry.dtype not in FLOAT8_NAMES or len(entry.shape) != 2:
            return False
        rows = entry.shape[0]
        return self.entries[scale].shape in ((), (1,), (1, 1), (rows,), (rows, 1))

    def _header(self, file: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
        if file.suffix in PICKLES:
            self._loaded[file] = unpickled_tensors(file)
            for name, tensor in self._loaded[file].items():
                yield name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
            return
        try:
            with safe_open(file, "pt"):  # checks the whole header against the file's size
                pass
            with file.open("rb") as stream:
                (size,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(size))
        except (SafetensorError, OSError, ValueError, RecursionError, struct.error) as error:
            raise ValueError(
                f"{file} cannot be read as safetensors (cut off, damaged, or another format):"
                f" {error}"
            ) from None
        for name, entry in header.items():
            if name != "__metadata__":
                yield name, tuple(entry["shape"]), entry["dtype"]

    def _check_index(self) -> None:
        """Raise ValueError if a sharded checkpoint lacks a tensor that its index names."""
        if not self.path.is_dir():
            return
        for index in self.path.glob(f"*{INDEX}"):
            if absent := sorted(set(_shards(index)) - set(self.entries)):
                raise ValueError(
                    f"{index} names {len(absent)} tensors that its shards lack, first {absent[0]};"
                    " fetch them"
                )


def header_of(file: Path, remedy: str = "") -> dict[str, str]:
    """Return the metadata in the header of a safetensors file. ValueError if it cannot be read;
    `remedy` ends the message."""
    refuse_stand_in(file)
    try:
        with safe_open(file, "pt") as handle:
            return handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}{remedy}") from None


def _files(path: Path) -> list[Path]:
    """Return the files that a checkpoint consists of."""
    if path.is_file():
        if path.suffix not in (".safetensors", *PICKLES):
            raise ValueError(
                f"{path} is no weight file: can read .safetensors, and {', '.join(PICKLES)} holding"
                " tensors alone"
            )
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; name a weight file or its folder")
    indices = sorted(path.glob(f"*{INDEX}"))
    if len(indices) > 1:
        raise ValueError(
            f"{path} holds {len(indices)} index files ({', '.join(i.name for i in indices[:3])});"
            " leave one"
        )
    if indices:
        names = sorted(set(_shards(indices[0]).values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{indices[0]} names a shard outside its folder: {outside[0]!r}")
        if absent := [name for name in names if not (path / name).is_file()]:
            raise ValueError(
                f"{path} lacks {len(absent)} of {len(names)} shards, first {absent[0]}; fetch them"
            )
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    if not files and (path / "checkpoints").is_dir():
        raise ValueError(
            f"{path} is the folder of a run: `mmdit export --checkpoint {path} --out"
            " FILE.safetensors` writes its weights to a file, with --lora diffusers its adapters"
        )
    if not files:
        raise ValueError(f"{path} holds no .safetensors file; name the file")
    shard = SHARD.search(files[0].name)
    if shard and int(shard[1]) > 1:
        _check_shards(path, files, shard)
    elif len(files) > 1:
        raise ValueError(
            f"{path} holds {len(files)} .safetensors files without an index ({files[0].name} …);"
            " name the file"
        )
    return files


def _check_shards(path: Path, files: list[Path], shard: re.Match) -> None:
    """Raise ValueError unless `files`, shards without an index, are all that their names announce,
    and nothing else."""
    count, start = int(shard[1]), files[0].name.removesuffix(shard[0])
    wanted = [f"{start}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if [file.name for file in files] == wanted:
        return
    problem = "holds other files beside them: move those"
    if absent := [name for name in wanted if not (path / name).is_file()]:
        problem = f"lacks {', '.join(absent[:SHOWN])}"
    raise ValueError(
        f"{path} holds {len(files)} of {count} shards without their index, *{INDEX}, and {problem}"
    )


def _shards(index: Path) -> dict[str, str]:
    """Return the file of every tensor that an index lists, by the tensor's name."""
    files = read_json(index, "index of shards").get("weight_map")
    named = isinstance(files, dict) and all(
        isinstance(name, str) and name for name in files.values()
    )
    if not files or not named:
        raise ValueError(
            f'{index} is no index of shards: "weight_map" must give the file of each tensor; fetch'
            " it again"
        )
    return files


def is_wan_release(path: Path) -> bool:
    """Return whether `path` is the folder of a Wan release, official or in Diffusers' layout, even
    if incomplete."""
    for name in WAN_RELEASE:
        if any(path.glob(name)):
            return True
    try:
        return read_json(path / "config.json", "config").get("_class_name") == "WanModel"
    except ValueError:
        return False


def unpickled_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a `.pth` file by name, read with torch's restricted unpickler.
    ValueError if the file holds anything else."""
    try:
        content = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )  # files without a ZIP archive are older than 2020
    except Exception as error:  # a damaged file makes the unpickler raise a dozen types of error
        what = f"it is damaged ({type(error).__name__}), or holds more than tensors"
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            what = f"it holds {code[1]}"
        raise ValueError(
            f"{file} is refused: {what}, which could run code; take a file of tensors alone"
        ) from None
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(
            f"{file} holds no dictionary of tensors; give the weights of the model alone"
        )
    return content


def parameter_count(module: nn.Module) -> int:
    """Return how many weights a module has."""
    return sum(parameter.numel() for parameter in module.parameters())


def is_finite(values: Tensor) -> bool:
    """Return whether every element is a finite number, without making a copy of the size of
    `values`. An empty tensor, or one without memory (meta), counts as finite."""
    if not values.numel() or values.is_meta:
        return True
    if values.dtype.itemsize == 1:  # float8 has no comparisons
        values = values.float()
    smallest, largest = values.aminmax()  # both are nan if one element is
    return bool(smallest.isfinite() & largest.isfinite())


def check_numbers(name: str, tensor: Tensor, source: object) -> None:
    """Raise ValueError unless the weight `name` of `source` holds finite real numbers: a network
    with any others draws black."""
    if not tensor.is_floating_point():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"{source}: the weight {name} holds {dtype}, must hold real numbers (float32,"
            " bfloat16, float16); take a file of trained weights"
        )
    if not is_finite(tensor):
        raise ValueError(
            f"{source}: the weight {name} holds nan or infinity: the training that wrote it"
            " diverged, or the file is damaged; take an earlier checkpoint, or fetch the file again"
        )


def check_fits(
    model: nn.Module,
    stored: Stored,
    names: dict[str, str],
    source: object,
    ignored: Container[str] = (),
) -> None:
    """Raise ValueError, in one sentence, unless the tensors of `stored` are exactly the parameters
    of `model`, neither quantised, missing, unknown nor of another shape. Unknown ones in `ignored`
    are allowed. For `names` and `source` see `fill`."""
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shapes = shapes_of(stored.entries, names)
    if scales := [name for name in stored.entries if SCALES.search(name)]:
        raise ValueError(
            f"{source} is quantised: {len(scales)} scale tensors such as {scales[0]}; take the bf16"
            " or fp16 file, or ComfyUI's fp8_scaled one"
        )
    problems = []
    if missing := [name for name in wanted if name not in shapes]:
        problems.append(f"lacks {len(missing)} tensors, first {', '.join(missing[:SHOWN])}")
    if unknown := [name for name in shapes if name not in wanted and name not in ignored]:
        first = ", ".join(unknown[:SHOWN])
        if near := difflib.get_close_matches(unknown[0], wanted, 1):
            first += f" (near {near[0]})"
        problems.append(f"holds {len(unknown)} unknown tensors, first {first}")
    if wrong := [name for name in wanted if shapes.get(name, wanted[name]) != wanted[name]]:
        first = f"{wrong[0]} {shapes[wrong[0]]} where {wanted[wrong[0]]} belongs"
        problems.append(f"holds {len(wrong)} tensors of another shape, first {first}")
    if problems:
        raise ValueError(f"{source} {' and '.join(problems)}")


def fill(
    model: Network,
    stored: Stored,
    names: dict[str, str],
    source: object,
    device: torch.device | str = "cpu",
    dtype: Callable[[str], torch.dtype] = lambda _: torch.float32,
    ignored: tuple[str, ...] = (),
    keep: Keep | None = None,
) -> Network:
    """Fill `model`, built on the meta device, with the tensors of `stored`, read one at a time, and
    return it in evaluation mode.

    `names` gives a stored tensor's name in the model where it differs. `keep` returns the weight
    for a tensor as it lies in its file, in place of a copy on `device` as `dtype(name)`. `source`
    names the checkpoint in errors. ValueError, in one sentence: see `check_fits` and
    `check_numbers`.
    """
    check_fits(model, stored, names, source, ignored)
    wanted = {name for name, _ in model.named_parameters()}
    for stored_name, tensor in stored.tensors():
        name = names.get(stored_name, stored_name)
        if name not in wanted:
            continue
        check_numbers(name, tensor, source)
        if keep is None:
            value = tensor.to(device=device, dtype=dtype(name), copy=True)
        else:
            value = keep(name, tensor, dtype(name))
        if value.dtype == torch.float16 and not is_finite(value):
            raise ValueError(f"{source}: the weight {name} is too large for float16; use bfloat16")
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(value))
    return model.eval()


# ── writing ──────────────────────────────────────────────────────────────────────────────────────
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def tensor_pieces(
    tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file piece by piece, for `mmdit.files.write_atomically`. Each tensor is
    copied to the CPU when its turn comes; tensors that share memory are stored separately."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # aligned
    header: dict[str, dict] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        dtype, shape = DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        yield bytes_of(tensors[name])


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor's elements; a contiguous tensor on the CPU is not copied."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data
