"""Encode the captions of a latent cache once, so that training with a large frozen text encoder
need not load it.

    mmdit cache-text --config configs/wan/t2v_1_3b_lora.yaml --cache_dir data/cache/mine

Keep `text_encoder.cache_dir` in the training config. Captions that augmentation changes are encoded
when they come up.
"""

from tqdm import tqdm

from mmdit.config import ConfigError
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.dataset.buckets import target_sizes
from mmdit.data.dataset.captions import all_captions, with_trigger
from mmdit.experiment.experiment_config import ExperimentConfig, load_experiment_config
from mmdit.scripts import config_parser, friendly, run
from mmdit.text_encoders import build_text_encoder
from mmdit.training.distributed import choose_device


def asked_texts(config: ExperimentConfig, cache_dir: str | None) -> list[str]:
    """Return every text that training, its previews and post-training ask the encoder for. What
    guidance leads away from has no trigger word, nor have the prompts of post-training."""
    texts = ["", config.train.sample_negative_prompt]
    if cache_dir:
        cache = open_cache(cache_dir)
        every = [
            text
            for caption, facts in zip(cache.captions, cache.facts)
            for text in all_captions(caption, facts)
        ]
        texts += [
            with_trigger(text, config.captions) for text in (*config.train.sample_prompts, *every)
        ]
    if config.posttrain:
        settings, video = config.posttrain, config.video
        size = target_sizes(video, config.bucketing, config.tokenizer.latent_f)[0]
        prompts, evaluated = settings.load_prompts(config.seed, video.num_frames > 1, *size)
        texts += [text for some in (prompts, *evaluated.values()) for text in some.captions]
    return texts


def main(argv: list[str] | None = None) -> int:
    parser = config_parser(__doc__)
    parser.add_argument("--cache_dir", help="the latent cache; a config with posttrain: needs none")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_intermixed_args(argv)
    with friendly():
        config = load_experiment_config(args.config, args.overrides)
        if not config.text_encoder.cache_dir:
            raise ConfigError(
                "text_encoder.cache_dir",
                "is empty or no key of this encoder; name a folder (type umt5 has it)",
            )
        if not args.cache_dir and config.posttrain is None:
            raise ValueError(
                "--cache_dir is not given, and the config has no posttrain: section with prompts;"
                " give the latent cache"
            )
        captions = list(dict.fromkeys(asked_texts(config, args.cache_dir)))
        encoder = build_text_encoder(config.text_encoder).to(choose_device(args.device))
        for start in tqdm(range(0, len(captions), args.batch_size), desc="encoding captions"):
            encoder(captions[start : start + args.batch_size])
        print(f"{len(captions)} captions are in {config.text_encoder.cache_dir}")
    return 0


if __name__ == "__main__":
    run(main)
