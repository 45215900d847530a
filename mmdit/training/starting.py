"""Start a run from something other than a whole model: a LoRA file of any tool, or one expert of a
run that trained a pair."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmdit.adapters import Adapter, adapters, is_adapter
from mmdit.adapters.strength import set_alpha
from mmdit.config import ConfigError
from mmdit.interop.lora_names import OF_ADAPTERS
from mmdit.interop.lora_reading import LoRAFile, read_lora
from mmdit.interop.wan_weights import note_of_name
from mmdit.training.checkpoint import Weights
from mmdit.training.learner import Learner
from mmdit.training.memory.shards import renamed


def is_lora(path: str | Path) -> bool:
    """Return whether `path` is a LoRA, in a file or in a PEFT folder, and not a run, checkpoint or
    export of ours."""
    path = Path(path)
    if path.is_dir():
        return (path / "adapter_config.json").is_file()
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as handle:
            ours = "mmdit" in (handle.metadata() or {})
            return not ours and any(name.endswith(OF_ADAPTERS) for name in handle.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def start_from_lora(learner: Learner, config) -> list[str]:
    """Copy the LoRA that `train.init_from` names into the adapters of `learner`; adapters of layers
    that it lacks start new. Return lines to report. ConfigError if it does not fit, or has no base
    to add to."""
    path = config.train.init_from
    if not config.lora.enabled:
        raise ConfigError(
            "train.init_from",
            f"is {path}, a LoRA, but lora.enabled is false; enable it to train on",
        )
    if not config.model.released:
        raise ConfigError(
            "train.init_from",
            f"is {path}, a LoRA without its base; name the run or export that it belongs to",
        )
    lines = []
    for name, part in learner.parts().items():
        expert: Any = name or config.model.expert
        try:
            content = read_lora(part, path, expert)
        except ValueError as error:
            raise ConfigError("train.init_from", str(error)) from None
        _copy(part, content, path)
        of_expert = f" for the {expert}-noise expert" if expert else ""
        new = len(adapters(part)) - len(content.updates)
        lines.append(
            f"starting from the LoRA {path}{of_expert}: {len(content.updates)} layers, {new} that"
            " it lacks start new"
        )
        if note := note_of_name(path, expert):
            lines.append(note)
    return lines


@torch.no_grad()
def _copy(part: nn.Module, content: LoRAFile, path: str) -> None:
    """Copy a file's factors into the adapters of `part`, rescaled so that they have the strength of
    the file at the adapters' alpha."""
    layers = adapters(part)
    if content.differences:
        raise ConfigError(
            "train.init_from",
            f"is {path}, which changes whole parameters, too (first"
            f" {next(iter(content.differences))}); a run of adapters does not keep them: merge it"
            " into the base first",
        )
    absent = [name for name in content.updates if name not in layers]
    if absent:
        raise ConfigError(
            "lora.target_modules",
            f"choose {len(layers)} layers, but {path} adapts {len(absent)} others, first "
            f"{absent[0]}; choose all of its layers",
        )
    for name, update in content.updates.items():
        layer = layers[name]
        made = update.adapter(layer)
        ours, theirs = _shapes(layer), _shapes(made)
        if ours != theirs:
            raise ConfigError(
                "lora",
                f"makes {name} of {ours}, {path} has {theirs}; set lora.type and lora.rank as it"
                f" was made (rank {update.rank})",
            )
        for key, value in layer.adapter_parameters().items():
            value.copy_(made.adapter_parameters()[key])
        wanted, ratio = layer.alpha, made.scale / layer.scale
        if ratio < 0:  # a file may have a negative scale, an alpha here may not
            layer.outer.neg_()
        set_alpha(layer, wanted * abs(ratio))
        set_alpha(layer, wanted, preserve=True)


def _shapes(layer: Adapter) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in layer.adapter_parameters().items()}


def one_expert(weights: Weights, config) -> tuple[Mapping[str, Tensor], dict[str, float]]:
    """Return tensors and alphas of a pair's run under the names of a single network: the adapters
    of the expert that `config` trains, and the base, which experts that share it store once.
    ConfigError if `config` names no expert."""
    expert, prefix = config.model.expert, f"{config.model.expert}."
    if expert is None:
        raise ConfigError(
            "train.init_from",
            f"is {weights.source}, a run of two experts, but this is one model; enable experts "
            "(of Wan, name one: model.expert)",
        )
    names: dict[str, str] = {}  # here → there
    for name in weights.tensors:
        match = re.match(r"model\.(high|low)\.(.+)", name)
        if match is None:
            names[name] = name
        elif match[1] == expert:
            names[f"model.{match[2]}"] = name
        elif not is_adapter(name):
            names.setdefault(f"model.{match[2]}", name)
    alphas = {
        name.removeprefix(prefix): alpha
        for name, alpha in weights.meta.alphas.items()
        if name.startswith(prefix)
    }
    return renamed(weights.tensors, names), alphas
