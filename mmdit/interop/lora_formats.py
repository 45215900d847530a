"""LoRA, DoRA and LoKr files of other tools, read into and written from any of our models: PEFT, Diffusers, kohya, ComfyUI and
their relatives.

All mean `ΔW = s B A` (LoKr: `s W1 ⊗ W2`); they differ in how a layer is named and where `s` stands: in `.alpha` tensors
(s = alpha / rank), in a config beside the weights or in the file's header, or nowhere (s = 1).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmdit.adapters.layers import Adapter, DoRALinear, LoKrLinear, kind_of
from mmdit.adapters.lora import adapters, insert, near
from mmdit.interop.wan import diffusers_module
from mmdit.models.wan import WanDiT
from mmdit.weights import Checkpoint

Format = Literal["peft", "diffusers", "kohya", "comfy"]

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "lora_unet_", "")
WRITTEN = {"peft": "base_model.model.", "diffusers": "transformer.", "comfy": "diffusion_model.", "kohya": "lora_unet_"}
EXPERTS = {"transformer_1.": "high", "transformer_2.": "low"}
PARTS = {  # ends of keys → what they hold
    **{f".lora_{part}{end}": f"lora_{part}" for part in "AB" for end in ("", ".weight", ".default.weight")},
    ".lora_down.weight": "lora_A", ".lora_up.weight": "lora_B", ".alpha": "alpha",
    ".diff": "weight", ".diff_b": "bias", ".diff_m": "modulation",  # of whole parameters
    **{end: "lora_magnitude" for end in (".dora_scale", ".lora_magnitude", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")},
    **{f".{part}": part for factor in ("lokr_w1", "lokr_w2") for part in (factor, f"{factor}_a", f"{factor}_b")},
}  # fmt: skip
HEADER = "lora_adapter_metadata"  # of Diffusers
SAME = 1e-6  # relative error that a saved and reloaded update may have


@dataclass
class Update:
    """Of one linear layer: tensors by the names of `adapters.layers`."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None  # as the file has it
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return next((len(tensor) for name, tensor in self.parts.items() if name == "lora_A" or name.endswith("_b")), 1)

    def adapter(self, base: nn.Linear) -> Adapter:
        return kind_of(self.parts)[0].of(base, self.parts, self.scale * self.rank)


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
    """The file, or PEFT folder, at `path` in terms of `model`. A LoRA of T2V fits an I2V model, with a warning. ValueError: keys
    that name no layer of it (with near names), half an update, another shape, or two experts of which none is chosen."""
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
        elif part in ("weight", "bias", "modulation"):
            result.differences[f"{module}.{part}"] = tensor
        elif part == "alpha":
            result.updates.setdefault(module, Update()).alpha = float(tensor)
        else:
            tensor = tensor.squeeze(1) if part == "lora_magnitude" and tensor.ndim == 2 else tensor
            result.updates.setdefault(module, Update()).parts[part] = tensor
    if unknown:
        word = re.sub(r"^lora_unet_|\.lora_[^.]*(\.default)?(\.weight)?$|\.alpha$|\.diff(_[bm])?$", "", unknown[0])
        alike = sorted(name for name in names if ("." in name) == ("." in word))
        raise ValueError(f"{path}: {len(unknown)} of {len(stored.entries)} keys name no layer of this model, first {unknown[0]}"
                         f"{near(word, alike)}; is it for another model (I2V, T2V, 1.3B, 14B)?")
    if not result.updates and not result.differences:
        raise ValueError(f"{path} holds no LoRA{f' of the {expert}-noise expert' if expert else ''}")
    settings = json.loads((path / "adapter_config.json").read_text()) if folder else _header(stored.files[0])
    for module, update in result.updates.items():
        _check(model, module, update, path)
        update.scale = _scale(update, settings, module, model)
    pictured = {name for name in names.values() if name.endswith((".k_img", ".v_img"))}
    told = [name for name in result.updates if name.endswith(("cross_attn.k", "cross_attn.v"))]
    if pictured and told and not result.updates.keys() & pictured:
        warnings.warn(f"{path} adapts {len(told)} layers that read the text and none of the {len(pictured)} that read the "
                      "picture: it was made for a T2V model, and this I2V model keeps those as they are", stacklevel=4)  # fmt: skip
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
    rank = update.rank
    if update.parts.keys() == {"lokr_w1", "lokr_w2"}:
        return 1.0  # every reader of whole factors ignores alpha
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
    for part, word in (("lora_A", "down"), ("lora_B", "up")):
        if part not in update.parts and not any(name.startswith("lokr") for name in update.parts):
            raise ValueError(f"{path}: {module} has no {part} ({word}): half an update")
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{path}: an update of {module}, which is a {type(layer).__name__}; only linear layers can have one")
    try:
        _, *sizes = kind_of(update.parts)
    except ValueError as error:
        raise ValueError(f"{path}: {module}: {error}") from None
    if sizes != [layer.in_features, layer.out_features]:
        shapes = ", ".join(f"{name.removeprefix('lora_')} {tuple(tensor.shape)}" for name, tensor in update.parts.items())
        raise ValueError(f"{path}: {module} has {shapes}; this layer is {layer.in_features} → "
                         f"{layer.out_features}: the LoRA is for a model of another size")


@torch.no_grad()
def load_lora(model: nn.Module, path: str | Path, expert: Literal["high", "low"] | None = None) -> list[str]:
    """Adapt `model` in place with the LoRA at `path`; returns the names of the adapted layers. Whole differences (of distilled
    models) are added to the parameters. ValueError: see `read_lora`; nothing is changed then."""
    if adapters(model):
        raise ValueError("the model has adapters already: merge or remove them first")
    content = read_lora(model, path, expert)
    insert(model, {name: lambda base, _, update=update: update.adapter(base) for name, update in content.updates.items()})
    parameters = dict(model.named_parameters())
    for name, difference in content.differences.items():
        parameters[name].add_(difference.to(parameters[name]))
    return list(content.updates)


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def save_lora(model: nn.Module, path: str | Path, format: Format) -> None:
    """Write the adapters of `model`: `diffusers`, `kohya` or `comfy` as one file, `peft` as a folder. Then it is read back and
    compared, layer by layer, before it bears its name. LoKr is written as LyCORIS does (`kohya`, `comfy`), with its scale in W1:
    readers ignore the alpha of whole factors. ValueError: no adapters, a path that is there, LoKr in the other formats."""
    path, layers = Path(path), adapters(model)
    if format not in ("peft", "diffusers", "kohya", "comfy"):
        raise ValueError(f"format is {format!r}; must be peft, diffusers, kohya or comfy")
    if not layers:
        raise ValueError("the model has no adapters to save")
    if format != "peft" and path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors: {format} is one file")
    if path.exists():
        raise ValueError(f"{path} is there already; choose another place")
    if format in ("peft", "diffusers") and any(isinstance(layer, LoKrLinear) for layer in layers.values()):
        raise ValueError(f"{format} files hold no LoKr; choose kohya or comfy")
    diffusers = format in ("peft", "diffusers") and isinstance(model, WanDiT)
    theirs = {name: diffusers_module(name) if diffusers else name for name in layers}
    ranks, alphas = {theirs[n]: m.rank for n, m in layers.items()}, {theirs[n]: m.scale * m.rank for n, m in layers.items()}
    common = (Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0])
    settings = {
        "peft_type": "LORA", "r": common[0], "lora_alpha": common[1], "lora_dropout": 0.0, "bias": "none",
        "target_modules": list(theirs.values()), "use_rslora": False,
        "use_dora": any(isinstance(layer, DoRALinear) for layer in layers.values()),
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != common[0]},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != common[1]},
    }  # fmt: skip
    tensors, header = {}, {"format": "pt"}
    for name, layer in layers.items():
        own = {part: tensor.cpu().contiguous() for part, tensor in layer.state().items()}
        key = WRITTEN[format] + (name.replace(".", "_") if format == "kohya" else theirs[name])
        alpha = own.pop("alpha")
        if isinstance(layer, LoKrLinear):
            first = "lokr_w1" if "lokr_w1" in own else "lokr_w1_a"
            own[first] = own[first] * layer.scale
            own["alpha"] = torch.tensor(float(layer.rank))
            tensors |= {f"{key}.{part}": tensor for part, tensor in own.items()}
            continue
        ends = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight", "lora_magnitude": ".lora_magnitude_vector"}
        if format in ("kohya", "comfy") and "lora_magnitude" in own:
            ends["lora_magnitude"], own["lora_magnitude"] = ".dora_scale", own["lora_magnitude"][:, None].contiguous()
        if format == "kohya":
            ends |= {"lora_A": ".lora_down.weight", "lora_B": ".lora_up.weight"}
            tensors[f"{key}.alpha"] = alpha
        if format == "comfy":
            own["lora_B"] = own["lora_B"] * layer.scale
        tensors |= {key + ends[part]: tensor for part, tensor in own.items()}
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
        expected, found = layer.delta(), back[name].adapter(layer).delta()
        lengths = [own.get("lora_magnitude", torch.zeros(1)) for own in (layer.state(), back[name].parts)]
        if (found - expected).norm() > SAME * expected.norm() or not torch.equal(*(length.cpu() for length in lengths)):
            raise ValueError(f"{written}: {name} is not what was saved; it is left for inspection")
