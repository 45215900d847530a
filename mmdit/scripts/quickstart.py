"""See the whole path work on this machine, with no argument and no download: samples first, then
data → cache → train → score.

    mmdit quickstart

Writes runs/quickstart/{samples/*.png, video.mp4, report.json}. Two CPU cores take about five
minutes; a GPU trains further.
"""

import os

from mmdit.scripts import command_parser, friendly, run

NEXT = """
Next:
  mmdit sample --checkpoint {model} \\
      --prompts "a large red star on a navy background" --out samples
  mmdit evaluate --checkpoint {shipped} --frames 16
  your own pictures: README.md, "Your own images"
"""


def line(name: str, row: dict) -> str:
    attributes = "  ".join(
        f"{key} {row[key]:.2f}"
        for key in ("color", "shape", "size", "background", "motion")
        if key in row
    )
    low, high = row["prompt_accuracy_interval"]
    return (
        f"{name:22} prompt accuracy {row['prompt_accuracy']:.2f} [{low:.2f}, {high:.2f}] "
        f" {attributes}  held out {row['held_out_accuracy']:.2f}  ceiling"
        f" {row['tokenizer_ceiling']:.2f}  control {row['control']:.2f}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_intermixed_args(argv)
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # read when torch starts; spinning threads slow down a shared machine
    with friendly():
        from mmdit.commands.quickstart import run

        report = run(args.device)
        shipped, scratch = report["shipped"], report["from_scratch"]
        print(
            f"\nDone in {report['seconds']:.0f} s. Look at runs/quickstart/samples/grid.png and"
            " runs/quickstart/video.mp4."
        )
        print(line("shipped, pictures", shipped))
        print(line("shipped, clips", shipped["video"]))
        print(line("from scratch", scratch))
        print(NEXT.format(model=scratch["checkpoint"], shipped=shipped["checkpoint"]))
    return 0


if __name__ == "__main__":
    run(main)
