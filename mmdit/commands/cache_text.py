"""Encode every caption of a cache once, or take its embedding from the tars of a packed cache:
`mmdit cache-text`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from mmdit.config import ConfigError
from mmdit.data.batches.data_config import SourceConfig
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.packed import shards_of
from mmdit.data.cache.tar_shards import noted_text_encoder, stored_embeddings
from mmdit.data.dataset.buckets import target_sizes
from mmdit.data.dataset.captions import all_captions, fixed_captions, with_trigger
from mmdit.data.dataset.records import media_of, read_records
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.text_encoders import build_text_encoder
from mmdit.text_encoders.huggingface import HuggingFaceEncoder
from mmdit.training.distributed import choose_device


def asked_texts(config: ExperimentConfig, sources: Sequence[SourceConfig]) -> list[str]:
    """Return every text that training, its previews and post-training will encode. Negative prompts
    get no trigger word."""
    texts = ["", config.train.sample_negative_prompt]
    prompts: list[str] = []
    if sources:
        prompts += config.train.sample_prompts
    for source in sources:
        texts += [
            source.caption_prefix + text
            for caption, facts in _captions(source)
            for written in all_captions(caption, facts)
            for text in fixed_captions(written, config.captions)
        ]
    if config.posttrain:
        settings, video = config.posttrain, config.video
        size = target_sizes(video, config.bucketing, config.tokenizer.latent_f)[0]
        trained, evaluated = settings.load_prompts(config.seed, video.num_frames > 1, *size)
        prompts += [text for some in (trained, *evaluated.values()) for text in some.captions]
        if settings.algorithm == "srpo" and settings.srpo.latents:
            prompts += open_cache(settings.srpo.latents).captions
    return texts + [with_trigger(text, config.captions) for text in prompts]


def _captions(source: SourceConfig) -> Iterator[tuple[str, dict]]:
    """Yield the caption and the facts of every item of a cache or a JSONL file."""
    if Path(source.path).is_file():
        for record in read_records(source.path, media_of(source.path), "frames_dir"):
            yield record.caption, record.facts
        return
    cache = open_cache(source.path)
    yield from zip(cache.captions, cache.facts, strict=True)


def take_embeddings(folder: Path, encoder: HuggingFaceEncoder) -> int:
    """Store the embeddings that the tars of a packed cache hold, if this encoder made them; return
    how many were stored."""
    stored = encoder.stored()
    noted = noted_text_encoder(folder) if folder.is_dir() else None
    if stored is None or noted is None or noted["key"] != stored.key:
        return 0
    if noted.get("settings", stored.settings) != stored.settings:
        return 0
    count = 0
    for path in shards_of(folder):
        for caption, row in stored_embeddings(path, noted["dtype"]):
            stored.save({encoder.clean(caption): row})
            count += 1
    return count


def encode_captions(
    config: ExperimentConfig, sources: Sequence[SourceConfig], device: str, batch_size: int = 64
) -> None:
    """Encode every text that will be needed and is not in `text_encoder.cache_dir` yet."""
    if not config.text_encoder.cache_dir:
        raise ConfigError(
            "text_encoder.cache_dir",
            "is empty or no key of this encoder; name a folder (type umt5 has it)",
        )
    captions = list(dict.fromkeys(asked_texts(config, sources)))
    encoder = build_text_encoder(config.text_encoder).to(choose_device(device))
    for source in sources:
        taken = take_embeddings(Path(source.path), encoder)
        if taken:
            print(f"{taken} embeddings of this encoder were taken from the tars in {source.path}")
    for start in tqdm(range(0, len(captions), batch_size), desc="encoding captions"):
        encoder(captions[start : start + batch_size])
        if encoder.unsaved:
            raise encoder.unsaved
    print(f"{len(captions)} captions are in {config.text_encoder.cache_dir}")
    if sources and (config.captions.shuffle or config.captions.token_dropout):
        print(
            "captions.shuffle and captions.token_dropout make other captions while training: these"
            " are encoded then, for which the text encoder is loaded"
        )
