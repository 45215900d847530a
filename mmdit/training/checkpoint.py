"""Checkpoints: folders of safetensors files and one JSON, written under another name and renamed,
so that the latest one is always complete.

    checkpoints/step_00001000/
        model.safetensors       everything in the learner (denoiser, trained text encoder, adapters)
        ema.safetensors         the averaged trainable parameters, when ema.enabled
        optimizer.safetensors   moments, named after their parameters
        lora.safetensors        the adapters alone, when lora.enabled
        lora_<expert>.safetensors   those of one expert, under the names of a single model
        signs.safetensors       signs of the adapters' last gradients, one bit a parameter
        monitor.json            windows and means behind the metrics, phases of the alpha schedule
        checkpoint.json         step, config, latents, alphas, versions; size and CRC-32 of each

Under FSDP the first three are folders of parts instead (`mmdit/training/memory/shards.py`); either
form can be read by any number of processes. An export (`mmdit.scripts.export`) is one safetensors
file of the weights used for sampling, with the JSON in its metadata."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

import mmdit
from mmdit.config import decode
from mmdit.files import Sum, flush_to_disk, read_text, refuse_link, remove
from mmdit.interfaces import LatentSpec
from mmdit.shipped import find
from mmdit.training.distributed import World
from mmdit.training.errors import RunError
from mmdit.training.memory.shards import Chosen, Stored, write
from mmdit.weights import bytes_of, header_of

_NAME = re.compile(r"step_(\d{8}|[1-9]\d{8,})")  # as `folder_of` writes it
FORMAT = "mmdit-checkpoint-1"
META, NOTES = "checkpoint.json", "monitor.json"
WEIGHTS = ("model", "ema")  # names of the files that sampling reads
UNSUMMED = f'if a person did that, remove "files" from {META}'
ALONE = World()
TRIES = 10  # to read the newest checkpoint of a run that is training
# What a stored config without the key `model.spatial` meant, before whole frames were the default.
SPATIAL_BEFORE = ["window", "shifted"]


@dataclass(frozen=True)
class Meta:
    """The contents of `checkpoint.json`."""

    step: int
    config: dict
    spec: LatentSpec
    tokenizer: str  # fingerprint
    alphas: dict = field(default_factory=dict)  # of the adapters, by layer, as in force
    origin: dict = field(
        default_factory=dict
    )  # `source`, `crc32` and `data` of weights that are read elsewhere (training/origin.py)

    def to_json(self, files: dict[str, list[int]] | None = None) -> str:
        """Return the contents as JSON. `files`: the size and CRC-32 of each file; with it, the JSON
        gets a CRC-32 of its other entries, too."""
        versions = {"mmdit": mmdit.__version__, "torch": torch.__version__}
        row = {"format": FORMAT, **asdict(self), "versions": versions}
        if files is not None:
            row["files"] = files
            row = json.loads(json.dumps(row))
            row["crc32"] = _crc(row)
        return json.dumps(row, indent=1)

    @staticmethod
    def from_json(text: str, where: str) -> Meta:
        try:
            raw = json.loads(text)
            if raw["format"] != FORMAT:
                raise KeyError(f"format {raw['format']!r}, this version reads {FORMAT!r}")
            known = {entry.name: raw[entry.name] for entry in fields(Meta) if entry.name in raw}
            meta = decode(Meta, known)
            model = meta.config.get("model", {})
            ours = isinstance(model, dict) and model.get("type", "video_mmdit") == "video_mmdit"
            if ours and "images" not in meta.config:  # those are of vtp_training.PretrainConfig
                model.setdefault("spatial", SPATIAL_BEFORE)
            return meta
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{where} is not a checkpoint of this project: {str(error)[:1000]}"
            ) from None

    @staticmethod
    def read(folder: Path) -> Meta:
        """Read `checkpoint.json` from a checkpoint folder."""
        path = folder / "checkpoint.json"
        try:
            text = read_text(path)
        except (OSError, UnicodeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        return Meta.from_json(text, str(path))


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _crc(row: dict) -> int:
    """Return the CRC-32 of the contents of a checkpoint.json, without the entry `crc32`."""
    rest = {name: value for name, value in row.items() if name != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def save(
    run_dir: Path,
    meta: Meta,
    files: dict[str, dict[str, Tensor]],
    keep_last: int,
    keep_every: int = 0,
    world: World = ALONE,
    notes: dict | None = None,
) -> Path:
    """Write `files` (name without suffix → tensors) and `notes` (monitor.json) as one checkpoint,
    and return its folder; every process must call. Older checkpoints beyond `keep_last` are removed
    (0 keeps all), except milestones: those whose step is a multiple of `keep_every`. RunError if it
    cannot be written.
    """
    final = folder_of(run_dir, meta.step)
    token = world.share(lambda: secrets.token_hex(4))
    unfinished = final.with_name(f".writing-{final.name}-{token}")
    try:
        if world.is_main:
            refuse_link(final.parent).mkdir(parents=True, exist_ok=True)
            unfinished.mkdir()
        world.barrier()
        sums: dict[str, list[int]] = {}
        for name, tensors in files.items():
            sums |= write(unfinished, name, tensors, world)
        world.barrier()
        sums |= _part_sums(unfinished, world)
        if world.is_main:
            if notes is not None:
                text = json.dumps({"step": meta.step, **notes})
                (unfinished / NOTES).write_text(text, encoding="utf-8")
                sums[NOTES] = Sum.of_file(unfinished / NOTES).as_json()
            for path in unfinished.rglob("*"):
                flush_to_disk(path)
            (unfinished / META).write_text(meta.to_json(sums), encoding="utf-8")
            flush_to_disk(unfinished / META)
            flush_to_disk(unfinished)
            _put(unfinished, final, token)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise RunError(
            f"could not save the checkpoint {final}: {error}; earlier checkpoints are untouched."
            f" Free disk space. {how_to_go_on(run_dir)}"
        ) from error
    if world.is_main:
        prune(run_dir, meta.step, keep_last, keep_every)
    world.barrier()
    return final


def how_to_go_on(run_dir: Path) -> str:
    """Return a sentence for a person that says how to continue after an error."""
    if complete(run_dir):
        return "Checkpoints are whole: continue with --resume"
    return "There is no checkpoint yet: start the run again"


def _part_sums(folder: Path, world: World) -> dict[str, list[int]]:
    """Compute the check sums of the files that a sharded save wrote; each process takes some of
    them."""
    parts = sorted(path for path in folder.glob("*/*") if path.is_file())
    sums = {
        path.relative_to(folder).as_posix(): Sum.of_file(path).as_json()
        for path in parts[world.rank :: world.size]
    }
    if not parts:
        return {}
    for other in world.gather(sums):
        sums |= other
    return sums


def _put(unfinished: Path, final: Path, token: str) -> None:
    """Give a finished checkpoint its name. A checkpoint that already has it was damaged and passed
    over, so checkpoints of later steps belong to an abandoned attempt. These are renamed, because
    otherwise they would be taken for the newest."""
    old = final.with_name(f".removing-{final.name}-{token}")
    if final.exists():
        final.rename(old)
    for later in complete(final.parent.parent):
        if step_of(later) > step_of(final):
            apart = later.with_name(f".abandoned-{later.name}-{token}")
            later.rename(apart)
            print(
                f"{later} was passed over: it is now {apart.name}, remove it if it is of no use",
                flush=True,
            )
    unfinished.rename(final)
    flush_to_disk(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def prune(run_dir: Path, step: int, keep_last: int, keep_every: int = 0) -> None:
    """Remove the checkpoints up to `step` that are older than the last `keep_last` whole ones (0
    keeps all), except milestones. Damaged ones are not counted, so that they never cause a whole
    one to be removed; the one of `step` always stays."""
    passing = [folder for folder in complete(run_dir) if step_of(folder) <= step]
    passing = [folder for folder in passing if not keep_every or step_of(folder) % keep_every]
    whole = [folder for folder in passing if step_of(folder) == step or not problem_of(folder, ())]
    if not keep_last or len(whole) <= keep_last:
        return
    for folder in passing[: passing.index(whole[-keep_last])]:
        gone = folder.with_name(f".removing-{folder.name}-{secrets.token_hex(4)}")
        try:
            folder.rename(gone)  # first, so that half a checkpoint never has this name
        except OSError as error:
            print(f"the old checkpoint {folder} cannot be removed: {error}", flush=True)
            continue
        shutil.rmtree(gone, ignore_errors=True)


def remove_partial(run_dir: Path) -> None:
    """Remove what killed processes left among the checkpoints. Only the holder of the run's lock
    may call this."""
    for left in (run_dir / "checkpoints").glob(".*ing-step_*"):
        remove(left)


def complete(run_dir: Path) -> list[Path]:
    """Return the finished checkpoints of a run, oldest first. A checkpoint that is being written
    has another name."""
    folders = [
        folder
        for folder in (run_dir / "checkpoints").glob("step_*")
        if _NAME.fullmatch(folder.name) and (folder / META).is_file()
    ]
    return sorted(folders, key=step_of)


def problem_of(folder: Path, summed: tuple[str, ...] | None = None) -> str:
    """Return what is wrong with a checkpoint, or "". The names and sizes of all files are compared,
    and the check sums of the files whose names begin with one of `summed` (None: of all). A
    checkpoint of an earlier version, which has no check sums, must open.
    """
    try:
        Meta.read(folder)
        row = json.loads(read_text(folder / META))
        if "files" not in row:
            parts = {path.parent for path in folder.glob("*/*.safetensors")}
            for path in {folder / "model.safetensors", *folder.glob("*.safetensors"), *parts}:
                Stored(path.with_suffix(".safetensors"))
            return ""
        if row.get("crc32") != _crc(row):
            return f"{folder / META} was changed after it was written ({UNSUMMED})"
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")}
        if foreign := sorted(there - row["files"].keys()):
            return f"{folder / foreign[0]} does not belong to it"
        for name, (size, crc) in row["files"].items():
            if name == NOTES and not (folder / name).exists():
                continue  # a person may remove it: the metrics start anew
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"{folder / META} names a file outside its folder: {name!r}"
            wanted = crc if summed is None or name.startswith(summed) else None
            if problem := _file_problem(folder / name, size, wanted):
                return problem
    except (ValueError, OSError, TypeError, AttributeError) as error:
        return str(error)[:1000]
    return ""


def _file_problem(path: Path, size: int, crc: int | None) -> str:
    if not path.is_file():
        return f"{path} is missing"
    length = path.stat().st_size
    if length != size:
        return f"{path} cannot be read as it was written: it has {length} bytes of {size}"
    if crc is not None and Sum.of_file(path).crc != crc:
        return f"the check sum of {path} is wrong: it was damaged, or changed ({UNSUMMED})"
    return ""


def read_notes(folder: Path) -> dict | None:
    """Read monitor.json; return None if there is none. ValueError if it is damaged or belongs to
    another step than the checkpoint."""
    path = folder / "monitor.json"
    try:
        notes = json.loads(read_text(path))
        step = notes["step"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {str(error)[:1000]}") from None
    if step != Meta.read(folder).step:
        raise ValueError(
            f"{path} is of step {step!r}, the checkpoint of step {Meta.read(folder).step}: it"
            " belongs to another one; remove it to start the metrics and the alpha schedule anew"
        )
    return notes


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of the safetensors file `path` by name."""
    return dict(Stored(path))


def latest(run_dir: Path, summed: tuple[str, ...] | None = ()) -> Path | None:
    """Return the newest checkpoint in which `problem_of` finds nothing; damaged ones are reported
    and passed over. A checkpoint that a running training removes meanwhile does not count as
    damaged: the search begins anew."""
    for _ in range(TRIES):
        vanished = False
        for folder in reversed(complete(run_dir)):
            problem = problem_of(folder, summed)
            if not problem:
                return folder
            vanished |= not folder.exists()
            if vanished:
                break
            print(f"passing over the damaged checkpoint {folder}: {problem}", flush=True)
        if not vanished and complete(run_dir):
            return None
    return None


def at_steps(run_dir: str | Path, steps: list[int]) -> list[Path]:
    """Return the checkpoints of these steps of a run. ValueError if one of them is not kept."""
    kept = {step_of(folder): folder for folder in complete(Path(run_dir))}
    missing = [step for step in steps if step not in kept]
    if missing:
        raise ValueError(
            f"{run_dir} keeps no checkpoint of the steps {missing}, but of {list(kept)}; a training"
            " keeps those of every train.keep_every_steps-th step"
        )
    return [kept[step] for step in steps]


@dataclass
class Weights:
    """Weights for sampling or for initialising another run."""

    meta: Meta
    tensors: Mapping[str, Tensor]  # names of the learner: model.*, text_encoder.*
    source: Path


def newest(path: Path) -> Path | None:
    """Return what `load_weights` would read: the file or checkpoint folder `path` itself, or the
    newest checkpoint of the run folder `path`."""
    return path if path.is_file() or (path / META).is_file() else latest(path, WEIGHTS)


def load_weights(path: str | Path, use_ema: bool = True, in_file: bool = False) -> Weights:
    """Load weights from a run folder (its latest checkpoint), a checkpoint folder, or an exported
    file. With `use_ema`, averaged parameters replace the raw ones if the checkpoint has them and is
    past `ema.start_step`. With `in_file`, tensors stay in their files until they are asked for."""
    path = find(path)
    if path.is_file():
        remedy = "; give a run folder, a checkpoint folder or an exported .safetensors file"
        metadata = header_of(path, remedy)
        text = metadata.get("mmdit")
        if text is None and (path.parent / META).is_file():
            raise ValueError(f"{path} is a part of a checkpoint: give its folder, {path.parent}")
        if text is None:
            raise ValueError(
                f"{path} holds no mmdit config in its metadata: it was not written by"
                " mmdit export (a LoRA is given as --lora, beside the --checkpoint of its"
                " base)"
            )
        if not use_ema:
            raise ValueError(
                f"{path} is an export, which holds one set of weights, not the last ones beside"
                " their average: give the folder of the run, or leave --raw_weights out"
            )
        stored = Stored(path)
        if "crc32" in metadata and int(metadata["crc32"]) != export_crc(text, stored):
            raise ValueError(
                f"the check sum of {path} is wrong: it was damaged, or changed after it was written"
            )
        meta = Meta.from_json(text, str(path))
        if in_file:
            return Weights(meta, Chosen({name: (stored, name) for name in stored}), path)
        tensors = {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in stored.items()
        }
        return Weights(meta, tensors, path)
    for _ in range(TRIES):
        folder = newest(path)
        try:
            return _of_folder(path, folder, use_ema, in_file)
        except Exception:  # files may vanish at any point of reading
            if folder in (None, path) or folder.exists():
                raise
    raise ValueError(
        f"the training in {path} removes its checkpoints faster than they can be read; name an"
        " export, or keep more of them (train.keep_last)"
    )


def _of_folder(path: Path, folder: Path | None, use_ema: bool, in_file: bool) -> Weights:
    """Return the weights of `folder`, the newest checkpoint at `path`."""
    if folder is not None and folder == path and (problem := problem_of(path, WEIGHTS)):
        raise ValueError(f"{path} is damaged: {problem}")
    if folder is None and path.name == "checkpoints" and newest(path.parent):
        raise ValueError(f"{path} is a part of a run: give the run's folder, {path.parent}")
    if folder is None:
        raise ValueError(
            f"no checkpoint at {path}: expected a run folder with checkpoints/step_*, a checkpoint"
            " folder, or a file (mmdit pull fetches a model of the hub)"
        )
    meta = Meta.read(folder)
    files = [Stored(folder / "model.safetensors")]
    section = meta.config.get("ema")
    start = section.get("start_step") if isinstance(section, dict) else None
    # Before that step, an older version kept the initial weights as the average.
    averaged = not isinstance(start, int) or meta.step > start
    if use_ema and averaged and any(folder.glob("ema*")):
        files.append(Stored(folder / "ema.safetensors"))
    chosen = Chosen({name: (stored, name) for stored in files for name in stored})
    return Weights(meta, chosen if in_file else dict(chosen), folder)


def export_crc(text: str, tensors: Mapping[str, Tensor]) -> int:
    """Return the CRC-32 of an export: of its config and of its tensors in the order of their
    names."""
    total = Sum()
    total.add(text.encode())
    for name in sorted(tensors):
        total.add(bytes_of(tensors[name]))
    return total.crc
