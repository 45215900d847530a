"""Clips from video files (PyAV): looked at without decoding, then decoded once, at the frame rate that the config asks for.

The times stored in the file decide, not its stated rate: clips of variable frame rate move as a player would show them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

VIDEO_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".m4v", ".avi"}
NEAR = 0.1  # a rate this near to the asked one is taken as it is: 29.97 for 30, 25 for 24
MAX_FRAMES = 4096  # of one clip: all of them are encoded at once


@dataclass(frozen=True)
class Probe:
    """What a file holds, from its packets alone: size as displayed before rotation, when each frame is shown, and the length
    in seconds that the file states (0 where it does not)."""

    width: int
    height: int
    stamps: tuple[int, ...]  # in units of `tick`, ascending
    tick: float  # seconds
    stated: float

    @property
    def fps(self) -> float:
        """Mean rate; 0 for a single frame."""
        length = (self.stamps[-1] - self.stamps[0]) * self.tick
        return (len(self.stamps) - 1) / length if length else 0.0

    def plan(self, fps: float) -> list[int]:
        """Numbers of the frames to take, for `fps` a second. ValueError where frames would have to be repeated throughout."""
        times = (np.array(self.stamps, np.float64) - self.stamps[0]) * self.tick
        gaps = np.diff(times)
        if len(times) == 1:
            return [0]
        if self.fps < fps * (1 - NEAR):
            raise ValueError(f"too few frames a second: the file has {self.fps:.4g}, video.fps asks for {fps:g} and they "
                             f"would be repeated; set video.fps to at most {self.fps:.4g}, or leave the clip out")
        steady = gaps.max() < 1.5 * gaps.min() + self.tick
        if steady and self.fps <= fps * (1 + NEAR):
            chosen = list(range(len(times)))
        else:  # what is on the screen at k / fps (times may be rounded to milliseconds); the last frame stays a mean gap
            wanted = np.arange(0, times[-1] + gaps.mean() - 0.1 / fps, 1 / fps)
            chosen = (np.searchsorted(times, wanted + 0.05 / fps, side="right") - 1).tolist()
        if len(chosen) > MAX_FRAMES:
            raise ValueError(f"too long: {len(chosen)} frames at {fps:g} a second; cut it into clips of at most {MAX_FRAMES}")
        return chosen


@contextmanager
def _opened(path: str | Path):
    """The container and its video stream; whatever the decoder raises becomes a ValueError without the path."""
    try:
        import av
    except ImportError:
        raise ValueError("video files need PyAV: pip install av") from None
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("no video in the file")
            yield container, container.streams.video[0]
    except FileNotFoundError:
        raise
    except (av.error.FFmpegError, EOFError) as error:
        raise ValueError(f"unreadable video: {error.strerror or type(error).__name__}") from None


def probe(path: str | Path) -> Probe:
    """Reads the packets and decodes nothing. ValueError: no video, no frame, or the file ends before its stated length."""
    with _opened(path) as (container, stream):
        packets = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
        packets = [stamp for stamp in packets if stamp is not None]
        if not packets:
            raise ValueError("video without frames")
        tick = float(stream.time_base)
        alone = (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0  # else perhaps the sound's length
        stated = float(stream.duration * stream.time_base) if stream.duration else alone
        ratio = float(stream.sample_aspect_ratio or 1)
        width, height = stream.codec_context.width, stream.codec_context.height
    found = Probe(round(width * ratio), height, tuple(sorted(set(packets))), tick, stated)
    length = (found.stamps[-1] - found.stamps[0]) * tick
    if stated > 1 and length < 0.8 * stated - 0.5:
        raise ValueError(f"truncated: the video ends at {length:.2f} s, the file states {stated:.2f} s")
    return found


def read_video(path: str | Path, fps: float) -> Iterator[Image.Image]:
    """RGB frames at `fps` a second, one at a time, as a player shows them: rotated as the file says, with square pixels.
    ValueError says what is wrong with the file; OSError if it is missing."""
    found = probe(path)
    wanted = [found.stamps[number] for number in found.plan(fps)]
    place = 0
    with _opened(path) as (container, stream):
        stream.codec_context.thread_count = 1  # the workers are the parallelism
        for frame in container.decode(stream):
            if place == len(wanted):
                break
            if frame.pts is None or frame.pts < wanted[place]:
                continue
            if frame.is_corrupt or frame.pts != wanted[place]:
                raise ValueError(f"damaged: a frame at {(wanted[place] - wanted[0]) * found.tick:.2f} s cannot be decoded")
            image = Image.fromarray(np.rot90(frame.to_ndarray(format="rgb24"), k=getattr(frame, "rotation", 0) // 90))
            if found.width != frame.width:  # pixels that are not square, before rotation
                size = (found.width, frame.height) if image.width == frame.width else (frame.height, found.width)
                image = image.resize(size, Image.Resampling.BICUBIC)
            while place < len(wanted) and wanted[place] == frame.pts:
                yield image
                place += 1
    if place < len(wanted):
        raise ValueError(f"damaged: {place} of {len(wanted)} frames could be decoded")
