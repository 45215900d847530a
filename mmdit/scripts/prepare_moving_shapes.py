"""Make the moving-shapes data set: pictures (or frame folders) with captions, without a download.

    mmdit prepare-moving-shapes --out_dir data/moving_shapes --count 4096 \\
        --width 64 --height 64
    mmdit prepare-moving-shapes --out_dir data/moving_shapes_video \\
        --count 512 --frames 16

Run again with the same settings, it continues where it was interrupted, or adds samples up to a
larger --count.
"""

from __future__ import annotations

from mmdit.data.moving_shapes.facts import SPLITS, VARIANTS
from mmdit.data.moving_shapes.prepare import Recipe, prepare_samples
from mmdit.scripts import command_parser, friendly, run
from mmdit.scripts.parsers import at_least
from mmdit.training.requests import MOST_PIXELS


def main(arguments: list[str] | None = None) -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--out_dir", default="data/moving_shapes")
    parser.add_argument("--count", type=at_least(1), default=4096, help="samples (default: 4096)")
    parser.add_argument(
        "--width",
        type=at_least(1, MOST_PIXELS),
        default=64,
        help="pixels, a multiple of 16 (default: 64)",
    )
    parser.add_argument("--height", type=at_least(1, MOST_PIXELS), default=64)
    parser.add_argument(
        "--frames",
        type=at_least(1, MOST_PIXELS),
        default=1,
        help="1: images (default); more: a folder of frames for each clip",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--split",
        choices=list(SPLITS),
        default="train",
        help="held_out: combinations that training never shows",
    )
    parser.add_argument(
        "--variant", choices=VARIANTS, default="one", help="many: one to four objects and a task"
    )
    parser.add_argument(
        "--complete_captions",
        action="store_true",
        help="captions for training state all facts; without it 15 of 100 facts are left out",
    )
    parser.add_argument(
        "--workers",
        type=at_least(0, 1024),
        default=0,
        help="processes (default: as many as pay off)",
    )
    options = parser.parse_intermixed_args(arguments)
    with friendly():
        if options.split != "train":
            reason = f"captions of --split {options.split} state all facts anyway: leave it out"
            parser.refuse_idle(options, ["complete_captions"], reason)
        recipe = Recipe(
            options.width,
            options.height,
            options.frames,
            options.seed,
            options.split,
            options.variant,
            options.complete_captions,
        )
        path = prepare_samples(options.out_dir, recipe, options.count, options.workers)
        print(f"{options.count} samples; captions and facts in {path}")


if __name__ == "__main__":
    run(main)
