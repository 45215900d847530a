"""Train text-to-image (one frame) or text-to-video from a latent cache.

    mmdit train --config my.yaml --train_cache_dir data/cache/mine [--resume] [train.lr=2e-4 …]
    torchrun --nproc_per_node=4 -m mmdit.scripts.train_t2v --config my.yaml \\
        --train_cache_dir data/cache/mine [--resume]

Several caches: --train_cache_dir again for each, or `data.sources` in the config. Without a cache:
--train_jsonl my_images.jsonl, which decodes and encodes while training.
"""

from mmdit.commands.cache_text import encode_captions
from mmdit.experiment.data_sources import sources_of, with_given
from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.experiment.run import run_training
from mmdit.scripts import friendly, run, training_parser
from mmdit.terminal import typed


def main(argv: list[str] | None = None) -> int:
    parser = training_parser(__doc__, "YAML file, see configs/")
    parser.add_argument(
        "--train_cache_dir",
        action="append",
        default=[],
        help=(
            "folder written by cache_vtp_images or cache_vtp_latents; several times: all of them,"
            " every item equally often (data.sources in the config gives weights)"
        ),
    )
    parser.add_argument(
        "--train_jsonl",
        action="append",
        default=[],
        metavar="FILE",
        help="pictures or clips, decoded and encoded while training: for trying things, slow",
    )
    parser.add_argument(
        "--cache_only",
        action="store_true",
        help="encode the captions, as cache_text does, and train nothing",
    )
    args = parser.parse_intermixed_args(argv)
    with friendly():
        if args.cache_only:
            reason = "--cache_only trains nothing: leave one of the two out"
            parser.refuse_idle(args, ["resume"], reason)
        config = load_experiment_config(args.config, args.overrides)
        config = with_given(config, args.train_cache_dir, args.train_jsonl)
        cache = next(iter(args.train_cache_dir), None)
        if args.cache_only:
            encode_captions(config, sources_of(config, cache), args.device)
        else:
            run_training(config, cache, args.device, args.resume, typed("train", argv))
    return 0


if __name__ == "__main__":
    run(main)
