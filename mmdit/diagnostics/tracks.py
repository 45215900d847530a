"""The tracks of the record log: tasks to be reached as fast as possible, each on one GPU."""

from __future__ import annotations

from dataclasses import dataclass

LEVEL = 0.95  # the rates of a record must lie above this
MOST_P = 0.01  # with a p-value below this
FEWEST_SEEDS = 5


@dataclass(frozen=True)
class Track:
    """State what a record draws, and which of its rates must lie above LEVEL. `frames`, `width` and
    `height` are those of the last score of the last stage; `prompts`: the fewest prompts of a list,
    for each seed."""

    title: str
    aim: float  # seconds
    frames: int
    width: int
    height: int
    rates: tuple[str, ...] = ("held_out",)
    prompts: int = 256
    caching: bool = False  # whether the time of caching counts, too


CLIPS = ("held_out", "left_right")
TRACKS = {
    "pictures_128": Track("pictures of 128x128", 30, 1, 128, 128),
    "pictures_448": Track("pictures of 448x256", 60, 1, 448, 256),
    "clips_128": Track("clips of 16 frames of 128x128", 180, 16, 128, 128, CLIPS),
    "road": Track(
        "clips of 80 frames of 448x256, caching included", 900, 80, 448, 256, CLIPS, 128, True
    ),
}
