"""Read and write the strength of adapters as PEFT keeps it: in a config beside the weights, or, as
Diffusers does, in the header of the file."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mmdit.adapters.layers import Adapter, DoRALinear
from mmdit.foreign import read_json
from mmdit.weights import Checkpoint, header_of

HEADER = "lora_adapter_metadata"  # the key that Diffusers uses
CONFIG = "adapter_config.json"  # the file that PEFT writes
USED = """
peft_type r lora_alpha alpha rank_pattern alpha_pattern use_rslora use_dora lora_bias
"""
# Settings that do not change the finished update: the choice of layers (the tensors show it),
# training, book-keeping. PEFT itself sets fan_in_fan_out to false for linear layers, and
# use_effective_conv2d concerns convolutions only.
NEUTRAL = """
task_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules
exclude_modules layers_to_transform layers_pattern lora_dropout megatron_core qalora_group_size
loftq_config eva_config corda_config lora_ga_config runtime_config ensure_weight_tying rank_dropout
module_dropout rank_dropout_scale decompose_both decompose_factor init_weights fan_in_fan_out
use_effective_conv2d
"""
CHECKED = {"init_lora_weights", "bias"}
KNOWN = CHECKED.union(USED.split(), NEUTRAL.split())
MOST_REPEATS = 4  # of parts in the pattern of a layer's name
# values of init_lora_weights that leave the base as it is
BESIDE_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class Settings:
    """`values` under PEFT's names, and the file from which they come; without values, every scale
    is 1."""

    source: str
    values: dict

    def check(self) -> None:
        """Raise ValueError for settings that change the update in an unknown or unsupported way."""
        values, source = self.values, self.source
        adapter, start = values.get("peft_type", "LORA"), values.get("init_lora_weights")
        if adapter not in ("LORA", "LOKR"):
            raise ValueError(
                f"{source}: peft_type is {adapter!r}; can read LORA (DoRA included) and LOKR"
            )
        if start not in BESIDE_THE_BASE:
            raise ValueError(
                f"{source}: init_lora_weights is {start!r}, which also changes the base; save the"
                " adapter with PEFT's path_initial_model_for_weight_conversion, which makes a"
                " plain LoRA of it"
            )
        if values.get("bias") not in (None, "none"):
            raise ValueError(
                f"{source}: bias is {values['bias']!r}: it comes with biases in place of the"
                " base's, which are not read; merge it with PEFT, or train with bias: none"
            )
        for name in ("use_rslora", "use_dora", "lora_bias"):
            if values.get(name) not in (None, True, False):
                raise ValueError(
                    f"{source}: {name} is {values[name]!r:.100}, must be true or false"
                )
        for name, value in values.items():
            if value and name not in KNOWN:
                raise ValueError(
                    f"{source}: {name} is {value!r:.100}, which may change the update and is not"
                    " known here; merge it with PEFT and take the whole weights"
                )

    def scale(self, layer: str, rank: int, whole: bool, lokr: bool) -> float:
        """Return the factor by which the product of a layer's factors is multiplied. `layer`: its
        name in the file; `whole`: both factors of LoKr are whole matrices, so that only the config
        knows the rank."""
        alpha = self._number("alpha" if lokr else "lora_alpha", "alpha_pattern", layer)
        if alpha is None:
            return 1.0
        stated = self._number("r", "rank_pattern", layer)
        if whole and stated is None:
            raise ValueError(f"{self.source} tells an alpha and no r, by which PEFT divides it")
        if stated is not None and not whole and stated != rank:
            raise ValueError(
                f"{self.source} gives {layer} the rank {stated:g}, its tensors have {rank}: they"
                " do not belong together"
            )
        divisor: float = rank
        if whole and stated is not None:
            divisor = stated
        if self.values.get("use_rslora") and not lokr:
            divisor = math.sqrt(divisor)
        return alpha / divisor

    def _number(self, name: str, pattern: str, layer: str) -> float | None:
        """Return the rank (positive) or the alpha (finite, not 0) of a layer: from the first key of
        `pattern` that matches the layer's name, else the common one, `name`; None if neither is
        given."""
        patterns = self.values.get(pattern) or {}
        if not isinstance(patterns, dict):
            raise ValueError(
                f"{self.source}: {pattern} is {patterns!r:.100}, must map names of layers to"
                " numbers"
            )
        value = self.values.get(name)
        missing = value is None
        for key, special in patterns.items():
            if _may_take_forever(str(key)):
                raise ValueError(
                    f"{self.source}: {pattern} has {key!r:.100}, which repeats a group or more than"
                    f" {MOST_REPEATS} parts, and may compare forever; name the layers in full"
                )
            try:
                fits = re.match(rf"(.*\.)?({key})$", layer)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(
                    f"{self.source}: {pattern} has {key!r:.100}, no regular expression: {error}"
                ) from None
            if fits:
                value, name, missing = special, f"{pattern}[{key!r}]", False
                break
        if missing:
            return None
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        positive = pattern == "rank_pattern"
        if not number or not math.isfinite(value) or value == 0 or (positive and value < 0):
            wanted = "positive" if positive else "finite"
            raise ValueError(
                f"{self.source}: {name} is {value!r:.100}, must be a {wanted} number other than 0"
            )
        return value


def _may_take_forever(expression: str) -> bool:
    """Return whether matching a regular expression may take exponential time, as with a repeated
    group or with many repeats. Layer names and the usual patterns for them do not."""
    plain = re.sub(r"\\.", "", expression, flags=re.DOTALL)
    if re.search(r"\(\?[a-zA-Z]|\)([*+]|\{[\d,]+\})", plain):  # flags, which may void spaces
        return True
    repeats = re.findall(r"([*+?]|\{[\d,]+\})[?+]?", plain.replace("(?", "("))
    return len(repeats) > MOST_REPEATS


def config_of(layers: dict[str, Adapter]) -> dict:
    """Return PEFT's config for adapters, which are given by the names of their layers in the
    file."""
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: layer.scale * layer.rank for name, layer in layers.items()}
    (rank, rank_pattern), (alpha, alpha_pattern) = map(_common, (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(layers),
        "use_rslora": False,
        "use_dora": any(isinstance(layer, DoRALinear) for layer in layers.values()),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }


def _common(values: dict[str, float]) -> tuple[float, dict[str, float]]:
    """Return the most frequent of `values`, and those that differ from it."""
    if not values:
        return 1, {}
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {name: value for name, value in values.items() if value != common}


def weights_of(path: Path) -> Path:
    """Return the weight file in a folder that PEFT saved; any other path as it is."""
    if (path / CONFIG).is_file():
        for end in ("safetensors", "bin"):
            if (path / f"adapter_model.{end}").is_file():
                return path / f"adapter_model.{end}"
    return path


def settings_of(stored: Checkpoint, expert: str | None) -> Settings:
    """Return the settings beside, or in the header of, the first file of `stored`. ValueError if
    they cannot be read, or contain an unknown setting."""
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
    text = header_of(file).get(HEADER)
    try:
        values = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is no config of an adapter: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source} is no config of an adapter: it is a {type(values).__name__}")
    return values


def _of_expert(values: dict, expert: str | None) -> dict:
    """Return the settings of one expert, without the words that Diffusers puts before the keys of
    each of its two transformers."""
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
