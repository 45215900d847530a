"""Animated pictures (GIF, WebP, PNG, AVIF) as clips, read by Pillow: the time at which each frame
appears, and the frames as displayed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import repeat

from PIL import Image

from mmdit.data.dataset.members import Source, open_source
from mmdit.data.dataset.pictures import as_shown, open_picture
from mmdit.data.dataset.problems import Unusable

STARTS = (b"\x89PNG\r\n\x1a\n", b"GIF8", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")
MOST_FRAMES = 20_000
SHORTEST = 10  # milliseconds: players show a frame with this time or less for 100


def is_picture(path: Source) -> bool:
    """Return whether a file begins like a picture. OSError or ValueError if it cannot be opened."""
    with open_source(path) as file:
        head = file.read(12)
    return head.startswith(STARTS) or head[8:] == b"WEBP" or head[4:] in (b"ftypavif", b"ftypavis")


def animation_times(path: Source) -> tuple[tuple[int, int], list[int]]:
    """Return the size as stored, and for each frame the time, in milliseconds from the start, at
    which it appears. All frames are decoded, so damage is found."""
    times, now = [], 0
    with open_picture(path) as image:
        for number in _frames(image):
            image.seek(number)
            image.load()
            times.append(now)
            length = image.info.get("duration") or 0
            now += round(length) if length > SHORTEST else 100
        return image.size, times


def animation_frames(path: Source, wanted: list[int]) -> Iterator[Image.Image]:
    """Yield the frames with these ascending numbers, which may repeat, as `load_image` returns
    them."""
    with open_picture(path) as image:
        times = Counter(wanted)
        # in order, because each frame is drawn over the one before
        for number, place in enumerate(_frames(image)[: wanted[-1] + 1]):
            image.seek(place)
            image.load()
            if number in times:
                yield from repeat(as_shown(image), times[number])


def _frames(image: Image.Image) -> range:
    """Return the numbers of the frames to show. Further pictures of TIFF and MPO files are not
    frames; a PNG may begin with a still picture for programs that cannot show animations."""
    if image.format in ("TIFF", "MPO"):
        return range(1)
    count = getattr(image, "n_frames", 1)
    if count > MOST_FRAMES:
        raise Unusable("too long", f"{count} frames; cut it into clips of at most {MOST_FRAMES}")
    return range(1 if getattr(image, "default_image", False) and count > 1 else 0, count)
