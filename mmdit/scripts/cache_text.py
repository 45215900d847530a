"""Encode the captions of a latent cache once, so that training with a large frozen text encoder
need not load it.

    mmdit cache-text --config configs/wan/t2v_1_3b_lora.yaml --cache_dir data/cache/mine

Keep `text_encoder.cache_dir` in the training config. Captions that augmentation changes are encoded
when they come up.
"""

from mmdit.commands.cache_text import encode_captions
from mmdit.data.batches.data_config import SourceConfig
from mmdit.experiment.data_sources import with_given
from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.scripts import config_parser, friendly, run
from mmdit.scripts.parsers import at_least


def main(argv: list[str] | None = None) -> int:
    parser = config_parser(__doc__)
    parser.add_argument("--cache_dir", help="the latent cache; a config with posttrain: needs none")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch_size", type=at_least(1), default=64)
    args = parser.parse_intermixed_args(argv)
    with friendly():
        config = load_experiment_config(args.config, args.overrides)
        given = [args.cache_dir] if args.cache_dir else []
        sources = with_given(config, given, []).data.sources or tuple(map(SourceConfig, given))
        if not sources and config.posttrain is None:
            raise ValueError(
                "--cache_dir is not given, and the config has no posttrain: section with prompts;"
                " give the latent cache"
            )
        encode_captions(config, sources, args.device, args.batch_size)
    return 0


if __name__ == "__main__":
    run(main)
