"""Write pixels to files: captioned contact sheets (PNG), MP4 if PyAV is installed, otherwise
animated PNG."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageSequence, PngImagePlugin
from torch import Tensor

from mmdit.files import open_atomically, open_regular
from mmdit.pixels import to_shown

SHEET_FRAMES, SHEET_LINES = 8, 12  # frames of a clip, lines of a caption
FACTS = "mmdit"  # the name under which a PNG keeps how it was made
SHEET_SAMPLES, SHEET_PIXELS = 256, 100_000_000  # of a sheet, at most


def _image(frame: Tensor) -> Image.Image:
    """Make a picture of `(3, H, W)` uint8."""
    return Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())


def _pieces(draw: ImageDraw.ImageDraw, word: str, font, width: int) -> list[str]:
    """Return a word in pieces that fit into `width` pixels: file names, for example, have no
    spaces."""
    length = draw.textlength(word, font=font)
    if length <= width:
        return [word]
    count = max(1, int(0.85 * len(word) * width / length))
    return [word[first : first + count] for first in range(0, len(word), count)]


def _lines(draw: ImageDraw.ImageDraw, text: str, font, width: int) -> list[str]:
    lines: list[str] = []
    line = ""
    pieces = chain.from_iterable(_pieces(draw, word, font, width) for word in text.split())
    for word in pieces:
        longer = f"{line} {word}".strip()
        if line and draw.textlength(longer, font=font) > width:
            lines, line = [*lines, line], word
            if len(lines) == SHEET_LINES:  # a caption may hold a hundred thousand words
                return [*lines[:-1], "…"]
        else:
            line = longer
    return [*lines, line]


def enlargement(height: int, width: int, cell: int = 128) -> int:
    """Return the factor by which a small picture is enlarged on a sheet."""
    return max(1, round(cell / min(height, width)))


def sheet_holds(width: int, height: int, frames: int) -> int:
    """Return how many samples of this size a contact sheet holds, so that it fits into memory and
    into a viewer."""
    scale = enlargement(height, width)
    cell = (width * scale + 2) * min(frames, SHEET_FRAMES) * (height * scale + 15 * SHEET_LINES)
    return max(1, min(SHEET_SAMPLES, SHEET_PIXELS // cell))


def sheet_strip(clip: Tensor) -> Tensor:
    """Return the frames of `clip (F, 3, H, W)` that a sheet shows, as uint8."""
    places = torch.linspace(0, len(clip) - 1, min(len(clip), SHEET_FRAMES)).round().long()
    return to_shown(clip[places])


def contact_sheet(
    pixels: Tensor, captions: list[str], columns: int, cell: int = 128
) -> Image.Image:
    """Draw `pixels (B, F, 3, H, W)`, one captioned cell a sample, as many as a sheet holds; a clip
    is shown as a strip of up to SHEET_FRAMES of its frames."""
    held = sheet_holds(pixels.shape[-1], pixels.shape[-2], pixels.shape[1])
    captions, clips = captions[:held], torch.stack([sheet_strip(clip) for clip in pixels[:held]])
    shown = range(clips.shape[1])
    scale = enlargement(clips.shape[-2], clips.shape[-1], cell)
    height, width = clips.shape[-2] * scale, clips.shape[-1] * scale
    font = ImageFont.load_default(size=12)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    cell_width = (width + 2) * len(shown)
    texts = [_lines(measure, caption, font, cell_width - 4) for caption in captions]
    text_height = 15 * max(len(lines) for lines in texts) + 6
    columns = max(1, min(columns, len(clips)))
    rows = -(-len(clips) // columns)
    sheet = Image.new(
        "RGB", (columns * (cell_width + 6) + 6, rows * (height + text_height + 6) + 6), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for i, (clip, lines) in enumerate(zip(clips, texts)):
        left, top = (
            6 + (i % columns) * (cell_width + 6),
            6 + (i // columns) * (height + text_height + 6),
        )
        for j, frame in enumerate(clip):
            sheet.paste(
                _image(frame).resize((width, height), Image.Resampling.NEAREST),
                (left + j * (width + 2), top),
            )
        for j, line in enumerate(lines):
            draw.text((left, top + height + 3 + 15 * j), line, fill="black", font=font)
    return sheet


def _png_text(facts: Mapping[str, Any] | None) -> PngImagePlugin.PngInfo:
    """Return `facts` in the form in which a PNG stores text; empty without facts."""
    text = PngImagePlugin.PngInfo()
    if facts:
        text.add_itxt(FACTS, json.dumps(facts, ensure_ascii=False))
    return text


def save_sheet(drawn: list[tuple[Tensor, str]], columns: int, path: Path) -> Path:
    """Write samples `(F, 3, H, W)` with their captions as a contact sheet; return its path."""
    pixels, captions = zip(*drawn, strict=True)
    return save_image(contact_sheet(torch.stack(pixels), list(captions), columns), path)


def save_image(image: Image.Image, path: Path, facts: Mapping[str, Any] | None = None) -> Path:
    """Write a PNG, which appears under its name only when it is complete. `facts` are stored in it
    and say how it was made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomically(path) as file:
        image.save(file, format="PNG", pnginfo=_png_text(facts))
    return path


def words_in(path: Path) -> Iterator[str]:
    """Yield the texts that a picture (PNG, WebP) or clip (MP4) holds beside its pixels. ValueError
    if PyAV is missing or there are too many pixels; OSError if the file is damaged."""
    if path.suffix.lower() == ".mp4":
        try:
            import av
        except ImportError:
            raise ValueError("a look into it needs PyAV: pip install av") from None
        with av.open(str(path)) as container:
            for part in (container, *container.streams):
                yield from part.metadata.values()
        return
    try:
        with Image.open(path, formats=["PNG", "WEBP"]) as image:
            image.load()  # a PNG may hold texts behind its pixels
            said = list(image.info.values())
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    for value in said:
        yield value.decode("latin-1") if isinstance(value, bytes) else str(value)


def read_facts(path: str | Path) -> dict[str, Any]:
    """Return the facts that `save_sample` stored in a PNG or MP4. ValueError if the file cannot be
    read or holds none."""
    path = Path(path)
    try:
        if path.suffix.lower() == ".mp4":
            import av

            with av.open(str(path)) as container:
                text = container.metadata.get("comment")
        else:
            with open_regular(path) as file, Image.open(file, formats=["PNG"]) as image:
                image.load()  # texts may stand behind the pixels
                text = getattr(image, "text", {}).get(FACTS)
        facts = json.loads(text) if text else None
    except ImportError:
        raise ValueError(f"{path}: reading a video needs PyAV: pip install av") from None
    except (OSError, ValueError, SyntaxError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a sample: {error}") from None
    if not isinstance(facts, dict):
        raise ValueError(
            f"{path} does not say how it was made: it was written by another program, or by an"
            " older version of this one; samples.json beside it may know"
        )
    return facts


def save_video(clip: Tensor, path: Path, fps: int, facts: Mapping[str, Any] | None = None) -> Path:
    """Write `clip (F, 3, H, W)` in [0, 1] to `path` (.mp4, H.264); return the path that was
    written. If PyAV or its H.264 is missing, or a side is odd, write an animated PNG of that name
    instead. `facts` are stored in the file and say how it was made. OSError names what could not be
    written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = to_shown(clip)
    if not h264() or frames.shape[-2] % 2 or frames.shape[-1] % 2:  # it halves the grid of colours
        path = path.with_suffix(".png")
        first, *rest = map(_image, frames)
        # Pillow leaves out a frame that equals the one before it, unless the two are drawn in other
        # ways: opaque pictures look the same in either
        repeats = (frames[1:] == frames[:-1]).flatten(1).all(1)
        with open_atomically(path) as file:
            first.save(
                file,
                format="PNG",
                save_all=True,
                append_images=rest,
                duration=round(1000 / fps),
                loop=0,
                blend=[0, *(repeats.cumsum(0) % 2).tolist()],
                pnginfo=_png_text(facts),
            )
        return path
    import av

    with open_atomically(path) as file, av.open(file, "w", format="mp4") as container:
        if facts:
            container.metadata["comment"] = json.dumps(facts, ensure_ascii=False)
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[-2:], "yuv420p"
        stream.options = {"crf": "12"}
        colours = stream.codec_context  # BT.709, stated: otherwise players guess by the size
        colours.colorspace = colours.color_primaries = colours.color_trc = 1
        for frame in frames:
            picture = av.VideoFrame.from_image(_image(frame))
            picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def save_sample(clip: Tensor, stem: Path, fps: int, facts: Mapping[str, Any] | None = None) -> Path:
    """Write `clip (F, 3, H, W)` as `stem`.png, or `.mp4` if it has several frames; return the
    path. `facts`: see `read_facts`."""
    if len(clip) == 1:
        return save_image(_image(to_shown(clip[0])), stem.with_name(f"{stem.name}.png"), facts)
    return save_video(clip, stem.with_name(f"{stem.name}.mp4"), fps, facts)


def read_back(path: Path) -> Tensor:
    """Read `(F, 3, H, W)` uint8 from a file that `save_sample` wrote; a video comes as H.264 stored
    it."""
    frames = [np.array(frame) for frame in read_frames(path)[0]]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def read_frames(path: Path) -> tuple[list[Image.Image], float]:
    """Return the frames of a picture, a sheet or a clip that this module wrote, and its duration in
    seconds. OSError, SyntaxError or ImportError if it cannot be read here; ValueError if it is
    empty."""
    if path.suffix == ".mp4":
        import av

        with av.open(str(path)) as container:
            rate = float(container.streams.video[0].average_rate or 8)
            frames = [frame.to_image() for frame in container.decode(video=0)]
            seconds = len(frames) / rate
    else:
        with Image.open(path, formats=["PNG"]) as image:
            frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
            seconds = len(frames) * image.info.get("duration", 125) / 1000
    if not frames:
        raise ValueError("it holds no frame")
    return frames, seconds


def some_frames(path: Path, most: int) -> tuple[list[Image.Image], float]:
    """Return up to `most` frames of a sample, evenly chosen, and its duration in seconds; errors as
    in `read_frames`."""
    frames, seconds = read_frames(path)
    places = np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int)
    return [frames[place] for place in places], seconds


def as_webp(frames: list[Image.Image], side: int, duration: int) -> bytes:
    """Return frames as WebP with a longer side of at most `side`; several frames become an
    animation that shows each for `duration` milliseconds."""
    scale = min(1.0, side / max(frames[0].size))
    width, height = (max(1, round(length * scale)) for length in frames[0].size)
    small = [frame if scale == 1 else frame.resize((width, height)) for frame in frames]
    data, animation = io.BytesIO(), {}
    if len(small) > 1:
        animation = {"save_all": True, "append_images": small[1:], "duration": duration, "loop": 0}
    small[0].save(data, format="WEBP", quality=80, method=2, **animation)
    return data.getvalue()


def h264() -> bool:
    """Return whether PyAV is installed and writes H.264."""
    try:
        import av

        return "libx264" in av.codecs_available
    except (ImportError, OSError):
        return False


def grid_video(pixels: Tensor, columns: int) -> Tensor:
    """Arrange clips `(B, F, 3, H, W)` in a grid, as one clip `(F, 3, rows·H, columns·W)`."""
    columns = max(1, min(columns, len(pixels)))
    white = pixels.new_ones(-len(pixels) % columns, *pixels.shape[1:])
    padded = torch.cat([pixels, white])
    return rearrange(padded, "(r c) f d h w -> f d (r h) (c w)", c=columns)
