"""Draw the curves of one or several runs: losses, validation, gradient, speed, memory.

mmdit plot-run --runs runs/a runs/b --out curves.png
"""

from pathlib import Path

from mmdit.diagnostics.curves import draw_curves, read_metrics
from mmdit.scripts import command_parser, friendly, run
from mmdit.training.media import save_image
from mmdit.training.samples import check_writable


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--runs", nargs="+", required=True, help="run folders or metrics.jsonl files, a colour each"
    )
    parser.add_argument("--out", default="curves.png", help="PNG to write [curves.png]")
    args = parser.parse_intermixed_args(argv)
    with friendly():
        out = Path(args.out)
        if out.suffix.lower() != ".png":
            raise ValueError(f"--out is {args.out!r}, must end in .png")
        check_writable(out, folder=False)
        save_image(draw_curves({run: read_metrics(Path(run)) for run in args.runs}), out)
        print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    run(main)
