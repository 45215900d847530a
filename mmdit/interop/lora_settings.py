"""The strength of adapters as PEFT keeps it: in a config beside the weights, or, as Diffusers does,
in the header of their file."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from mmdit.foreign import read_json
from mmdit.weights import Checkpoint

HEADER = "lora_adapter_metadata"  # of Diffusers
CONFIG = "adapter_config.json"  # of PEFT
USED = {
    "peft_type",
    "r",
    "lora_alpha",
    "alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
}
# What the finished update does not depend on: choice of layers (the tensors tell it), training,
# book-keeping.
NEUTRAL = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "lora_dropout",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
    "ensure_weight_tying",
    "fan_in_fan_out",  # PEFT itself sets it to false for linear layers
    "rank_dropout",
    "module_dropout",
    "rank_dropout_scale",
    "decompose_both",
    "decompose_factor",
    "init_weights",
    "use_effective_conv2d",  # of convolutions alone
}
BESIDE_THE_BASE = (
    None,
    True,
    False,
    "gaussian",
    "eva",
    "orthogonal",
    "mica",
)  # init_lora_weights that leave the base as it is


@dataclass(frozen=True)
class Settings:
    """`values` by PEFT's names, and the file that they are from; without any, every scale is 1."""

    source: str
    values: dict

    def check(self) -> None:
        """ValueError names what changes the update in a way that is not known here."""
        values = self.values
        kind = values.get("peft_type", "LORA")
        if kind not in ("LORA", "LOKR"):
            raise ValueError(
                f"{self.source}: peft_type is {kind!r}; can read LORA (DoRA included) and LOKR"
            )
        start = values.get("init_lora_weights")
        if start not in BESIDE_THE_BASE:
            raise ValueError(
                f"{self.source}: init_lora_weights is {start!r}, which also changes the base; save "
                "the adapter with PEFT's "
                "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
            )
        if values.get("bias") not in (None, "none"):
            raise ValueError(
                f"{self.source}: bias is {values['bias']!r}: it comes with biases in place of the "
                "base's, which are not "
                "read; merge it with PEFT, or train with bias: none"
            )
        for name in ("use_rslora", "use_dora", "lora_bias"):
            if values.get(name) not in (None, True, False):
                raise ValueError(
                    f"{self.source}: {name} is {values[name]!r:.100}, must be true or false"
                )
        for name, value in values.items():
            if value and name not in USED | NEUTRAL | {"init_lora_weights", "bias"}:
                raise ValueError(
                    f"{self.source}: {name} is {value!r:.100}, which may change the update and is "
                    "not known here; merge it "
                    "with PEFT and take the whole weights"
                )

    def scale(self, layer: str, rank: int, whole: bool, lokr: bool) -> float:
        """Return what multiplies the product of a layer's factors. `layer`: its name in the file;
        `whole`: both factors of LoKr are, so that only the config knows the rank."""
        told = self._number("alpha" if lokr else "lora_alpha", layer)
        if told is None:
            return 1.0
        own = self._number("r", layer)
        if whole and own is None:
            raise ValueError(f"{self.source} tells an alpha and no r, by which PEFT divides it")
        if own is not None and not whole and own != rank:
            raise ValueError(
                f"{self.source} gives {layer} the rank {own:g}, its tensors have {rank}: they do "
                "not belong together"
            )
        rank = own if whole else rank
        return told / (math.sqrt(rank) if self.values.get("use_rslora") and not lokr else rank)

    def _number(self, name: str, layer: str) -> float | None:
        """Return a positive `r`, or a finite alpha, of a layer: the first pattern that fits its
        name, else the common one."""
        pattern = "rank_pattern" if name == "r" else "alpha_pattern"
        patterns = self.values.get(pattern) or {}
        if not isinstance(patterns, dict):
            raise ValueError(
                f"{self.source}: {pattern} is {patterns!r:.100}, must map names of layers to "
                "numbers"
            )
        value = self.values.get(name)
        for key, own in patterns.items():
            try:
                fits = re.match(rf"(.*\.)?({key})$", layer)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(
                    f"{self.source}: {pattern} has {key!r:.100}, no regular expression: {error}"
                ) from None
            if fits:
                value, name = own, f"{pattern}[{key!r}]"
                break
        if value is None and "[" not in name:
            return None
        number = (
            isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        )
        if not number or value == 0 or (pattern == "rank_pattern" and value < 0):
            raise ValueError(
                f"{self.source}: {name} is {value!r:.100}, must be a "
                f"{'positive' if pattern == 'rank_pattern' else 'finite'} "
                "number other than 0"
            )
        return value


def weights_of(path: Path) -> Path:
    """Return the file of weights in a folder that PEFT saved; any other path as it is."""
    if (path / CONFIG).is_file():
        return next(
            (
                file
                for end in ("safetensors", "bin")
                if (file := path / f"adapter_model.{end}").is_file()
            ),
            path,
        )
    return path


def settings_of(stored: Checkpoint, expert: str | None) -> Settings:
    """Read what lies beside or in the first file of `stored`. ValueError: it cannot be read, or
    asks for what is not known."""
    file = stored.files[0]
    beside = file.with_name(CONFIG)
    peft = file.stem == "adapter_model" or any(
        name.startswith("base_model.model.") for name in stored.entries
    )
    if peft and beside.is_file():
        source, values = str(beside), read_json(beside, "config of an adapter")
    else:
        source = f"{file}, {HEADER} in its header"
        values = _in_header(file, source)
    settings = Settings(source, _of_expert(values, expert))
    settings.check()
    return settings


def _in_header(file: Path, source: str) -> dict:
    if file.suffix != ".safetensors":
        return {}
    with safe_open(file, "pt") as handle:
        text = (handle.metadata() or {}).get(HEADER)
    try:
        values = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is no config of an adapter: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source} is no config of an adapter: it is a {type(values).__name__}")
    return values


def _of_expert(values: dict, expert: str | None) -> dict:
    """Take the words off that Diffusers puts before the names of each of its two transformers."""
    low = {
        key.removeprefix("transformer_2."): value
        for key, value in values.items()
        if key.startswith("transformer_2.")
    }
    if low and expert == "low":
        return low
    return {
        key.removeprefix("transformer."): value
        for key, value in values.items()
        if not key.startswith("transformer_2.")
    }
