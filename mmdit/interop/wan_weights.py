"""Read and write Wan 2.1 / 2.2 transformers in the layouts in use: official, Diffusers', and
repacked single files.

The layouts differ only in names, which correspond one to one. The high and the low expert of a pair
cannot be told apart by their weights: folders name them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mmdit.adapters.layers import Adapter, is_adapter
from mmdit.config import ConfigError
from mmdit.files import refuse_filled_folder, replace_folder, write_atomically
from mmdit.foreign import count_blocks, read_json
from mmdit.interfaces import LatentSpec
from mmdit.interop.weights_in_files import left_in_file
from mmdit.models.wan import TI2V_CHANNELS, WanConfig, WanDiT
from mmdit.models.wan_denoiser import WanDenoiser, WanModelConfig
from mmdit.models.wan_names import BLOCK_MODULES, MODULES, PARAMETERS, diffusers_name
from mmdit.nn.encodings import ENCODINGS
from mmdit.nn.stored_weights import StoredWeight, store
from mmdit.weights import (
    INDEX,
    SCALES,
    Checkpoint,
    fill,
    is_finite,
    scaled_float8,
    shapes_of,
    tensor_pieces,
)

Expert = Literal["high", "low"]
Layout = Literal["official", "diffusers"]

EXPERT_FOLDERS = {
    "high": ("high_noise_model", "transformer"),
    "low": ("low_noise_model", "transformer_2"),
}
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
OTHER_PARTS = {
    "vae",
    "first_stage_model",
    "text_encoders",
    "cond_stage_model",
    "conditioner",
    "clip_vision",
}
WEIGHTS = "diffusion_pytorch_model"
SHARD_BYTES = 10_000_000_000
HEAD_DIM = 128

MOST_WORDS = 65_536  # the longest caption, in tokens, that a config may ask for
CONFIG_KEYS = {  # Diffusers' config.json → ours
    "ffn_dim": "ffn_dim",
    "num_attention_heads": "num_heads",
    "num_layers": "num_layers",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "eps": "eps",
    "image_dim": "image_dim",
    "pos_embed_seq_len": "image_positions",
}


# ── reading ───────────────────────────────────────────────────────────────────────────────────────
def locate(path: str | Path, expert: str | None = None) -> Path:
    """Return where the weights lie: `path` itself, or the expert's folder in it. ValueError: an
    expert must be named but is not, or is named but not there."""
    path = Path(path)
    if expert not in (None, "high", "low"):
        raise ValueError(
            f"expert is {expert!r}; must be 'high', 'low', or None for a model without experts"
        )
    inside = {
        name: path / folder
        for name, folders in EXPERT_FOLDERS.items()
        for folder in folders
        if (path / folder).is_dir()
    }
    if len(inside) == 2 and expert is None:
        raise ValueError(
            f"{path} holds two experts, {inside['high'].name} and {inside['low'].name}: say"
            " expert='high' or 'low' (--expert, or model.expert in a config)"
        )
    if expert is None:
        return next(iter(inside.values()), path)
    # A folder `transformer` without a second one holds a model without experts.
    experts = {
        name: folder
        for name, folder in inside.items()
        if len(inside) == 2 or folder.name != "transformer"
    }
    if expert in experts:
        return experts[expert]
    folder = path.parent if path.is_file() else path
    names_of_path, said = {path.name, folder.name}, None
    if path.is_file():
        said = expert_in_name(path)
    named = [
        name
        for name, folders in EXPERT_FOLDERS.items()
        if names_of_path & set(folders) or f"{name}_noise" in path.name.lower() or said == name
    ]
    if named == [expert]:
        return path
    what = "is a model without experts, or its name does not tell of which it is (high_noise, …)"
    if named:
        what = f"is the {named[0]}-noise expert"
    if experts:
        what = f"holds the {next(iter(experts))}-noise expert alone"
    raise ValueError(f"the {expert}-noise expert is asked for, but {path} {what}")


def expert_in_name(path: str | Path) -> Expert | None:
    """Return the expert that a file's name indicates, None if it indicates none."""
    name = Path(path).name.lower()
    for pattern in (r"(high|low)[-_ ]?noise", r"(?<![a-z])(high|low)(?![a-z])"):
        named = set(re.findall(pattern, name))
        if named == {"high"}:
            return "high"
        if named == {"low"}:
            return "low"
    return None


def note_of_name(path: str | Path, expert: str | None) -> str:
    """Return a line to print if a file's name indicates another expert than the one that it is
    used for, else an empty text."""
    if expert is None or expert_in_name(path) in (None, expert):
        return ""
    return f"  its name says that it is for the other expert, not for the {expert}-noise one"


def official_names(names: list[str]) -> tuple[dict[str, str], Layout, str]:
    """Return the official name of every tensor by its stored name, the layout, and the common
    prefix of the stored names."""

    def begins(prefix: str) -> bool:
        return all(name.startswith(prefix) or SCALES.search(name) for name in names)

    prefix = next(filter(begins, PREFIXES), "")
    bare = {name: name.removeprefix(prefix) for name in names}
    if not any(
        ".attn1." in name or name.startswith("condition_embedder.") for name in bare.values()
    ):
        return bare, "official", prefix
    blocks = {match[1] for name in bare.values() if (match := re.match(r"(blocks\.\d+)\.", name))}
    modules = {theirs: ours for ours, theirs in MODULES.items()}
    modules |= {
        f"{b}.{theirs}": f"{b}.{ours}" for b in blocks for ours, theirs in BLOCK_MODULES.items()
    }
    whole = {theirs: ours for ours, theirs in PARAMETERS.items()}
    whole |= {f"{b}.scale_shift_table": f"{b}.modulation" for b in blocks}

    def official(name: str) -> str:
        module, _, leaf = name.rpartition(".")
        return whole.get(name) or (f"{modules[module]}.{leaf}" if module in modules else name)

    return {stored: official(name) for stored, name in bare.items()}, "diffusers", prefix


def left_out(names: dict[str, str]) -> tuple[str, ...]:
    """Return the official names of the tensors that neither our models nor Diffusers' read.
    `names`: the table from `official_names`."""
    return tuple(name for name in names.values() if name.endswith("norm_added_q.weight"))


def infer_config(shapes: dict[str, tuple[int, ...]], source: object) -> WanConfig:
    """Return the sizes that official names and shapes reveal. Heads are taken to be 128 wide, as in
    every released Wan; num_heads is 0 if the width is no multiple of that. ValueError if it is no
    Wan transformer."""
    try:
        dim, in_dim = shapes["patch_embedding.weight"][:2]
        blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
        config = WanConfig(
            dim=dim,
            ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
            num_heads=0 if dim % HEAD_DIM else dim // HEAD_DIM,
            num_layers=max(blocks) + 1,
            in_dim=in_dim,
            out_dim=shapes["head.head.weight"][0] // 4,
            freq_dim=shapes["time_embedding.0.weight"][1],
            text_dim=shapes["text_embedding.0.weight"][1],
            image_dim=shapes.get("img_emb.proj.1.weight", (0,))[0],
            image_positions=shapes.get("img_emb.emb_pos", (1, 0, 0))[1],
        )
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(_no_transformer(shapes, source, error)) from None
    count_blocks(blocks, len(shapes), source)
    return config


def stored_sizes(stored: Checkpoint, source: object) -> WanConfig:
    """Return the result of `infer_config` for the headers of a checkpoint."""
    names = official_names(list(stored.entries))[0]
    return infer_config(shapes_of(stored.entries, names), source)


def _no_transformer(names: Iterable[str], source: object, error: Exception) -> str:
    """Return a message that says what a file holds that lacks tensors of the transformer."""
    names = list(names)
    if scales := [name for name in names if SCALES.search(name)]:
        return (
            f"{source} is quantised: it has tensors such as {scales[0]}; take the bf16 or fp16"
            " file, or ComfyUI's fp8_scaled one"
        )
    others = sorted(
        {f"{part}." for name in names if (part := name.partition(".")[0]) in OTHER_PARTS}
    )
    if others and any(name.startswith(PREFIXES[0]) for name in names):
        return (
            f"{source} holds a whole pipeline in one file ({', '.join(others)} beside "
            f"{PREFIXES[0]}); take the transformer, the VAE and the text encoder each by itself"
        )
    if not isinstance(error, KeyError):
        return f"{source} is no Wan transformer: its tensors have other names or shapes"
    return f"{source} is no Wan transformer: {error} is missing among its {len(names)} tensors"


def read_config(folder: Path, inferred: WanConfig) -> WanConfig:
    """Return `inferred`, completed from the config.json in `folder`, of either layout: shapes do
    not show the number of heads, epsilon and text length. ValueError if it cannot be read, or
    contradicts the weights."""
    more, file = inferred.in_dim - inferred.out_dim, folder / "config.json"
    if more not in (0, inferred.out_dim + 4):
        raise ValueError(
            f"{folder} takes {inferred.in_dim} channels and gives {inferred.out_dim}: T2V takes as "
            f"many as it gives, I2V {inferred.out_dim + 4} more; models with other inputs "
            "(Fun-Control, VACE) are not read here"
        )
    if not file.is_file():
        return inferred
    stored = read_json(file, "config of a Wan transformer")
    try:
        known = {field.name for field in fields(WanConfig)}
        foreign = "attention_head_dim" in stored
        renamed = {
            CONFIG_KEYS.get(key, key) if foreign else key: value or 0
            for key, value in stored.items()
        }
        written = {key: value for key, value in renamed.items() if key in known}
        for key in ("eps", "text_len"):  # null stands for the default
            if stored.get(key, 0) is None:
                written.pop(key, None)
        if foreign:
            written["dim"] = stored["attention_head_dim"] * stored["num_attention_heads"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is no config of a Wan transformer: {error!r}") from None
    for key, least, most in (
        ("num_heads", 1, inferred.dim),
        ("eps", 0, 1),
        ("text_len", 1, MOST_WORDS),
    ):
        value, number = written.get(key, least), (int, float) if key == "eps" else int
        if isinstance(value, bool) or not isinstance(value, number) or not least <= value <= most:
            raise ValueError(f"{file}: {key} is {value!r}, must be a number from {least} to {most}")
    shapes = asdict(inferred)
    for key, value in written.items():
        if key not in ("num_heads", "eps", "text_len") and value != shapes[key]:
            raise ValueError(
                f"{file}: {key} is {value}, the weights beside it have {shapes[key]}; they do not"
                " belong together"
            )
    return replace(inferred, **written)


def load_dit(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    expert: str | None = None,
    model_class: type[WanDiT] = WanDiT,
    encoding: str | None = None,
    in_file: bool = False,
) -> WanDiT:
    """Load a Wan transformer from an official or Diffusers folder, or a single file. The parts that
    the official code keeps in float32 (`WanDiT.stored_dtype`) stay so when `dtype` has less.
    Tensors are read one by one into a model on the meta device.

    `encoding`: the matrices of the blocks are stored in it, to be frozen; for float8, those that
    the file holds as float8 are kept as they are. `in_file`: all weights stay in their files;
    `unpack_weights` must read them before anything is computed.

    ValueError, in one sentence: nothing there, shards missing, a file cut off or with code in it,
    quantised weights, not a Wan transformer, config.json of another model, the wrong expert,
    tensors missing or unknown.
    """
    place = locate(path, expert)

    def unpack(name: str, codes: Tensor, scale: Tensor) -> Tensor:
        if in_file or (encoding == "float8" and names[name].startswith("blocks.")):
            return StoredWeight(codes, scale.expand(len(codes), 1).contiguous(), dtype)
        return scaled_float8(name, codes, scale)

    def kept(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        matrix = name.startswith("blocks.") and tensor.ndim == 2
        bits = ENCODINGS[encoding] if encoding and matrix else None
        if bits is ENCODINGS["float8"] and tensor.dtype == bits.dtype:  # codes without a scale
            tensor = StoredWeight(tensor, torch.ones(len(tensor), 1), dtype)
        if in_file:
            return left_in_file(tensor, dtype, bits)
        if bits is None or isinstance(tensor, StoredWeight):
            return tensor.to(device, dtype, copy=True)
        return StoredWeight.encoded(tensor.to(device, dtype), bits)

    stored = Checkpoint(place, unpack=unpack)
    names, _, _ = official_names(list(stored.entries))
    if loose := [name for name in names.values() if is_adapter(name)]:
        raise ValueError(
            f"{place} holds adapters apart from its weights ({len(loose)} tensors, first"
            f" {loose[0]}): most programs would leave them out; write it anew with the adapters"
            " merged"
        )
    shapes = shapes_of(stored.entries, names)
    inferred = infer_config(shapes, place)
    folder = (
        place.parent if place.name.startswith(WEIGHTS) else place
    )  # for a release's own weight file, the config.json beside it counts, too
    config = read_config(folder, inferred)
    if not config.num_heads:
        raise ValueError(
            f"{place}: a width of {config.dim} is no multiple of {HEAD_DIM}, which all released"
            " heads have; its config.json, which says how many heads it has, must lie beside it"
        )
    if config.dim % config.num_heads or (config.dim // config.num_heads) % 2:
        raise ValueError(
            f"{place}: width {config.dim} does not split into {config.num_heads} heads of even"
            " width"
        )
    with torch.device("meta"):
        model = model_class(config)
    return fill(
        model,
        stored,
        names,
        f"{place}, read as {config.variant},",
        device,
        lambda name: WanDiT.stored_dtype(name, dtype),
        left_out(names),
        kept,
    )


def load_denoiser(
    settings: WanModelConfig,
    spec: LatentSpec,
    text_dim: int,
    expert: str | None = None,
    in_file: bool = False,
) -> WanDenoiser:
    """Return the network that the section `model:` of type wan names (of a pair its expert, or
    `expert`), to be trained on latents of `spec` and text tokens of width `text_dim`. `in_file`:
    see `load_dit`. ConfigError, in one sentence, if it cannot be read, or the parts do not fit
    together."""
    try:
        dtype, expert = (
            torch.float32 if settings.dtype == "float32" else torch.bfloat16,
            expert or settings.expert,
        )
        model = load_dit(
            settings.name_or_path,
            dtype,
            expert=expert,
            model_class=WanDenoiser,
            encoding=settings.dtype if settings.dtype in ENCODINGS else None,
            in_file=in_file,
        )
    except ValueError as error:
        raise ConfigError("model.name_or_path", str(error)) from None
    config = model.config
    if spec.channels == 2 * config.out_dim:
        raise ConfigError(
            "tokenizer.picture",
            "gives latents of pictures beside those of clips, which are not taken here: I2V is "
            "trained by train_t2v; elsewhere set tokenizer.picture=none",
        )
    if spec.channels != config.out_dim:
        name = {16: "the Wan 2.1 VAE", 48: "the Wan 2.2 VAE"}.get(
            config.out_dim, "another tokenizer"
        )
        raise ConfigError(
            "tokenizer",
            f"gives latents of {spec.channels} channels, {config.variant} takes {config.out_dim}: "
            f"use {name}",
        )
    if text_dim != config.text_dim:
        raise ConfigError(
            "text_encoder",
            f"gives tokens {text_dim} wide, {config.variant} takes {config.text_dim}: use the "
            "UMT5 of its release",
        )
    return prepare(model, settings)


def prepare(model: WanDenoiser, settings: WanModelConfig) -> WanDenoiser:
    """Set up a loaded network, in place, as `settings` ask, and return it. ConfigError if its
    widths rule out float8 products."""
    model.settings, model.residual = settings, settings.residual
    model.checkpointing, model.checkpoint_every = settings.checkpointing, settings.checkpoint_every
    model.offload_activations = settings.offload_activations
    if settings.dtype in ENCODINGS:
        model.encoding = settings.dtype
        store(model.blocks, settings.dtype, settings.products == "float8")
    widths = model.config.dim, model.config.ffn_dim
    if settings.products == "float8" and any(width % 16 for width in widths):
        raise ConfigError(
            "model.products",
            "is float8, for which widths must be multiples of 16, but those of the blocks are"
            f" {widths[0]} and {widths[1]}; leave it out",
        )
    return model


# ── writing ───────────────────────────────────────────────────────────────────────────────────────
def config_json(config: WanConfig, layout: Layout) -> dict:
    if layout == "official":
        model_type = "ti2v" if config.in_dim == TI2V_CHANNELS else "t2v"
        if config.in_dim != config.out_dim:
            model_type = "flf2v" if config.image_positions else "i2v"
        keys = (
            "dim",
            "eps",
            "ffn_dim",
            "freq_dim",
            "in_dim",
            "num_heads",
            "num_layers",
            "out_dim",
            "text_len",
        )
        return {"_class_name": "WanModel", "model_type": model_type} | {
            key: getattr(config, key) for key in keys
        }
    ours = {theirs: getattr(config, key) for theirs, key in CONFIG_KEYS.items()}
    ours |= {
        "image_dim": config.image_dim or None,
        "pos_embed_seq_len": config.image_positions or None,
    }
    return {
        "_class_name": "WanTransformer3DModel",
        "attention_head_dim": config.dim // config.num_heads,
        "cross_attn_norm": True,
        "added_kv_proj_dim": config.dim if config.image_dim else None,
        "patch_size": [1, 2, 2],
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        **ours,
    }


def save_dit(
    model: WanDiT,
    folder: str | Path,
    layout: Layout = "official",
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json and the weights with which the model computes, in shards with an index if
    they are larger than `shard_bytes`.

    Adapters are merged into what is written (in float32, rounded once; `model` keeps them), weights
    that are stored as float8 or in other encodings are unpacked, and all others are written bit for
    bit. `dtype`: the type to write, except for the parts that stay float32 in loading, too. The
    folder is written under another name, then renamed. ValueError if the folder exists and is not
    empty, or a weight is not finite in this type.
    """
    folder = Path(folder)
    refuse_filled_folder(folder)
    if layout not in ("official", "diffusers"):
        raise ValueError(f"layout is {layout!r}; must be 'official' or 'diffusers'")
    rename = diffusers_name if layout == "diffusers" else str
    shards, size, total = [[]], 0, 0
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        written = parameter.numel() * _written_dtype(name, parameter, dtype).itemsize
        if shards[-1] and size + written > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + written, total + written
    files = [
        f"{WEIGHTS}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    if len(shards) == 1:
        files = [f"{WEIGHTS}.safetensors"]
    with replace_folder(folder) as unfinished:
        if len(shards) > 1:
            places = {
                rename(name): file
                for file, names in zip(files, shards, strict=True)
                for name in names
            }
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (unfinished / f"{WEIGHTS}{INDEX}").write_text(
                json.dumps(index, indent=1), encoding="utf-8"
            )
        for file, names in zip(files, shards, strict=True):
            tensors = {rename(name): _written(model, name, dtype) for name in names}
            pieces = tensor_pieces(tensors, {"format": "pt"})
            write_atomically(unfinished / file, pieces, flush=True)
        config = json.dumps(config_json(model.config, layout), indent=1)
        (unfinished / "config.json").write_text(config, encoding="utf-8")


def _written_dtype(name: str, parameter: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return parameter.dtype if dtype is None else WanDiT.stored_dtype(name, dtype)


@torch.no_grad()
def _written(model: WanDiT, name: str, dtype: torch.dtype | None) -> Tensor:
    """Return a parameter in the form in which `save_dit` writes it."""
    parameter = model.get_parameter(name)
    module, _, leaf = name.rpartition(".")
    layer = model.get_submodule(module)
    value = parameter.detach()
    if isinstance(layer, Adapter) and leaf == "weight":
        value = layer.merged_weight()
    elif isinstance(value, StoredWeight):
        value = value.whole()
    result = value.to(device="cpu", dtype=_written_dtype(name, parameter, dtype)).contiguous()
    if not is_finite(result):
        raise ValueError(
            f"the weight {name} holds numbers that are not finite in"
            f" {str(result.dtype).removeprefix('torch.')}: nothing is written"
        )
    return result
