"""Compare samples with real pictures or clips, from files alone, whatever drew the samples.

    mmdit compare-samples --samples samples/ --real data/pictures --features pt_inception.pth
    mmdit compare-samples --samples clips/ --real train.jsonl --held_out val.jsonl \\
        --features tokenizer --frames 16 --width 256 --height 256 --copies nearest.png
    mmdit compare-samples --samples samples/ --clip_score clip-vit-base-patch32/

A source is a folder, or a JSONL file of metadata. Nothing is downloaded; docs/metrics.md says which
encoders are read and what each number depends on.
"""

from mmdit.data.dataset.media_sets import Shape
from mmdit.diagnostics.results_file import machine, write_report
from mmdit.diagnostics.sample_scores import build_scores, score_files
from mmdit.scripts import command_parser, friendly, run
from mmdit.scripts.arguments import number
from mmdit.scripts.metric_arguments import add_metric_arguments, metric_values
from mmdit.training.distributed import choose_device
from mmdit.training.samples import check_files, check_outside


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--samples", required=True, help="a folder or a JSONL file")
    add_metric_arguments(parser)
    parser.add_argument("--width", type=int, help="cut all items to this size [as they are]")
    parser.add_argument("--height", type=int)
    parser.add_argument("--frames", type=int, default=1, help="of a clip, from its middle [1]")
    parser.add_argument("--stride", type=int, default=1, help="between frames of real clips [1]")
    parser.add_argument("--fps", type=number, help="of real video files [as stored]")
    parser.add_argument("--seed", type=int, default=0, help="chooses subsets [0]")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="write the report as JSON")
    args = parser.parse_intermixed_args(argv)
    with friendly():
        sheets = {"copies": args.copies, "nearest": args.nearest}
        check_files(out=args.out, **sheets)
        sources = {"samples": args.samples, "real": args.real, "held_out": args.held_out}
        check_outside(sheets, sources)
        if not (args.features or args.clip_score):
            raise ValueError("nothing to measure; give --features, --clip_score or both")
        if not args.features:
            reason = "nothing is compared with real items: give --features, or leave it out"
            parser.refuse_idle(args, ["stride", "fps", "seed"], reason)
        if (args.width is None) != (args.height is None):
            raise ValueError("--width and --height are given together, or none of them")
        size = None if args.width is None else (args.width, args.height)
        shape = Shape(size, args.frames, args.stride, args.fps)
        device = choose_device(args.device)
        scores = build_scores(shape, device, **metric_values(args), seed=args.seed)
        score_files(scores, args.samples, shape, args.num_workers)
        report = {"sample_source": args.samples, "machine": machine(device)}
        scores.finish(report)
        if args.out:
            write_report(args.out, report)
    return 0


if __name__ == "__main__":
    run(main)
