"""Read LoRA, DoRA and LoKr files of other programs into the names of one of our models."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mmdit.adapters.layers import Adapter, DoRALinear, adapter_type
from mmdit.adapters.lora import near
from mmdit.interfaces import Denoiser
from mmdit.interop.lora_names import FORMATS, Key, foreign_names, parse, unread_type
from mmdit.interop.lora_settings import CONFIG, Settings, settings_of, weights_of
from mmdit.weights import Checkpoint, check_numbers, header_of

# a key in the header: DoRA's lengths are for the base (`LoRAFormat.lengths_over_base`)
OVER_BASE = "mmdit_dora_scale"
WHOLE = ("weight", "bias", "modulation")  # parts that change whole parameters
UNMANGLE = (
    r"^(lora_unet_+|lycoris_)|\.(lora|lokr)_[^.]*(\.default)?(\.weight)?$|\.alpha$|\.diff(_[bm])?$"
)


@dataclass
class Update:
    """The update of one linear layer: tensors by the names of `adapters.layers`."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None  # as in the file
    scale: float = 1.0
    written: str = ""  # the layer's name in the file
    over_base: bool = False  # see OVER_BASE

    @property
    def rank(self) -> int:
        """Return the rank of the factors that are products; 1 if both factors of LoKr are whole."""
        for name in ("lora_A", "lokr_w2_b", "lokr_w1_b"):
            if name in self.parts:
                return len(self.parts[name])
        return 1

    @property
    def lokr(self) -> bool:
        return any(name.startswith("lokr") for name in self.parts)

    @property
    def whole(self) -> bool:
        return self.parts.keys() == {"lokr_w1", "lokr_w2"}

    @torch.no_grad()
    def adapter(self, base: nn.Linear) -> Adapter:
        """Return an adapter of `base` that makes this update."""
        layer = adapter_type(self.parts)[0].of(base, self.parts, self.scale * self.rank)
        if self.over_base and isinstance(layer, DoRALinear):
            layer.lora_magnitude.mul_(stretch_over_base(layer))
        return layer


@torch.no_grad()
def stretch_over_base(layer: DoRALinear) -> Tensor:
    """Return ‖W + ΔW‖ / ‖W‖ for each row. Lengths for the base times this are lengths for the
    adapted weight."""
    plain = layer.weight.detach().to(layer.precise).norm(dim=1).clamp(min=1e-15)
    return (layer._norm().to(plain.dtype) / plain).to(layer.lora_magnitude.dtype)


@dataclass
class LoRAFile:
    """The content of a file under our names: `updates` of linear layers, and `differences` to add
    to whole parameters."""

    updates: dict[str, Update] = field(default_factory=dict)
    differences: dict[str, Tensor] = field(default_factory=dict)


def read_lora(
    model: Denoiser, path: str | Path, expert: Literal["high", "low"] | None = None
) -> LoRAFile:
    """Return the content of the file, or PEFT folder, at `path`, under the names of `model`. A LoRA
    of a T2V model is accepted for an I2V model, with a warning. ValueError: keys that name no layer
    of it (with near names), half an update, another shape, numbers that are not finite, an unknown
    setting, or two experts of which none is chosen."""
    path, names = Path(path), foreign_names(model)
    stored = Checkpoint(weights_of(path))
    keys = _chosen(stored, names, expert, path)
    content = _gather(model, stored, keys, path)
    settings = settings_of(stored, expert)
    for module, update in content.updates.items():
        bias = update.parts.pop("lora_B_bias", None)
        _check(model, module, update, path)
        update.scale = _scale(update, settings)
        if update.whole:  # as in `LoKrLinear`: there is no rank to divide by
            update.parts["lokr_w1"], update.scale = update.scale * update.parts["lokr_w1"], 1.0
        if settings.values.get("use_dora") and "lora_magnitude" not in update.parts:
            raise ValueError(
                f"{settings.source} says use_dora, but {module} has no magnitude: the file is "
                "incomplete"
            )
        if bias is not None:
            name = f"{module}.bias"
            before = content.differences.get(name, 0)
            content.differences[name] = update.scale * bias.float() + before
    if not content.updates and not content.differences:
        whose = f" of the {expert}-noise expert" if expert else ""
        raise ValueError(f"{path} holds no LoRA{whose}")
    peft = any(name.startswith(FORMATS["peft"].prefix) for name in keys)
    if peft and not settings.values:
        warnings.warn(
            f"{path} was saved by PEFT, and its {CONFIG} is not beside it: taken as if alpha were"
            " the rank; name the folder that holds both",
            stacklevel=4,
        )
    _warn_of_pictures(path, names, content)
    _fit_differences(path, model, content.differences)
    return content


def experts_in(model: Denoiser, path: str | Path) -> set[str]:
    """Return the experts of a pair, "high" and "low", that the keys of a LoRA file name; none for
    the file of a single network. `model`: either of the two networks."""
    names = foreign_names(model)
    entries = Checkpoint(weights_of(Path(path))).entries
    experts = {name: parse(name, names).expert for name in entries}
    named = {expert for expert in experts.values() if expert}
    plain = [name for name, expert in experts.items() if not expert]
    if named and any(name.startswith("transformer.") for name in plain):
        named.add("high")  # as in `_chosen`
    return named


def _chosen(
    stored: Checkpoint, names: dict[str, str], expert: str | None, path: Path
) -> dict[str, Key]:
    """Return the keys to be read, and what each says. In a file that names an expert,
    `transformer.` alone means the high one, as Diffusers writes a pair."""
    keys = {name: parse(name, names) for name in stored.entries}
    of_experts = [name for name, key in keys.items() if key.expert]
    if of_experts:
        if expert is None:
            raise ValueError(
                f"{path} holds LoRAs of two experts ({of_experts[0]} …), and this model has one"
                " network: say expert='high' or 'low', or take a file of one (mmdit export"
                " --expert), or the whole pair in one (mmdit export without --lora)"
            )
        for name, key in keys.items():
            if key.expert is None and name.startswith("transformer."):
                keys[name] = replace(key, expert="high")
        keys = {name: key for name, key in keys.items() if key.expert in (None, expert)}
    if unknown := [name for name, key in keys.items() if key.module is None]:
        if adapter := unread_type(unknown):
            raise ValueError(
                f"{path} holds {adapter} ({unknown[0]} …), which is not read here: LoRA, DoRA, LoKr"
                " and whole differences are; merge it with the tool that made it"
            )
        if not any(key.part for key in keys.values()):
            raise ValueError(
                f"{path} holds whole weights ({unknown[0]} …), and no changes of a LoRA: give it as"
                " --checkpoint, or name a file of a LoRA"
            )
        word = re.sub(UNMANGLE, "", unknown[0])
        alike = sorted(name for name in names if ("." in name) == ("." in word))
        raise ValueError(
            f"{path}: {len(unknown)} of {len(stored.entries)} keys name no layer of this model,"
            f" first {unknown[0]}{near(word, alike)}; is it for another model (I2V, T2V, 1.3B,"
            " 14B)?"
        )
    return keys


def _gather(model: nn.Module, stored: Checkpoint, keys: dict[str, Key], path: Path) -> LoRAFile:
    """Return the content of the tensors named by `keys`, with the scales still to be set."""
    file, content = stored.files[0], LoRAFile()
    over_base = file.suffix == ".safetensors" and OVER_BASE in header_of(file)
    sources: dict[str, str] = {}
    parameters = dict(model.named_parameters())
    for name, tensor in stored.tensors():
        if name not in keys:
            continue
        module, part = keys[name].module, keys[name].part
        assert module is not None, "`_chosen` refuses other keys"
        ours = module if part in WHOLE and module in parameters else f"{module}.{part}"
        if ours in sources:
            raise ValueError(
                f"{path} holds {ours} twice, as {sources[ours]} and as {name}; remove one"
            )
        sources[ours] = name
        if part == "alpha":
            content.updates.setdefault(module, Update()).alpha = _alpha(name, tensor, path)
            continue
        check_numbers(name, tensor, path)
        if part in WHOLE:
            # torch has no arithmetic in float8
            content.differences[ours] = tensor.float() if tensor.dtype.itemsize == 1 else tensor
            continue
        update = content.updates.setdefault(module, Update())
        update.written, update.over_base = keys[name].written, over_base
        update.parts[part] = _lengths(name, tensor, path) if part == "lora_magnitude" else tensor
    return content


def _alpha(name: str, tensor: Tensor, path: Path) -> float:
    plain = tensor.numel() == 1 and not tensor.is_complex()
    value = tensor.item() if plain else math.nan
    if not math.isfinite(value) or value == 0:
        raise ValueError(
            f"{path}: {name} is {tensor.tolist()!r:.100}, must be one finite number other than 0"
        )
    return float(value)


def _lengths(name: str, tensor: Tensor, path: Path) -> Tensor:
    """Return DoRA's magnitudes as a vector. ValueError if they are lengths of columns."""
    if tensor.ndim == 2 and tensor.shape[0] == 1 < tensor.shape[1]:
        raise ValueError(
            f"{path}: {name} {tuple(tensor.shape)} has a length for each column (LyCORIS'"
            " wd_on_output: false), which is not read here; only lengths of rows are"
        )
    return tensor.squeeze(1) if tensor.ndim == 2 else tensor


def _scale(update: Update, settings: Settings) -> float:
    if settings.values.get("peft_type") == "LOKR" and not update.lokr:
        raise ValueError(f"{settings.source} says LOKR, but {update.written} has other tensors")
    if update.alpha is None:
        return settings.scale(update.written, update.rank, update.whole, update.lokr)
    # all readers of whole factors ignore alpha but PEFT's, whose files have no such tensor
    return 1.0 if update.whole else update.alpha / update.rank


def _check(model: nn.Module, module: str, update: Update, path: Path) -> None:
    parent, _, leaf = module.rpartition(".")
    layer = getattr(model.get_submodule(parent), leaf)  # or a parameter of that name
    for part, word in (("lora_A", "down"), ("lora_B", "up")):
        if part not in update.parts and not update.lokr:
            raise ValueError(f"{path}: {module} has no {part} ({word}): half an update")
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"{path}: an update of {module}, which is a {type(layer).__name__}; only linear layers"
            " can have one"
        )
    try:
        _, *sizes = adapter_type(update.parts)
    except ValueError as error:
        both = update.lokr and "lora_magnitude" in update.parts
        reason = f"DoRA over LoKr is not read here: {error}" if both else error
        raise ValueError(f"{path}: {module}: {reason}") from None
    if sizes != [layer.in_features, layer.out_features]:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in update.parts.items())
        raise ValueError(
            f"{path}: {module} has {shapes}; this layer is {layer.in_features} →"
            f" {layer.out_features}: the LoRA is for a model of another size"
        )


def _warn_of_pictures(path: Path, names: dict[str, str], content: LoRAFile) -> None:
    """Warn if a LoRA leaves the picture layers of an I2V model unchanged, as one of T2V does."""
    of_pictures = {name for name in names.values() if name.endswith((".k_img", ".v_img"))}
    of_text = [name for name in content.updates if name.endswith(("cross_attn.k", "cross_attn.v"))]
    if of_pictures and of_text and not content.updates.keys() & of_pictures:
        warnings.warn(
            f"{path} adapts {len(of_text)} layers that read the text and none of the"
            f" {len(of_pictures)} that read the picture: it was made for a T2V model, or for words"
            " alone, and this I2V model keeps those as they are",
            stacklevel=5,
        )


def _fit_differences(path: Path, model: nn.Module, differences: dict[str, Tensor]) -> None:
    """Drop, with a warning, differences of patch embeddings with fewer input channels, as of a T2V
    model. ValueError for other shapes that do not fit."""
    parameters = dict(model.named_parameters())
    for name, tensor in list(differences.items()):
        here = parameters[name].shape if name in parameters else None
        if here == tensor.shape:
            continue
        if here is not None and _of_fewer_channels(tensor.shape, here):
            warnings.warn(
                f"{path}: the difference of {name} is for {tensor.shape[1]} input channels, this"
                f" model has {here[1]}: it was made for a T2V model; this one is left out, all"
                " others are laid on",
                stacklevel=5,
            )
            del differences[name]
            continue
        what = "not there" if here is None else tuple(here)
        raise ValueError(
            f"{path}: a difference {tuple(tensor.shape)} for {name}, which is {what} in this model"
        )


def _of_fewer_channels(shape: torch.Size, here: torch.Size) -> bool:
    """Return whether `shape` is that of a patch embedding like `here`, but with fewer input
    channels."""
    if len(shape) != len(here) or len(here) < 3:
        return False
    return shape[1] < here[1] and (shape[0], *shape[2:]) == (here[0], *here[2:])
