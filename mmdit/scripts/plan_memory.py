"""Compute the GPU memory that a training step will take, part by part, before it is run; nothing is
loaded or allocated.

    mmdit plan-memory \\
        --config configs/wan/ti2v_5b_first_frame_lora.yaml [--gpu_gb 24] [--variant 5B]
        [section.key=value …]

With --gpu_gb it then adds options that save memory, those that cost least time first, until the
step fits. The plan is for one process, with blocks compiled if train.compile says so for a GPU.
tests/drivers/gpu_memory_plan.py compares plans with measurements.
"""

import json
import math
from dataclasses import asdict

from mmdit.commands.plan_memory.ladder import fits, latent_shape, plans_until_fit, variant_sizes
from mmdit.commands.plan_memory.memory_plan import SIZES
from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.scripts import command_parser, friendly, run
from mmdit.scripts.arguments import number
from mmdit.scripts.parsers import at_least


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument(
        "--gpu_gb", type=number, help="memory of the GPU in 1e9 bytes: what makes it fit?"
    )
    parser.add_argument(
        "--variant", choices=tuple(SIZES), help="of Wan, where model.name_or_path is not there yet"
    )
    parser.add_argument(
        "--words", type=at_least(1), help="of a caption; default: as many as the text encoder reads"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    args = parser.parse_intermixed_args(argv)
    with friendly():
        config = load_experiment_config(args.config, args.overrides)
        if args.gpu_gb is not None and args.gpu_gb <= 0:
            raise ValueError(f"--gpu_gb is {args.gpu_gb:g}, must be above 0, for example 24")
        if not config.model.released:
            reason = f"model.type is {config.model.type}: it is of Wan, leave it out"
            parser.refuse_idle(args, ["variant"], reason)
        if config.experts.enabled and not args.json:
            print("two experts of equal shape: the high-noise one computes, both are counted")
        sizes = variant_sizes(config, args.variant)
        for words, plan in plans_until_fit(config, args.gpu_gb or math.inf, sizes, args.words):
            if args.json:
                print(json.dumps({"overrides": words} | asdict(plan) | {"total": plan.total}))
            else:
                print(
                    f"{plan.total / 1e9:8.3f} GB "
                    f" {' '.join(words) or f'as configured, for latents {latent_shape(config)}'}"
                )
            if not words and not args.json:
                print(plan.describe())
        if args.gpu_gb and not args.json:
            verdict = "does not fit: take fewer frames or a smaller size"
            if fits(plan, args.gpu_gb):
                verdict = f"fits {' '.join(words) or 'as configured'}"
            print(f"{args.gpu_gb:g} GB: {verdict}")
    return 0


if __name__ == "__main__":
    run(main)
