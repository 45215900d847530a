"""Find the shots of a film, the runs of frames between two cuts, from the numbers of its frames.

A cut is a frame that differs from the one before it
- by at least `cut`, even after removing a change of light,
- several times as much as neighbouring frames differ (fast motion changes every frame), and
- for longer than a few frames (after a flash the scene is the same as before).

A dissolve or fade is a stretch of frames in which one picture turns into another by mixing: in its
middle is the mean of both, with correspondingly less contrast. (In a pan, the middle shows another
picture.) Its frames belong to no shot, and neither do black or damaged frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mmdit.config import ConfigError, least
from mmdit.data.preparing.shot_signals import BLENDS, NAMES

RATIO = 2.0  # of a cut to the mean change of its busiest neighbours
NEAR = 12  # frames on each side that are neighbours
NOISE = 0.5  # of the change that compression alone causes
LIGHT = 1 / 3  # the largest share that removing a change of light leaves of it
LASTING = (2, 4, 8)  # frames after which a cut must still be visible
STILL_LAG = 32  # frames over which a still shot does not change

# dissolves:
CHANGED = 0.6  # the largest correlation of its ends
BENT = 0.4  # the largest distance of its middle from their mean, relative to their distance
SHORTER = 0.99
DIP = 0.1  # how far the variance of the middle may exceed that of a mean


@dataclass(frozen=True)
class ShotSettings:
    """Where a film is cut, and which pieces are kept."""

    # The least difference of two frames, of 255, that counts as a cut.
    cut: float = 4.0
    # Shots that are shorter are dropped.
    min_seconds: float = 2.0
    # Shots that are longer are cut into equal pieces.
    max_seconds: float = 10.0
    # Frames count as black if their pixels, except for the brightest 2 %, are darker than this
    # share of white.
    black: float = 0.12
    # Pieces count as still if no frame differs by more than this, of 255, from the one 32 frames
    # before.
    still: float = 0.5

    def __post_init__(self):
        least(self, 0, "black", "still")
        least(self, 0, "cut", "min_seconds", above=True)
        if self.max_seconds < 2 * self.min_seconds:
            raise ConfigError(
                "max_seconds",
                f"is {self.max_seconds:g}; must be at least twice min_seconds"
                f" ({self.min_seconds:g}), or the halves of a long shot would be too short",
            )


@dataclass(frozen=True)
class Piece:
    """A run of frames of a film, from `first` up to, but not including, `end`. `problem`: why it is
    left out, or ""."""

    first: int
    end: int
    problem: str = ""


def columns(signals: np.ndarray) -> dict[str, np.ndarray]:
    """Return the numbers of a film's frames `(frames, len(NAMES))` by name."""
    return dict(zip(NAMES, signals.T, strict=True))


def hard_cuts(film: Mapping[str, np.ndarray], settings: ShotSettings) -> list[int]:
    """Return the frames at which a new shot begins abruptly."""
    change, step = film["change"], film["step"]
    around = _busiest_neighbours(step)
    cuts = []
    clear = (change >= settings.cut) & (change >= LIGHT * step)
    for frame in np.flatnonzero(clear & (step >= RATIO * (NOISE + around))):
        lasting = True
        for lag in LASTING:
            after = frame - 1 + lag
            for place in (frame, after):
                seen = place < len(step) and film[f"far_{lag}"][place] > 0
                lasting &= not seen or film[f"far_{lag}"][place] >= step[frame] / 2
        if lasting:
            cuts.append(int(frame))
    return cuts


def _busiest_neighbours(values: np.ndarray) -> np.ndarray:
    """Return, for each value, the mean of the largest third of its neighbours, up to NEAR on each
    side."""
    padded = np.pad(values, NEAR)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * NEAR + 1)
    others = np.sort(np.delete(windows, NEAR, axis=1), axis=1)
    return others[:, -(2 * NEAR // 3) :].mean(1)


def gradual_changes(
    film: Mapping[str, np.ndarray], cuts: list[int], least_cut: float
) -> list[tuple[int, int]]:
    """Return the dissolves and fades: for each, the last frame of the old picture and the first of
    the new one. None of them contains one of `cuts`."""
    candidates = []
    numbers = np.arange(len(film["time"]))
    # the first frame of the shot to which each frame belongs
    begins = np.concatenate([[0], cuts])[np.searchsorted(cuts, numbers, side="right")]
    for lag in BLENDS:
        far, likeness = film[f"far_{lag}"], film[f"likeness_{lag}"]
        variance = film["variance"]
        before, between = np.roll(variance, lag), np.roll(variance, lag - lag // 2)
        mixed = (before + variance + 2 * likeness * np.sqrt(before * variance)) / 4
        mixing = (
            (numbers - lag >= begins)
            & (far >= 2 * least_cut)
            & (likeness <= CHANGED)
            & (film[f"bend_{lag}"] <= BENT * far)
            & (between <= mixed + DIP * (before + variance) / 2)
        )
        for end in np.flatnonzero(mixing).tolist():
            clear = far[end] - 2 * film[f"bend_{lag}"][end]
            candidates.append((float(clear) * SHORTER**lag, end - lag, end))
    candidates.sort(reverse=True)
    changes: list[tuple[int, int]] = []
    for _, first, end in candidates:
        if all(end <= other_first or other_end <= first for other_first, other_end in changes):
            changes.append((first, end))
    return sorted(changes)


def find_shots(film: Mapping[str, np.ndarray], settings: ShotSettings) -> list[Piece]:
    """Return the shots of a film, and the stretches between them that belong to none, in order."""
    count = len(film["time"])
    problems = np.full(count, "", dtype=object)
    cuts = hard_cuts(film, settings)
    for first, end in gradual_changes(film, cuts, settings.cut):
        problems[first + 1 : end] = "a dissolve or fade"
    white = 235 - 16  # range of luma in videos, where black is 16
    if settings.black:
        problems[film["bright"] < 16 + settings.black * white] = "black"
    problems[np.isnan(film["bright"])] = "damaged"
    borders = {0, count, *cuts}
    borders |= set((np.flatnonzero(problems[1:] != problems[:-1]) + 1).tolist())
    ordered = sorted(borders)
    return [Piece(first, end, str(problems[first])) for first, end in pairwise(ordered)]


def cut_into_clips(film: Mapping[str, np.ndarray], settings: ShotSettings) -> list[Piece]:
    """Return the clips into which a film is cut, and the pieces that are left out, in order."""
    pieces = []
    for shot in find_shots(film, settings):
        if shot.problem:
            pieces.append(shot)
            continue
        seconds = duration(film["time"], shot.first, shot.end)
        parts = max(1, int(np.ceil(seconds / settings.max_seconds - 1e-3)))
        places = np.linspace(shot.first, shot.end, parts + 1).round().astype(int).tolist()
        for first, end in pairwise(places):
            pieces.append(Piece(first, end, _problem(film, first, end, settings)))
    return pieces


def _problem(film: Mapping[str, np.ndarray], first: int, end: int, settings: ShotSettings) -> str:
    """Return why a piece of a shot is left out, or ""."""
    if duration(film["time"], first, end) < settings.min_seconds - 1e-3:
        return "too short"
    lag = STILL_LAG if end - first > STILL_LAG else 2
    changes = film[f"far_{lag}"][first + lag : end]
    if settings.still and len(changes) and changes.max() <= settings.still:
        return "still"
    return ""


def duration(times: np.ndarray, first: int, end: int) -> float:
    """Return for how many seconds frames are shown; the last frame of a film counts as long as the
    mean frame."""
    if end < len(times):
        return float(times[end] - times[first])
    mean = float(times[-1] - times[0]) / max(1, len(times) - 1)
    return float(times[-1] - times[first]) + mean
