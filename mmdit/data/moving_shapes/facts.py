"""What a sample of the moving-shapes data set shows: the vocabulary of version 1, and the draw of
sample `i`.

Lengths are in units of S, the short side of the canvas, so that facts drawn for one size hold at
every size of the same aspect ratio. `x` grows to the right and `y` downwards. A sample is a
function of (version, seed, index) alone: any order of workers and any subset gives the same facts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch

from mmdit.rng import Draws, key

VERSION = 1

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 170),
    "cyan": (50, 200, 210),
    "orange": (245, 130, 30),
    "white": (245, 245, 245),
}
BACKGROUNDS = {
    "black": (12, 12, 12),
    "gray": (120, 120, 120),
    "navy": (15, 25, 75),
    "brown": (95, 60, 35),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
# over the radius: half side, inner radius, width of the ring, half width of an arm
SQUARE, INNER_STAR, RING, CROSS = 0.86, 0.42, 0.56, 0.33
SIZES = {"small": (0.16, 0.18), "large": (0.25, 0.30)}  # radius / S
MOTIONS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
ATTRIBUTES = ("color", "shape", "size", "background", "motion")

TRAVEL = 0.38  # path of a moving object / S
MARGIN = 0.01  # between an object's bounding circle and the edge of the canvas / S
GAP = 0.05  # between the circles that hold two objects / S
# the farthest corner / radius, where not 1
REACH = {"square": math.hypot(SQUARE, SQUARE), "cross": math.hypot(1, CROSS)}
JITTER = 6  # of an object's colour, per channel, of 255

# One pair a shape and a colour at most once each (a Latin diagonal): every word is seen in
# training, these pairs never.
HELD_OUT = tuple(zip(("red", "green", "blue", "yellow", "purple", "cyan"), SHAPES, strict=True))
TRAIN = tuple(
    (color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in HELD_OUT
)
SPLITS = {"train": TRAIN, "held_out": HELD_OUT}
VARIANTS = ("one", "many")


@dataclass(frozen=True)
class Object:
    """Hold one shape: its named attributes, and what was drawn for it. `(x, y)` is its centre in
    the first frame."""

    color: str
    shape: str
    size: str
    motion: str | None  # None: an image
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]

    def velocity(self) -> tuple[float, float]:
        """Return the displacement from the first frame to the last, in units of S."""
        dx, dy = MOTIONS[self.motion or "still"]
        return dx * TRAVEL, dy * TRAVEL


@dataclass(frozen=True)
class Facts:
    """Hold one sample: one object, or two or three of different colours that never touch (variant
    `many`)."""

    background: str
    objects: tuple[Object, ...]

    @property
    def attributes(self) -> tuple[str, ...]:
        """Return the names that a complete caption of this sample states."""
        return ATTRIBUTES if self.objects[0].motion is not None else ATTRIBUTES[:-1]

    def to_json(self) -> dict:
        return {
            "version": VERSION,
            "background": self.background,
            "objects": [asdict(item) | {"rgb": list(item.rgb)} for item in self.objects],
        }

    @staticmethod
    def from_json(record: dict) -> Facts:
        if record.get("version") != VERSION:
            version = record.get("version")
            raise ValueError(
                f"facts are of moving shapes version {version!r}, this code knows {VERSION}: make"
                " the data again"
            )
        objects = tuple(Object(**{**item, "rgb": tuple(item["rgb"])}) for item in record["objects"])
        return Facts(record["background"], objects)


def check_canvas(width: int, height: int) -> None:
    """Refuse a canvas that the data set is not defined on."""
    for name, value in (("width", width), ("height", height)):
        if value < 16 or value % 16:
            nearest = max(16, round(value / 16) * 16)
            raise ValueError(
                f"{name} is {value}; moving shapes need a multiple of 16, for example {nearest}"
            )


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Refuse a value that is none of the known ones."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}; must be one of {', '.join(known)}")


def draw(
    seed: int,
    indices: Iterable[int],
    *,
    video: bool,
    width: int,
    height: int,
    split: str = "train",
    variant: str = "one",
) -> list[Facts]:
    """Return the facts of the samples `indices`. `split`: `train` never shows a held-out (colour,
    shape) pair, `held_out` only those.

    For one object the named attributes do not depend on the canvas; `width / height` only scales
    the range of positions."""
    check_canvas(width, height)
    check_choice("split", split, SPLITS)
    check_choice("variant", variant, VARIANTS)
    indices = torch.as_tensor(list(indices), dtype=torch.int64)
    pairs = SPLITS[split]
    stream = key("moving_shapes", VERSION, seed)
    canvas = (width / min(width, height), height / min(width, height))
    count = np.ones(len(indices), int)
    if variant == "many":
        count += 1 + _below(Draws(stream, 0, indices), "count", 2)

    result: list[Facts | None] = [None] * len(indices)
    pending, attempt = np.arange(len(indices)), 0
    # arrangements in which objects touch are drawn again, from the next attempt's key, more at once
    while len(pending):
        draws = Draws(stream, attempt, indices[torch.from_numpy(pending)])
        shape = (1, 1) if variant == "one" else (min(8 * 4**attempt, 1024), 3)
        drawn = _candidates(draws, pairs, video, canvas, shape)
        fits = _apart(drawn, count[pending], pairs)
        first = fits.argmax(1)
        for row in np.flatnonzero(fits.any(1)):
            chosen = {name: values[row, first[row]] for name, values in drawn.items()}
            result[pending[row]] = _facts(chosen, count[pending[row]], pairs, video)
        pending, attempt = pending[~fits.any(1)], attempt + 1
    return [facts for facts in result if facts is not None]


def _below(draws: Draws, purpose: str, count: int, *shape: int) -> np.ndarray:
    return (draws.uniform(purpose, *shape).double().numpy() * count).astype(int)


def _candidates(
    draws: Draws, pairs: tuple, video: bool, canvas: tuple[float, float], shape: tuple[int, int]
) -> dict:
    """Return the numbers of every candidate arrangement and object slot: arrays `(N, candidates,
    slots, …)`."""
    pair = _below(draws, "pair", len(pairs), *shape)
    size = _below(draws, "size", len(SIZES), *shape)
    size[..., 1:] = 0  # of several objects one may be large: two would seldom fit
    motion = _below(draws, "motion", len(MOTIONS), *shape) if video else np.zeros_like(pair)
    low, high = np.moveaxis(np.array(list(SIZES.values()))[size], -1, 0)
    radius = low + (high - low) * draws.uniform("radius", *shape).double().numpy()
    velocity = TRAVEL * np.array(list(MOTIONS.values()), float)[motion]
    near = radius[..., None] + MARGIN + np.maximum(0, -velocity)
    far = np.array(canvas) - radius[..., None] - MARGIN - np.maximum(0, velocity)
    start = near + (far - near) * draws.uniform("position", *shape, 2).double().numpy()
    jitter = _below(draws, "jitter", 2 * JITTER + 1, *shape, 3) - JITTER
    background = _below(draws, "background", len(BACKGROUNDS))
    background = np.broadcast_to(background[:, None], pair.shape[:2])
    return {
        "pair": pair,
        "size": size,
        "motion": motion,
        "radius": radius,
        "start": start,
        "velocity": velocity,
        "jitter": jitter,
        "background": background,
    }


def _apart(drawn: dict, count: np.ndarray, pairs: tuple) -> np.ndarray:
    """Return `(N, candidates)`: whether the first `count` objects differ in colour and never come
    nearer than GAP."""
    fits = np.ones(drawn["pair"].shape[:2], bool)
    color = np.array([list(COLORS).index(name) for name, _ in pairs])[drawn["pair"]]
    reach = np.array([REACH.get(name, 1.0) for _, name in pairs])[drawn["pair"]] * drawn["radius"]
    slots = color.shape[-1]
    for a in range(slots):
        for b in range(a + 1, slots):
            offset = drawn["start"][..., a, :] - drawn["start"][..., b, :]
            drift = drawn["velocity"][..., a, :] - drawn["velocity"][..., b, :]
            # objects that move alike keep their distance
            square = np.maximum((drift**2).sum(-1), 1e-12)
            closest = np.clip(-(offset * drift).sum(-1) / square, 0, 1)  # the time of it
            distance = np.sqrt(((offset + closest[..., None] * drift) ** 2).sum(-1))
            far = distance >= reach[..., a] + reach[..., b] + GAP
            differ = color[..., a] != color[..., b]
            fits &= (far & differ) | (count <= b)[:, None]
    return fits


def _facts(chosen: dict, count: int, pairs: tuple, video: bool) -> Facts:
    objects = []
    for slot in range(count):
        color, shape = pairs[chosen["pair"][slot]]
        x, y = chosen["start"][slot]
        red, green, blue = (
            value + int(delta)
            for value, delta in zip(COLORS[color], chosen["jitter"][slot], strict=True)
        )
        objects.append(
            Object(
                color=color,
                shape=shape,
                size=list(SIZES)[chosen["size"][slot]],
                motion=list(MOTIONS)[chosen["motion"][slot]] if video else None,
                x=round(float(x), 5),
                y=round(float(y), 5),
                radius=round(float(chosen["radius"][slot]), 5),
                rgb=(red, green, blue),
            )
        )
    return Facts(list(BACKGROUNDS)[int(chosen["background"])], tuple(objects))
