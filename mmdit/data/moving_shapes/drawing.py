"""Draw the facts of sample `i`: what it shows, and where.

A sample is a function of (version, seed, index) alone: any order of workers and any subset of
samples give the same facts. Axes: n samples, c candidate arrangements, s objects.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import combinations
from random import Random

import numpy as np
import torch

from mmdit.data.moving_shapes.facts import (
    BACKGROUNDS,
    COLORS,
    GAP,
    HELD_OUT_OF_TASKS,
    JITTER,
    MARGIN,
    MOTIONS,
    REACH,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    TASKS,
    TRAVEL,
    VARIANTS,
    Facts,
    Object,
    check_canvas,
    check_choice,
    held_out_words,
)
from mmdit.rng import Draws, key

COUNTS: dict[str, tuple[int, ...]] = dict.fromkeys(TASKS, (2, 3))  # of objects
COUNTS |= {"single": (1,), "counting": (2, 3, 4), "colors": (1,)}
MOST = max(max(counts) for counts in COUNTS.values())
CROWD = {3: 0.85, 4: 0.75}  # the radius of so many objects, relative to that of a single one
CANDIDATES = 64  # arrangements that are tried at once
SLOPE = math.tan(math.radians(30))  # the largest slope to its axis at which a relation is stated


def draw(
    seed: int,
    indices: Iterable[int],
    *,
    video: bool,
    width: int,
    height: int,
    split: str = "train",
    variant: str = "one",
    task: str | None = None,
) -> list[Facts]:
    """Return the facts of the samples `indices`. `split`: `train` never shows a held-out
    combination; `held_out` of variant `one` shows only held-out (colour, shape) pairs, and that of
    `many` scenes with a held-out combination of their task and of no other task. `task`: for
    `many`, the task of every scene; None draws one for each.

    For a single object, the named attributes do not depend on the canvas; `width / height` only
    scales the range of positions."""
    check_canvas(width, height)
    check_choice("split", split, SPLITS)
    check_choice("variant", variant, VARIANTS)
    rows = torch.as_tensor(list(indices), dtype=torch.int64)
    stream = key("moving_shapes", VARIANTS[variant], seed)
    canvas = (width / min(width, height), height / min(width, height))
    if variant == "one":
        return _draw_one(Draws(stream, 0, rows), SPLITS[split], video, canvas)
    if task is not None:
        check_choice("task", task, TASKS)
    return _draw_many(stream, rows, task, split, video, canvas)


def _draw_one(draws: Draws, pairs: tuple, video: bool, canvas: tuple[float, float]) -> list[Facts]:
    count = len(draws.indices)
    pair = _below(draws, "pair", len(pairs), 1, 1).reshape(count)
    size = _below(draws, "size", len(SIZES), 1, 1).reshape(count)
    motion = np.zeros(count, int)
    if video:
        motion = _below(draws, "motion", len(MOTIONS), 1, 1).reshape(count)
    background = _below(draws, "background", len(BACKGROUNDS))
    scenes = []
    for row in range(count):
        item = (*pairs[pair[row]], list(SIZES)[size[row]], list(MOTIONS)[motion[row]])
        scenes.append(_Scene(None, list(BACKGROUNDS)[background[row]], (item,)))
    places = _places(draws, scenes, (1, 1), canvas)
    return [_facts(scene, places, row, 0, video) for row, scene in enumerate(scenes)]


def _draw_many(
    stream: int,
    indices: torch.Tensor,
    task: str | None,
    split: str,
    video: bool,
    canvas: tuple[float, float],
) -> list[Facts]:
    result: list[Facts | None] = [None] * len(indices)
    words = [_words(stream, index, task, split) for index in indices.tolist()]
    pending, attempt = list(range(len(indices))), 0
    # if no arrangement fits sizes and motions, these are drawn again, with the key of the next
    # attempt
    while pending:
        scenes = [_changed(words[k], stream, int(indices[k]), attempt, video) for k in pending]
        draws = Draws(stream, attempt, indices[pending])
        places = _places(draws, scenes, (CANDIDATES, MOST), canvas)
        fits = _arranged(places, scenes)
        for row, k in enumerate(pending):
            for candidate in np.flatnonzero(fits[row]).tolist():
                facts = _facts(scenes[row], places, row, candidate, video)
                if _facts_are_of(split, facts):
                    result[k] = facts
                    break
        pending, attempt = [k for k in pending if result[k] is None], attempt + 1
    return [facts for facts in result if facts is not None]


@dataclass(frozen=True)
class _Scene:
    """The contents of a scene without positions: `(color, shape, size, motion)` of each object."""

    task: str | None
    background: str
    objects: tuple[tuple[str, str, str, str], ...]

    @property
    def scale(self) -> float:
        """Return the radius of its objects relative to that of a single object."""
        return CROWD.get(len(self.objects), 1.0)


def _words(stream: int, index: int, task: str | None, split: str) -> _Scene:
    """Return the scene of a sample with all objects small and still; its words belong to the
    split."""
    numbers = Random(key("words", stream, index))
    task = task or _pick(numbers, TASKS)
    count = _pick(numbers, COUNTS[task])
    while True:
        background = _pick(numbers, BACKGROUNDS)
        colors, shapes = _some(numbers, COLORS, count), _some(numbers, SHAPES, count)
        if task == "counting":
            colors, shapes = colors[:1] * count, shapes[:1] * count
        colored = list(zip(colors, shapes, strict=True))
        held = held_out_words(background, colored, task)
        if _is_of(split, task, held, held | {"position"}):
            objects = tuple((*words, "small", "still") for words in colored)
            return _Scene(task, background, objects)


def _changed(scene: _Scene, stream: int, index: int, attempt: int, video: bool) -> _Scene:
    """Return the scene with sizes, and in clips motions, which are drawn anew at each attempt."""
    numbers = Random(key("changes", stream, index, attempt))
    count = len(scene.objects)
    sizes = ["small"] * count
    if count < 3 and scene.task != "counting":
        sizes[0] = _pick(numbers, SIZES)  # of several, one may be large: two would seldom fit
    motions = [_pick(numbers, MOTIONS) if video else "still" for _ in range(count)]
    if scene.task == "counting":
        motions = motions[:1] * count
    objects = []
    for (color, shape, *_), size, motion in zip(scene.objects, sizes, motions, strict=True):
        objects.append((color, shape, size, motion))
    return replace(scene, objects=tuple(objects))


def _pick(numbers: Random, options: Iterable):
    listed = tuple(options)
    return listed[int(numbers.random() * len(listed))]


def _some(numbers: Random, options: Iterable, count: int) -> list:
    """Return `count` different options, in random order."""
    return sorted(options, key=lambda _: numbers.random())[:count]


def _is_of(split: str, task: str, held: frozenset, stated: frozenset) -> bool:
    """Return whether a scene belongs to the split. `held`: the tasks of which it shows held-out
    combinations; `stated`: those of which its caption states them. In `train` there must be none;
    in `held_out` the scene's own task must be stated, and no other may be held (colors and
    attribution count as one)."""
    if split == "train":
        return not held
    alike = {"colors", "attribution"} if task in ("colors", "attribution") else {task}
    return task in stated and held <= alike


def _facts_are_of(split: str, facts: Facts) -> bool:
    held = facts.held_out  # includes relations of all pairs, of which a caption states only some
    stated = held if facts.said & HELD_OUT_OF_TASKS["position"] else held - {"position"}
    return _is_of(split, facts.task or "", held, stated)


def _below(draws: Draws, purpose: str, count: int, *shape: int) -> np.ndarray:
    return (draws.uniform(purpose, *shape).double().numpy() * count).astype(int)


def _places(
    draws: Draws, scenes: list[_Scene], shape: tuple[int, int], canvas: tuple[float, float]
) -> dict[str, np.ndarray]:
    """Return the numbers of all arrangements and objects, `shape` being (c, s), as arrays `(n, c,
    s, …)`. Values beyond the objects of a scene have no meaning."""
    drawn = draws.uniform("radius", *shape).double().numpy()
    low, high, reach = np.ones((3, len(scenes), 1, shape[1]))
    velocity = np.zeros((len(scenes), 1, shape[1], 2))
    for row, scene in enumerate(scenes):
        for slot, (_, form, size, motion) in enumerate(scene.objects):
            low[row, 0, slot], high[row, 0, slot] = SIZES[size]
            reach[row, 0, slot] = REACH.get(form, 1.0)
            velocity[row, 0, slot] = MOTIONS[motion]
    scale = np.array([scene.scale for scene in scenes])[:, None, None]
    radius, velocity = scale * (low + (high - low) * drawn), TRAVEL * velocity
    near = radius[..., None] + MARGIN + np.maximum(0, -velocity)
    far = np.array(canvas) - radius[..., None] - MARGIN - np.maximum(0, velocity)
    start = near + (far - near) * draws.uniform("position", *shape, 2).double().numpy()
    jitter = _below(draws, "jitter", 2 * JITTER + 1, *shape, 3) - JITTER
    return {
        "radius": radius,
        "reach": reach * radius,
        "start": start,
        "velocity": np.broadcast_to(velocity, start.shape),
        "jitter": jitter,
    }


def _arranged(places: dict[str, np.ndarray], scenes: list[_Scene]) -> np.ndarray:
    """Return `(n, c)`: whether objects never come nearer to each other than GAP and, in scenes
    about relations, whether each object keeps the same relation to the next one all the time."""
    start, velocity, reach = places["start"], places["velocity"], places["reach"]
    fits = np.ones(start.shape[:2], bool)
    count = np.array([len(scene.objects) for scene in scenes])[:, None]
    stated = np.array([scene.task == "position" for scene in scenes])[:, None]
    for a, b in combinations(range(start.shape[2]), 2):
        offset, drift = (
            start[..., a, :] - start[..., b, :],
            velocity[..., a, :] - velocity[..., b, :],
        )
        # objects that move alike keep their distance
        square = np.maximum((drift**2).sum(-1), 1e-12)
        closest = np.clip(-(offset * drift).sum(-1) / square, 0, 1)  # time of least distance
        distance = np.sqrt(((offset + closest[..., None] * drift) ** 2).sum(-1))
        fits &= (distance >= reach[..., a] + reach[..., b] + GAP) | (count <= b)
        if b == a + 1:
            clear = _clear_of_diagonals(offset, offset + drift)
            fits &= clear | ~stated | (count <= b)
    return fits


def _clear_of_diagonals(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return whether two vectors `(…, 2)` point along the same direction of the same axis, up to
    SLOPE; then all vectors between them do."""
    clear = np.zeros(first.shape[:-1], bool)
    for direction in RELATIONS.values():
        within = [
            np.abs(way @ direction[::-1]) <= SLOPE * (way @ direction) for way in (first, last)
        ]
        clear |= within[0] & within[1]
    return clear


def _facts(
    scene: _Scene, places: dict[str, np.ndarray], row: int, candidate: int, video: bool
) -> Facts:
    objects = []
    for slot, (color, shape, size, motion) in enumerate(scene.objects):
        x, y = places["start"][row, candidate, slot]
        red, green, blue = (
            value + int(delta)
            for value, delta in zip(
                COLORS[color], places["jitter"][row, candidate, slot], strict=True
            )
        )
        objects.append(
            Object(
                color=color,
                shape=shape,
                size=size,
                motion=motion if video else None,
                x=round(float(x), 5),
                y=round(float(y), 5),
                radius=round(float(places["radius"][row, candidate, slot]), 5),
                rgb=(red, green, blue),
            )
        )
    return Facts(scene.background, tuple(objects), scene.task)
