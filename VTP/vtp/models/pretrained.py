"""Read and write checkpoint folders: config.json and model.safetensors, whole or in shards with an
index.

Only safetensors is needed, so a checkpoint behaves the same whichever version of transformers is
installed, if any.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
INDEX_FILE = WEIGHTS_FILE + ".index.json"
MOST_BYTES = 64 << 20  # of a JSON file, at most
_BUFFER = "rope_embed.periods"  # part of the model's arithmetic: bfloat16 in every precision


def checkpoint_folder(name_or_path: str | os.PathLike) -> Path:
    """Return the folder of a checkpoint: a local path, or `owner/name` on the Hugging Face hub when
    huggingface_hub is installed.

    FileNotFoundError when there is no such folder and the hub cannot give it.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    missing = f"there is no checkpoint folder {str(path.absolute())!r}"
    if str(name_or_path).count("/") != 1 or str(name_or_path).startswith((".", "/", "~")):
        raise FileNotFoundError(f"{missing}; give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"{missing}; to fetch {name_or_path} from the hub, pip install huggingface_hub"
        ) from None
    try:
        return Path(
            snapshot_download(
                str(name_or_path),
                allow_patterns=[CONFIG_FILE, "*.safetensors", "*.safetensors.index.json"],
            )
        )
    except Exception as error:  # the hub client raises dozens of types; each means: not to be had
        raise FileNotFoundError(
            f"{missing}, and the hub does not give {name_or_path}: {error}"
        ) from error


def read_json(path: Path) -> dict:
    """Return the JSON object in `path`. FileNotFoundError if the file is missing, ValueError if it
    is too large or holds no JSON object."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; a VTP checkpoint folder holds {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} is larger than {MOST_BYTES} bytes; it must be a page of keys")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; must be an object of keys")
    return values


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, in a fixed order. FileNotFoundError names what
    is missing."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; download the weights again"
        )
    files = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{folder / INDEX_FILE}: weight_map must give the file of each tensor")
    names = sorted(set(files.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside or not names:
        raise ValueError(
            f"{folder / INDEX_FILE}: weight_map must name files of the same folder, has"
            f" {outside or 'none'}"
        )
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(absent)}, named in {INDEX_FILE}; download the weights again"
        )
    return [folder / name for name in names]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint. ValueError for a damaged file."""
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            weights.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} is not a readable safetensors file ({error}); download or train it again"
            ) from None
    return weights


def assign_weights(
    model: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype, source: str
) -> None:
    """Give `model` (possibly on the meta device) the tensors in `weights` as `dtype`. ValueError
    lists the mismatches, and the tensors that do not hold finite real numbers."""
    expected = model.state_dict()
    problems = []
    for title, names in (
        ("missing", expected.keys() - weights.keys()),
        ("unexpected", weights.keys() - expected.keys()),
    ):
        if names:
            listed = ", ".join(sorted(names)[:8]) + (", …" if len(names) > 8 else "")
            problems.append(f"{len(names)} {title}: {listed}")
    for name in sorted(expected.keys() & weights.keys()):
        if expected[name].shape != weights[name].shape:
            problems.append(
                f"{name} is {tuple(weights[name].shape)}, config.json makes it"
                f" {tuple(expected[name].shape)}"
            )
        if not weights[name].is_floating_point():
            problems.append(f"{name} holds {weights[name].dtype}, must hold real numbers")
        elif not bool(weights[name].float().isfinite().all()):
            problems.append(
                f"{name} holds nan or infinity: the training that wrote it diverged, or the file "
                "is damaged"
            )
    if problems:
        raise ValueError(
            f"the weights in {source} do not fit its {CONFIG_FILE}: " + "; ".join(problems[:12])
        )
    state = {}
    for name, tensor in weights.items():
        state[name] = tensor.to(torch.bfloat16 if name.endswith(_BUFFER) else dtype, copy=True)
    model.load_state_dict(state, assign=True)


def write_checkpoint(folder: str | os.PathLike, config: dict, weights: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors; each file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config)
    whole = {name: tensor.contiguous() for name, tensor in weights.items()}
    replace_file(folder / WEIGHTS_FILE, save(whole, {"format": "pt"}))


def write_config(folder: Path, config: dict) -> None:
    replace_file(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` completely or not at all: it is written to a temporary file with a
    unique name, which is then renamed. A link at `path` is replaced."""
    temporary = path.with_name(f".writing-{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
