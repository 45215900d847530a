"""What tensors of adapters are called in the files of other tools: the ends of keys, what stands
before a layer's name, the layer's name itself."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from mmdit.interop.wan import diffusers_module, diffusers_name
from mmdit.models.wan import WanDiT

WRITTEN = {
    "peft": "base_model.model.",
    "diffusers": "transformer.",
    "comfy": "diffusion_model.",
    "kohya": "lora_unet_",
}
WRAPPERS = {
    "base_model",
    "model",
    "module",
    "_orig_mod",
    "diffusion_model",
    "transformer",
    "unet",
    "pipe",
    "dit",
}  # words before a name
EXPERTS = {"transformer_1": "high", "transformer_2": "low"}  # such words, too
MANGLED = (
    "lora_unet__",
    "lora_unet_",
    "lora_transformer_",
    "lora_prior_unet_",
    "lycoris_",
)  # before names without dots
PARTS = {  # ends of keys → what they hold
    **{
        f".lora_{part}{end}": f"lora_{part}"
        for part in "AB"
        for end in ("", ".weight", ".default.weight")
    },
    **{
        f"{join}.{word}.weight": part
        for join in (".lora", "_lora", ".lora_linear_layer")
        for word, part in (("down", "lora_A"), ("up", "lora_B"))
    },
    ".lora_down.weight": "lora_A",
    ".lora_up.weight": "lora_B",
    ".alpha": "alpha",
    ".lora_B.bias": "lora_B_bias",
    ".lora_B.default.bias": "lora_B_bias",
    ".diff": "weight",
    ".diff_b": "bias",
    ".diff_m": "modulation",  # of whole parameters
    ".w_norm": "weight",
    ".b_norm": "bias",
    **{
        end: "lora_magnitude"
        for end in (
            ".dora_scale",
            ".lora_magnitude",
            ".lora_magnitude_vector",
            ".lora_magnitude_vector.weight",
            ".lora_magnitude_vector.default.weight",
        )
    },
    **{
        f".{part}{end}": part
        for factor in ("lokr_w1", "lokr_w2")
        for part in (factor, f"{factor}_a", f"{factor}_b")
        for end in ("", ".default")
    },
}
OTHER_KINDS = {  # what keys of adapters that are not read here have in them
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
    """What the name of a stored tensor says: `module` and `part` in our words, the layer's name as
    PEFT's patterns see it, and the expert of a pair that it names."""

    module: str | None  # None: no layer of this model
    part: str
    written: str = ""
    expert: str | None = None


def foreign_names(model: nn.Module) -> dict[str, str]:
    """Return every name that a module or a parameter of its own may have in a file → our name.
    kohya's underscores are never taken apart: the table is made forward from what is there."""
    wan, table = isinstance(model, WanDiT), {}

    def add(name: str, theirs) -> None:
        own = {name}
        if wan:
            with contextlib.suppress(KeyError):  # a container: no tensor bears its name
                own.add(theirs(name))
        for foreign in own:
            table[foreign] = table[foreign.replace(".", "_")] = name

    for name, _ in model.named_modules():
        add(name, diffusers_module)
    for name, _ in model.named_parameters():
        if not name.endswith((".weight", ".bias")):
            add(name, diffusers_name)
    table.pop("", None)
    return table


def parse(key: str, names: dict[str, str]) -> Key:
    """Split a stored name; `names` as `foreign_names` makes them."""
    end = max((e for e in PARTS if key.endswith(e)), key=len, default=None)
    if end is None:
        return Key(None, "")
    for written, expert in _unwrapped(key.removesuffix(end)):
        if written in names:
            return Key(names[written], PARTS[end], _seen_by_peft(key.removesuffix(end)), expert)
    return Key(None, PARTS[end])


def _unwrapped(body: str) -> Iterator[tuple[str, str | None]]:
    """Yield what `body` may be without the words before a layer's name, and the expert that one of
    them names."""
    yield body, None
    for mark in MANGLED:
        if body.startswith(mark):
            yield body.removeprefix(mark), None
    expert = None
    word, dot, rest = body.partition(".")
    while dot and (word in WRAPPERS or word in EXPERTS):
        expert = EXPERTS.get(word, expert)
        yield rest, expert
        word, dot, rest = rest.partition(".")


def _seen_by_peft(body: str) -> str:
    """Return a layer's name without what PEFT or Diffusers puts before it: their patterns are for
    this."""
    for prefix in ("base_model.model.", "transformer_2.", "transformer."):
        if body.startswith(prefix):
            return body.removeprefix(prefix)
    return body


def other_kind(keys: Iterable[str]) -> str | None:
    """Return the name of a kind of adapter that is not read here, and that one of `keys` is of."""
    for key in keys:
        for pattern, kind in OTHER_KINDS.items():
            if re.search(pattern, key):
                return kind
    return None


def common_prefix(keys: Iterable[str]) -> str:
    """Return what stands before the names of layers in all keys of a file of adapters."""
    keys = list(keys)
    longest = (
        "base_model.model.",
        "model.diffusion_model.",
        "diffusion_model.",
        "transformer.",
        *MANGLED,
    )
    return next((prefix for prefix in longest if all(key.startswith(prefix) for key in keys)), "")
