"""Adapters apart from their base: as a state dict, and as safetensors files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mmdit.adapters.layers import Adapter, is_adapter, kind_of
from mmdit.adapters.lora import adapters, insert, near, summary
from mmdit.config import ConfigError
from mmdit.files import clean, write_atomically
from mmdit.weights import tensor_pieces


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the model without its adapters: what a plain model of the same shape loads
    strictly."""
    modules = model.named_modules(remove_duplicate=False)
    own = {
        f"{name}.{part}"
        for name, module in modules
        if isinstance(module, Adapter)
        for part in module.own()
    }
    return {key: value for key, value in model.state_dict().items() if key not in own}


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of every adapter, as `<layer>.lora_A`, and `<layer>.alpha` (0-d: the alpha in
    force); for safetensors."""
    return {
        f"{name}.{part}": tensor
        for name, layer in adapters(model).items()
        for part, tensor in layer.state().items()
    }


def load_lora_state(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Puts `lora_state` of another model into this one and returns the layers' names. A model
    without adapters gets exactly those that the state holds; in an injected one both must agree on
    layers, kind, rank and alpha. ValueError (layer, both values, near names) otherwise, and then
    the model is as it was."""
    grouped = _group(state)
    present = adapters(model)
    if not present:
        linears = {
            name: m
            for name, m in model.named_modules(remove_duplicate=False)
            if type(m) is nn.Linear
        }
        _check_layers(grouped, linears)
        insert(
            model,
            {
                name: lambda base, _, own=own: own.kind.of(base, own.parts, own.alpha)
                for name, own in grouped.items()
            },
        )
        present = adapters(model)
    else:
        _check_adapters(present, grouped)
        with torch.no_grad():
            for name, own in grouped.items():
                for part, parameter in present[name].own().items():
                    parameter.copy_(own.parts[part])
    return [name for name in present if name in grouped]


def check_adapters(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: object
) -> None:
    """Raise ConfigError unless each layer that has an adapter in `tensors` has one of the same kind
    and sizes in `own`: half of one kind and half of another computes neither."""
    theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items() if is_adapter(name)}
    layers = {name.rpartition(".")[0] for name in theirs}
    ours = {
        name: tuple(tensor.shape)
        for name, tensor in own.items()
        if is_adapter(name) and name.rpartition(".")[0] in layers
    }
    for name in sorted(theirs | ours):
        if theirs.get(name) != ours.get(name):
            raise ConfigError(
                "train.init_from",
                f"has adapters of another kind than lora: asks for: {name} is "
                f"{theirs.get(name, 'not there')} in {source}, {ours.get(name, 'not there')} here; "
                "set lora: as in the run that wrote it, or fold them into its weights with export "
                "--merge and start from that file",
            )


def save_lora(model: nn.Module, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """`lora_state` as safetensors, complete or not at all (written aside, then renamed). The header
    repeats rank and alpha for people and other programs; `metadata` adds to it. ValueError without
    adapters."""
    layers = adapters(model).values()
    if not layers:
        raise ValueError(
            f"nothing to save to {path}: the model has no adapter (lora.enabled: false?)"
        )
    header = {
        "format": "mmdit.lora",
        "type": ",".join(
            sorted({type(layer).__name__.removesuffix("Linear").lower() for layer in layers})
        ),
        "rank": ",".join(map(str, sorted({layer.rank for layer in layers}))),
        "alpha": ",".join(
            f"{alpha:g}" for alpha in sorted({layer.state()["alpha"].item() for layer in layers})
        ),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clean(path.parent)
    write_atomically(
        path, tensor_pieces(lora_state(model), {**(metadata or {}), **header}), flush=True
    )


def load_lora(model: nn.Module, path: str | Path) -> list[str]:
    """`load_lora_state` of a file made by `save_lora`; ValueError that names the file if it is
    absent, damaged or foreign."""
    try:
        state = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"cannot read the adapter {path}: {error}") from None
    try:
        return load_lora_state(model, state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@dataclass
class _Stored:
    """One adapter of a state."""

    parts: dict[str, Tensor]
    alpha: float
    kind: type[Adapter]
    sizes: tuple[int, int]  # in, out


def _group(state: dict[str, Tensor]) -> dict[str, _Stored]:
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, part = key.rpartition(".")
        if not (is_adapter(key) or part == "alpha"):
            raise ValueError(
                f"{key!r} is no adapter tensor: expected names end in .lora_A, .lora_B, .lokr_w1 …"
                " or .alpha"
            )
        grouped.setdefault(name, {})[part] = value
    if not grouped:
        raise ValueError("holds no adapter: no name ends in .lora_A or .lokr_w1")
    result = {}
    for name, parts in grouped.items():
        alpha = parts.pop("alpha", None)
        absent = [
            part
            for part in ("lora_A", "lora_B")
            if part not in parts and any(p.startswith("lora") for p in parts)
        ]
        if absent or alpha is None or not parts:
            raise ValueError(
                f"the adapter of {name!r} lacks"
                f" {', '.join(absent or ['alpha' if parts else 'its tensors'])}: the file is"
                " incomplete"
            )
        if alpha.numel() != 1 or not 0 < alpha.item() < math.inf:
            raise ValueError(f"{name}: alpha is {alpha.tolist()}, must be one positive number")
        try:
            kind, *sizes = kind_of(parts)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        result[name] = _Stored(parts, alpha.item(), kind, tuple(sizes))
    return result


def _check_layers(grouped: dict[str, _Stored], layers: dict[str, nn.Linear]) -> None:
    foreign = [name for name in grouped if name not in layers]
    if foreign:
        shown = "; ".join(f"{name!r}{near(name, list(layers))}" for name in foreign[:5])
        raise ValueError(
            f"{len(foreign)} of {len(grouped)} adapters have no layer here: {shown}; is it for"
            " another model?"
        )
    for name, own in grouped.items():
        ours = (layers[name].in_features, layers[name].out_features)
        if own.sizes != ours:
            sizes = (
                f"the adapter is for {own.sizes[0]}→{own.sizes[1]}, the layer is"
                f" {ours[0]}→{ours[1]}"
            )
            raise ValueError(f"{name}: {sizes}; open the model size it was trained on")


def _check_adapters(present: dict[str, Adapter], grouped: dict[str, _Stored]) -> None:
    _check_layers(grouped, present)
    untouched = [name for name in present if name not in grouped]
    if untouched:
        raise ValueError(
            f"no tensors for the adapters of {summary(untouched)}; set lora.target_modules to what"
            " was trained"
        )
    for name, own in grouped.items():
        layer = present[name]
        ranks = own.kind.of(layer, own.parts, own.alpha).rank, layer.rank
        kinds = own.kind.__name__, type(layer).__name__
        alphas = own.alpha, layer.state()["alpha"].item()
        for what, (theirs, ours) in (("type", kinds), ("rank", ranks), ("alpha", alphas)):
            if theirs != ours and not (
                what == "alpha" and math.isclose(theirs, ours, rel_tol=1e-6)
            ):  # stored in float32
                theirs, ours = (
                    value if isinstance(value, str) else f"{value:g}" for value in (theirs, ours)
                )
                word = theirs.removesuffix("Linear").lower()  # of a class; numbers have no such end
                raise ValueError(
                    f"{name}: the adapter has {what} {theirs}, the model {ours}; set lora.{what}:"
                    f" {word}"
                )
        shapes = {
            part: (tuple(own.parts[part].shape), tuple(p.shape))
            for part, p in layer.own().items()
            if part in own.parts
        }
        wrong = [
            f"{part} {theirs}, the model {ours}"
            for part, (theirs, ours) in shapes.items()
            if theirs != ours
        ]
        if wrong or len(shapes) != len(own.parts):
            raise ValueError(
                f"{name}: the adapter has {wrong[0] if wrong else sorted(own.parts)}; set"
                " lora.factor and its kin as it was made"
            )
