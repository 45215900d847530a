"""Training pictures, made on the device: step `s` of seed `k` always sees the same batch, and there
is no data file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from mmdit import rng
from mmdit.config import ConfigError
from mmdit.data import moving_shapes
from mmdit.pixels import to_uint8, to_unit
from mmdit.vtp_training import textures
from mmdit.vtp_training.glyphs import letters

Tokenize = Callable[[list[str]], Tensor]  # captions to ids (N, T)

POOL_PIXELS = 1 << 28  # of one size
TEXTURE_CHUNK_PIXELS = 1 << 23
CLIP_FRAMES = 3  # first, middle and last of a motion


@dataclass(frozen=True)
class MixConfig:
    """The section `images.mix:`: relative parts of a batch."""

    # Moving shapes, which have captions.
    shapes: float = 0.4
    # Smooth gradients.
    gradients: float = 0.06
    # Noise of many scales.
    clouds: float = 0.16
    # Stripes, checks and dots.
    patterns: float = 0.08
    # Piles of flat objects.
    piles: float = 0.18
    # Letters.
    glyphs: float = 0.12

    def __post_init__(self):
        weights = [getattr(self, f.name) for f in fields(self)]
        if min(weights) < 0 or sum(weights) <= 0:
            raise ConfigError(
                "", f"has weights {weights}; must be non-negative with a positive sum"
            )

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))

    def counts(self, total: int) -> dict[str, int]:
        """Whole numbers that add up to `total`: cumulative rounding."""
        weights = {f.name: getattr(self, f.name) for f in fields(self)}
        scale, sum_so_far, placed, result = total / self.total, 0.0, 0, {}
        for name, weight in weights.items():
            sum_so_far += weight * scale
            result[name] = round(sum_so_far) - placed
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
    # Patches of a step.
    patches_per_step: int = 32768
    # The most objects of a pile.
    objects: int = 8
    # The most moving shapes that are rendered of a size; steps draw from them.
    shape_pool: int = 16384
    # The same for all other pictures, which take longer to make than to train on.
    texture_pool: int = 16384
    # Steps after which the textures of a size are made anew.
    refresh_every: int = 1000
    # The share of every sort of picture.
    mix: MixConfig = field(default_factory=MixConfig)

    def __post_init__(self):
        if not self.sizes:
            raise ConfigError("sizes", "is empty; must list [width, height, weight]")
        for width, height, weight in self.sizes:
            if width % 16 or height % 16 or min(width, height) < 32 or weight <= 0:
                message = (
                    f"has [{width}, {height}, {weight}]; sides must be multiples of 16 from 32 on,"
                    " the weight positive"
                )
                raise ConfigError("sizes", message)
        for name in ("patches_per_step", "objects", "shape_pool", "texture_pool", "refresh_every"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"is {getattr(self, name)}, must be at least 1")

    def size_at(self, seed: int, step: int) -> tuple[int, int]:
        """`(width, height)` of the step's batch."""
        point = (
            (rng.key(seed, "size", step) & 0xFFFF_FFFF)
            / 2**32
            * sum(weight for *_, weight in self.sizes)
        )
        for width, height, weight in self.sizes:
            point -= weight
            if point < 0:
                return width, height
        return self.sizes[-1][:2]

    def batch_size(self, width: int, height: int) -> int:
        return max(1, self.patches_per_step * 256 // (width * height))


@dataclass
class Shapes:
    """Moving shapes as `pixels (N, 3, H, W)` uint8; `tokens (N, T)` of a caption each, when
    captions are wanted; `facts (N,)`: equal numbers, equal colours, shapes, sizes and
    background."""

    pixels: Tensor
    tokens: Tensor | None
    facts: Tensor


@dataclass
class Pictures:
    """`pixels (B, 3, H, W)` in [0, 1]. The first `len(facts)` are moving shapes, described by
    `tokens` and `facts`."""

    pixels: Tensor
    tokens: Tensor | None
    facts: Tensor


def _named(facts: moving_shapes.Facts) -> tuple:
    return facts.background, tuple(
        sorted((item.color, item.shape, item.size) for item in facts.objects)
    )


def moving_shapes_of(
    seed: int,
    count: int,
    width: int,
    height: int,
    device: torch.device,
    tokenize: Tokenize | None = None,
) -> Shapes:
    """`count` frames: about half from the ends and the middle of clips, a tenth with several
    objects, the rest stills."""
    size = {"width": width, "height": height}
    clips = moving_shapes.draw(
        rng.key(seed, "clips"), range(count // (2 * CLIP_FRAMES)), video=True, **size
    )
    many = moving_shapes.draw(
        rng.key(seed, "many"), range(count // 10), video=False, variant="many", **size
    )
    rest = count - CLIP_FRAMES * len(clips) - len(many)
    stills = moving_shapes.draw(rng.key(seed, "stills"), range(rest), video=False, **size)
    frames = moving_shapes.render(clips, frames=CLIP_FRAMES, device=device, **size).flatten(0, 1)
    pixels = torch.cat([frames, moving_shapes.render(many + stills, device=device, **size)[:, 0]])
    # A frame of a clip shows no motion, so its caption must not name one.
    shown = [
        replace(f, objects=tuple(replace(o, motion=None) for o in f.objects))
        for f in clips
        for _ in range(CLIP_FRAMES)
    ]
    shown += many + stills
    numbers: dict[tuple, int] = {}
    facts = torch.tensor(
        [numbers.setdefault(_named(f), len(numbers)) for f in shown], device=device
    )
    tokens = None
    if tokenize is not None:
        tokens = tokenize(
            [moving_shapes.caption(f, seed, i, complete=False) for i, f in enumerate(shown)]
        ).to(device)
    return Shapes(pixels, tokens, facts)


class PictureSource:
    """Batches by step; `batch(step)` is a function of (config, seed, step) alone."""

    def __init__(
        self,
        config: ImagesConfig,
        seed: int,
        device: torch.device,
        tokenize: Tokenize | None = None,
    ):
        self.config, self.seed, self.device, self.tokenize = config, seed, device, tokenize
        self._pools: dict[tuple[int, int], Shapes] = {}
        self._textures: dict[tuple[int, int], tuple[int, Tensor]] = {}  # size → (epoch, pictures)

    def pool(self, width: int, height: int) -> Shapes:
        """All moving shapes of one size, rendered when first wanted."""
        if (width, height) not in self._pools:
            count = max(1, min(self.config.shape_pool, POOL_PIXELS // (width * height)))
            seed = rng.key(self.seed, "shapes", width, height)
            self._pools[width, height] = moving_shapes_of(
                seed, count, width, height, self.device, self.tokenize
            )
        return self._pools[width, height]

    def textures(self, width: int, height: int, step: int) -> Tensor:
        """The other pictures `(N, 3, H, W)` uint8 that step draws from: a function of the size and
        `step // refresh_every`."""
        epoch = step // self.config.refresh_every
        if self._textures.get((width, height), (None,))[0] != epoch:
            count = max(1, min(self.config.texture_pool, POOL_PIXELS // (width * height)))
            chunk = max(1, TEXTURE_CHUNK_PIXELS // (width * height))
            draws = rng.Draws.of(
                rng.key(self.seed, "textures", width, height), epoch, count, self.device
            )
            counts = (
                replace(self.config.mix, shapes=0.0).counts
                if self.config.mix.shapes < self.config.mix.total
                else None
            )
            parts = (
                [
                    self._made(draws[i : i + chunk], counts, width, height)
                    for i in range(0, count, chunk)
                ]
                if counts
                else []
            )
            pictures = (
                torch.cat(parts)
                if parts
                else torch.empty(0, 3, height, width, dtype=torch.uint8, device=self.device)
            )
            self._textures[width, height] = (epoch, pictures)
        return self._textures[width, height][1]

    def batch(self, step: int, size: tuple[int, int] | None = None) -> Pictures:
        """The pictures of a step, moving shapes first; `size` replaces the drawn one."""
        width, height = size or self.config.size_at(self.seed, step)
        total = self.config.batch_size(width, height)
        shapes = self.config.mix.counts(total)["shapes"]
        draws = rng.Draws.of(rng.key(self.seed, "pictures"), step, total, self.device)
        where = draws.uniform("picture", 1)[:, 0]
        pool, others = self.pool(width, height), self.textures(width, height, step)
        chosen = (where[:shapes] * len(pool.pixels)).long()
        made = _turned(draws[shapes:], others[(where[shapes:] * len(others)).long()])
        pixels = to_unit(torch.cat([pool.pixels[chosen], made]))
        return Pictures(
            pixels, None if pool.tokens is None else pool.tokens[chosen], pool.facts[chosen]
        )

    def _made(
        self, draws: rng.Draws, mix: Callable[[int], dict[str, int]], width: int, height: int
    ) -> Tensor:
        makers = {
            "gradients": textures.gradients,
            "clouds": textures.clouds,
            "patterns": textures.patterns,
            "piles": lambda d, h, w: textures.piles(d, _ground(d, h, w), self.config.objects),
            "glyphs": lambda d, h, w: letters(d, _ground(d, h, w)),
        }
        counts, parts, start = mix(len(draws.indices)), [], 0
        for name, make in makers.items():
            parts.append(make(draws[start : start + counts[name]], height, width))
            start += counts[name]
        made = torch.cat(parts)
        made = torch.where(
            draws.uniform("jitter/none", 1, 1, 1) < 0.4, made, textures.jitter(draws, made)
        )
        return to_uint8(made)


def _turned(draws: rng.Draws, pictures: Tensor) -> Tensor:
    """Each picture mirrored along each axis or not, its colour channels in any order: a pool seen
    24 times as large."""
    for axis, name in ((-1, "mirror/x"), (-2, "mirror/y")):
        pictures = torch.where(draws.uniform(name, 1, 1, 1) < 0.5, pictures.flip(axis), pictures)
    order = draws.uniform("channels", 3).argsort(1)
    return pictures.gather(1, order[:, :, None, None].expand_as(pictures))


def _ground(draws: rng.Draws, height: int, width: int) -> Tensor:
    """What lies under objects and letters: two thirds blends, one third clouds."""
    cloudy = len(draws.indices) // 3
    return torch.cat(
        [
            textures.clouds(draws[:cloudy], height, width),
            textures.gradients(draws[cloudy:], height, width),
        ]
    )
