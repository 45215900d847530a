"""Training pictures, generated on the device: step `s` with seed `k` always sees the same batch,
and there are no data files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmdit import rng
from mmdit.config import ConfigError, least
from mmdit.data import moving_shapes
from mmdit.pixels import to_uint8, to_unit
from mmdit.vtp_training import textures
from mmdit.vtp_training.glyphs import letters

Tokenize = Callable[[list[str]], Tensor]  # captions to ids (N, T)

POOL_PIXELS = 1 << 28  # of all pictures of one size that are kept
TEXTURE_CHUNK_PIXELS = 1 << 23
CLIP_FRAMES = 3  # first, middle and last of a motion


@dataclass(frozen=True)
class MixConfig:
    """The section `images.mix:`: the relative shares of the kinds of pictures in a batch."""

    # Moving shapes, which have captions.
    shapes: float = 0.4
    # Smooth gradients.
    gradients: float = 0.06
    # Noise at many scales.
    clouds: float = 0.16
    # Stripes, checks and dots.
    patterns: float = 0.08
    # Piles of flat objects.
    piles: float = 0.18
    # Letters.
    glyphs: float = 0.12

    def __post_init__(self):
        weights = list(vars(self).values())
        if min(weights) < 0 or sum(weights) <= 0:
            raise ConfigError(
                "", f"has weights {weights}; must be non-negative with a positive sum"
            )

    def counts(self, total: int, made: bool = False) -> dict[str, int]:
        """Return whole numbers, one for each kind, that add up to `total`, by cumulative rounding.
        `made`: without moving shapes."""
        weights = vars(self) | ({"shapes": 0.0} if made else {})
        scale = total / sum(weights.values())
        covered, placed, result = 0.0, 0, {}
        for name, weight in weights.items():
            covered += weight * scale
            result[name] = round(covered) - placed
            placed += result[name]
        return result


@dataclass(frozen=True)
class ImagesConfig:
    """The section `images:`. Each step draws one size; the batch holds `patches_per_step` patches
    of 16x16 pixels, whatever the size."""

    # Sizes and their weights, as [[width, height, weight], …].
    sizes: tuple[tuple[int, int, float], ...] = (  # width, height, weight
        (64, 64, 0.40),
        (128, 128, 0.30),
        (256, 256, 0.12),
        (112, 64, 0.04),
        (64, 112, 0.04),
        (192, 128, 0.05),
        (448, 256, 0.05),
    )
    # Patches in a step.
    patches_per_step: int = 32768
    # The most objects in a pile.
    objects: int = 8
    # The most moving shapes that are rendered for a size; steps draw from them.
    shape_pool: int = 16384
    # The same for all other pictures, which take longer to generate than to train on.
    texture_pool: int = 16384
    # The number of steps after which the textures of a size are generated anew.
    refresh_every: int = 1000
    # The shares of the kinds of pictures.
    mix: MixConfig = field(default_factory=MixConfig)

    def __post_init__(self):
        if not self.sizes:
            raise ConfigError("sizes", "is empty; must list [width, height, weight]")
        for width, height, weight in self.sizes:
            if width % 16 or height % 16 or min(width, height) < 32 or weight <= 0:
                raise ConfigError(
                    "sizes",
                    f"has [{width}, {height}, {weight}]; sides must be multiples of 16 from 32 on,"
                    " the weight positive",
                )
        least(self, 1, "patches_per_step", "objects", "shape_pool", "texture_pool")
        least(self, 1, "refresh_every")

    def size_at(self, seed: int, step: int) -> tuple[int, int]:
        """Return `(width, height)` of the step's batch."""
        place = (rng.key(seed, "size", step) & 0xFFFF_FFFF) / 2**32
        left = place * sum(weight for *_, weight in self.sizes)
        for width, height, weight in self.sizes:
            left -= weight
            if left < 0:
                return width, height
        return self.sizes[-1][:2]

    def batch_size(self, width: int, height: int) -> int:
        return max(1, self.patches_per_step * 256 // (width * height))


@dataclass
class PictureBatch:
    """`pixels (N, 3, H, W)`: uint8 in a pool, in [0, 1] in a batch. The first `len(facts)` pictures
    are moving shapes. `tokens (N, T)`: one caption for each of these, if captions are needed.
    `facts (N,)`: a number for each; it is equal where background, colours, shapes, sizes and stated
    relations are."""

    pixels: Tensor
    tokens: Tensor | None
    facts: Tensor


def _named(facts: moving_shapes.Facts) -> tuple:
    """Return everything that a caption of a still picture may state, for comparison."""
    objects = sorted((item.color, item.shape, item.size) for item in facts.objects)
    return facts.background, tuple(objects), facts.said


def moving_shapes_of(
    seed: int,
    count: int,
    width: int,
    height: int,
    device: torch.device,
    tokenize: Tokenize | None = None,
) -> PictureBatch:
    """Render `count` frames: about half are first, middle and last frames of clips, a tenth show
    several objects, and the rest are single objects in stills."""
    size: dict[str, Any] = {"width": width, "height": height}

    def draw(name: str, count: int, **options: Any) -> list[moving_shapes.Facts]:
        return moving_shapes.draw(rng.key(seed, name), range(count), **options, **size)

    clips = draw("clips", count // (2 * CLIP_FRAMES), video=True)
    many = draw("many", count // 10, video=False, variant="many")
    stills = many + draw("stills", count - CLIP_FRAMES * len(clips) - len(many), video=False)
    frames = moving_shapes.render(clips, frames=CLIP_FRAMES, device=device, **size).flatten(0, 1)
    pixels = torch.cat([frames, moving_shapes.render(stills, device=device, **size)[:, 0]])
    shown = []
    for clip in clips:  # a frame of a clip shows no motion, so its caption must not name one
        objects = tuple(replace(item, motion=None) for item in clip.objects)
        shown += [replace(clip, objects=objects)] * CLIP_FRAMES
    shown += stills
    names = [_named(facts) for facts in shown]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    tokens = None
    if tokenize is not None:
        captions = [moving_shapes.caption(f, seed, i, complete=False) for i, f in enumerate(shown)]
        tokens = tokenize(captions).to(device)
    return PictureBatch(pixels, tokens, torch.tensor([numbers[n] for n in names], device=device))


def pool_size(most: int, width: int, height: int) -> int:
    """Return how many pictures of a size are kept in memory, at most `most`."""
    return max(1, min(most, POOL_PIXELS // (width * height)))


class PictureSource:
    """Makes batches; `batch(step)` is a function of (config, seed, step) alone."""

    def __init__(
        self,
        config: ImagesConfig,
        seed: int,
        device: torch.device,
        tokenize: Tokenize | None = None,
    ):
        self.config, self.seed, self.device, self.tokenize = config, seed, device, tokenize
        self._pools: dict[tuple[int, int], PictureBatch] = {}
        self._textures: dict[tuple[int, int], tuple[int, Tensor]] = {}  # size → (epoch, pictures)

    def pool(self, width: int, height: int) -> PictureBatch:
        """Return all moving shapes of one size, rendered when they are first needed."""
        if (width, height) not in self._pools:
            self._pools[width, height] = moving_shapes_of(
                rng.key(self.seed, "shapes", width, height),
                pool_size(self.config.shape_pool, width, height),
                width,
                height,
                self.device,
                self.tokenize,
            )
        return self._pools[width, height]

    def textures(self, width: int, height: int, step: int) -> Tensor:
        """Return the other pictures from which a step draws, `(N, 3, H, W)` uint8: a function of
        the size and `step // refresh_every`."""
        epoch = step // self.config.refresh_every
        if self._textures.get((width, height), (-1,))[0] != epoch:
            seed = rng.key(self.seed, "textures", width, height)
            count = pool_size(self.config.texture_pool, width, height)
            draws = rng.Draws.of(seed, epoch, count, self.device)
            chunk = max(1, TEXTURE_CHUNK_PIXELS // (width * height))
            mix, parts = self.config.mix, []
            if any(weight for name, weight in vars(mix).items() if name != "shapes"):
                starts = range(0, count, chunk)
                parts = [self._make(draws[i : i + chunk], width, height) for i in starts]
            none = torch.empty(0, 3, height, width, dtype=torch.uint8, device=self.device)
            self._textures[width, height] = (epoch, torch.cat([none, *parts]))
        return self._textures[width, height][1]

    def batch(self, step: int, size: tuple[int, int] | None = None) -> PictureBatch:
        """Return the pictures of a step, moving shapes first; `size` replaces the drawn size."""
        width, height = size or self.config.size_at(self.seed, step)
        total = self.config.batch_size(width, height)
        shapes = self.config.mix.counts(total)["shapes"]
        draws = rng.Draws.of(rng.key(self.seed, "pictures"), step, total, self.device)
        where = draws.uniform("picture", 1)[:, 0]
        pool, others = self.pool(width, height), self.textures(width, height, step)
        chosen = (where[:shapes] * len(pool.pixels)).long()
        made = _turned(draws[shapes:], others[(where[shapes:] * len(others)).long()])
        pixels = to_unit(torch.cat([pool.pixels[chosen], made]))
        tokens = None if pool.tokens is None else pool.tokens[chosen]
        return PictureBatch(pixels, tokens, pool.facts[chosen])

    def _make(self, draws: rng.Draws, width: int, height: int) -> Tensor:
        """Generate one picture for each draw, with the shares in `mix`, as uint8."""
        config, size = self.config, (height, width)
        counts, start = config.mix.counts(len(draws.indices), made=True), 0
        parts: dict[str, rng.Draws] = {}
        for name, count in counts.items():
            parts[name] = draws[start : start + count]
            start += count
        piles, glyphs = parts["piles"], parts["glyphs"]
        made = torch.cat(
            [
                textures.gradients(parts["gradients"], *size),
                textures.clouds(parts["clouds"], *size),
                textures.patterns(parts["patterns"], *size),
                textures.piles(piles, _ground(piles, *size), config.objects),
                letters(glyphs, _ground(glyphs, *size)),
            ]
        )
        plain = draws.uniform("jitter/none", 1, 1, 1) < 0.4
        return to_uint8(torch.where(plain, made, textures.jitter(draws, made)))


def _turned(draws: rng.Draws, pictures: Tensor) -> Tensor:
    """Mirror each picture at random along both axes, and permute its colour channels: this makes a
    pool effectively 24 times as large."""
    for axis, name in ((-1, "mirror/x"), (-2, "mirror/y")):
        pictures = torch.where(draws.uniform(name, 1, 1, 1) < 0.5, pictures.flip(axis), pictures)
    order = draws.uniform("channels", 3).argsort(1)
    return pictures.gather(1, order[:, :, None, None].expand_as(pictures))


def _ground(draws: rng.Draws, height: int, width: int) -> Tensor:
    """Return the backgrounds for objects and letters: two thirds gradients, one third clouds."""
    third = len(draws.indices) // 3
    clouds = textures.clouds(draws[:third], height, width)
    return torch.cat([clouds, textures.gradients(draws[third:], height, width)])
