"""Adapters apart from their base: as a state dict, and as safetensors files."""

from __future__ import annotations

import math
import os
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mmdit.adapters.lora import PARTS, LoRALinear, adapters, insert, near, summary


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the model without its adapters: what a plain model of the same shape loads strictly."""
    modules = model.named_modules(remove_duplicate=False)
    own = {f"{name}.{part}" for name, module in modules if isinstance(module, LoRALinear) for part in PARTS}
    return {key: value for key, value in model.state_dict().items() if key not in own}


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """`<layer>.lora_A`, `<layer>.lora_B` and `<layer>.alpha` (0-d: the alpha in force) of every adapter; for safetensors."""
    state = {}
    for name, module in adapters(model).items():
        state[f"{name}.lora_A"] = module.lora_A.detach()
        state[f"{name}.lora_B"] = module.lora_B.detach()
        state[f"{name}.alpha"] = torch.tensor(float(module.alpha))
    return state


def load_lora_state(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Puts `lora_state` of another model into this one and returns the layers' names. A model without adapters gets exactly
    those that the state holds; in an injected one both must agree on layers, rank and alpha. ValueError (layer, both values,
    near names) otherwise, and then the model is as it was."""
    grouped = _group(state)
    present = adapters(model)
    if not present:
        _check_layers(model, grouped)
        shapes = {name: (len(parts["lora_A"]), float(parts["alpha"])) for name, parts in grouped.items()}
        insert(model, shapes, dropout=0.0, seed=0)
        present = adapters(model)
    else:
        _check_adapters(present, grouped)
    with torch.no_grad():
        for name, parts in grouped.items():
            present[name].lora_A.copy_(parts["lora_A"])
            present[name].lora_B.copy_(parts["lora_B"])
    return [name for name in present if name in grouped]


def save_lora(model: nn.Module, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """`lora_state` as safetensors, complete or not at all (written aside, then renamed). The header repeats rank and alpha for
    people and other programs; `metadata` adds to it. ValueError without adapters."""
    layers = adapters(model).values()
    if not layers:
        raise ValueError(f"nothing to save to {path}: the model has no adapter (lora.enabled: false?)")
    header = {
        "format": "mmdit.lora",
        "rank": ",".join(map(str, sorted({layer.rank for layer in layers}))),
        "alpha": ",".join(f"{alpha:g}" for alpha in sorted({layer.alpha for layer in layers})),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tensors = {key: value.cpu().contiguous() for key, value in lora_state(model).items()}
    try:
        with open(aside, "wb") as file:
            file.write(safetensors.torch.save(tensors, {**(metadata or {}), **header}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def load_lora(model: nn.Module, path: str | Path) -> list[str]:
    """`load_lora_state` of a file made by `save_lora`; ValueError that names the file if it is absent, damaged or foreign."""
    try:
        state = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"cannot read the adapter {path}: {error}") from None
    try:
        return load_lora_state(model, state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _group(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, part = key.rpartition(".")
        if part not in (*PARTS, "alpha"):
            raise ValueError(f"{key!r} is no adapter tensor: expected names end in .lora_A, .lora_B or .alpha")
        grouped.setdefault(name, {})[part] = value
    for name, parts in grouped.items():
        absent = [part for part in (*PARTS, "alpha") if part not in parts]
        if absent:
            raise ValueError(f"the adapter of {name!r} lacks {', '.join(absent)}: the file is incomplete")
        down, up = parts["lora_A"], parts["lora_B"]
        if down.dim() != 2 or up.dim() != 2 or not len(down) == up.shape[1] > 0:
            raise ValueError(f"{name}: lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)} do not share a rank")
        if parts["alpha"].numel() != 1 or not 0 < parts["alpha"].item() < math.inf:
            raise ValueError(f"{name}: alpha is {parts['alpha'].tolist()}, must be one positive number")
    if not grouped:
        raise ValueError("holds no adapter: no name ends in .lora_A")
    return grouped


def _check_layers(model: nn.Module, grouped: dict[str, dict[str, Tensor]]) -> None:
    linears = {name: m for name, m in model.named_modules(remove_duplicate=False) if type(m) is nn.Linear}
    _check_names(grouped, linears)
    for name, parts in grouped.items():
        _check_shape(name, parts, linears[name])


def _check_adapters(present: dict[str, LoRALinear], grouped: dict[str, dict[str, Tensor]]) -> None:
    _check_names(grouped, present)
    untouched = [name for name in present if name not in grouped]
    if untouched:
        raise ValueError(f"no tensors for the adapters of {summary(untouched)}; set lora.target_modules to what was trained")
    for name, parts in grouped.items():
        _check_shape(name, parts, present[name])
        for what, theirs, ours in (
            ("rank", len(parts["lora_A"]), present[name].rank),
            ("alpha", float(parts["alpha"]), present[name].alpha),
        ):
            if not math.isclose(theirs, ours, rel_tol=1e-6):  # alpha is stored in float32
                raise ValueError(f"{name}: the adapter has {what} {theirs:g}, the model {ours:g}; set lora.{what}: {theirs:g}")


def _check_names(grouped: dict, known: dict[str, nn.Linear]) -> None:
    foreign = [name for name in grouped if name not in known]
    if foreign:
        shown = "; ".join(f"{name!r}{near(name, list(known))}" for name in foreign[:5])
        raise ValueError(f"{len(foreign)} of {len(grouped)} adapters have no layer here: {shown}; is it for another model?")


def _check_shape(name: str, parts: dict[str, Tensor], linear: nn.Linear) -> None:
    theirs = (parts["lora_A"].shape[1], parts["lora_B"].shape[0])
    ours = (linear.in_features, linear.out_features)
    if theirs != ours:
        sizes = f"the adapter is for {theirs[0]}→{theirs[1]}, the layer is {ours[0]}→{ours[1]}"
        raise ValueError(f"{name}: {sizes}; open the model size it was trained on")
