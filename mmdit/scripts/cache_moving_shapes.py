"""Write generated data straight into a latent cache: any number of samples, in seconds on a GPU.

    mmdit cache-moving-shapes --config configs/moving_shapes_t2v_128.yaml \\
        --count 50000 --out_dir data/cache/shapes

It does the same as prepare-moving-shapes followed by cache-images (or cache-latents), without the
files in between. With bucketing, each sample has one of the listed sizes; with shifted crops, it is
drawn on a slightly longer canvas, and each crop of that is an item.
"""

from collections import Counter
from pathlib import Path

from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.plain import item_files
from mmdit.data.moving_shapes.canvases import Canvases
from mmdit.data.moving_shapes.latents import cache_moving_shapes
from mmdit.data.moving_shapes.prepare import Recipe
from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.scripts import config_parser, friendly, run
from mmdit.scripts.listing import advised
from mmdit.scripts.parsers import at_least
from mmdit.tokenizers import build_tokenizer
from mmdit.training.distributed import choose_device


def main(argv: list[str] | None = None) -> int:
    parser = config_parser(__doc__)
    parser.add_argument(
        "--out_dir", required=True, help="cache folder; run again to go on or to add samples"
    )
    parser.add_argument("--count", type=at_least(1), default=10_000)
    parser.add_argument(
        "--frames", type=at_least(1), help="frames of each clip [what one training sample covers]"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--variant", default="one", help="one, or many: one to four objects and a task"
    )
    parser.add_argument(
        "--complete_captions",
        action="store_true",
        help="captions state all facts; without it 15 of 100 facts are left out",
    )
    parser.add_argument("--prune", action="store_true", help="remove items beyond --count")
    parser.add_argument("--device", default="auto")
    args = parser.parse_intermixed_args(argv)
    with friendly():
        config = load_experiment_config(args.config, args.overrides)
        device = choose_device(args.device)
        tokenizer = build_tokenizer(config.tokenizer, device)
        manifest = CacheManifest.of(
            tokenizer, config.video, config.bucketing, config.preprocess, source="moving shapes"
        )
        frames = args.frames or config.video.span
        if tokenizer.spec.temporal > 1:  # it encodes each sample as it will be used
            frames = config.video.num_frames
            if args.frames not in (None, frames):
                reason = f"this tokenizer compresses time: clips have video.num_frames, {frames}"
                raise ValueError(f"--frames is {args.frames}; {reason}")
        recipe = Recipe(
            config.video.width,
            config.video.height,
            frames,
            args.seed,
            variant=args.variant,
            complete_captions=args.complete_captions,
        )
        canvases = Canvases.of(manifest, config.preprocess, recipe)
        made = cache_moving_shapes(
            tokenizer,
            args.out_dir,
            manifest,
            recipe,
            args.count,
            device,
            args.prune,
            canvases,
        )
        files = item_files(Path(args.out_dir)).values()
        beyond = len(files) - sum(len(canvases.item_ids(i)) for i in range(args.count))
        if beyond > 0:
            print(
                f"{beyond} items of the cache are not among these {args.count} samples: they are"
                " trained, too; --prune removes them"
            )
        if manifest.bucketed:
            counts = Counter(file.partition("/")[0] for file in files)
            for size in sorted(manifest.sizes):
                name = "{}x{}".format(*size)
                if counts[name]:
                    print(f"  {name}: {counts[name]} items")
        following = ["train", "--config", args.config, "--train_cache_dir", args.out_dir]
        print(
            f"{made} samples made, {args.count - made} were there;"
            f" next: {advised(*following, *args.overrides)}"
        )
    return 0


if __name__ == "__main__":
    run(main)
