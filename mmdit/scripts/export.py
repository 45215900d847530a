"""One safetensors file from a run, with its config inside: for sampling, sharing or train.init_from.

    python -m mmdit.scripts.export --checkpoint runs/my_run --out my_model.safetensors [--dtype bf16] [--raw_weights]
    python -m mmdit.scripts.export --checkpoint runs/my_run --out my_lora.safetensors --lora comfy
"""

import argparse
from pathlib import Path

import torch

from mmdit.experiment import load_pipeline
from mmdit.interop.lora_formats import save_lora
from mmdit.scripts import friendly
from mmdit.training.checkpoint import export, load_weights


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="run folder or checkpoint folder")
    parser.add_argument("--out", required=True, help="file to write")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="bf16")
    parser.add_argument("--raw_weights", action="store_true", help="the last weights instead of their average")
    parser.add_argument("--lora", choices=["diffusers", "kohya", "comfy", "peft"], help="only the adapters, as these programs read them")
    args = parser.parse_args(argv)
    with friendly():
        if args.lora:
            pipeline, _ = load_pipeline(args.checkpoint, "cpu", use_ema=not args.raw_weights, lora=None)
            save_lora(pipeline.learner.model, args.out, args.lora)
            print(f"wrote {args.out}")
            return 0
        weights = load_weights(args.checkpoint, use_ema=not args.raw_weights)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
        export(weights, Path(args.out), dtype)
        print(f"wrote {args.out} ({Path(args.out).stat().st_size / 1e6:.1f} MB, step {weights.meta.step})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
