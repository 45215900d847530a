"""Checkpoints: folders of safetensors files and one JSON, written aside and renamed, so that the latest one is always whole.

    checkpoints/step_00001000/
        model.safetensors       everything in the learner (denoiser, trained text encoder, adapters)
        ema.safetensors         the averaged trainable parameters, when ema.enabled
        optimizer.safetensors   moments, named after their parameters
        lora.safetensors        the adapters alone, when lora.enabled
        lora_<expert>.safetensors   those of one expert, under the names of a single model, when experts.enabled
        signs.safetensors       of the adapters' last gradients, one bit a parameter
        monitor.json            windows and means behind the metrics, phases of the alpha schedule
        checkpoint.json         step, config, latent spec, alphas in force, versions

Under FSDP the first three are folders of parts instead (`training.stored`); any number of processes reads either.
An export (`mmdit.scripts.export`) is one safetensors file of the weights used for sampling, with the JSON in its metadata.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import mmdit
from mmdit.config import decode
from mmdit.interfaces import LatentSpec
from mmdit.training.distributed import World
from mmdit.training.errors import RunError
from mmdit.training.stored import Stored, place, write
from mmdit.weights import check_numbers, is_finite

_NAME = re.compile(r"step_(\d{8})")
FORMAT = "mmdit-checkpoint-1"
ALONE = World()


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says of itself."""

    step: int
    config: dict
    spec: LatentSpec
    tokenizer: str  # fingerprint
    alphas: dict = field(default_factory=dict)  # of adapters by layer, in force

    def to_json(self) -> str:
        versions = {"mmdit": mmdit.__version__, "torch": torch.__version__}
        return json.dumps({"format": FORMAT, **asdict(self), "versions": versions}, indent=1)

    @staticmethod
    def from_json(text: str, where: str) -> Meta:
        try:
            raw = json.loads(text)
            if raw["format"] != FORMAT:
                raise KeyError(f"format {raw['format']!r}, this version reads {FORMAT!r}")
            return decode(Meta, {name: raw[name] for name in ("step", "config", "spec", "tokenizer", "alphas") if name in raw})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{where} is not a checkpoint of this project: {str(error)[:1000]}") from None

    @staticmethod
    def read(folder: Path) -> Meta:
        """Of a checkpoint folder."""
        path = folder / "checkpoint.json"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        return Meta.from_json(text, str(path))


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _flush(path: Path) -> None:
    """Make a file or folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(run_dir: Path, meta: Meta, files: dict[str, dict[str, Tensor]], keep_last: int, keep_every: int = 0,
         world: World = ALONE, notes: dict | None = None) -> Path:
    """Write `files` (name without suffix → tensors) and `notes` (monitor.json) as one checkpoint; every process must
    call. Older ones beyond `keep_last` are removed (0 keeps all), except milestones, whose step `keep_every` divides."""
    final = folder_of(run_dir, meta.step)
    aside, old = final.with_name(f".writing-{final.name}"), final.with_name(f".removing-{final.name}")
    try:
        if world.is_main:
            for left in final.parent.glob(".*ing-step_*"):  # by a killed process
                shutil.rmtree(left)
            aside.mkdir(parents=True)
        world.barrier()
        for name, tensors in files.items():
            write(aside, name, tensors, world.is_main)
        world.barrier()
        if not world.is_main:
            world.barrier()
            return final
        if notes is not None:
            (aside / "monitor.json").write_text(json.dumps({"step": meta.step, **notes}))
        for path in aside.rglob("*"):
            _flush(path)
        (aside / "checkpoint.json").write_text(meta.to_json())
        _flush(aside / "checkpoint.json")
        _flush(aside)
        if final.exists():  # a damaged one that was passed over
            final.rename(old)
        aside.rename(final)
        _flush(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise RunError(f"could not save the checkpoint {final}: {error}; earlier checkpoints are untouched. Free disk space "
                       "and continue with --resume") from error
    shutil.rmtree(old, ignore_errors=True)
    passing = [folder for folder in complete(run_dir) if not keep_every or step_of(folder) % keep_every]
    for folder in passing[:-keep_last] if keep_last else []:
        gone = folder.with_name(f".removing-{folder.name}")
        folder.rename(gone)  # first of all: half a checkpoint must not bear its name
        shutil.rmtree(gone)
    world.barrier()
    return final


def complete(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first. A half-written one never has such a name."""
    found = [p for p in (run_dir / "checkpoints").glob("step_*") if _NAME.fullmatch(p.name) and (p / "checkpoint.json").is_file()]
    return sorted(found)


def read_notes(folder: Path) -> dict | None:
    """monitor.json; None if there is none. ValueError if it is damaged or of another step than the checkpoint."""
    path = folder / "monitor.json"
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
        step = notes["step"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {str(error)[:1000]}") from None
    if step != Meta.read(folder).step:
        raise ValueError(f"{path} is of step {step!r}, the checkpoint of step {Meta.read(folder).step}: it belongs to another "
                         "one; remove it to start the metrics and the alpha schedule anew")
    return notes


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All of a `Stored`."""
    return dict(Stored(path))


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint whose files open; damaged ones are named and passed over."""
    for folder in reversed(complete(run_dir)):
        try:
            Meta.read(folder)
            parts = {path.parent for path in folder.glob("*/*.safetensors")}
            for path in {folder / "model.safetensors", *folder.glob("*.safetensors"), *parts}:
                Stored(path.with_suffix(".safetensors"))
            return folder
        except (ValueError, OSError) as error:
            print(f"passing over the damaged checkpoint {folder}: {error}", flush=True)
    return None


@dataclass
class Weights:
    """Weights for sampling or for starting another run."""

    meta: Meta
    tensors: dict[str, Tensor]  # names of the learner: model.*, text_encoder.*
    source: Path


def load_weights(path: str | Path, use_ema: bool = True) -> Weights:
    """From a run folder (its latest checkpoint), a checkpoint folder, or an exported file. With `use_ema` the averaged
    parameters replace the raw ones where the checkpoint has them and `ema.start_step` is past."""
    path = Path(path)
    if path.is_file():
        try:
            with safe_open(path, "pt") as handle:
                text = (handle.metadata() or {}).get("mmdit")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}; give a run folder, a checkpoint folder or an "
                             "exported .safetensors file") from None
        if text is None:
            raise ValueError(f"{path} holds no mmdit config in its metadata: it was not written by mmdit.scripts.export")
        tensors = {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in read_tensors(path).items()
        }
        return Weights(Meta.from_json(text, str(path)), tensors, path)
    folder = path if (path / "checkpoint.json").is_file() else latest(path)
    if folder is None:
        raise ValueError(f"no checkpoint at {path}: expected a run folder with checkpoints/step_*, a checkpoint folder, or a file")
    meta = Meta.read(folder)
    tensors = read_tensors(folder / "model.safetensors")
    section = meta.config.get("ema")
    start = section.get("start_step") if isinstance(section, dict) else None
    averaged = not isinstance(start, int) or meta.step > start  # an older version kept the initial weights until then
    if use_ema and averaged and any(folder.glob("ema*")):
        tensors |= read_tensors(folder / "ema.safetensors")
    return Weights(meta, tensors, folder)


def export(weights: Weights, path: Path, dtype: torch.dtype) -> None:
    """Write one file with the weights in `dtype` and the config in its metadata. ValueError: a
    weight is no finite number, or too large for `dtype`."""
    tensors = {}
    for name, tensor in weights.tensors.items():
        if name.startswith("text_encoder.") and not tensor.is_floating_point():  # positions
            tensors[name] = tensor.contiguous()
            continue
        check_numbers(name, tensor, weights.source)
        tensors[name] = tensor.to(dtype).contiguous()
        if not is_finite(tensors[name]):
            raise ValueError(
                f"{weights.source}: the weight {name} is too large for {dtype}; choose --dtype "
                f"bf16 or fp32"
            )
    aside = path.with_name(f".writing-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, aside, {"mmdit": weights.meta.to_json()})
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise RunError(f"could not write {path}: {error}; free disk space or choose another place") from error


def assign(own: dict[str, Tensor], tensors: Mapping[str, Tensor], source: str, fresh=lambda name: False) -> None:
    """Copy `tensors` into `own` (a `state_dict()`, sharded or not), strictly: names and shapes must agree, except those for
    which `fresh(name)` holds (adapters that start new). ValueError lists what differs, or names
    a weight that is no finite number."""
    stored = tensors.shapes if isinstance(tensors, Stored) else {name: tensor.shape for name, tensor in tensors.items()}
    missing = [name for name in own if name not in tensors and not fresh(name)]
    unexpected = [name for name in tensors if name not in own]
    shapes = [f"{n}: file {tuple(shape)}, model {tuple(own[n].shape)}" for n, shape in stored.items() if n in own
              and shape != own[n].shape]
    if missing or unexpected or shapes:
        problems = []
        for label, names in (("of another shape", shapes), ("missing in the file", missing), ("unknown to the model", unexpected)):
            if names:
                problems.append(f"{len(names)} {label} ({'; '.join(names[:3])}{' …' if len(names) > 3 else ''})")
        raise ValueError(f"{source} does not fit this model: {', '.join(problems)}. Use the model: and text_encoder: sections "
                         "of the run that wrote it")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if own[name].is_floating_point():
                check_numbers(name, tensor, source)
            own[name].copy_(place(tensor, own[name]))
