"""Prompt accuracy of a model trained on moving shapes: what was asked for, checked in the pixels by
arithmetic.

    python -m mmdit.scripts.evaluate --checkpoint runs/shapes [--count 256] [--out report.json]

Prints each attribute on seen and held-out prompts, with the tokenizer's ceiling and the
shuffled-caption control beside it.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from mmdit.diagnostics.prompt_accuracy import format_report, prompt_accuracy_report
from mmdit.experiment.load import load_pipeline
from mmdit.files import write_atomically
from mmdit.scripts import friendly, run
from mmdit.scripts.arguments import add_sampling_arguments, sample_settings, sample_size
from mmdit.training.expert_choice import describe_pair
from mmdit.training.media import contact_sheet, save_image
from mmdit.training.memory.sampling_offload import offload_pipeline
from mmdit.training.samples import check_writable


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sampling_arguments(parser)
    parser.add_argument("--count", type=int, default=256, help="prompts of each list (at most 256)")
    parser.add_argument("--out", help="write the report as JSON")
    parser.add_argument("--sheet", help="write the first 32 samples as a captioned PNG")
    args = parser.parse_intermixed_args(argv)
    with friendly():
        for path in filter(None, (args.out, args.sheet)):
            check_writable(path, folder=False)
        pipeline, config = load_pipeline(
            args.checkpoint,
            args.device,
            use_ema=not args.raw_weights,
            overrides=args.overrides,
            offload=args.offload,
        )
        if pair := describe_pair(pipeline, config):
            print(pair)
        settings = sample_settings(args, config)
        width, height, frames, _ = sample_size(args, config)
        pipeline.check(width, height, frames, settings)
        offload_pipeline(pipeline, args.offload)
        drawn = []

        def sample(captions: list[str], first: int):
            pixels = pipeline(captions, width, height, frames, settings, first, args.batch_size)
            drawn.extend(list(zip(pixels, captions))[: 32 - len(drawn)])
            return pixels

        start = time.perf_counter()
        report = prompt_accuracy_report(
            sample,
            pipeline.tokenizer,
            width=width,
            height=height,
            frames=frames,
            count=args.count,
            device=pipeline.device,
        )
        report |= {
            "settings": asdict(settings),
            "checkpoint": str(args.checkpoint),
            "seconds": time.perf_counter() - start,
        }
        print(format_report(report))
        if args.out:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(args.out, json.dumps(report, indent=1))
        if args.sheet:
            import torch

            pixels, captions = zip(*drawn)
            save_image(
                contact_sheet(torch.stack(pixels), list(captions), 8 if frames == 1 else 2),
                Path(args.sheet),
            )
    return 0


if __name__ == "__main__":
    run(main)
