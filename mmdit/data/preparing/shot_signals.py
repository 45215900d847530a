"""Measure what a detector of cuts needs to know of each frame of a film: some thirty numbers,
measured in one pass over thumbnails. No more than 65 of these are held at a time, so the length of
a film does not matter; and a film can be measured in parts, whose numbers are those of the whole.

`step` compares a frame with the one before it, `change` does so whatever the light does. For `k` of
LAGS, `far_k` compares it with the frame `k` before. For those of BLENDS, `bend_k` is how far the
frame between the two is from their mean (in a dissolve it is that mean), and `likeness_k` is the
correlation of their luma.
"""

from __future__ import annotations

from collections import deque

import numpy as np

SIZE = (64, 36)  # of a thumbnail: noise and small motion are averaged out
BLENDS = (6, 8, 12, 16, 24, 32, 48, 64)
LAGS = (2, 4, *BLENDS)
NAMES = (
    *("time", "step", "change", "bright", "variance"),
    *(f"far_{lag}" for lag in LAGS),
    *(f"bend_{lag}" for lag in BLENDS),
    *(f"likeness_{lag}" for lag in BLENDS),
)
HISTORY = max(LAGS)  # frames before a frame that its numbers depend on
GREY = 128  # of colour
ALIKE = 0.9  # the correlation of two pictures of one scene


class ShotSignals:
    """Take thumbnails one by one, `add`; each returns the numbers of its frame, named NAMES."""

    def __init__(self) -> None:
        self.frames: deque[np.ndarray] = deque(maxlen=HISTORY + 1)  # the newest last

    def add(self, thumbnail: np.ndarray | None, time: float) -> np.ndarray:
        """Return the numbers of the next frame, float32 `(len(NAMES),)`; `thumbnail`: uint8 YUV
        `(3, H, W)`, shown at `time` seconds. What would need frames before the first is 0. None
        stands for a frame that cannot be decoded: its numbers are nan, and the next begins anew."""
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
    """Return the mean absolute difference of two thumbnails; and, of two that look alike, what is
    left of it when the first has been brought to the brightness and contrast of the second."""
    step = float(np.abs(frame - before).mean())
    if _likeness(before[0], frame[0]) < ALIKE:
        return step, step
    old, new = before[0] - before[0].mean(), frame[0] - frame[0].mean()
    gain = (old * new).mean() / (old * old).mean()
    luma = np.abs(new - gain * old).mean()
    colour = np.abs((frame[1:] - GREY) - gain * (before[1:] - GREY)).mean()
    return step, min(step, float(luma + 2 * colour) / 3)


def _likeness(first: np.ndarray, second: np.ndarray) -> float:
    """Return the correlation of two pictures; 0 where one has no contrast."""
    one, other = first - first.mean(), second - second.mean()
    scale = np.sqrt((one * one).mean() * (other * other).mean())
    return float((one * other).mean() / scale) if scale > 1 else 0.0
