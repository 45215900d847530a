"""Read real items with which samples are compared: from a folder, a JSONL file, or a cache of
latents, decoded by the tokenizer that made it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdit.data.cache.latent_cache import LatentCache, open_cache
from mmdit.data.dataset.media_sets import Shape, batched, media_records, read_media
from mmdit.data.dataset.problems import Damaged, Unusable
from mmdit.data.dataset.records import Record
from mmdit.files import expanded
from mmdit.interfaces import Tokenizer
from mmdit.pixels import to_shown
from mmdit.tokenizers import VTPTokenizerConfig, build_tokenizer


class RealItems:
    """The items of `source`, each brought to `shape`.

    A cache must have been made by one of `tokenizers`, or by the tokenizer that comes with mmdit.
    `clips`: items are one frame of each clip (or animated picture); pictures of a folder are read
    only if it holds no clip. ValueError if there is nothing, or no tokenizer fits the cache.
    """

    def __init__(
        self,
        source: str,
        shape: Shape,
        tokenizers: list[Tokenizer],
        num_workers: int,
        clips: bool = False,
    ):
        self.source, self.num_workers = source, num_workers
        self.shape = replace(shape, animated=clips)
        self.clips = clips
        self.cache: LatentCache | None = None
        folder = expanded(source)
        if (folder / "manifest.json").is_file():
            self.cache = open_cache(folder)
            self.tokenizer = self._maker(self.cache, tokenizers)
            self.numbers = {id: number for number, id in enumerate(self.cache.ids)}
            if shape.frames > 1:
                self.shape = _as_cached(self.cache, shape)

    def _maker(self, cache: LatentCache, tokenizers: list[Tokenizer]) -> Tokenizer:
        for tokenizer in (*tokenizers, build_tokenizer(VTPTokenizerConfig())):
            if tokenizer.fingerprint == cache.manifest.plain[0]:
                return tokenizer
        raise ValueError(
            f"{self.source} is a cache of {cache.manifest.tokenizer_name}, whose weights are not at"
            " hand: take `mmdit evaluate` with a model that was trained on it, --features with the"
            " folder of that tokenizer, or a folder or JSONL file of the pictures themselves"
        )

    def read(self, batch: int) -> Iterator[tuple[list[Record], Tensor]]:
        """Yield up to `batch` records of one size with their frames, uint8 `(B, F, 3, H, W)`."""
        if self.cache is None:
            yield from read_media(self._records(), self.shape, batch, self.num_workers)
            return
        yield from batched(self._decoded(self.cache), batch)

    def _records(self) -> list[Record]:
        if self.clips:
            with contextlib.suppress(ValueError):  # there is no clip
                return media_records(self.source, 2)
        return media_records(self.source, self.shape.frames)

    def read_one(self, record: Record, size: tuple[int, int] | None) -> Tensor:
        """Return the frames `(F, 3, H, W)` of one item, at the size (width, height), or at its own
        size if that is None."""
        shape = replace(self.shape, size=size)
        if self.cache is not None:
            return self._frames(self.cache, self.numbers[record.id], shape)
        ((_, pixels),) = read_media([record], shape, 1)
        return pixels[0]

    def _decoded(self, cache: LatentCache) -> Iterator[tuple[Record, Tensor]]:
        count = 0
        for number, id in enumerate(cache.ids):
            path = f"{self.source}/{id}"
            record = Record(id, path, cache.captions[number], cache.facts[number])
            try:
                yield record, self._frames(cache, number, self.shape)
                count += 1
            except (Unusable, Damaged) as error:
                print(f"skipped: {record.path}: {error}", flush=True)
        if not count:
            raise ValueError(f"none of the {len(cache)} items of {self.source} could be read")

    @torch.no_grad()
    def _frames(self, cache: LatentCache, number: int, shape: Shape) -> Tensor:
        latents = cache.load_finite(number)[..., : cache.manifest.plain[1]]
        if self.tokenizer.spec.temporal == 1:  # frames are decoded separately, so only those needed
            latents = latents[list(shape.places(len(latents)))]
        else:
            latents = self._middle_sample(cache, latents)
        pixels = to_shown(self.tokenizer.decode(latents[None].float())[0])
        if self.tokenizer.spec.temporal > 1:
            pixels = pixels[list(shape.places(len(pixels)))]
        if shape.size in (None, (pixels.shape[-1], pixels.shape[-2])):
            return pixels
        images = (Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in pixels)
        return torch.from_numpy(np.stack([shape.cut(image) for image in images]))

    def _middle_sample(self, cache: LatentCache, latents: Tensor) -> Tensor:
        """Return the middle one of the samples `(F, h, w, C)` that a cached clip consists of, if
        its tokenizer joins frames: these lie one after the other, each encoded by itself."""
        length = cache.manifest.joined or len(latents)
        first = len(latents) // length // 2 * length
        return latents[first : first + length]


def _as_cached(cache: LatentCache, shape: Shape) -> Shape:
    """Return `shape` counted in the frames that a cache holds: where a tokenizer joins frames, the
    frames of a sample were chosen when it was cached. ValueError if their distance in time is not
    the one that `shape` asks for."""
    rates = cache.rates - {shape.fps}
    if shape.fps is not None and rates:
        raise ValueError(
            f"the cache {cache.folder} holds clips of video files at {min(rates):g} frames a"
            f" second, and {shape.fps:g} are asked for: give clips of one speed"
        )
    plan = cache.manifest.clip_plan
    if not plan:
        return shape
    if plan["shrink_video_to_frames"]:
        return replace(shape, stride=1, stretch=False)
    if shape.stretch:
        raise ValueError(
            f"the cache {cache.folder} holds samples of clips, and whole clips are asked for"
            " (video.shrink_video_to_frames): give the clips themselves, or a cache of such samples"
        )
    if plan["frame_stride"] != shape.stride:
        raise ValueError(
            f"the cache {cache.folder} holds clips of stride {plan['frame_stride']}, and stride"
            f" {shape.stride} is asked for: give clips of one stride"
        )
    return replace(shape, stride=1)
