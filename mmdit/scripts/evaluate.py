"""Measure how good a model is: prompt accuracy on moving shapes, distances from real pictures or
clips, and the CLIP score.

    mmdit evaluate --checkpoint runs/shapes [--count 256] [--out report.json]
    mmdit evaluate --checkpoint runs/shapes_many --variant many [--count 128] [--sheet sheet.png]
    mmdit evaluate --checkpoint runs/shapes --at_steps 400 800 1200 --out report.json
    mmdit evaluate --checkpoint runs/mine --prompts prompts.yaml --count 4096 \\
        --features pt_inception-2015-12-05-6726825d.pth --real data/train.jsonl

Without --prompts, the samples show moving shapes, and arithmetic on the pixels checks whether they
show what was asked for: each attribute on seen and held-out prompts, with the tokenizer's ceiling
and the shuffled-caption control beside it. --variant many asks for one to four objects in GenEval's
six tasks; each task has its score, and the share of true pictures missing one thing that the oracle
accepts. --features compares the samples with real items in the features of a local encoder,
--clip_score with their prompts (see docs/metrics.md). --at_steps scores the checkpoints of several
steps of a run, one after another, to show how fast it learnt.
"""

import argparse
from functools import partial
from pathlib import Path

from mmdit.commands.evaluate import Scorer
from mmdit.diagnostics.results_file import write_report
from mmdit.diagnostics.task_accuracy import SCORES
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.experiment.load import Loader
from mmdit.scripts import command_parser, friendly, run
from mmdit.scripts.arguments import (
    add_sampling_arguments,
    sample_settings,
    sample_size,
)
from mmdit.scripts.idle import refuse_idle_overrides, refuse_without_guidance
from mmdit.scripts.metric_arguments import add_metric_arguments, metric_values
from mmdit.scripts.parsers import at_least
from mmdit.training.checkpoint import at_steps
from mmdit.training.media import save_sheet
from mmdit.training.pipeline import SampleSettings
from mmdit.training.samples import check_files, check_outside


def checked_settings(args: argparse.Namespace, config: ExperimentConfig) -> SampleSettings:
    """Return the settings with which samples are drawn. ValueError if an option has no effect on
    them."""
    settings = sample_settings(args, config)
    refuse_without_guidance(args, [settings])
    return settings


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
        refuse_idle_overrides(args.overrides)
        if args.prompts and not (args.features or args.clip_score):
            raise ValueError(
                "--prompts needs --features or --clip_score: only moving shapes are scored without"
            )
        if args.prompts and args.variant != "one":
            raise ValueError(f"--variant {args.variant} is of moving shapes; leave --prompts out")
        sheets = {"sheet": args.sheet, "copies": args.copies, "nearest": args.nearest}
        check_files(out=args.out, **sheets)
        check_outside(sheets, {"real": args.real, "held_out": args.held_out})
        paths = at_steps(args.checkpoint, args.at_steps) if args.at_steps else [args.checkpoint]
        loader = Loader(args.device, not args.raw_weights, args.overrides, args.offload)
        asked = {name: getattr(args, name) for name in ("variant", "prompts", "count")}
        asked |= {"batch_size": args.batch_size, "metrics": metric_values(args)}
        of_config = partial(checked_settings, args), partial(sample_size, args)
        scorer = Scorer(loader, *of_config, **asked)
        scored = []
        for path in paths:
            if args.at_steps:
                print(f"{path}:")
            scored.append(scorer.score(path))
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
