"""Open the sources that a configuration trains on: one or several, caches or JSONL files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmdit.config import ConfigError
from mmdit.data.batches.data_config import SourceConfig, check_together, shares_of
from mmdit.data.batches.kept_cache import opened
from mmdit.data.batches.latent_batches import (
    LatentBatches,
    MixedBatches,
    StepBatches,
    contents,
)
from mmdit.data.batches.mixture import MixedPlan
from mmdit.data.batches.on_the_fly import UnencodedItems
from mmdit.data.batches.stores import fits_in_memory
from mmdit.data.cache.latent_cache import LatentCache
from mmdit.data.cache.manifest import CacheManifest
from mmdit.experiment.build import build_plan
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.files import real_path
from mmdit.interfaces import Tokenizer
from mmdit.training import checkpoint
from mmdit.training.distributed import World

NOTHING = (
    "no data is named: give --train_cache_dir, a folder that cache-images or cache-latents wrote,"
    " or data.sources in the config (--train_jsonl trains without a cache)"
)


def with_given(
    config: ExperimentConfig, caches: Sequence[str], files: Sequence[str]
) -> ExperimentConfig:
    """Return `config` with the sources given on a command line: caches, and JSONL files to encode
    during training. A single cache needs no section: the config then stays as it is."""
    if not caches and not files:
        return config
    if config.data.sources:
        raise ConfigError(
            "data.sources",
            f"names {len(config.data.sources)} sources, and the command line"
            f" {len(caches) + len(files)}; give them in one of the two places",
        )
    if len(caches) == 1 and not files:
        return config
    paths = (*caches, *files)
    sources = tuple(map(SourceConfig, paths, _names(paths)))
    on_the_fly = config.data.on_the_fly or bool(files)
    try:
        return replace(config, data=replace(config.data, sources=sources, on_the_fly=on_the_fly))
    except ConfigError as error:
        raise ConfigError(f"data.{error.path}", error.message) from None


def _names(paths: Sequence[str]) -> list[str]:
    """Return names that tell sources apart: empty ones if the last parts of their paths differ,
    otherwise as many parts as needed. ValueError if a path is given twice."""
    all_parts = [real_path(path).parts for path in paths]
    for i, parts in enumerate(all_parts):
        if parts in all_parts[:i]:
            raise ValueError(
                f"{paths[i]} is given twice; to have it seen more often, name it in data.sources"
                " with weight or repeats"
            )
    names = [Path(path).name for path in paths]
    if len(set(names)) == len(names):
        return [""] * len(paths)
    count = 1
    while len(set(names)) < len(names):
        count += 1
        names = ["/".join(parts[-count:]) for parts in all_parts]
    return names


def with_known_names(config: ExperimentConfig, start: Path | None) -> ExperimentConfig:
    """Return the config with the source names and order of the run to be continued. A cache that
    was moved or packed still holds the same items, and the order of its items depends on its name,
    and on its place among the sources. `start`: the checkpoint."""
    notes = checkpoint.read_notes(start) if start else None
    rows = (notes or {}).get("data") or []
    known, labels = [row["source"] for row in rows], {one.label for one in config.data.sources}
    gone = {row["crc32"]: row["source"] for row in rows if row["source"] not in labels}
    sources = []
    for source in config.data.sources:
        if gone and not source.name and source.label not in known and Path(source.path).is_dir():
            name = gone.pop(contents(opened(Path(source.path), None))["crc32"], "")
            source = replace(source, name=name)
        sources.append(source)
    sources.sort(key=lambda one: known.index(one.label) if one.label in known else len(known))
    return replace(config, data=replace(config.data, sources=tuple(sources)))


def sources_of(config: ExperimentConfig, cache_dir: str | Path | None) -> tuple[SourceConfig, ...]:
    """Return the sources of a training. ValueError if there are none."""
    if config.data.sources:
        return config.data.sources
    if cache_dir is None:
        raise ValueError(NOTHING)
    return (SourceConfig(str(cache_dir)),)


def open_batches(
    config: ExperimentConfig,
    tokenizer: Tokenizer,
    sources: Sequence[SourceConfig],
    world: World,
) -> StepBatches:
    """Open the sources, which must agree with the configuration, and return the batches of this
    process. A single source must also have the sizes of the config."""
    wanted = CacheManifest.of(tokenizer, config.video, config.bucketing, config.preprocess)
    alone = len(sources) == 1
    caches = [
        _open(config, source, tokenizer, wanted if alone else None, world) for source in sources
    ]
    if not alone:
        for line in check_together(caches, wanted, config.model.patch):
            world.print(line)
    stored = sum(cache.nbytes for cache in caches if not isinstance(cache, UnencodedItems))
    in_memory = config.data.in_memory
    if in_memory == "auto":
        in_memory = fits_in_memory(stored)
    parts = [
        LatentBatches(
            cache,
            build_plan(config, cache, world.data_size, "" if alone else source.label),
            rank=world.data_rank,
            world=world.data_size,
            accum=config.train.grad_accum_steps,
            in_memory=in_memory,
            num_workers=config.num_workers,
            captions=config.captions,
            crops=config.model.crop,
            tile=None if config.video.tile is None else tokenizer.spec.grid(*config.video.tile),
            prefix=source.caption_prefix,
        )
        for source, cache in zip(sources, caches, strict=True)
    ]
    if alone:
        return parts[0]
    plans = [part.plan for part in parts]
    return MixedBatches(parts, MixedPlan(plans, shares_of(sources, plans), config.train.max_steps))


def _open(
    config: ExperimentConfig,
    source: SourceConfig,
    tokenizer: Tokenizer,
    wanted: CacheManifest | None,
    world: World,
) -> LatentCache:
    """Open a cache, or inspect the records of a file that will be encoded during training."""
    path = Path(source.path)
    if not path.is_file():
        return opened(path, wanted)
    if not config.data.on_the_fly:
        raise ConfigError(
            "data.on_the_fly",
            f"is false, and {path} is a file, not the folder of a cache; make a cache of it with"
            " cache-images or cache-latents, or set it to true (slow)",
        )
    items = UnencodedItems(
        path,
        tokenizer,
        config.video,
        config.bucketing,
        config.preprocess,
        device=world.device,
        num_workers=config.num_workers,
    )
    world.print(
        f"{path}: {len(items)} items are decoded and encoded anew for each batch"
        " (data.on_the_fly): slow, `data wait` of the log says how much; a cache is made once"
    )
    if items.other_rates:
        world.print(f"  {items.other_rates}")
    if items.skips:
        first = items.skips[0]
        world.print(
            f"  left out {len(items.skips)} records, for example {first.path or first.id}:"
            f" {first.reason}"
        )
    return items
