"""Train text-to-image (one frame) or text-to-video from a latent cache.

    mmdit train --config my.yaml --train_cache_dir data/cache/mine [--resume] [train.lr=2e-4 …]
    torchrun --nproc_per_node=4 -m mmdit.scripts.train_t2v --config my.yaml \\
        --train_cache_dir data/cache/mine [--resume]
"""

from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.experiment.run import run_training
from mmdit.scripts import cache_text, friendly, run, training_parser


def main(argv: list[str] | None = None) -> int:
    parser = training_parser(__doc__, "YAML file, see configs/")
    parser.add_argument(
        "--train_cache_dir",
        required=True,
        help="folder written by cache_vtp_images or cache_vtp_latents",
    )
    parser.add_argument(
        "--cache_only",
        action="store_true",
        help="encode the captions, as cache_text does, and train nothing",
    )
    args = parser.parse_intermixed_args(argv)
    if args.cache_only:
        where = ["--cache_dir", args.train_cache_dir, "--device", args.device]
        return cache_text.main(["--config", args.config, *where, *args.overrides])
    with friendly():
        config = load_experiment_config(args.config, args.overrides)
        run_training(config, args.train_cache_dir, args.device, args.resume)
    return 0


if __name__ == "__main__":
    run(main)
