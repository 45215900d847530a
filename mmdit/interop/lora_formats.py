"""LoRA files of other tools, read into and written from any of our models: PEFT, Diffusers, kohya, ComfyUI and their relatives.

All mean `ΔW = s B A`; they differ in how a layer is named and where `s` stands: in `.alpha` tensors (s = alpha / rank), in a
config beside the weights or in the file's header, or nowhere (s = 1).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmdit.adapters.lora import adapters, insert, near
from mmdit.interop.wan import diffusers_module
from mmdit.models.wan import WanDiT
from mmdit.weights import Checkpoint

Format = Literal["peft", "diffusers", "kohya", "comfy"]

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "lora_unet_", "")
EXPERTS = {"transformer_1.": "high", "transformer_2.": "low"}
PARTS = {  # ends of keys → what they hold
    **{f".lora_{part}{end}": part for part in "AB" for end in ("", ".weight", ".default.weight")},
    ".lora_down.weight": "A", ".lora_up.weight": "B", ".alpha": "alpha", ".diff": "weight", ".diff_b": "bias",
    ".dora_scale": "dora",
}  # fmt: skip
HEADER = "lora_adapter_metadata"  # of Diffusers
SAME = 1e-6  # relative error that a saved and reloaded update may have


@dataclass
class Update:
    """Of one linear layer: `ΔW = scale · B A`, `A (rank, in)`, `B (out, rank)`."""

    A: Tensor | None = None
    B: Tensor | None = None
    alpha: float | None = None
    scale: float = 1.0


@dataclass
class LoRAFile:
    """What a file holds under our names: `updates` of linear layers, and `differences` to add to whole parameters."""

    updates: dict[str, Update] = field(default_factory=dict)
    differences: dict[str, Tensor] = field(default_factory=dict)


def foreign_names(model: nn.Module) -> dict[str, str]:
    """Every name that a module of `model` may have in a file → our name. kohya's underscores are never taken apart: the table
    is made forward from the modules that there are."""
    table = {}
    for name, _ in model.named_modules():
        own = {name}
        if isinstance(model, WanDiT):
            with contextlib.suppress(KeyError):  # a container: no tensor bears its name
                own.add(diffusers_module(name))
        for foreign in own:
            table[foreign] = table[foreign.replace(".", "_")] = name
    table.pop("", None)
    return table


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def read_lora(model: nn.Module, path: str | Path, expert: Literal["high", "low"] | None = None) -> LoRAFile:
    """The file, or PEFT folder, at `path` in terms of `model`. ValueError: keys that name no layer of it (with near names),
    half an update, another shape, two experts of which none is chosen, or DoRA."""
    path, names, result = Path(path), foreign_names(model), LoRAFile()
    folder = path.is_dir() and (path / "adapter_config.json").is_file()
    stored = Checkpoint(path)
    unknown = []
    for key, tensor in stored.tensors():
        found = _parse(key, names, expert, path)
        if found is None:
            continue
        module, part = found
        if module is None:
            unknown.append(key)
        elif part == "dora":
            raise ValueError(f"{path} is a DoRA file ({key}): its magnitudes would be lost; merge it with its own tool")
        elif part in ("weight", "bias"):
            result.differences[f"{module}.{part}"] = tensor
        elif part == "alpha":
            result.updates.setdefault(module, Update()).alpha = float(tensor)
        else:
            setattr(result.updates.setdefault(module, Update()), part, tensor)
    if unknown:
        word = re.sub(r"\.?lora_.*$|\.alpha$|\.diff(_b)?$", "", unknown[0])
        raise ValueError(f"{path}: {len(unknown)} of {len(stored.entries)} keys name no layer of this model, first {unknown[0]}"
                         f"{near(word, sorted(set(names.values())))}; is it for another model (I2V, T2V, 1.3B, 14B)?")
    if not result.updates and not result.differences:
        raise ValueError(f"{path} holds no LoRA{f' of the {expert}-noise expert' if expert else ''}")
    settings = json.loads((path / "adapter_config.json").read_text()) if folder else _header(stored.files[0])
    for module, update in result.updates.items():
        _check(model, module, update, path)
        update.scale = _scale(update, settings, module, model)
    parameters = dict(model.named_parameters())
    for name, tensor in result.differences.items():
        own = parameters.get(name)
        if own is None or own.shape != tensor.shape:
            what = "not there" if own is None else tuple(own.shape)
            raise ValueError(f"{path}: a difference {tuple(tensor.shape)} for {name}, which is {what} in this model")
    return result


def _parse(key: str, names: dict[str, str], expert: str | None, path: Path) -> tuple[str | None, str] | None:
    """(our module or None, part) of a key; None: it belongs to the other expert."""
    end = max((e for e in PARTS if key.endswith(e)), key=len, default=None)
    if end is None:
        return None, ""
    body = key.removesuffix(end)
    for prefix in PREFIXES:
        if not body.startswith(prefix):
            continue
        rest = body.removeprefix(prefix)
        for mark, whose in EXPERTS.items():
            if rest.startswith(mark):
                if expert is None:
                    raise ValueError(f"{path} holds LoRAs of two experts ({mark[:-1]} …): say expert='high' or 'low'")
                if whose != expert:
                    return None
                rest = rest.removeprefix(mark)
        if rest in names:
            return names[rest], PARTS[end]
    return None, ""


def _header(file: Path) -> dict:
    """Diffusers' adapter config, from the header of the file; empty without one."""
    if file.suffix != ".safetensors":
        return {}
    with safe_open(file, "pt") as handle:
        text = (handle.metadata() or {}).get(HEADER)
    return {key.removeprefix("transformer."): value for key, value in json.loads(text).items()} if text else {}


def _scale(update: Update, settings: dict, module: str, model: nn.Module) -> float:
    rank = len(update.A)
    if update.alpha is not None:
        return update.alpha / rank
    if "lora_alpha" not in settings:
        return 1.0
    alpha = settings["lora_alpha"]
    theirs = [name for name, ours in foreign_names(model).items() if ours == module] if settings.get("alpha_pattern") else []
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in theirs):
            alpha = value
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _check(model: nn.Module, module: str, update: Update, path: Path) -> None:
    layer = model.get_submodule(module)
    if update.A is None or update.B is None:
        raise ValueError(f"{path}: {module} has {'no lora_A (down)' if update.A is None else 'no lora_B (up)'}: half an update")
    shapes = tuple(update.A.shape), tuple(update.B.shape)
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{path}: an update of {module}, which is a {type(layer).__name__}; only linear layers can have one")
    rank = len(update.A)
    if shapes != ((rank, layer.in_features), (layer.out_features, rank)):
        raise ValueError(f"{path}: {module} has A {shapes[0]} and B {shapes[1]}; this layer is {layer.in_features} → "
                         f"{layer.out_features}: the LoRA is for a model of another size")


@torch.no_grad()
def load_lora(model: nn.Module, path: str | Path, expert: Literal["high", "low"] | None = None) -> list[str]:
    """Adapt `model` in place with the LoRA at `path`; returns the names of the adapted layers. Whole differences (of distilled
    models) are added to the parameters. ValueError: see `read_lora`; nothing is changed then."""
    if adapters(model):
        raise ValueError("the model has adapters already: merge or remove them first")
    content = read_lora(model, path, expert)
    insert(model, {name: (len(u.A), u.scale * len(u.A)) for name, u in content.updates.items()}, dropout=0.0, seed=0)
    for name, layer in adapters(model).items():
        if name in content.updates:
            layer.lora_A.copy_(content.updates[name].A)
            layer.lora_B.copy_(content.updates[name].B)
    parameters = dict(model.named_parameters())
    for name, difference in content.differences.items():
        parameters[name].add_(difference.to(parameters[name]))
    return list(content.updates)


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def save_lora(model: nn.Module, path: str | Path, format: Format) -> None:
    """Write the adapters of `model`: `diffusers`, `kohya` or `comfy` as one file, `peft` as a folder. Then it is read back and
    compared, layer by layer, before it bears its name. ValueError: no adapters, or a path that is there."""
    path, layers = Path(path), adapters(model)
    if format not in ("peft", "diffusers", "kohya", "comfy"):
        raise ValueError(f"format is {format!r}; must be peft, diffusers, kohya or comfy")
    if not layers:
        raise ValueError("the model has no adapters to save")
    if path.exists():
        raise ValueError(f"{path} is there already; choose another place")
    diffusers = format in ("peft", "diffusers") and isinstance(model, WanDiT)
    theirs = {name: diffusers_module(name) if diffusers else name for name in layers}
    ranks, alphas = ({theirs[n]: getattr(m, key) for n, m in layers.items()} for key in ("rank", "alpha"))
    common = (Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0])
    settings = {
        "peft_type": "LORA", "r": common[0], "lora_alpha": common[1], "lora_dropout": 0.0, "bias": "none",
        "target_modules": list(theirs.values()), "use_rslora": False,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != common[0]},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != common[1]},
    }  # fmt: skip
    tensors, header = {}, {"format": "pt"}
    for name, layer in layers.items():
        a, b = layer.lora_A.detach().cpu().contiguous(), layer.lora_B.detach().cpu().contiguous()
        if format == "kohya":
            key = f"lora_unet_{name.replace('.', '_')}"
            alpha = torch.tensor(float(layer.alpha))
            tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": alpha}
            continue
        prefix = {"peft": "base_model.model.", "diffusers": "transformer.", "comfy": "diffusion_model."}[format]
        b = b * layer.scale if format == "comfy" else b
        tensors |= {f"{prefix}{theirs[name]}.lora_A.weight": a, f"{prefix}{theirs[name]}.lora_B.weight": b}
    aside = path.with_name(f".writing-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if format == "peft":
        aside.mkdir(parents=True)
        (aside / "adapter_config.json").write_text(json.dumps(settings, indent=1))
        save_file(tensors, aside / "adapter_model.safetensors", header)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        if format == "diffusers":
            header[HEADER] = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
        aside = aside.with_suffix(".safetensors")
        save_file(tensors, aside, header)
    _compare(model, aside)
    os.replace(aside, path)


def _compare(model: nn.Module, written: Path) -> None:
    back = read_lora(model, written).updates
    for name, layer in adapters(model).items():
        expected = layer.scale * (layer.lora_B.detach().double() @ layer.lora_A.detach().double()).cpu()
        found = back[name].scale * (back[name].B.double() @ back[name].A.double())
        if (found - expected).norm() > SAME * expected.norm():
            raise ValueError(f"{written}: {name} is not what was saved; it is left for inspection")
