"""Define what a sample of the moving-shapes data set can show: the vocabulary, and the combinations
of words that are held out of training.

Lengths are in units of S, the short side of the canvas, so that facts drawn for one size are valid
at every size of the same aspect ratio. `x` grows to the right and `y` downwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, pairwise

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
# relative to the radius: half side, inner radius, width of the ring, half width of an arm
SQUARE, INNER_STAR, RING, CROSS = 0.86, 0.42, 0.56, 0.33
SIZES = {"small": (0.16, 0.18), "large": (0.25, 0.30)}  # radius / S
MOTIONS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
ATTRIBUTES = ("color", "shape", "size", "background", "motion")
# The direction of the first of two objects, as seen from the second.
RELATIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}

TRAVEL = 0.38  # path of a moving object / S
MARGIN = 0.01  # between an object's bounding circle and the edge of the canvas / S
GAP = 0.05  # between the circles that hold two objects / S
# the distance of the farthest corner, relative to the radius, where it is not 1
REACH = {"square": math.hypot(SQUARE, SQUARE), "cross": math.hypot(1, CROSS)}
JITTER = 6  # of an object's colour, per channel, of 255

# One pair for each of the shapes, and none for two shapes of one colour (a Latin diagonal):
# training shows every word, but never these pairs.
HELD_OUT = tuple(zip(("red", "green", "blue", "yellow", "purple", "cyan"), SHAPES, strict=True))
TRAIN = tuple(
    (color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in HELD_OUT
)
SPLITS = {"train": TRAIN, "held_out": HELD_OUT}
VARIANTS = {"one": VERSION, "many": 2}  # and the version of the drawing code

# The tasks of GenEval, and what their captions state in addition to background and motion.
TASKS = {
    "single": ("count", "shape"),
    "two": ("count", "shape"),
    "counting": ("count", "shape"),
    "colors": ("count", "shape", "color"),
    "position": ("count", "shape", "position"),
    "attribution": ("count", "shape", "color"),
}
# The held-out combinations, which a scene of `many` shows only if its task is tested on them. Those
# of `two` are both shapes, in the order of SHAPES; those of `position` have the first shape left of
# the second, or above it.
_NEXT = (*SHAPES, *SHAPES)
HELD_OUT_OF_TASKS: dict[str, frozenset[tuple]] = {
    "single": frozenset(zip((*BACKGROUNDS, *BACKGROUNDS), SHAPES, strict=False)),
    "two": frozenset(zip(SHAPES[:3], SHAPES[3:], strict=True)),
    "counting": frozenset(zip((2, 3, 4) * 2, SHAPES, strict=True)),
    "colors": frozenset(HELD_OUT),
    "position": frozenset(zip(SHAPES, ("left",) * 6, _NEXT[1:], strict=False))
    | frozenset(zip(SHAPES, ("above",) * 6, _NEXT[2:], strict=False)),
    "attribution": frozenset(HELD_OUT),
}


@dataclass(frozen=True)
class Object:
    """One shape: its named attributes, and the numbers drawn for it. `(x, y)` is its centre in the
    first frame."""

    color: str
    shape: str
    size: str
    motion: str | None  # None in an image
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]

    def velocity(self) -> tuple[float, float]:
        """Return the displacement from the first frame to the last, in units of S."""
        dx, dy = MOTIONS[self.motion or "still"]
        return dx * TRAVEL, dy * TRAVEL

    def offset(self, other: Object, time: float) -> tuple[float, float]:
        """Return the vector from `other` to this object at a time from 0 (first frame) to 1 (last
        frame)."""
        (dx, dy), (other_dx, other_dy) = self.velocity(), other.velocity()
        x = self.x - other.x + time * (dx - other_dx)
        return x, self.y - other.y + time * (dy - other_dy)


def relation_of(x: float, y: float) -> str:
    """Return the relation of an object to another one from which it is at `(x, y)`: along the axis
    with the longer component."""
    if abs(x) > abs(y):
        return "left" if x < 0 else "right"
    return "above" if y < 0 else "below"


@dataclass(frozen=True)
class Facts:
    """The facts of one sample: one object; or, in variant `many`, one to four objects that never
    touch, and a task that decides what the caption states."""

    background: str
    objects: tuple[Object, ...]
    task: str | None = None

    @property
    def attributes(self) -> tuple[str, ...]:
        """Return the names of the attributes that a complete caption of this sample states."""
        if self.task is None:
            return ATTRIBUTES if self.objects[0].motion is not None else ATTRIBUTES[:-1]
        moving = () if self.objects[0].motion is None else ("motion",)
        return (*TASKS[self.task], "background", *moving)

    @property
    def relations(self) -> tuple[str, ...]:
        """Return the relation of each object to the next one, which holds all the time, if
        relations are the task; else an empty tuple."""
        if self.task != "position":
            return ()
        return tuple(relation_of(*a.offset(b, 0)) for a, b in pairwise(self.objects))

    @property
    def said(self) -> frozenset[tuple[str, str, str]]:
        """Return the stated relations of shapes, each in the form with "left" or "above"."""
        shapes = [item.shape for item in self.objects]
        stated = zip(shapes, self.relations, shapes[1:], strict=False)
        return frozenset(ordered(*words) for words in stated)

    @property
    def held_out(self) -> frozenset[str]:
        """Return the tasks of which this sample shows a held-out combination at any time."""
        colored = [(item.color, item.shape) for item in self.objects]
        held = held_out_words(self.background, colored, self.task)
        for a, b in combinations(self.objects, 2):
            for time in (0, 0.5, 1):
                shown = ordered(a.shape, relation_of(*a.offset(b, time)), b.shape)
                if shown in HELD_OUT_OF_TASKS["position"]:
                    return held | {"position"}
        return held

    def to_json(self) -> dict:
        variant = "one" if self.task is None else "many"
        record = {
            "version": VARIANTS[variant],
            "background": self.background,
            "objects": [vars(item) | {"rgb": list(item.rgb)} for item in self.objects],
        }
        if self.task is not None:
            record |= {"task": self.task, "relations": list(self.relations)}
        return record

    @staticmethod
    def from_json(record: dict) -> Facts:
        if record.get("version") not in VARIANTS.values():
            version, known = record.get("version"), " and ".join(map(str, VARIANTS.values()))
            raise ValueError(
                f"facts are of moving shapes version {version!r}, this code knows {known}: make"
                " the data again"
            )
        objects = tuple(Object(**{**item, "rgb": tuple(item["rgb"])}) for item in record["objects"])
        return Facts(record["background"], objects, record.get("task"))


def ordered(first: str, relation: str, second: str) -> tuple[str, str, str]:
    """Return the statement about two shapes in its form with "left" or "above"."""
    if relation in ("left", "above"):
        return first, relation, second
    return second, {"right": "left", "below": "above"}[relation], first


def held_out_words(
    background: str, colored: list[tuple[str, str]], task: str | None
) -> frozenset[str]:
    """Return the tasks of which objects with these `(color, shape)` on a background show a held-out
    combination, whatever their positions."""
    shapes = [shape for _, shape in colored]
    shown: dict[str, set[tuple]] = {
        "single": {(background, shape) for shape in shapes},
        "two": set(combinations(sorted(shapes, key=SHAPES.index), 2)),
        "counting": {(len(shapes), shapes[0])} if task == "counting" else set(),
        "colors": set(colored),
        "attribution": set(colored),
    }
    return frozenset(task for task, seen in shown.items() if seen & HELD_OUT_OF_TASKS[task])


def check_canvas(width: int, height: int) -> None:
    """Raise ValueError for a canvas size on which the data set is not defined."""
    for name, value in (("width", width), ("height", height)):
        if value < 16 or value % 16:
            nearest = max(16, round(value / 16) * 16)
            raise ValueError(
                f"{name} is {value}; moving shapes need a multiple of 16, for example {nearest}"
            )


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raise ValueError for a value that is not one of `known`."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}; must be one of {', '.join(known)}")
