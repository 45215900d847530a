"""The adapters of a model as files of other tools."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmdit.adapters.layers import Adapter, DoRALinear, LoKrLinear
from mmdit.adapters.lora import adapters, differences
from mmdit.interop.lora_names import WRITTEN
from mmdit.interop.lora_reading import OVER_BASE, read_lora, stretch_over_base
from mmdit.interop.lora_settings import CONFIG, HEADER
from mmdit.interop.wan import diffusers_module
from mmdit.models.wan import WanDiT
from mmdit.weights import is_finite

Format = Literal["peft", "diffusers", "kohya", "comfy"]
SAME = {
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}  # relative error that a saved and reloaded update may have


def save_lora(
    model: nn.Module, path: str | Path, format: Format, dtype: torch.dtype = torch.float32
) -> None:
    """Write the adapters of `model`, and the whole differences that came with them: `diffusers`,
    `kohya` or `comfy` as one file, `peft` as a folder. Then it is read back and compared, layer by
    layer, before it bears its name.

    LoKr is written as LyCORIS does (`kohya`, `comfy`), with its scale in a whole W1: readers ignore
    the alpha of whole factors, and some know no other W1. DoRA in `comfy` is as ComfyUI computes
    it, whose lengths are over ‖W‖; a mark in the header says so. ValueError: no adapters, a path
    that is there, what the format cannot hold, numbers too large for `dtype`."""
    path = Path(path)
    _check(model, path, format)
    tensors, header = {}, {"format": "pt"}
    theirs = _names(model, format)
    for name, layer in adapters(model).items():
        key = WRITTEN[format] + (name.replace(".", "_") if format == "kohya" else theirs[name])
        tensors |= {key + end: tensor for end, tensor in _parts(layer, format).items()}
    tensors |= _differences(model, format)
    tensors = {
        name: tensor.detach().to(device="cpu", dtype=dtype).contiguous()
        for name, tensor in tensors.items()
    }
    if wrong := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        raise ValueError(
            f"{wrong[0]} holds numbers that are not finite in {str(dtype).removeprefix('torch.')}: "
            "nothing is written"
        )
    if format == "comfy" and any(
        isinstance(layer, DoRALinear) for layer in adapters(model).values()
    ):
        header[OVER_BASE] = "lengths of rows times |W| / |W + dW|, as ComfyUI reads them"
    settings = _settings(model, theirs)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        aside = Path(folder) / path.name
        if format == "peft":
            aside.mkdir()
            (aside / CONFIG).write_text(json.dumps(settings, indent=1), encoding="utf-8")
            save_file(tensors, aside / "adapter_model.safetensors", header)
        else:
            if format == "diffusers":
                told = {f"transformer.{key}": value for key, value in settings.items()}
                header[HEADER] = json.dumps(told)
            save_file(tensors, aside, header)
        _compare(model, aside, SAME[dtype])
        os.replace(aside, path)


def _check(model: nn.Module, path: Path, format: str) -> None:
    layers, changed = adapters(model), differences(model)
    if format not in WRITTEN:
        raise ValueError(f"format is {format!r}; must be peft, diffusers, kohya or comfy")
    if not layers and not changed:
        raise ValueError("the model has no adapters to save")
    if format != "peft" and path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors: {format} is one file")
    if path.exists():
        raise ValueError(f"{path} is there already; choose another place")
    if format in ("peft", "diffusers") and any(
        isinstance(layer, LoKrLinear) for layer in layers.values()
    ):
        raise ValueError(f"{format} files hold no LoKr; choose kohya or comfy")
    if format in ("peft", "diffusers") and changed:
        raise ValueError(
            f"{format} files hold no differences of whole parameters, and this model has "
            f"{len(changed)} beside its adapters "
            f"(first of {next(iter(changed))}); choose kohya or comfy"
        )
    if both := [name for name in layers if f"{name}.weight" in changed]:
        warnings.warn(
            f"{len(both)} layers have an adapter and a whole difference (first {both[0]}): other "
            "programs take one of the two, "
            "ComfyUI the difference; merge the model and hand on the whole",
            stacklevel=3,
        )
    if format == "kohya" and any(isinstance(layer, DoRALinear) for layer in layers.values()):
        warnings.warn(
            "ComfyUI reads the lengths of DoRA in kohya files otherwise than they were trained; "
            "choose comfy for it",
            stacklevel=3,
        )


def _names(model: nn.Module, format: str) -> dict[str, str]:
    """Return the names of the adapted layers in `format`."""
    wan = format in ("peft", "diffusers") and isinstance(model, WanDiT)
    return {name: diffusers_module(name) if wan else name for name in adapters(model)}


def _settings(model: nn.Module, theirs: dict[str, str]) -> dict:
    """Return PEFT's config."""
    layers = adapters(model)
    ranks = {theirs[name]: layer.rank for name, layer in layers.items()}
    alphas = {theirs[name]: layer.scale * layer.rank for name, layer in layers.items()}
    rank, alpha = (
        Counter(values.values()).most_common(1)[0][0] if values else 1 for values in (ranks, alphas)
    )
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(theirs.values()),
        "use_rslora": False,
        "use_dora": any(isinstance(layer, DoRALinear) for layer in layers.values()),
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
    }


def _parts(layer: Adapter, format: str) -> dict[str, Tensor]:
    """Return what a file has of one adapter, by the ends of keys."""
    own = layer.state()
    alpha = own.pop("alpha")
    if isinstance(layer, LoKrLinear):
        first, _ = layer.factors(torch.float32)
        rest = {
            f".{part}": tensor for part, tensor in own.items() if not part.startswith("lokr_w1")
        }
        told = {".alpha": torch.tensor(float(layer.rank))} if format == "kohya" else {}
        return {".lokr_w1": layer.scale * first, **rest, **told}
    ends = {
        "lora_A": ".lora_A.weight",
        "lora_B": ".lora_B.weight",
        "lora_magnitude": ".lora_magnitude_vector",
    }
    if format in ("kohya", "comfy") and "lora_magnitude" in own:
        ends["lora_magnitude"], own["lora_magnitude"] = (
            ".dora_scale",
            own["lora_magnitude"][:, None],
        )
    if format == "comfy":
        own["lora_B"] = own["lora_B"] * layer.scale
        if isinstance(layer, DoRALinear):
            own["lora_magnitude"] = own["lora_magnitude"] / stretch_over_base(layer)[:, None]
    if format == "kohya":
        ends |= {"lora_A": ".lora_down.weight", "lora_B": ".lora_up.weight"}
        own["alpha"], ends["alpha"] = alpha, ".alpha"
    return {ends[part]: tensor for part, tensor in own.items()}


def _differences(model: nn.Module, format: str) -> dict[str, Tensor]:
    """Return the whole differences under ComfyUI's names."""
    result = {}
    for name, tensor in differences(model).items():
        module, _, kind = name.rpartition(".")
        end = {"weight": ".diff", "bias": ".diff_b"}.get(kind)
        if end is None:  # a parameter that is no layer's: kohya has no name for it
            result[f"{WRITTEN['comfy']}{name}.diff"] = tensor
        else:
            result[
                WRITTEN[format] + (module.replace(".", "_") if format == "kohya" else module) + end
            ] = tensor
    return result


def _compare(model: nn.Module, written: Path, same: float) -> None:
    back = read_lora(model, written)
    for name, layer in adapters(model).items():
        again = back.updates[name].adapter(layer)
        pairs = [(layer.delta(), again.delta())]
        if isinstance(layer, DoRALinear):
            pairs.append((layer.lora_magnitude, again.lora_magnitude))
        for expected, found in pairs:
            if not (found - expected).norm() <= same * expected.norm():
                raise ValueError(
                    f"{written}: {name} would not be read back as it is: nothing is written"
                )
    for name, expected in differences(model).items():
        found = back.differences.get(name)
        if (
            found is None
            or not (found.float() - expected.float().cpu()).norm() <= same * expected.float().norm()
        ):
            raise ValueError(
                f"{written}: the difference of {name} would not be read back as it is: nothing is "
                "written"
            )
