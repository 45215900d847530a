"""Load the pictures of a record that a captioner sees: its picture, or some frames of its clip."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mmdit.data.dataset.frames import frames_in, naming
from mmdit.data.dataset.pictures import load_image
from mmdit.data.dataset.problems import Unusable
from mmdit.data.dataset.records import Media, Record
from mmdit.data.dataset.videos import probe, read_video


def shown_pictures(record: Record, media: Media, frames: int, side: int) -> list[Image.Image]:
    """Return the picture of a record, or up to `frames` evenly spaced frames of a clip, with sides
    of at most `side` pixels. ValueError or OSError if it cannot be used."""
    if media == "image":
        pictures = [load_image(record.source)]
    elif record.is_folder:
        pictures = []
        for path in _spread(frames_in(record.path), frames):
            with naming(path):
                pictures.append(load_image(path))
    else:
        content = probe(record.source)
        fps = content.fps
        if len(content.stamps) > frames:
            fps *= frames / len(content.stamps)
        pictures = list(read_video(record.source, fps or 1.0))[:frames]
    return [_at_most(picture, side) for picture in pictures]


def _spread(paths: list, count: int) -> list:
    """Return up to `count` evenly spaced paths, beginning with the first."""
    if len(paths) <= count:
        return paths
    places = np.arange(count) * len(paths) // count
    return [paths[place] for place in places]


def _at_most(picture: Image.Image, side: int) -> Image.Image:
    """Return the picture, scaled down if its longer side exceeds `side`."""
    scale = side / max(picture.size)
    if scale >= 1:
        return picture
    width, height = (round(length * scale) for length in picture.size)
    if not min(width, height):
        raise Unusable("too narrow", f"{picture.width}x{picture.height} pixels")
    return picture.resize((width, height), Image.Resampling.BICUBIC)
