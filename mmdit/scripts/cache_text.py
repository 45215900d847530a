"""Encode the captions of a latent cache once, so that training with a large frozen text encoder
need not load it.

    mmdit cache-text --config configs/wan/t2v_1_3b_lora.yaml --cache_dir data/cache/mine

Keep `text_encoder.cache_dir` in the training config. Captions that augmentation changes are encoded
when they come up.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from mmdit.config import ConfigError
from mmdit.data.batches.data_config import SourceConfig
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.dataset.buckets import target_sizes
from mmdit.data.dataset.captions import all_captions, with_trigger
from mmdit.data.dataset.records import media_of, read_records
from mmdit.experiment.experiment_config import ExperimentConfig, load_experiment_config
from mmdit.scripts import config_parser, friendly, run
from mmdit.text_encoders import build_text_encoder
from mmdit.training.distributed import choose_device


def asked_texts(config: ExperimentConfig, sources: Sequence[SourceConfig]) -> list[str]:
    """Return every text that training, its previews and post-training ask the encoder for. What
    guidance leads away from has no trigger word, nor have the prompts of post-training."""
    texts = ["", config.train.sample_negative_prompt]
    if sources:
        texts += [with_trigger(text, config.captions) for text in config.train.sample_prompts]
    for source in sources:
        texts += [
            source.caption_prefix + with_trigger(text, config.captions)
            for caption, facts in _captions(source)
            for text in all_captions(caption, facts)
        ]
    if config.posttrain:
        settings, video = config.posttrain, config.video
        size = target_sizes(video, config.bucketing, config.tokenizer.latent_f)[0]
        prompts, evaluated = settings.load_prompts(config.seed, video.num_frames > 1, *size)
        texts += [text for some in (prompts, *evaluated.values()) for text in some.captions]
    return texts


def _captions(source: SourceConfig) -> Iterator[tuple[str, dict]]:
    """Yield caption and facts of every item of a cache or a JSONL file."""
    if Path(source.path).is_file():
        for record in read_records(source.path, media_of(source.path), "frames_dir"):
            yield record.caption, record.facts
        return
    cache = open_cache(source.path)
    yield from zip(cache.captions, cache.facts, strict=True)


def encode_captions(
    config: ExperimentConfig, sources: Sequence[SourceConfig], device: str, batch_size: int = 64
) -> None:
    """Encode every text that is asked for and not in `text_encoder.cache_dir` yet."""
    if not config.text_encoder.cache_dir:
        raise ConfigError(
            "text_encoder.cache_dir",
            "is empty or no key of this encoder; name a folder (type umt5 has it)",
        )
    captions = list(dict.fromkeys(asked_texts(config, sources)))
    encoder = build_text_encoder(config.text_encoder).to(choose_device(device))
    for start in tqdm(range(0, len(captions), batch_size), desc="encoding captions"):
        encoder(captions[start : start + batch_size])
    print(f"{len(captions)} captions are in {config.text_encoder.cache_dir}")


def main(argv: list[str] | None = None) -> int:
    parser = config_parser(__doc__)
    parser.add_argument("--cache_dir", help="the latent cache; a config with posttrain: needs none")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_intermixed_args(argv)
    with friendly():
        config = load_experiment_config(args.config, args.overrides)
        sources = config.data.sources
        if args.cache_dir:
            sources = (SourceConfig(args.cache_dir),)
        if not sources and config.posttrain is None:
            raise ValueError(
                "--cache_dir is not given, and the config has no posttrain: section with prompts;"
                " give the latent cache"
            )
        encode_captions(config, sources, args.device, args.batch_size)
    return 0


if __name__ == "__main__":
    run(main)
