"""Clips from video files (PyAV): inspected without decoding, then decoded once, at the frame rate
that the config asks for. Animated pictures are read by Pillow instead (`animations`).

The times stored in the file count, not the rate that it states: clips of variable frame rate move
as in a player. The stated colours count, too: HDR is tone-mapped, wide gamuts become sRGB; if
nothing is stated, HD is taken as BT.709 and the rest as BT.601."""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from mmdit.data.dataset.animations import animation_frames, animation_times, is_picture
from mmdit.data.dataset.colours import BT2020, Coding, coding_of, stored_to_srgb
from mmdit.data.dataset.members import Source, VideoSpan, open_source
from mmdit.data.dataset.pictures import BACKGROUND
from mmdit.data.dataset.problems import Unusable
from mmdit.foreign import HEAD, stand_in

VIDEO_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".m4v", ".avi", ".mpg", ".mpeg", ".m2ts"}
VIDEO_SUFFIXES |= {".wmv", ".flv", ".3gp", ".ogv"}  # .ts and .mts are as often program text
NEAR = 0.1  # a rate this near to the wanted one is used unchanged: 29.97 for 30, 25 for 24
MAX_FRAMES = 4096  # of one clip, because all of them are encoded at once
MAX_FRAME_PIXELS = 8192 * 4352  # slightly more than 8K
MOST_STRETCHED = 16  # ratio of the sides of a pixel
MOST_DELAYED = 32  # frames: more than any codec holds back before it returns one
# FFmpeg's names of the containers that are opened; none of them can refer to other files
CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,ivf,flv,asf,ogg,mxf,dv"

Matrix = tuple[int, int, int, int]  # a, b, c, d of ISO 14496-12, 6.2.2


@dataclass(frozen=True)
class Probe:
    """Hold what the packets of a file say without decoding: the size as displayed before rotation,
    the time of each frame, the length in seconds that the file states (0 if it states none), and
    the times of key frames, where decoding can begin."""

    width: int
    height: int
    stamps: tuple[int, ...]  # in units of `tick`, ascending
    tick: float  # seconds
    stated: float
    keys: tuple[int, ...] = ()  # some of `stamps`

    def part(self, first: int, end: int) -> Probe:
        """Return the probe of the frames from number `first` up to, but not including, `end`.
        ValueError if there are not so many."""
        if end > len(self.stamps):
            problem = "its frames are not there"
            raise Unusable(problem, f"video_span ends at {end}, of {len(self.stamps)} frames")
        return replace(self, stamps=self.stamps[first:end])

    @property
    def fps(self) -> float:
        """Return the mean frame rate; 0 for a single frame."""
        length = (self.stamps[-1] - self.stamps[0]) * self.tick
        return (len(self.stamps) - 1) / length if length else 0.0

    def plan(self, fps: float) -> list[int]:
        """Return the numbers of the frames to take for `fps` frames a second. ValueError if frames
        would have to be repeated throughout."""
        times = (np.array(self.stamps, np.float64) - self.stamps[0]) * self.tick
        gaps = np.diff(times)
        if len(times) == 1:
            return [0]
        if self.fps < fps * (1 - NEAR):
            raise Unusable(
                "too few frames a second",
                f"the file has {self.fps:.4g}, video.fps asks for {fps:g} and they would be"
                f" repeated; set video.fps to at most {self.fps:.4g}, or leave the clip out",
            )
        steady = gaps.max() < 1.5 * gaps.min() + self.tick
        if steady and self.fps <= fps * (1 + NEAR):
            chosen = list(range(len(times)))
        else:
            # the frame that is on the screen at k / fps (times may be rounded to milliseconds); the
            # last frame stays for the mean time between frames
            wanted = np.arange(0, times[-1] + gaps.mean() - 0.1 / fps, 1 / fps)
            chosen = (np.searchsorted(times, wanted + 0.05 / fps, side="right") - 1).tolist()
            chosen = chosen or [0]  # the whole clip is shorter than a frame
        if len(chosen) > MAX_FRAMES:
            raise Unusable(
                "too long",
                f"{len(chosen)} frames at {fps:g} a second; cut it into clips of at most"
                f" {MAX_FRAMES}",
            )
        return chosen


@contextmanager
def _opened(path: Source):
    """Open the container and its video stream. Errors of the decoder become a ValueError without
    the path. FFmpeg gets the open file, not its name, and a closed list of containers, without
    those that list other files or addresses."""
    try:
        import av
    except ImportError:
        raise Unusable("video files need PyAV", "pip install av") from None
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none"}
    try:
        # a title that is not UTF-8 is no reason to leave a video out
        reading: dict[str, Any] = {"options": options, "metadata_errors": "replace"}
        with open_source(path) as file, av.open(file, **reading) as container:
            if not container.streams.video:
                raise Unusable("no video in the file")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise Unusable("unreadable video", "its codec is not known")
            # frames may be larger than the file states; FFmpeg counts its padding, too
            stream.codec_context.options = {"max_pixels": str(2 * MAX_FRAME_PIXELS)}
            yield container, stream
    except FileNotFoundError:
        raise
    except (av.error.FFmpegError, EOFError) as error:
        with open_source(path) as file:
            what = stand_in(file.read(HEAD))
        why = what or getattr(error, "strerror", None) or type(error).__name__
        raise Unusable("unreadable video", why) from None


@contextmanager
def _converting() -> Iterator[None]:
    """Raise Unusable for pixels that FFmpeg cannot convert. It reports a missing conversion as an
    error of the system, which is misleading."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        raise Unusable("unreadable video", str(error.strerror)) from None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_FRAME_PIXELS:
        most = f"{MAX_FRAME_PIXELS / 1e6:.0f} million pixels"
        size = f"{width}x{height}"
        raise Unusable("too large", f"frames of {size} are more than {most}; scale it down")


def probe(path: Source) -> Probe:
    """Return what a file holds. Packets are read but not decoded, except that animated pictures are
    decoded completely. ValueError if there is no video or no frame, or if the file ends before its
    stated length. A long video that holds several clips is read once."""
    if isinstance(path, VideoSpan):
        status = os.stat(path.path)
        state = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return _probe_once(path.path, state).part(path.first, path.end)
    if is_picture(path):
        (width, height), times = animation_times(path)
        _check_size(width, height)
        return Probe(width, height, tuple(times), 0.001, 0.0)
    with _opened(path) as (container, stream):
        shown, keys, untimed = set(), set(), 0
        for packet in container.demux(stream):
            untimed += bool(packet.size) and packet.pts is None
            if packet.size and packet.pts is not None and not packet.is_discard:
                shown.add(packet.pts)
                if packet.is_keyframe:
                    keys.add(packet.pts)
        if not shown:
            raise Unusable("video without frames")
        if untimed > len(shown):  # of two fields that make a frame, the second may have none
            raise _without_times(f"{untimed} of its packets have none")
        tick = float(stream.time_base)
        stated = start = 0.0  # seconds; Matroska may count from zero with a later first frame
        if stream.duration:
            stated = float(stream.duration * stream.time_base)
        elif container.duration and len(container.streams) == 1:  # else perhaps of the sound
            stated = container.duration / 1e6
            start = max(0.0, min(shown) * tick)
        width, height = stream.codec_context.width, stream.codec_context.height
        width = _square(width, height, stream)
    stamps = tuple(sorted(shown))
    length = (stamps[-1] - stamps[0]) * tick
    if stated > 1 and start + length < 0.8 * stated - 0.5:
        raise Unusable(
            "truncated", f"the video ends at {length:.2f} s, the file states {stated:.2f} s"
        )
    return Probe(width, height, stamps, tick, stated, tuple(sorted(keys)))


@lru_cache(maxsize=8)
def _probe_once(path: str, state: tuple[int, int, int]) -> Probe:
    """Return the probe of a file; computed once for each `state` (size and times)."""
    return probe(path)


def _without_times(what: str) -> Unusable:
    return Unusable(
        "the file does not say when its frames are shown",
        f"{what}; encode it anew (ffmpeg -i FILE NEW.mp4)",
    )


def _square(width: int, height: int, stream) -> int:
    """Return the width of a frame after its pixels are made square."""
    ratio = float(stream.sample_aspect_ratio or 1)
    if not 1 / MOST_STRETCHED <= ratio <= MOST_STRETCHED:
        shape = f"{ratio:.3g} times as wide as high"
        raise Unusable(f"its pixels are {shape}, which cannot be meant; encode it anew")
    width = max(1, round(width * ratio))
    _check_size(width, height)
    return width


def read_video(path: Source, fps: float) -> Iterator[Image.Image]:
    """Yield RGB frames at `fps` frames a second, one at a time, as a player shows them: rotated and
    mirrored as the file states, with square pixels; `info["notes"]` as in `load_image`. ValueError
    says what is wrong with the file; OSError if it is missing."""
    content = probe(path)
    numbers = content.plan(fps)
    if is_picture(path):
        skipped = path.first if isinstance(path, VideoSpan) else 0
        yield from animation_frames(path, [skipped + number for number in numbers])
        return
    wanted = [content.stamps[number] for number in numbers]
    place, matrix = 0, None
    # one thread, because the workers run in parallel
    decoded = _decoded_from(path, content.keys, wanted[0], threads=1)
    for stream, frame in decoded:
        if place == len(wanted):
            break
        if frame.pts is None or frame.pts < wanted[place]:
            continue
        if frame.is_corrupt or frame.pts != wanted[place]:
            for _ in islice(decoded, MOST_DELAYED):
                pass  # if the frame does come later, its times are wrong, and that error is raised
            seconds = (wanted[place] - wanted[0]) * content.tick
            raise Unusable("damaged", f"a frame at {seconds:.2f} s cannot be decoded")
        matrix = matrix or _matrix(frame)
        with _converting():
            image = _shown(frame, stream, matrix)
        while place < len(wanted) and wanted[place] == frame.pts:
            yield image
            place += 1
    if place < len(wanted):
        raise Unusable("damaged", f"{place} of {len(wanted)} frames could be decoded")


def _decoded_from(
    path: Source, keys: tuple[int, ...], stamp: int, threads: int
) -> Iterator[tuple[Any, Any]]:
    """Yield (stream, frame) for the frames of a file from the one shown at `stamp` on, or from an
    earlier one: decoding begins at the last key frame before it, or, if the container does not find
    that, at the first frame. `threads`: of the decoder; 0 means one for each core."""
    import av

    before = bisect_right(keys, stamp)
    for key in [keys[before - 1], None] if before > 1 else [None]:
        with _opened(path) as (container, stream):
            stream.codec_context.thread_count = threads
            if threads != 1:
                stream.thread_type = "AUTO"
            with suppress(av.error.FFmpegError):  # the key frame is then not found
                if key is not None:
                    container.seek(key, stream=stream)
            met, last = key is None, None
            for frame in container.decode(stream):
                if not met:
                    # frames shown before the key frame depend on frames that were not decoded
                    if frame.pts is None or frame.pts < key:
                        continue
                    if frame.pts > key or not frame.key_frame:  # packets may have other times
                        break
                    met = True
                if frame.pts is not None:
                    if last is not None and frame.pts < last:
                        raise _without_times("their times are not in their order")
                    last = frame.pts
                yield stream, frame
        if met:
            return


def thumbnails(
    path: str, content: Probe, size: tuple[int, int], first: int = 0
) -> Iterator[tuple[float, np.ndarray | None]]:
    """Yield (time, thumbnail) for every frame of a video file from number `first` on: the time in
    seconds at which it is shown, and uint8 YUV `(3, H, W)` of this size (width, height), or None
    for a frame that cannot be decoded. `content`: the file's `probe`."""
    seconds = [(stamp - content.stamps[0]) * content.tick for stamp in content.stamps]
    place = first
    if is_picture(path):
        for image in animation_frames(path, list(range(first, len(seconds)))):
            small = image.resize(size, Image.Resampling.BOX).convert("YCbCr")
            yield seconds[place], np.asarray(small).transpose(2, 0, 1)
            place += 1
    while place < len(seconds):
        try:
            for number, thumbnail in _thumbnails_from(path, content, size, place):
                yield from ((seconds[missing], None) for missing in range(place, number))
                yield seconds[number], thumbnail
                place = number + 1
            following = len(seconds)
        except Unusable:  # after damage, decoding begins again at the next key frame
            later = content.keys[bisect_right(content.keys, content.stamps[place]) :]
            following = content.stamps.index(later[0]) if later else len(seconds)
        yield from ((seconds[missing], None) for missing in range(place, following))
        place = following


def _thumbnails_from(
    path: str, content: Probe, size: tuple[int, int], first: int
) -> Iterator[tuple[int, np.ndarray | None]]:
    """Yield (number, thumbnail) for the frames from number `first` on that the decoder returns; see
    `thumbnails`."""
    from av.video.reformatter import VideoReformatter

    reformatter, place = VideoReformatter(), first
    for _, frame in _decoded_from(path, content.keys, content.stamps[first], threads=0):
        while place < len(content.stamps) and (frame.pts or 0) > content.stamps[place]:
            place += 1
        if place == len(content.stamps):
            return
        if frame.pts != content.stamps[place]:
            continue
        thumbnail = None
        if not frame.is_corrupt:
            with _converting():
                small = reformatter.reformat(frame, *size, format="yuv444p", interpolation="AREA")
                thumbnail = small.to_ndarray()
        yield place, thumbnail
        place += 1


# ── one frame ─────────────────────────────────────────────────────────────────────────────────────
def _shown(frame, stream, matrix: Matrix) -> Image.Image:
    """Return a decoded frame as a player shows it."""
    coding = _coding(frame, stream)
    image = Image.fromarray(np.ascontiguousarray(_upright(_rgb(frame, coding), matrix)))
    width = _square(frame.width, frame.height, stream)
    if width != frame.width:
        size = (frame.height, width) if _lies(matrix) else (width, frame.height)
        image = image.resize(size, Image.Resampling.BICUBIC)
    notes = {
        "hdr": coding is not None and coding.hdr,
        "profile": coding is not None and not coding.hdr,
        "interlaced": frame.interlaced_frame,
        "alpha not read": stream.metadata.get("alpha_mode") == "1",
    }
    image.info = {"animated": False, "notes": tuple(note for note, so in notes.items() if so)}
    return image


def _coding(frame, stream) -> Coding | None:
    """Return how the frame's numbers represent light, or None if as in sRGB."""
    context = stream.codec_context  # older versions of PyAV have them here
    primaries = getattr(frame, "color_primaries", context.color_primaries)
    return coding_of(primaries, getattr(frame, "color_trc", context.color_trc))


def _rgb(frame, coding: Coding | None) -> np.ndarray:
    """Return uint8 `(H, W, 3)` in sRGB, with transparency laid on the background."""
    equations = None  # those that the frame states
    if frame.colorspace == 2 and not frame.format.is_rgb:  # the frame states none
        hd = frame.height >= 720 or frame.width >= 1280
        equations = "ITU709" if hd else "ITU601"
        if coding is not None and coding.gamut == BT2020:
            equations = "BT2020"
    if coding is not None:
        return stored_to_srgb(_converted(frame, "rgb48le", equations), coding)
    if not any(part.is_alpha for part in frame.format.components):
        return _converted(frame, "rgb24", equations)
    layers = Image.fromarray(_converted(frame, "rgba", equations))
    ground = Image.new("RGB", layers.size, BACKGROUND)
    ground.paste(layers, mask=layers.getchannel("A"))
    return np.asarray(ground)


def _converted(frame, layout: str, equations: Any) -> np.ndarray:
    """Return the frame's pixels in another layout. The converter has threads and must not outlive
    this call: a forked worker that inherits one would wait for its threads for ever."""
    from av.video.reformatter import VideoReformatter

    return VideoReformatter().reformat(frame, format=layout, src_colorspace=equations).to_ndarray()


def _matrix(frame) -> Matrix:
    """Return the matrix by which a player lays out frames: (x, y) is shown at (a x + c y, b x + d
    y). It is read from one frame only, because reading it keeps the frame in memory until Python's
    garbage collection."""
    try:
        matrix = np.frombuffer(bytes(frame.side_data["DISPLAYMATRIX"]), np.int32)
    except KeyError:
        return 1, 0, 0, 1
    except ValueError:  # the frame also has data that this PyAV has no name for
        quarters = round(getattr(frame, "rotation", 0) / 90) % 4  # counterclockwise
        return ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))[quarters]
    a, b, _, c, d = matrix[:5].tolist()
    return a, b, c, d


def _lies(matrix: Matrix) -> bool:
    """Return whether the matrix turns rows into columns."""
    a, b, c, d = matrix
    return abs(a) + abs(d) < abs(b) + abs(c)


def _upright(pixels: np.ndarray, matrix: Matrix) -> np.ndarray:
    """Return `(H, W, 3)` mirrored and rotated by quarter turns as the matrix says; other angles are
    rounded to the nearest quarter."""
    a, b, c, d = matrix
    if _lies(matrix):
        pixels, across, down = pixels.transpose(1, 0, 2), c, b
    else:
        across, down = a, d
    return pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]
