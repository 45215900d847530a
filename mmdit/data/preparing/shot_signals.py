"""Measure what a detector of cuts needs to know about each frame of a film: some thirty numbers,
measured in one pass over thumbnails. At most 65 thumbnails are held at a time, so films may have
any length; and a film can be measured in parts, with the same numbers as in one go.

`step` compares a frame with the one before it; `change` does so after removing a change of light.
For each `k` in LAGS, `far_k` compares it with the frame `k` before. For each `k` in BLENDS,
`bend_k` is the distance of the frame half way between these two from their mean (in a dissolve it
equals that mean), and `likeness_k` is the correlation of their luma.
"""

from __future__ import annotations

from collections import deque

import numpy as np

SIZE = (64, 36)  # of a thumbnail, in which noise and small motion are averaged out
BLENDS = (6, 8, 12, 16, 24, 32, 48, 64)
LAGS = (2, 4, *BLENDS)
NAMES = (
    *("time", "step", "change", "bright", "variance"),
    *(f"far_{lag}" for lag in LAGS),
    *(f"bend_{lag}" for lag in BLENDS),
    *(f"likeness_{lag}" for lag in BLENDS),
)
HISTORY = max(LAGS)  # the number of earlier frames on which the numbers of a frame depend
GREY = 128  # the value of colour channels in grey
ALIKE = 0.9  # the least correlation of two pictures of one scene


class ShotSignals:
    """Takes the thumbnails of a film one by one (`add`); each call returns the numbers of its
    frame, in the order of NAMES."""

    def __init__(self) -> None:
        self.frames: deque[np.ndarray] = deque(maxlen=HISTORY + 1)  # the newest last

    def add(self, thumbnail: np.ndarray | None, time: float) -> np.ndarray:
        """Return the numbers of the next frame, float32 `(len(NAMES),)`. `thumbnail`: uint8 YUV
        `(3, H, W)`, shown at `time` seconds. Numbers that would need frames before the first are 0.
        None stands for a frame that cannot be decoded: its numbers are nan, and the next frame
        counts as a first one."""
        if thumbnail is None:
            self.frames.clear()
            return np.array([time, *[np.nan] * (len(NAMES) - 1)], np.float32)
        frame = thumbnail.astype(np.int16)
        luma = thumbnail[0]
        bright = float(np.percentile(luma, 98))
        self.frames.append(frame)
        values = {"time": time, "bright": bright, "variance": float(luma.var())}
        if len(self.frames) > 1:
            values["step"], values["change"] = _step(self.frames[-2], frame)
        for lag in LAGS:
            if len(self.frames) <= lag:
                break
            before = self.frames[-1 - lag]
            values[f"far_{lag}"] = float(np.abs(frame - before).mean())
            if lag in BLENDS:
                between = 2 * self.frames[-1 - lag // 2]
                values[f"bend_{lag}"] = float(np.abs(between - frame - before).mean()) / 2
                values[f"likeness_{lag}"] = _likeness(before[0], frame[0])
        return np.array([values.get(name, 0.0) for name in NAMES], np.float32)


def _step(before: np.ndarray, frame: np.ndarray) -> tuple[float, float]:
    """Return the mean absolute difference of two thumbnails; and the same after the first was
    brought to the brightness and contrast of the second, if the two look alike."""
    step = float(np.abs(frame - before).mean())
    if _likeness(before[0], frame[0]) < ALIKE:
        return step, step
    old, new = before[0] - before[0].mean(), frame[0] - frame[0].mean()
    gain = (old * new).mean() / (old * old).mean()
    luma = np.abs(new - gain * old).mean()
    colour = np.abs((frame[1:] - GREY) - gain * (before[1:] - GREY)).mean()
    return step, min(step, float(luma + 2 * colour) / 3)


def _likeness(first: np.ndarray, second: np.ndarray) -> float:
    """Return the correlation of two pictures; 0 if either has no contrast."""
    one, other = first - first.mean(), second - second.mean()
    scale = np.sqrt((one * one).mean() * (other * other).mean())
    return float((one * other).mean() / scale) if scale > 1 else 0.0
