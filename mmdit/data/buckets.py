"""Sizes: what a picture or clip is resized to. One function decides, in caching; the decision is in the cache's manifest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mmdit.config import ConfigError

Size = tuple[int, int]  # pixels (width, height)


@dataclass(frozen=True)
class VideoConfig:
    """YAML section `video:`. One frame is text-to-image. Clips are cached whole; frames are chosen when a batch is made."""

    width: int = 256
    height: int = 256
    fps: float = 16.0  # of the frame folders
    num_frames: int = 1
    frame_stride: int = 1  # take every n-th frame of the source
    image_fraction: float = 0.0  # share of the training steps that use single frames of the clips (and single images)

    def __post_init__(self):
        for name in ("width", "height", "num_frames", "frame_stride", "fps"):
            if getattr(self, name) <= 0:
                raise ConfigError(name, f"is {getattr(self, name)}; must be greater than 0")
        if not 0 <= self.image_fraction <= 1:
            raise ConfigError("image_fraction", f"is {self.image_fraction}; must be from 0 to 1")
        if self.image_fraction and self.num_frames == 1:
            raise ConfigError("image_fraction", f"is {self.image_fraction} but num_frames is 1, so every step uses single "
                              "frames; set it to 0 or raise num_frames")

    @property
    def span(self) -> int:
        """Source frames that one training sample covers."""
        return 1 + (self.num_frames - 1) * self.frame_stride

    @property
    def sample_fps(self) -> int:
        """Frames a second at which a sampled clip moves as its sources do (video files want a whole number)."""
        return max(1, round(self.fps / self.frame_stride))


@dataclass(frozen=True)
class BucketingConfig:
    """YAML section `bucketing:`. `closest_ar`: the listed size whose aspect ratio is nearest to the source's."""

    enabled: bool = False
    strategy: Literal["closest_ar"] = "closest_ar"
    buckets: tuple[Size, ...] = ()  # [[width, height], …]

    def __post_init__(self):
        if self.enabled and not self.buckets:
            raise ConfigError("buckets", "is empty but bucketing is enabled; list sizes as [[256, 256], [320, 192]] "
                              "or set bucketing.enabled: false")
        for i, size in enumerate(self.buckets):
            if min(size) <= 0:
                raise ConfigError(f"buckets[{i}]", f"is {list(size)}; width and height must be greater than 0")
            if size in self.buckets[:i]:
                raise ConfigError(f"buckets[{i}]", f"is {list(size)}, as is buckets[{self.buckets.index(size)}]; remove one")


def target_sizes(video: VideoConfig, bucketing: BucketingConfig, spatial: int) -> tuple[Size, ...]:
    """Every size that items may get. Raises ConfigError for one that the tokenizer's downsampling `spatial` does not divide."""
    named = {f"bucketing.buckets[{i}]": size for i, size in enumerate(bucketing.buckets)}
    if not bucketing.enabled:
        named = {"video.width, video.height": (video.width, video.height)}
    for path, (width, height) in named.items():
        if width % spatial or height % spatial:
            near = [max(spatial, round(side / spatial) * spatial) for side in (width, height)]
            raise ConfigError(path, f"is {width}x{height}; both must be multiples of {spatial}, the tokenizer's downsampling; "
                              f"the nearest is {near[0]}x{near[1]}")
    return tuple(named.values())


def choose_size(source: Size, sizes: tuple[Size, ...]) -> Size:
    """The size nearest in aspect ratio (in the logarithm, so that 2:1 and 1:2 are alike). Of equal ones: the largest that the
    source fills without upscaling, else the smallest."""
    distance = {size: abs(math.log(source[0] / source[1]) - math.log(size[0] / size[1])) for size in sizes}
    nearest = [size for size in sizes if distance[size] < min(distance.values()) + 1e-9]
    filled = [size for size in nearest if size[0] <= source[0] and size[1] <= source[1]]
    return max(filled, key=math.prod) if filled else min(nearest, key=math.prod)
