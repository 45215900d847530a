"""Write the adapters of a model as files of other programs."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from mmdit.adapters.layers import Adapter, DoRALinear, LoKrLinear
from mmdit.adapters.lora import adapters, differences
from mmdit.files import clean, hidden_folder, write_atomically
from mmdit.interfaces import Denoiser
from mmdit.interop.lora_names import DIFFERENCES, FORMATS, LoRAFormat
from mmdit.interop.lora_reading import OVER_BASE, read_lora, stretch_over_base
from mmdit.interop.lora_settings import CONFIG, HEADER, config_of
from mmdit.weights import is_finite, tensor_pieces

# the relative error that an update may have after saving and reading it again
TOLERANCES = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def save_lora(
    model: Denoiser, path: str | Path, format: str, dtype: torch.dtype = torch.float32
) -> None:
    """Write the adapters of `model`, and the whole differences that came with them: `diffusers`,
    `kohya` or `comfy` as one file, `peft` as a folder. The result is read back and compared layer
    by layer before it gets its final name.

    LoKr is written as LyCORIS does (`kohya`, `comfy`), with its scale multiplied into a whole W1:
    readers ignore the alpha of whole factors, and some can read no other W1. DoRA in `comfy`
    follows ComfyUI, whose lengths are relative to ‖W‖; a mark in the header says so. ValueError:
    the model has no adapters, the path exists, the format cannot hold them, or numbers are too
    large for `dtype`.
    """
    path, layers = Path(path), adapters(model)
    _check(model, path, format)
    form, other_names = FORMATS[format], model.diffusers_names()
    named = {
        other_names.get(name, name) if form.diffusers_names else name: layer
        for name, layer in layers.items()
    }
    tensors = _differences(model, form)
    for name, layer in named.items():
        for end, tensor in _parts(layer, form).items():
            tensors[form.key(name, end)] = tensor
    for name, tensor in tensors.items():
        kept = torch.float32 if name.endswith(".alpha") else dtype  # bfloat16 cannot hold 257
        tensors[name] = tensor.detach().to(device="cpu", dtype=kept).contiguous()
        if not is_finite(tensors[name]):
            raise ValueError(
                f"{name} holds numbers that are not finite in {str(dtype).removeprefix('torch.')}:"
                " nothing is written"
            )
    header, config = {"format": "pt"}, config_of(named)
    if form.lengths_over_base and any(isinstance(layer, DoRALinear) for layer in layers.values()):
        header[OVER_BASE] = "lengths of rows times |W| / |W + dW|, as ComfyUI reads them"
    if form.strength == "header":
        values = {form.prefix + key: value for key, value in config.items()}
        header[HEADER] = json.dumps(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    clean(path.parent)
    with hidden_folder(path.parent) as folder:
        place = weights = folder / path.name
        if form.strength == "config":
            place.mkdir()
            (place / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
            weights = place / "adapter_model.safetensors"
        write_atomically(weights, tensor_pieces(tensors, header), flush=True)
        _compare(model, place, dtype)
        os.replace(place, path)


def check_place(path: Path, format: str) -> None:
    """Raise ValueError unless adapters in `format` can be written to `path`."""
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; must be one of {', '.join(FORMATS)}")
    if FORMATS[format].strength != "config" and path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors: {format} is one file")
    if path.exists():
        raise ValueError(f"{path} is there already; choose another place")


def _check(model: nn.Module, path: Path, format: str) -> None:
    layers, changed = adapters(model), differences(model)
    check_place(path, format)
    form = FORMATS[format]
    if not layers and not changed:
        raise ValueError("the model has no adapters to save")
    if not form.lycoris and any(isinstance(layer, LoKrLinear) for layer in layers.values()):
        raise ValueError(f"{format} files hold no LoKr; choose kohya or comfy")
    if not form.lycoris and changed:
        raise ValueError(
            f"{format} files hold no differences of whole parameters, and this model has"
            f" {len(changed)} beside its adapters (first of {next(iter(changed))}); choose kohya"
            " or comfy"
        )
    if both := [name for name in layers if f"{name}.weight" in changed]:
        warnings.warn(
            f"{len(both)} layers have an adapter and a whole difference (first {both[0]}): other"
            " programs take one of the two, ComfyUI the difference; merge the model and hand on"
            " the whole",
            stacklevel=3,
        )
    if format == "kohya" and any(isinstance(layer, DoRALinear) for layer in layers.values()):
        warnings.warn(
            "ComfyUI reads the lengths of DoRA in kohya files otherwise than they were trained; "
            "choose comfy for it",
            stacklevel=3,
        )


def _parts(layer: Adapter, form: LoRAFormat) -> dict[str, Tensor]:
    """Return the tensors of one adapter by the ends of their keys in a file."""
    state = layer.state()
    alpha = state.pop("alpha")
    if isinstance(layer, LoKrLinear):
        first, _ = layer.factors(torch.float32)
        second = {part: tensor for part, tensor in state.items() if part.startswith("lokr_w2")}
        result = {f".{part}": tensor for part, tensor in second.items()}
        result[".lokr_w1"] = layer.scale * first
        if form.strength == "alpha":
            result[".alpha"] = torch.tensor(float(layer.rank))
        return result
    result = {form.down: state["lora_A"], form.up: state["lora_B"]}
    if form.strength == "alpha":
        result[".alpha"] = alpha
    if form.strength == "factors":
        result[form.up] = state["lora_B"] * layer.scale
    if isinstance(layer, DoRALinear):
        lengths = state["lora_magnitude"]
        if form.lengths_over_base:
            lengths = lengths / stretch_over_base(layer)
        result[form.magnitude] = lengths[:, None] if form.lycoris else lengths
    return result


def _differences(model: nn.Module, form: LoRAFormat) -> dict[str, Tensor]:
    """Return the whole differences by their keys. A parameter outside of layers has no name in
    kohya's files, and gets ComfyUI's there, too."""
    ends = {part: end for end, part in DIFFERENCES.items() if part in ("weight", "bias")}
    result = {}
    for name, tensor in differences(model).items():
        module, _, part = name.rpartition(".")
        key = FORMATS["comfy"].key(name, ".diff")
        if part in ends:
            key = form.key(module, ends[part])
        result[key] = tensor
    return result


def _compare(model: Denoiser, written: Path, dtype: torch.dtype) -> None:
    """Raise ValueError unless the file `written`, read again, gives the same updates within the
    tolerance of `dtype`."""
    tolerance = TOLERANCES[dtype]
    remedy = ""
    if dtype != torch.float32:
        kept = str(dtype).removeprefix("torch.")
        remedy = f" (in {kept}, which has few digits for small numbers: write it in float32)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these warnings are about files of others
        back = read_lora(model, written)

    def check(what: str, expected: Tensor, again: Tensor | None) -> None:
        if again is not None:
            expected = expected.float()
            again = again.to(expected)
            if (again - expected).norm() <= tolerance * expected.norm():
                return
        raise ValueError(
            f"{written.name}: {what} would not be read back as it is{remedy}: nothing is written"
        )

    for name, layer in adapters(model).items():
        again = back.updates[name].adapter(layer)
        check(name, layer.delta(), again.delta())
        if isinstance(layer, DoRALinear):
            assert isinstance(again, DoRALinear)
            check(name, layer.lora_magnitude, again.lora_magnitude)
    for name, change in differences(model).items():
        check(f"the difference of {name}", change, back.differences.get(name))
