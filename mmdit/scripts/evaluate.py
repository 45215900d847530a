"""Measure how good a model is: prompt accuracy on moving shapes, distances from real pictures or
clips, and the CLIP score.

    mmdit evaluate --checkpoint runs/shapes [--count 256] [--out report.json]
    mmdit evaluate --checkpoint runs/shapes_many --variant many [--count 128] [--sheet sheet.png]
    mmdit evaluate --checkpoint runs/shapes --at_steps 400 800 1200 --out report.json
    mmdit evaluate --checkpoint runs/mine --prompts prompts.yaml --count 4096 \\
        --features pt_inception-2015-12-05-6726825d.pth --real data/train.jsonl

Without --prompts the samples are of moving shapes, and what was asked for is checked in the pixels
by arithmetic: each attribute on seen and held-out prompts, with the tokenizer's ceiling and the
shuffled-caption control beside it. --variant many asks for one to four objects in GenEval's six
tasks: each has its score, and what the oracle accepts of true pictures that miss one thing. With
--features the samples are compared with real items in the features of a local encoder, with
--clip_score with their prompts (see docs/metrics.md). --at_steps scores the checkpoints of several
steps of a run, one after another: how fast it learnt.
"""

import argparse
from pathlib import Path

from mmdit.commands.evaluate import Shown, evaluate
from mmdit.data.dataset.media_sets import Shape
from mmdit.diagnostics.results_file import write_report
from mmdit.diagnostics.sample_scores import build_scores
from mmdit.diagnostics.task_accuracy import SCORES
from mmdit.experiment.load import load_pipeline
from mmdit.scripts import command_parser, friendly, run
from mmdit.scripts.arguments import add_sampling_arguments, sample_settings, sample_size
from mmdit.scripts.metric_arguments import add_metric_arguments, metric_values
from mmdit.scripts.parsers import at_least
from mmdit.training.checkpoint import at_steps
from mmdit.training.expert_choice import describe_pair
from mmdit.training.media import save_sheet
from mmdit.training.memory.host import keep_freed_memory
from mmdit.training.memory.sampling_offload import offload_pipeline
from mmdit.training.samples import check_files


def score(path: str | Path, args: argparse.Namespace) -> tuple[dict, Shown]:
    """Return the report of a checkpoint, and samples to show."""
    pipeline, config = load_pipeline(
        path,
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
    keep_freed_memory(pipeline.device)
    shape = Shape((width, height), frames, config.video.frame_stride, config.video.fps)
    scores = build_scores(
        shape, pipeline.device, **metric_values(args), tokenizer=pipeline.tokenizer
    )
    asked = {name: getattr(args, name) for name in ("variant", "prompts", "count", "batch_size")}
    report, drawn = evaluate(pipeline, shape, settings, scores, **asked)
    return report | {"checkpoint": str(path), "raw_weights": args.raw_weights}, drawn


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    add_sampling_arguments(parser)
    parser.add_argument(
        "--count",
        type=int,
        help="prompts of each list (default and most: 256, of --variant many 128); with --prompts"
        " samples (default 2048)",
    )
    parser.add_argument(
        "--variant", choices=SCORES, default="one", help="many: one to four objects, six tasks"
    )
    add_metric_arguments(parser)
    parser.add_argument(
        "--prompts",
        type=Path,
        help=(
            "a file of prompts (as posttrain.prompts) in place of moving shapes; with --features"
            " or --clip_score"
        ),
    )
    parser.add_argument(
        "--at_steps",
        type=at_least(1),
        nargs="+",
        metavar="STEP",
        help="score these checkpoints of a run, not the newest; the report is of the last of them,"
        " and has the steps and scores of all as at_steps",
    )
    parser.add_argument("--out", help="write the report as JSON")
    parser.add_argument(
        "--sheet",
        help="write the first 32 samples as a captioned PNG; of --variant many some of each task",
    )
    args = parser.parse_intermixed_args(argv)
    with friendly():
        if args.prompts and not (args.features or args.clip_score):
            raise ValueError(
                "--prompts needs --features or --clip_score: only moving shapes are scored without"
            )
        if args.prompts and args.variant != "one":
            raise ValueError(f"--variant {args.variant} is of moving shapes; leave --prompts out")
        check_files(out=args.out, sheet=args.sheet, copies=args.copies, nearest=args.nearest)
        paths = at_steps(args.checkpoint, args.at_steps) if args.at_steps else [args.checkpoint]
        scored = [score(path, args) for path in paths]
        report, drawn = scored[-1]
        if args.at_steps:
            report["at_steps"] = [dict(other) for other, _ in scored]
        if args.out:
            write_report(args.out, report)
        if args.sheet:
            save_sheet(drawn, 8 if len(drawn[0][0]) == 1 else 2, Path(args.sheet))
    return 0


if __name__ == "__main__":
    run(main)
