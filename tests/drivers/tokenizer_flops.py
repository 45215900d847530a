"""Count the operations of a step of tokenizer pre-training, forward and backward.

    python -m tests.drivers.tokenizer_flops VTP/configs/vtp_tiny_f16d64_stage1.yaml [KEY=VALUE ...]

Prints one JSON object: for each size of `images.sizes`, and for a step of the run (their mean by
weight), 10¹² operations of matrix products and attention. The counted step has a sixteenth of the
pictures and of the pairs of captions, for it runs on a CPU, and counts sixteen times: all that a
step computes grows with its pictures.
"""

import argparse
import json

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmdit.config import load
from mmdit.vtp_training.pretrain_config import PretrainConfig
from mmdit.vtp_training.pretrain_trainer import TokenizerTrainer

PART = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args()
    whole = load(PretrainConfig, args.config, args.overrides)
    words = [f"images.patches_per_step={whole.images.patches_per_step // PART}"]
    words += ["images.shape_pool=64", "images.texture_pool=64"]
    if whole.contrast.weight:
        words += [f"contrast.pairs={whole.contrast.pairs // PART}"]
    config = load(PretrainConfig, args.config, [*args.overrides, *words])
    trainer = TokenizerTrainer(config, torch.device("cpu"))
    counted: dict[str, float] = {}
    total = 0.0
    for width, height, weight in config.images.sizes:
        batch = trainer.source.batch(0, (width, height))
        with FlopCounterMode(display=False) as counter:
            trainer.losses(batch, adversarial=False).total.backward()
        counted[f"{width}x{height}"] = counter.get_total_flops() * PART / 1e12
        total += weight * counted[f"{width}x{height}"]
    mean = total / sum(weight for *_, weight in config.images.sizes)
    rounded = {size: round(value, 3) for size, value in counted.items()}
    print(json.dumps({"tflop": rounded, "tflop_a_step": round(mean, 3)}))


if __name__ == "__main__":
    main()
