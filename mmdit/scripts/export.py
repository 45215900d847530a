"""One safetensors file from a run, with its config inside: for sampling, sharing or
train.init_from.

    mmdit export --checkpoint runs/my_run \\
        --out my_model.safetensors [--dtype bf16] [--raw_weights]
    mmdit export --checkpoint runs/my_run --out my_lora.safetensors --lora comfy
    mmdit export --checkpoint runs/my_run --out merged.safetensors --merge
    mmdit export --checkpoint runs/my_wan --out transformer --layout diffusers

Two bytes a weight are enough: bf16 reaches as far as fp32, and fp16 keeps eight times the digits of
bf16 (a weight that it cannot hold is an error), so fp16 draws nearer to what the run drew.

A run's own file holds its adapters beside the base, as checkpoints do; --merge and --layout fold
them into the weights.
"""

from dataclasses import replace
from pathlib import Path

import torch

from mmdit.adapters import is_adapter
from mmdit.experiment.load import load_pipeline
from mmdit.interop.lora_formats import save_lora
from mmdit.interop.wan_weights import save_dit
from mmdit.scripts import command_parser, friendly, run
from mmdit.training.checkpoint import Weights, export, load_weights
from mmdit.training.expert_choice import joint_choice

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def merged(weights: Weights, use_ema: bool) -> Weights:
    """Return the weights of a run with its adapters folded in, and a config without `lora:`.
    ValueError: it has no adapters, is a pair of experts, or its base is elsewhere (Wan)."""
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


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="run folder or checkpoint folder")
    parser.add_argument("--out", required=True, help="file to write")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="of what is written [bf16; with --lora fp32; with --layout as it is]",
    )
    parser.add_argument(
        "--raw_weights", action="store_true", help="the last weights instead of their average"
    )
    parser.add_argument(
        "--lora",
        choices=["diffusers", "kohya", "comfy", "peft"],
        help="only the adapters, in this format (for Diffusers: diffusers)",
    )
    parser.add_argument(
        "--layout",
        choices=["official", "diffusers"],
        help="a Wan transformer as such a folder, adapters merged",
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="fold the adapters into the weights: a model without lora:, for init_from",
    )
    parser.add_argument(
        "--expert",
        choices=["high", "low"],
        help="of a pair, for --lora and --layout [the trained one, or high]",
    )
    args = parser.parse_intermixed_args(argv)
    with friendly():
        if args.lora or args.layout:
            if args.merge or (args.lora and args.layout):
                raise ValueError("--merge, --lora and --layout each make another file: choose one")
            keep = None  # kept apart: what writes a whole model merges them, rounding once
            pipeline, config = load_pipeline(
                args.checkpoint, "cpu", use_ema=not args.raw_weights, lora=keep
            )
            choice = joint_choice(pipeline, config, args.expert, args.checkpoint)
            model, said = choice.network, choice.said
            if len(model.networks()) > 1:
                said = "both experts, their names under high. and low."
            if args.layout and not config.model.released:
                raise ValueError(
                    f"--layout is for Wan transformers, {args.checkpoint} is a"
                    f" {type(model).__name__}; leave it out"
                )
            if args.layout:
                save_dit(model, args.out, args.layout, dtype=DTYPES.get(args.dtype))
            else:
                save_lora(model, args.out, args.lora, DTYPES[args.dtype or "fp32"])
            print(": ".join([f"wrote {args.out}", said]) if said else f"wrote {args.out}")
            return 0
        if args.expert:
            raise ValueError(
                f"--expert is {args.expert}, but the whole model is written: add --lora or --layout"
            )
        weights = load_weights(args.checkpoint, use_ema=not args.raw_weights)
        if args.merge:
            weights = merged(weights, not args.raw_weights)
        export(weights, Path(args.out), DTYPES[args.dtype or "bf16"])
        print(
            f"wrote {args.out} ({Path(args.out).stat().st_size / 1e6:.1f} MB, step"
            f" {weights.meta.step})"
        )
    return 0


if __name__ == "__main__":
    run(main)
