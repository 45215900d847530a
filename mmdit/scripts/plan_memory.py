"""The GPU memory that a training step will take, part by part, before it is run; nothing is loaded or allocated.

    python -m mmdit.scripts.plan_memory --config configs/wan/ti2v_5b_first_frame_lora.yaml [--gpu_gb 24] [--variant 5B] [section.key=value …]

With --gpu_gb it goes on to save memory, in the order of what it costs in time, until the step fits. One process; blocks as they
are written (compiled ones need less). On one H200 the tests/gpu_memory_plan.py compares plans with what was measured.
"""

import argparse
import json
from dataclasses import asdict

from mmdit.experiment import load_experiment_config
from mmdit.memory_ladder import climb, latent_shape, plan
from mmdit.scripts import friendly
from mmdit.training.memory_plan import SIZES


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--gpu_gb", type=float, help="memory of the GPU in 1e9 bytes: what makes it fit?")
    parser.add_argument("--variant", choices=tuple(SIZES), help="of Wan, where model.name_or_path is not there yet")
    parser.add_argument("--words", type=int, help="of a caption; default: as many as the text encoder reads")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    args = parser.parse_args(argv)
    with friendly():
        config = load_experiment_config(args.config, args.overrides)
        sizes = SIZES.get(args.variant)
        found = plan(config, sizes, args.words)
        if args.json:
            print(json.dumps(asdict(found) | {"total": found.total}))
        else:
            print(f"micro-batch of latents {latent_shape(config)}\n{found.describe()}")
        if args.gpu_gb:
            for words, rung in climb(config, args.gpu_gb, sizes):
                print(f"{rung.total / 1e9:8.1f} GB  {' '.join(words) or 'as configured'}")
            fits = rung.total < 0.95e9 * args.gpu_gb
            advice = f"fits with: {' '.join(words) or 'the config as it is'}" if fits else "does not fit: take fewer frames, or a smaller size"
            print(f"{args.gpu_gb:g} GB: {advice}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
