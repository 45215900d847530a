"""Describe how a cache was made: the settings on which its latents depend, stored beside them and
compared before they are used."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mmdit.config import ConfigError, decode
from mmdit.data.dataset.buckets import (
    BucketingConfig,
    Size,
    VideoConfig,
    budget_size,
    choose_size,
    target_sizes,
)
from mmdit.data.dataset.clips import clip_plan
from mmdit.data.dataset.frames import PreprocessConfig
from mmdit.data.dataset.pictures import DECODING
from mmdit.files import open_regular, write_atomically
from mmdit.interfaces import LatentSpec, Tokenizer

FORMAT = 1


@dataclass(frozen=True)
class CacheManifest:
    """The settings that decide the contents of a cache. `source` and the statistics in `spec` are
    only for the reader's information."""

    tokenizer: str  # fingerprint: a hash of weights and configuration
    tokenizer_name: str
    spec: LatentSpec
    sizes: tuple[Size, ...]  # empty under a pixel budget
    bucketed: bool
    preprocess: dict = field(default_factory=lambda: {"crop": "center"})
    source: str = ""
    format: int = FORMAT
    max_pixels_per_frame: int = 0
    clip_plan: dict = field(default_factory=dict)  # for a tokenizer that joins frames in time
    decoding: int = 1  # version of `pictures` when the cache was begun; version 1 was not noted
    precision: str = ""  # of encoding (`Tokenizer.precision`); "" in older caches

    @staticmethod
    def of(
        tokenizer: Tokenizer,
        video: VideoConfig,
        bucketing: BucketingConfig | None = None,
        preprocess: PreprocessConfig | None = None,
        source: str = "",
    ) -> CacheManifest:
        """Return the manifest that a config asks for: to write when caching, to compare when
        training."""
        bucketing, preprocess = bucketing or BucketingConfig(), preprocess or PreprocessConfig()
        sizes = target_sizes(video, bucketing, tokenizer.spec.spatial)
        sizes, plan = () if bucketing.budget else sizes, clip_plan(video, tokenizer.spec)
        return CacheManifest(
            tokenizer.fingerprint,
            tokenizer.name,
            tokenizer.spec,
            sizes,
            bucketing.enabled,
            preprocess.describe(),
            source,
            max_pixels_per_frame=bucketing.budget,
            clip_plan=plan,
            decoding=DECODING,
            precision=tokenizer.precision,
        )

    def choose(self, source: Size) -> Size:
        """Return the size that an item of `source` pixels gets; no other code decides it.
        ValueError if the source cannot be used."""
        if self.max_pixels_per_frame:
            return budget_size(source, self.max_pixels_per_frame, self.spec.spatial)
        return choose_size(source, self.sizes)

    def size_of(self, shape: Sequence[int]) -> Size:
        """Return (width, height) in pixels of latents of the shape `(F, H, W, C)`."""
        return shape[2] * self.spec.spatial, shape[1] * self.spec.spatial

    def item_bytes(self, frames: int) -> int:
        """Return the size in bytes of the largest item of `frames` latent frames."""
        pixels = max([self.max_pixels_per_frame, *(math.prod(size) for size in self.sizes)])
        return 2 * frames * pixels // self.spec.spatial**2 * self.spec.channels

    @property
    def joined(self) -> int | None:
        """Return how many latent frames of a clip were encoded together, in runs that follow each
        other; None if each frame was encoded alone."""
        frames = self.clip_plan.get("num_frames")
        return self.spec.frames(frames) if isinstance(frames, int) else None

    @property
    def plain(self) -> tuple[str, int]:
        """Return the fingerprint of the tokenizer of the clips alone, and the number of their
        channels. They are the first half of the channels if an input of the model (a picture or
        small clip) was cached beside them."""
        beside = self.tokenizer_name.partition(" with ")[2].removeprefix("the picture ")
        if not beside:
            return self.tokenizer, self.spec.channels
        return self.tokenizer.removesuffix(f" {beside}"), self.spec.channels // 2

    def allows(self, size: Size) -> bool:
        """Return whether items of this size may be in the cache."""
        if self.max_pixels_per_frame:
            return 0 < math.prod(size) <= self.max_pixels_per_frame
        return size in self.sizes

    def older(self, folder: str | Path) -> str:
        """Return a sentence about a cache whose pictures were decoded by another version; "" if
        they were not."""
        if self.decoding == DECODING:
            return ""
        return (
            f"the cache {folder} was begun when pictures and videos were decoded otherwise (version"
            f" {self.decoding}, now {DECODING}: colour profiles, HDR, untagged HD video). It is"
            " usable as it is, and what it holds stays; cache into a new folder to decode all anew"
        )

    def check_precision(self, folder: str | Path, wanted: CacheManifest) -> str:
        """Return a sentence if it is not known with which precision the latents in the cache were
        encoded, "" if it is known. ConfigError if new latents have another precision."""
        if self.precision == wanted.precision:
            return ""
        if not self.precision:
            return (
                f"the cache {folder} was begun by a version that did not note tokenizer.dtype;"
                f" what this run adds is encoded in {wanted.precision}"
            )
        raise ConfigError(
            "tokenizer.dtype",
            f"is {wanted.precision}, and the latents of the cache {folder} were encoded in"
            f" {self.precision}: set tokenizer.dtype to {self.precision}, or cache into a new"
            " folder",
        )

    def write(self, folder: Path) -> None:
        """Write `manifest.json`."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / "manifest.json", text)

    @staticmethod
    def read(folder: str | Path) -> CacheManifest:
        """Read `manifest.json`. ConfigError if there is none, or if it is damaged."""
        path = Path(folder) / "manifest.json"
        try:
            with open_regular(path) as file:
                row = json.loads(file.read().decode())
            version = row["format"]
            manifest = decode(CacheManifest, row) if version == FORMAT else None
        except FileNotFoundError:
            raise ConfigError(
                "",
                f"{folder} is no latent cache (it has no manifest.json); correct the path, or make"
                " one with mmdit cache-images or cache-latents",
            ) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = (
                error
                if isinstance(error, ConfigError)
                else f"{type(error).__name__}: {error}"[:1000]
            )
            raise ConfigError(
                "", f"{path} is damaged ({reason}); cache again into a new folder"
            ) from None
        if manifest is None:
            raise ConfigError(
                "",
                f"{path} has format {version}, this version reads {FORMAT}; cache into a new"
                " folder",
            )
        return manifest

    def differences(self, wanted: CacheManifest) -> list[str]:
        """Return `name: the cache has X, the config asks Y` for every setting that changes the
        latents and differs."""
        here, asked = self._deciding(), wanted._deciding()
        # the name alone (of a moved checkpoint) does not matter
        if self.tokenizer == wanted.tokenizer:
            del here["tokenizer"], asked["tokenizer"]
        return [
            f"{name}: the cache has {here.get(name)}, the config asks {asked.get(name)}"
            for name in here | asked
            if here.get(name) != asked.get(name)
        ]

    def latents(self) -> dict[str, object]:
        """Return the properties that latents must share to be trained on together, by names for
        people. (The tokenizer's name is not among them, since a checkpoint may have been moved.)"""
        return {
            "tokenizer": self.tokenizer,
            "latent channels": self.spec.channels,
            "pixels per latent cell": self.spec.spatial,
            "frames per latent frame": self.spec.temporal,
        }

    def _deciding(self) -> dict[str, object]:
        """Return all settings that decide the latents, by names for people."""
        settings: dict[str, object] = {
            **self.latents(),
            "tokenizer": f"{self.tokenizer_name} {self.tokenizer}",
            "bucketing.enabled": self.bucketed,
            "sizes": sorted(self.sizes),
            "bucketing.max_pixels_per_frame": self.max_pixels_per_frame,
        }
        for section, values in (("preprocess", self.preprocess), ("video", self.clip_plan)):
            settings |= {f"{section}.{name}": values[name] for name in sorted(values)}
        return settings

    def check(self, folder: str | Path, wanted: CacheManifest) -> None:
        """Raise ValueError with every difference and the remedy, unless the cache is the wanted
        one."""
        if differences := self.differences(wanted):
            raise ValueError(
                "\n  ".join([f"the cache {folder} was made with other settings:", *differences])
                + "\nUse the settings it was made with, or cache again into a new folder (it is not"
                " touched)."
            )
