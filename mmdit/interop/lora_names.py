"""Describe how programs that write adapters name their tensors, and where they keep the strength,
in one table, which both `lora_reading` and `lora_writing` use. To add a format, add its entry."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from mmdit.interfaces import Denoiser


@dataclass(frozen=True)
class LoRAFormat:
    """Describe how one program writes adapters. `prefix`: the text before a layer's name. `down`,
    `up` and `magnitude`: the ends of the keys of A, B and DoRA's lengths."""

    prefix: str
    down: str
    up: str
    magnitude: str
    # where the scale of the product B A is kept: in a config beside the weights, in the header of
    # the file, in `.alpha` tensors (alpha / rank), or multiplied into B
    strength: Literal["config", "header", "alpha", "factors"]
    underscores: bool = False  # replace the dots in a layer's name
    diffusers_names: bool = False  # for Wan's layers; else official ones
    lycoris: bool = False  # can hold LoKr and whole differences; lengths of DoRA are a column
    lengths_over_base: bool = False  # DoRA lengths are times ‖W‖ / ‖W + ΔW‖, as in ComfyUI

    def key(self, layer: str, end: str) -> str:
        """Return the key in a file of the tensor of `layer` whose key ends in `end`."""
        return self.prefix + (layer.replace(".", "_") if self.underscores else layer) + end


FORMATS = {
    "peft": LoRAFormat(
        prefix="base_model.model.",
        down=".lora_A.weight",
        up=".lora_B.weight",
        magnitude=".lora_magnitude_vector",
        strength="config",
        diffusers_names=True,
    ),
    "diffusers": LoRAFormat(
        prefix="transformer.",
        down=".lora_A.weight",
        up=".lora_B.weight",
        magnitude=".lora_magnitude_vector",
        strength="header",
        diffusers_names=True,
    ),
    "kohya": LoRAFormat(
        prefix="lora_unet_",
        down=".lora_down.weight",
        up=".lora_up.weight",
        magnitude=".dora_scale",
        strength="alpha",
        underscores=True,
        lycoris=True,
    ),
    "comfy": LoRAFormat(
        prefix="diffusion_model.",
        down=".lora_A.weight",
        up=".lora_B.weight",
        magnitude=".dora_scale",
        strength="factors",
        lycoris=True,
        lengths_over_base=True,
    ),
}

# ── further names that can be read ────────────────────────────────────────────────────────────────
# words before a layer's name that tell the expert, from Diffusers and from our own pairs
EXPERTS = {"transformer_1": "high", "transformer_2": "low", "high": "high", "low": "low"}
WRAPPERS = {"module", "_orig_mod", "unet", "pipe", "dit", *EXPERTS} | {
    word for form in FORMATS.values() if not form.underscores for word in form.prefix.split(".")
} - {""}
MANGLED = (  # prefixes of names without dots
    "lora_unet__",
    *(form.prefix for form in FORMATS.values() if form.underscores),
    "lora_transformer_",
    "lora_prior_unet_",
    "lycoris_",
)
PREFIXES = (*(form.prefix for form in FORMATS.values()), "model.diffusion_model.", *MANGLED)
DIFFERENCES = {".diff": "weight", ".diff_b": "bias", ".diff_m": "modulation"}
LOKR = [f"{factor}{end}" for factor in ("lokr_w1", "lokr_w2") for end in ("", "_a", "_b")]


def _ends() -> dict[str, str]:
    """Return what part of an adapter a tensor is, by the end of its key."""
    ends = {".alpha": "alpha", ".w_norm": "weight", ".b_norm": "bias", **DIFFERENCES}
    for form in FORMATS.values():
        ends |= {form.down: "lora_A", form.up: "lora_B", form.magnitude: "lora_magnitude"}
    for join in (".lora", "_lora", ".lora_linear_layer"):
        ends |= {f"{join}.down.weight": "lora_A", f"{join}.up.weight": "lora_B"}
    for part in ("lora_A", "lora_B"):
        ends |= {f".{part}{end}": part for end in ("", ".weight", ".default.weight")}
    for end in ("", "_vector", "_vector.weight", "_vector.default.weight"):
        ends[f".lora_magnitude{end}"] = "lora_magnitude"
    ends |= {".lora_B.bias": "lora_B_bias", ".lora_B.default.bias": "lora_B_bias"}
    for part in LOKR:
        ends |= {f".{part}": part, f".{part}.default": part}
    return ends


PARTS = _ends()
OF_ADAPTERS = tuple(end for end, part in PARTS.items() if part.startswith(("lora_", "lokr_")))
NOT_READ = {  # patterns in the keys of other adapters
    r"^lora_te\d?_|^(base_model\.model\.)?text_encoder.*lora": "LoRA of a text encoder",
    r"\.hada_[wt]\d": "LoHa",
    r"\.oft_|\.oft_blocks": "OFT",
    r"\.boft_": "BOFT",
    r"\.[ab][12](\.weight)?$|\.bm\.weight$": "GLoRA",
    r"\.ia3_|\.on_input$": "(IA)³",
    r"\.vera_lambda": "VeRA",
    r"\.lora_[EP]$|\.ranknum$": "AdaLoRA",
    r"\.lokr_t[12]|\.lora_mid": "an adapter with a Tucker core, for convolutions",
    r"\.lora_embedding_": "LoRA of an embedding",
    r"\.reshape_weight$": "an adapter that changes a layer's shape",
    r"\.set_weight$": "whole weights to put in place of others",
    r"\.diag_oft|\.rescale$": "OFT",
    r"\.modules_to_save\.": "whole weights of other modules (PEFT's modules_to_save)",
    r"\.base_layer\.bias$": "biases of the base (PEFT's bias: all or lora_only)",
}


@dataclass(frozen=True)
class Key:
    """Hold what the key of a stored tensor says: `module` and `part` under our names, the layer's
    name as PEFT's patterns see it (`written`), and the expert of a pair that it names."""

    module: str | None  # None: not a layer of this model
    part: str
    written: str = ""
    expert: str | None = None


def foreign_names(model: Denoiser) -> dict[str, str]:
    """Return our name of each module, and of each parameter outside of layers, by every name that
    it can have in a file. kohya's underscores cannot be split safely, so the table holds our names
    with underscores, too."""
    theirs, table = model.diffusers_names(), {}
    parameters = (name for name, _ in model.named_parameters())
    alone = [name for name in parameters if not name.endswith((".weight", ".bias"))]
    modules = [name for name, _ in model.named_modules() if name]
    for name in modules + alone:
        for foreign in (name, theirs.get(name, name)):
            table[foreign] = table[foreign.replace(".", "_")] = name
    return table


def parse(key: str, names: dict[str, str]) -> Key:
    """Return what a stored key says; `names` is the table from `foreign_names`."""
    end = max((end for end in PARTS if key.endswith(end)), key=len, default=None)
    if end is None:
        return Key(None, "")
    body = key.removesuffix(end)
    for written, expert in _unwrapped(body):
        if written in names:
            return Key(names[written], PARTS[end], _seen_by_peft(body), expert)
    return Key(None, PARTS[end])


def _unwrapped(body: str) -> Iterator[tuple[str, str | None]]:
    """Yield candidates for a layer's name: `body` with ever more words before it removed, each with
    the expert that these words name, if any."""
    yield body, None
    for prefix in MANGLED:
        if body.startswith(prefix):
            rest = body.removeprefix(prefix)
            yield rest, None
            word, _, rest = rest.partition("_")
            if word in EXPERTS:
                yield rest, EXPERTS[word]
    expert = None
    word, dot, rest = body.partition(".")
    while dot and word in WRAPPERS:
        expert = EXPERTS.get(word, expert)
        yield rest, expert
        word, dot, rest = rest.partition(".")


def _seen_by_peft(body: str) -> str:
    """Return a layer's name without the prefix of PEFT or Diffusers: their patterns refer to
    this."""
    for prefix in (FORMATS["peft"].prefix, "transformer_2.", FORMATS["diffusers"].prefix):
        if body.startswith(prefix):
            return body.removeprefix(prefix)
    return body


def unread_type(keys: Iterable[str]) -> str | None:
    """Return the name of a type of adapter that cannot be read here and to which one of `keys`
    belongs; None if there is none."""
    for key in keys:
        for pattern, name in NOT_READ.items():
            if re.search(pattern, key):
                return name
    return None


def common_prefix(keys: Iterable[str]) -> str:
    """Return the longest known prefix with which all keys of a file of adapters begin."""
    keys = list(keys)
    longest = ""
    for prefix in PREFIXES:
        if len(prefix) > len(longest) and all(key.startswith(prefix) for key in keys):
            longest = prefix
    return longest
