"""The section `data:`: where samples come from, one source or several of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mmdit.config import ConfigError, FilePath, Section
from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.cache.latent_cache import LatentCache
from mmdit.data.cache.manifest import CacheManifest


@dataclass(frozen=True)
class SourceConfig:
    """One source: a folder that holds a latent cache, or a JSONL file (with `on_the_fly`)."""

    # The folder of the cache, or the JSONL file.
    path: FilePath
    # What the log and the metrics call the source; empty: the last part of `path`.
    name: str = ""
    # The relative share of training steps that show it, in proportion to the weights of the other
    # sources; null: in proportion to its number of items, so that all items are seen equally often.
    weight: float | None = None
    # Without weights: how often its items are seen for each time that items of other sources are.
    repeats: int = 1
    # Put in front of every caption of this source (with a space at its end, if one is wanted).
    caption_prefix: str = ""

    def __post_init__(self):
        if not self.path:
            raise ConfigError("path", "is empty; name the folder of a cache")
        if self.weight is not None and self.weight <= 0:
            raise ConfigError(
                "weight", f"is {self.weight:g}; must be above 0 (leave a source out to skip it)"
            )
        if self.repeats < 1:
            raise ConfigError("repeats", f"is {self.repeats}; must be at least 1")
        if self.weight is not None and self.repeats > 1:
            raise ConfigError(
                "repeats",
                f"is {self.repeats}, but weight {self.weight:g} decides how often the source is"
                " seen; remove one of them",
            )

    @property
    def label(self) -> str:
        """Return the name of the source in the log and the metrics."""
        return self.name or Path(self.path).name or self.path


@dataclass(frozen=True)
class DataConfig(Section):
    """The section `data:`."""

    # Hold the whole cache in memory; `auto`: if all sources together take at most a quarter of the
    # memory.
    in_memory: Literal["auto", True, False] = "auto"
    # The sources to train on, in place of `--train_cache_dir`.
    sources: tuple[SourceConfig, ...] = ()
    # Allow JSONL files of pictures or clips as sources, decoded and encoded during training: slow.
    on_the_fly: bool = False

    def __post_init__(self):
        labels = [source.label for source in self.sources]
        for number, label in enumerate(labels):
            if label in labels[:number]:
                first = labels.index(label)
                raise ConfigError(
                    f"sources[{number}].name",
                    f"is {label!r}, as that of sources[{first}]; give one of them another name",
                )
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ConfigError(
                f"sources[{weighted.index(False)}].weight",
                f"is null, but sources[{weighted.index(True)}] has one; give all a weight, or none",
            )


def shares_of(sources: Sequence[SourceConfig], plans: Sequence[BatchPlan]) -> list[float]:
    """Return the weights by which steps are shared out among the sources."""
    return [
        float(source.repeats * plan.items) if source.weight is None else source.weight
        for source, plan in zip(sources, plans, strict=True)
    ]


def check_together(caches: Sequence[LatentCache], wanted: CacheManifest, patch: int) -> list[str]:
    """Raise ValueError unless one model can be trained on the latents of all caches; return lines
    to print. Sizes and crops may differ, but tokenizers may not, nor how frames are joined (single
    pictures go with anything). `wanted`: the manifest that the config asks for; `patch`: the side,
    in cells, of a patch of the model."""
    first = caches[0]
    for cache in caches[1:]:
        differences = _differences(first.manifest.latents(), cache.manifest.latents())
        if differences:
            raise ValueError(
                "\n  ".join(
                    [
                        f"the sources {first.folder} and {cache.folder} hold latents of different"
                        " kinds, on which no model can be trained together:",
                        *differences,
                    ]
                )
                + "\nLeave one of them out, or make it again with the tokenizer of the other."
            )
    for cache in caches:
        manifest = cache.manifest
        differences = _differences(manifest.latents(), wanted.latents())
        pictures = not (cache.shapes[:, 0] > 1).any()
        if not pictures:
            differences += _differences(manifest.clip_plan, wanted.clip_plan)
        if differences:
            raise ValueError(
                "\n  ".join(
                    [f"the source {cache.folder} is not what the config asks for:", *differences]
                )
                + "\nUse the settings it was made with, or cache again into a new folder."
            )
        unfit = (cache.shapes[:, 1:3] % patch).any(1)
        if unfit.any():
            item = int(torch.nonzero(unfit)[0])
            width, height = manifest.size_of(cache.shapes[item].tolist())
            raise ValueError(
                f"the source {cache.folder} holds items of {width}x{height} pixels (for example"
                f" {cache.ids[item]}), which are no multiple of {patch * manifest.spec.spatial}"
                " along both axes, as this model needs; leave the source out or make it again"
            )
    return _notes(caches)


def _differences(here: dict, there: dict) -> list[str]:
    """Return the differences, by name, with both values."""
    return [
        f"{name}: {here.get(name)} and {there.get(name)}"
        for name in here | there
        if here.get(name) != there.get(name)
    ]


def _notes(caches: Sequence[LatentCache]) -> list[str]:
    """Return a line if manifests note different statistics of their latents. Since latents are
    stored raw, the statistics of the config apply to all."""
    first = caches[0]
    for cache in caches[1:]:
        if cache.manifest.spec != first.manifest.spec:
            return [
                f"the manifests of {first.folder} and {cache.folder} note different latent"
                " statistics; latents are stored raw, and those of the config hold for all sources"
            ]
    return []
