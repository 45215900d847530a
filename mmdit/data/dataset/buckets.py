"""Sizes to which pictures and clips are resized. One function decides them, in caching, and the
cache's manifest records its settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from mmdit.config import ConfigError, Section
from mmdit.data.dataset.problems import Unusable
from mmdit.interfaces import LatentSpec

Size = tuple[int, int]  # pixels (width, height)


@dataclass(frozen=True)
class VideoConfig(Section):
    """The section `video:`. Clips are cached as a whole, and frames are chosen when a batch is
    made. (For a tokenizer that joins frames in time, they are chosen when the clip is cached.)"""

    # Width in pixels, where `bucketing` does not decide; a multiple of the tokenizer's `latent_f`.
    width: int = 256
    # Height in pixels, under the same conditions.
    height: int = 256
    # The frame rate of folders of frames; video files are decoded at this rate.
    fps: float = 16.0
    # Frames of a training sample; 1 trains on pictures.
    num_frames: int = 1
    # Train on tiles of this width and height in pixels, cut at drawn places, and draw larger or
    # longer samples in overlapping tiles; null: train on whole frames, and draw clips of any length
    # at once.
    tile: Size | None = None
    # Take every n-th frame of the source.
    frame_stride: int = 1
    # Smaller numbers of frames, for clips too short for `num_frames`; the largest one that fits is
    # used.
    frame_counts: tuple[int, ...] = ()
    # Spread the frames of a sample over its whole clip, whatever its length, instead of taking a
    # window of it.
    shrink_video_to_frames: bool = False
    # Move every frame but the first by up to this many source frames; the order of frames stays.
    temporal_jitter: int = 0
    # The share of steps that train on single frames of clips, and on single pictures.
    image_fraction: float = 0.0

    def __post_init__(self):
        for name in ("width", "height", "num_frames", "frame_stride", "fps"):
            if getattr(self, name) <= 0:
                raise ConfigError(name, f"is {getattr(self, name)}; must be greater than 0")
        if not 0 <= self.image_fraction <= 1:
            raise ConfigError("image_fraction", f"is {self.image_fraction}; must be from 0 to 1")
        if self.image_fraction and self.num_frames == 1:
            raise ConfigError(
                "image_fraction",
                f"is {self.image_fraction} but num_frames is 1, so every step uses single "
                "frames; set it to 0 or raise num_frames",
            )
        for i, count in enumerate(self.frame_counts):
            if not 1 < count < self.num_frames or count in self.frame_counts[:i]:
                raise ConfigError(
                    f"frame_counts[{i}]",
                    f"is {count}; must be from 2 to below num_frames ({self.num_frames}), "
                    "and stand there once",
                )
        if self.temporal_jitter < 0 or (self.temporal_jitter and self.num_frames == 1):
            raise ConfigError(
                "temporal_jitter",
                f"is {self.temporal_jitter} with num_frames {self.num_frames}; must be at "
                "least 0, and 0 for single frames",
            )
        if self.shrink_video_to_frames and (self.frame_stride > 1 or self.num_frames == 1):
            raise ConfigError(
                "shrink_video_to_frames",
                f"is true with num_frames {self.num_frames} and frame_stride {self.frame_stride}:"
                " the clip's length decides the stride; set frame_stride: 1 and num_frames to at"
                " least 2",
            )

    def check(self, run: Any) -> None:
        """Refuse sizes and numbers of frames that do not suit the tokenizer and the model."""
        target_sizes(self, run.bucketing, run.tokenizer.latent_f * run.model.patch)
        self.check_frames(LatentSpec(1, temporal=run.tokenizer.temporal))
        self._check_tile(run)

    def _check_tile(self, run: Any) -> None:
        if self.tile is None:
            return
        cell = run.tokenizer.latent_f * run.model.patch
        if min(self.tile) < cell or self.tile[0] % cell or self.tile[1] % cell:
            raise ConfigError(
                "video.tile",
                f"is {list(self.tile)}; both must be multiples of {cell}, as the sizes of clips"
                " are; null trains on whole frames",
            )
        if not run.model.takes_place:
            raise ConfigError(
                "video.tile",
                f"is {list(self.tile)}, but a model of type {run.model.type} cannot be told where a"
                " tile lies; set it to null",
            )

    def latent_tile(self, spec: LatentSpec) -> tuple[int, int, int] | None:
        """Return the shape of a tile in latent (frames, rows, columns); None without tiles."""
        if self.tile is None:
            return None
        return spec.frames(self.num_frames), *spec.grid(*self.tile)

    def check_frames(self, spec: LatentSpec) -> None:
        """Raise ConfigError for settings that a tokenizer which joins `spec.temporal` frames rules
        out: numbers of frames that do not fit, and frames that are chosen anew for each batch."""
        if spec.temporal > 1 and self.temporal_jitter:
            raise ConfigError(
                "video.temporal_jitter",
                f"is {self.temporal_jitter}, but this tokenizer joins {spec.temporal} frames into "
                "one, so frames are chosen when the clip is cached; set it to 0",
            )
        for number in (self.num_frames, *self.frame_counts):
            try:
                spec.frames(number)
            except ValueError as error:
                key = "num_frames" if number == self.num_frames else "frame_counts"
                raise ConfigError(f"video.{key}", str(error)) from None

    def needed(self, frames: int) -> int:
        """Return the least number of source frames that a sample of `frames` needs."""
        return frames if self.shrink_video_to_frames else 1 + (frames - 1) * self.frame_stride

    @property
    def span(self) -> int:
        """Return the number of source frames that one training sample needs."""
        return self.needed(self.num_frames)

    @property
    def sample_fps(self) -> int:
        """Return the frame rate at which a drawn clip moves as fast as its sources (a whole number,
        as video files need)."""
        return max(1, round(self.fps / self.frame_stride))


@dataclass(frozen=True)
class BucketingConfig(Section):
    """The section `bucketing:`."""

    # Whether pictures keep roughly their own aspect ratio; otherwise all get `video.width` by
    # `video.height`.
    enabled: bool = False
    # `closest_ar`: the size in `buckets` with the nearest aspect ratio. `pixel_budget`: a separate
    # size for each source, never larger than the source.
    strategy: Literal["closest_ar", "pixel_budget"] = "closest_ar"
    # The sizes of `closest_ar`, as [[width, height], …] in pixels.
    buckets: tuple[Size, ...] = ()
    # The most pixels that a frame may have under `pixel_budget`.
    max_pixels_per_frame: int = 0

    @property
    def budget(self) -> int:
        """Return the most pixels a frame may have under a pixel budget; 0 without one."""
        return self.max_pixels_per_frame if self.enabled and self.strategy == "pixel_budget" else 0

    def __post_init__(self):
        if self.strategy == "pixel_budget":
            if self.max_pixels_per_frame <= 0:
                raise ConfigError(
                    "max_pixels_per_frame",
                    f"is {self.max_pixels_per_frame}; strategy pixel_budget needs it, "
                    "for example 65536 (256 x 256)",
                )
            if self.buckets:
                raise ConfigError(
                    "buckets",
                    "lists sizes, but with strategy pixel_budget each source gets its own; remove"
                    " the list, or set strategy: closest_ar",
                )
        elif self.max_pixels_per_frame:
            raise ConfigError(
                "max_pixels_per_frame",
                f"is {self.max_pixels_per_frame}, but strategy closest_ar uses the "
                "listed buckets; set strategy: pixel_budget, or remove it",
            )
        elif self.enabled and not self.buckets:
            raise ConfigError(
                "buckets",
                "is empty but bucketing is enabled; list sizes as [[256, 256], [320, 192]] "
                "or set bucketing.enabled: false",
            )
        for i, size in enumerate(self.buckets):
            if min(size) <= 0:
                raise ConfigError(
                    f"buckets[{i}]", f"is {list(size)}; width and height must be greater than 0"
                )
            if size in self.buckets[:i]:
                raise ConfigError(
                    f"buckets[{i}]",
                    f"is {list(size)}, as is buckets[{self.buckets.index(size)}]; remove one",
                )


def target_sizes(video: VideoConfig, bucketing: BucketingConfig, spatial: int) -> tuple[Size, ...]:
    """Return every size that items may get (under a pixel budget, the size of previews).
    ConfigError for a size that is not a multiple of the tokenizer's downsampling `spatial`."""
    named = {f"bucketing.buckets[{i}]": size for i, size in enumerate(bucketing.buckets)}
    if 0 < bucketing.budget < spatial**2:
        raise ConfigError(
            "bucketing.max_pixels_per_frame",
            f"is {bucketing.budget}; must be at least {spatial**2}, a cell of "
            f"the tokenizer ({spatial}x{spatial} pixels)",
        )
    if not bucketing.enabled or bucketing.budget:
        named = {"video.width, video.height": (video.width, video.height)}
    for path, (width, height) in named.items():
        if width % spatial or height % spatial:
            near = [max(spatial, round(side / spatial) * spatial) for side in (width, height)]
            raise ConfigError(
                path,
                f"is {width}x{height}; both must be multiples of {spatial}, the tokenizer's"
                f" downsampling; the nearest is {near[0]}x{near[1]}",
            )
    return tuple(named.values())


def choose_size(source: Size, sizes: tuple[Size, ...]) -> Size:
    """Return the size with the nearest aspect ratio (by its logarithm: 2:1 and 1:2 are equally far
    from 1:1). Of equally near ones: the largest that the source fills without upscaling, else the
    smallest."""
    distance = {
        size: abs(math.log(source[0] / source[1]) - math.log(size[0] / size[1])) for size in sizes
    }
    nearest = [size for size in sizes if distance[size] < min(distance.values()) + 1e-9]
    filled = [size for size in nearest if size[0] <= source[0] and size[1] <= source[1]]
    return max(filled, key=math.prod) if filled else min(nearest, key=math.prod)


WORST_ASPECT = 0.05  # relative deviation of the aspect ratio; sizes below it come first
UNUSED_WEIGHT = (
    0.5  # weight of an unused share of the budget, against a cropped share of the picture
)


@lru_cache(maxsize=4096)
def budget_size(source: Size, max_pixels: int, spatial: int) -> Size:
    """Return the size that loses least of a source under a pixel budget.

    Sizes are multiples of `spatial`, hold at most `max_pixels` and nowhere exceed the source. Those
    whose aspect ratio is within 5 % of the source's come first, else the nearest ones. The loss
    counts the part that is cropped, and half of what is unused of the budget or the source.
    ValueError if the source is smaller than one cell."""
    width, height = source
    if min(source) < spatial:
        raise Unusable(
            "too small",
            f"{width}x{height} pixels, the tokenizer needs at least {spatial}x{spatial}",
        )
    widths = np.arange(spatial, min(width, max_pixels // spatial) + 1, spatial)[:, None]
    heights = np.arange(spatial, min(height, max_pixels // spatial) + 1, spatial)[None]
    pixels = widths * heights
    off = np.abs(np.log(widths / heights) - math.log(width / height))
    unused = np.log(min(max_pixels, width * height) / pixels)
    loss = 1 - np.exp(-off) + UNUSED_WEIGHT * unused
    loss += np.where(off > math.log(1 + WORST_ASPECT), 100 * (1 + off), 0)
    loss[pixels > max_pixels] = np.inf
    row, column = np.unravel_index(loss.argmin(), loss.shape)
    return int(widths[row, 0]), int(heights[0, column])
