"""Write the weights of a run to a file or a folder that can be passed on: see
`mmdit.scripts.export`."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch

from mmdit.adapters import is_adapter
from mmdit.commands.export_card import write_card
from mmdit.commands.exported import Exported, places_here
from mmdit.config import apply_overrides, decode, encode
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.experiment.load import load_pipeline
from mmdit.files import check_creatable
from mmdit.interop.lora_formats import save_lora
from mmdit.interop.wan_weights import save_dit
from mmdit.nn.encodings import ENCODINGS
from mmdit.privacy import NEEDED, last_part, portable_config
from mmdit.training.checkpoint import Meta, Weights, load_weights
from mmdit.training.expert_choice import joint_choice
from mmdit.training.exporting import export
from mmdit.weights import parameter_count

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def write_export(args: argparse.Namespace, command: str) -> list[str]:
    """Write what the arguments of `mmdit export` ask for, and its model card; return lines to
    print. `command`: the command as typed. ValueError if the arguments contradict each other, or
    the model cannot be written in this form."""
    if sum(map(bool, (args.merge, args.lora, args.layout))) > 1:
        raise ValueError("--merge, --lora and --layout each make another file: choose one")
    if Path(args.out).suffix in (".pt", ".pth", ".ckpt", ".bin"):
        raise ValueError(
            f"--out is {args.out}, a name for files of torch.save, but safetensors are written:"
            " end it in .safetensors"
        )
    check_creatable(args.out)
    check_overrides(args.overrides, bool(args.layout))
    write = _write_file
    if args.layout == "diffusers_pipeline":
        write = _write_pipeline
    elif args.lora or args.layout:
        write = _write_network
    exported, said = write(args)
    exported = replace(exported, raw=args.raw_weights, command=command)
    return [*said, *write_card(exported)]


def _write_file(args: argparse.Namespace) -> tuple[Exported, list[str]]:
    """Write a single file in our own format."""
    if args.expert:
        raise ValueError(
            f"--expert is {args.expert}, but the whole model is written: add --lora or --layout"
        )
    if args.out.endswith(("/", os.sep)) or Path(args.out).is_dir():
        raise ValueError(
            f"--out is {args.out}, a folder, but one file is written: name it, for example"
            f" {Path(args.out) / 'model.safetensors'}"
        )
    weights = load_weights(args.checkpoint, use_ema=not args.raw_weights)
    if args.merge:
        weights = merged(weights, not args.raw_weights)
    weights.meta = shareable(weights.meta, args.overrides)
    out = Path(args.out)
    export(weights, out, DTYPES[args.dtype or "bf16"])
    megabytes = out.stat().st_size / 1e6
    said = [f"wrote {out} ({megabytes:.1f} MB, step {weights.meta.step})"]
    for key, path in places_here(weights.meta.config):
        said.append(
            f"  {key} in it is {path}, which others do not have: before you push it, export it with"
            f" {key}=PLACE"
        )
    exported = Exported(
        out,
        "mmdit",
        weights.meta.config,
        weights.source,
        weights.meta.step,
        sum(tensor.numel() for tensor in weights.tensors.values()),
    )
    return exported, said


def _write_network(args: argparse.Namespace) -> tuple[Exported, list[str]]:
    """Write only the adapters, or a network in a layout of other programs."""
    pipeline, config = load_pipeline(
        args.checkpoint,
        "cpu",
        use_ema=not args.raw_weights,
        lora=None,  # not merged here: the writers merge, and round once
        overrides=args.overrides,
        wanted=args.expert,
    )
    choice = joint_choice(pipeline, config, args.expert, args.checkpoint)
    model, said = choice.network, choice.said
    if len(model.networks()) > 1:
        said = "both experts, their names under high. and low."
    if args.layout and not config.model.released:
        raise ValueError(
            f"--layout {args.layout} is for Wan transformers, {args.checkpoint} is a"
            f" {type(model).__name__}; leave it out, or write --layout diffusers_pipeline"
        )
    if args.layout:
        save_dit(model, args.out, args.layout, dtype=DTYPES.get(args.dtype))
    else:
        save_lora(model, args.out, args.lora, DTYPES[args.dtype or "fp32"])
    sizes = [
        parameter.numel()
        for name, parameter in model.named_parameters()
        if is_adapter(name) == bool(args.lora)
    ]
    weights = pipeline.learner.text_encoder.parameters()
    trained_encoder = any(weight.requires_grad for weight in weights)
    exported = Exported(
        Path(args.out),
        args.lora or args.layout,
        encode(config),
        pipeline.checkpoint,
        pipeline.step,
        sum(sizes),
        is_lora=bool(args.lora),
        is_pair=len(model.networks()) > 1,
        expert=choice.name if config.model.released else None,
        without_encoder=trained_encoder,
    )
    lines = [": ".join([f"wrote {args.out}", said]) if said else f"wrote {args.out}"]
    if args.layout and config.model.dtype in ENCODINGS:
        lines.append(
            f"  its base is kept as {config.model.dtype} (model.dtype), and the written weights"
            " have its errors: for the numbers of the release add model.dtype=bfloat16, or float32"
        )
    if args.lora and not config.lora.train_lora_only:
        remedy = "--layout" if config.model.released else "--merge"
        lines.append(
            "  its base was trained, too (lora.train_lora_only: false), and is not in it: laid over"
            f" another base it draws something else; {remedy} writes the whole"
        )
    if trained_encoder:
        lines.append(
            "  its text encoder was trained, too (text_encoder.freeze: false), and is not in it:"
            " with another one it draws something else; mmdit export without --lora and --layout"
            " writes what was trained of both"
        )
    return exported, lines


def check_overrides(overrides: list[str], whole_wan: bool = False) -> None:
    """Raise ValueError for an override of a key that the weights determine. With `whole_wan`, the
    dtype of its base may be chosen."""
    for word in overrides:
        key = word.partition("=")[0]
        if key == "model.dtype" and whole_wan:
            continue
        if not key.startswith("card.") and key not in NEEDED:
            raise ValueError(
                f"{word}: an export takes card.… and the places {', '.join(NEEDED)}, with --layout"
                " also model.dtype; the rest is as it was trained"
            )


def shareable(meta: Meta, overrides: list[str]) -> Meta:
    """Return the metadata of a file: the config with `overrides`, without paths of this machine."""
    config = apply_overrides(meta.config, overrides)
    if overrides:
        decode(ExperimentConfig, config)
    origin = {name: value for name, value in meta.origin.items() if name != "data"}
    if isinstance(origin.get("source"), str):
        origin["source"] = last_part(origin["source"])
    return replace(meta, config=portable_config(config, NEEDED), origin=origin)


def _write_pipeline(args: argparse.Namespace) -> tuple[Exported, list[str]]:
    """Write a complete pipeline of Diffusers."""
    try:
        from mmdit.experiment.diffusers_pipeline import save_pipeline
    except ImportError as error:
        raise ValueError(
            f"--layout diffusers_pipeline needs diffusers ({error}); pip install diffusers"
        ) from None
    if args.expert:
        raise ValueError(
            f"--expert is {args.expert}, but a pipeline holds one network: leave it out"
        )
    pipeline, config = load_pipeline(
        args.checkpoint, "cpu", use_ema=not args.raw_weights, overrides=args.overrides
    )
    out = Path(args.out)
    save_pipeline(pipeline, config, out, DTYPES.get(args.dtype), args.checkpoint)
    exported = Exported(
        out,
        args.layout,
        encode(config),
        pipeline.checkpoint,
        pipeline.step,
        parameter_count(pipeline.learner),
    )
    return exported, [f"wrote {out}, which Diffusers opens where mmdit is installed too"]


def merged(weights: Weights, use_ema: bool) -> Weights:
    """Return the weights of a run with its adapters merged, and a config without `lora:`.
    ValueError if it has no adapters, is a pair of experts, or its base lies elsewhere (Wan)."""
    source, config = weights.source, weights.meta.config
    if not config.get("lora", {}).get("enabled"):
        raise ValueError(
            f"--merge folds adapters into the weights, and {source} has none; leave it out"
        )
    if config.get("model", {}).get("type") == "wan":
        raise ValueError(
            "--merge is for models of our own; a whole Wan is written by --layout official (or"
            " diffusers)"
        )
    if config.get("experts", {}).get("enabled"):
        raise ValueError(
            f"--merge is for one model; the experts of {source} share a base that their adapters"
            " change differently"
        )
    pipeline, _ = load_pipeline(source, "cpu", use_ema=use_ema, lora=True)
    names = [name for name in weights.tensors if not is_adapter(name)]
    state = pipeline.learner.state_dict()
    plain = {**config, "lora": {"enabled": False}, "alpha_schedule": {"enabled": False}}
    return Weights(
        replace(weights.meta, config=plain, alphas={}),
        {name: state[name] for name in names},
        source,
    )
