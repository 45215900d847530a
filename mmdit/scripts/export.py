"""One safetensors file from a run, with its config inside: for sampling, sharing or train.init_from.

    python -m mmdit.scripts.export --checkpoint runs/my_run --out my_model.safetensors [--dtype bf16] [--raw_weights]
    python -m mmdit.scripts.export --checkpoint runs/my_run --out my_lora.safetensors --lora comfy
    python -m mmdit.scripts.export --checkpoint runs/my_wan --out transformer --layout diffusers
"""

import argparse
from pathlib import Path

import torch

from mmdit.experiment import load_pipeline
from mmdit.interop.lora_formats import save_lora
from mmdit.interop.wan import save_dit
from mmdit.models.wan import WanDiT
from mmdit.scripts import friendly, run
from mmdit.training.checkpoint import export, load_weights


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="run folder or checkpoint folder")
    parser.add_argument("--out", required=True, help="file to write")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="bf16")
    parser.add_argument("--raw_weights", action="store_true", help="the last weights instead of their average")
    parser.add_argument("--lora", choices=["diffusers", "kohya", "comfy", "peft"], help="only the adapters, in this format")
    parser.add_argument("--layout", choices=["official", "diffusers"], help="a Wan transformer as such a folder, adapters merged")
    parser.add_argument("--expert", choices=["high", "low"], help="of a pair, for --lora and --layout [the trained one, or high]")
    args = parser.parse_args(argv)
    with friendly():
        if args.lora or args.layout:
            keep = None if args.lora else True
            pipeline, config = load_pipeline(args.checkpoint, "cpu", use_ema=not args.raw_weights, lora=keep)
            expert = args.expert or getattr(config.model, "expert", None) or "high"
            if args.expert and pipeline.low is None:
                raise ValueError(f"--expert is {args.expert}, but {args.checkpoint} is no pair of Wan experts; leave it out")
            model = pipeline.low if pipeline.low is not None and expert == "low" else pipeline.learner.model
            if args.layout and not isinstance(model, WanDiT):
                raise ValueError(f"--layout is for Wan transformers, {args.checkpoint} is a {type(model).__name__}; leave it out")
            save_dit(model, args.out, args.layout) if args.layout else save_lora(model, args.out, args.lora)
            print(f"wrote {args.out}")
            return 0
        weights = load_weights(args.checkpoint, use_ema=not args.raw_weights)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
        export(weights, Path(args.out), dtype)
        print(f"wrote {args.out} ({Path(args.out).stat().st_size / 1e6:.1f} MB, step {weights.meta.step})")
    return 0


if __name__ == "__main__":
    run(main)
