"""Pictures from files, as a viewer shows them. This is the one place that opens pictures: from a
closed list of formats (PostScript would start Ghostscript), from regular files only, and with a
limit on pixels before anything is decoded.

What is done: rotation by EXIF; conversion to sRGB by ICC profiles, and by primaries or gamma that
PNG and AVIF state; CMYK, Lab, palettes and 16 bits to 8-bit RGB; transparency is laid on white.
Text chunks in PNG files are not unpacked. Pictures of floating-point or signed numbers are refused,
since they state no range."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import ExifTags, Image

from mmdit.data.dataset.colours import MAX_PROFILE, PART, Coding, coding_of, stored_to_srgb, to_srgb
from mmdit.data.dataset.members import Source, open_source
from mmdit.data.dataset.problems import Unusable
from mmdit.foreign import stand_in

# version of the decoding here and in `videos`, noted in manifests; to be raised when pixels change
DECODING = 2
BACKGROUND = (255, 255, 255)  # under transparent pixels
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
SUFFIXES |= {".jp2", ".avif", ".jfif", ".jpe"}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")  # Pillow's names
MAX_PIXELS = 1 << 27  # a phone's picture of 108 million pixels is below it
HEAD = 4096  # bytes at the start of a file that tell what it is
FLIP = Image.Transpose
TURNS = {  # by the orientation in EXIF
    2: FLIP.FLIP_LEFT_RIGHT,
    3: FLIP.ROTATE_180,
    4: FLIP.FLIP_TOP_BOTTOM,
    5: FLIP.TRANSPOSE,
    6: FLIP.ROTATE_270,
    7: FLIP.TRANSVERSE,
    8: FLIP.ROTATE_90,
}
PNG = b"\x89PNG\r\n\x1a\n"
# chunks that Pillow would unpack, or for which it would refuse the picture
UNPACKED = {b"tEXt", b"zTXt", b"iTXt", b"iCCP"}
COLOURS = {b"iCCP", b"cICP", b"sRGB", b"gAMA", b"cHRM"}


# ── opening ───────────────────────────────────────────────────────────────────────────────────────
@contextmanager
def open_picture(source: Source | BinaryIO) -> Iterator[Image.Image]:
    """Open a picture without decoding its pixels yet. `info["coding"]` says how its numbers
    represent light, if not as in sRGB.

    ValueError says what is wrong with the file, without its path; OSError comes from the system
    (missing, unreadable)."""
    with open_source(source) if isinstance(source, Source) else source as file:
        head = file.read(HEAD)
        try:
            with _open(file, head) as image:
                _check_size(image)
                yield image
        except Image.UnidentifiedImageError:
            raise Unusable("no picture that can be read", what_it_is(head)) from None
        except Image.DecompressionBombError:
            raise Unusable(
                "too large", f"more than {MAX_PIXELS / 1e6:.0f} million pixels; scale it down"
            ) from None
        except (MemoryError, Unusable):
            raise
        except Exception as error:  # decoders raise almost anything on damaged files
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise Unusable("damaged picture", str(error) or type(error).__name__) from None


def _open(file: BinaryIO, head: bytes) -> Image.Image:
    """Open a picture of the closed list, and add what its file states about colours to its
    `info`."""
    profile, coding = None, None
    if head.startswith(PNG):
        file, chunks = _slim_png(file)
        profile, coding = _png_colours(chunks)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about size, which is checked later, and broken EXIF
        image = Image.open(file, formats=formats())
    if image.format == "PNG":
        image.info.pop("icc_profile", None)
        key = image.info.get("transparency")
        bits = head[24]
        # of 16 bits, pixels keep the upper 8
        if image.mode == "RGB" and isinstance(key, tuple) and bits == 16:
            image.info["transparency"] = tuple(value >> 8 for value in key)
        # values of 2 or 4 bits are scaled to 8
        if image.mode == "L" and isinstance(key, int) and key < 1 << bits < 256:
            image.info["transparency"] = key * 255 // ((1 << bits) - 1)
    place = head.find(b"colrnclx")
    has_code_points = image.format == "AVIF" and 0 < place <= len(head) - 12
    if has_code_points and not image.info.get("icc_profile"):
        coding = coding_of(*struct.unpack_from(">HH", head, place + 8))
    if profile is not None:
        image.info["icc_profile"] = profile
    if coding:
        image.info["coding"] = coding
    return image


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """Return the FORMATS that the installed Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _tags(image: Image.Image) -> Any:
    """Return the tags of a TIFF by number."""
    return image.tag_v2  # type: ignore[attr-defined]


def _has_signed_numbers(image: Image.Image) -> bool:
    """Return whether the numbers of a picture have a sign, which a TIFF states (SampleFormat)."""
    return image.format == "TIFF" and 2 in _tags(image).get(339, ())


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        limit = f"{MAX_PIXELS / 1e6:.0f} million pixels"
        raise Unusable("too large", f"{width}x{height} are more than {limit}; scale it down")
    is_raw = image.format == "TIFF" and 50706 in _tags(image)  # DNGVersion
    if is_raw:  # the first picture in it is a preview
        raise Unusable(
            "no picture that can be read", "a camera's raw file; develop it to JPEG or PNG first"
        )


def shown_size(path: str | Path) -> tuple[int, int]:
    """Return the width and height as displayed, read from the head of a picture alone."""
    with open_picture(path) as image:
        size = image.size
        if image.format == "TIFF":  # some versions of Pillow swap its sides on opening
            size = _tags(image)[256], _tags(image)[257]
        return size[::-1] if _orientation(image) >= 5 else size


def _slim_png(file: BinaryIO) -> tuple[BinaryIO, dict[bytes, bytes]]:
    """Return a PNG file without the chunks in UNPACKED, and its chunks about colours."""
    colours: dict[bytes, bytes] = {}
    places, place = [(0, 8, b"")], 8
    while True:
        file.seek(place)
        head = file.read(8)
        if len(head) < 8:
            break
        size, name = int.from_bytes(head[:4], "big"), head[4:]
        if name in COLOURS:
            colours.setdefault(name, file.read(min(size, MAX_PROFILE)))
        places.append((place, size + 12, name))
        place += size + 12
        if name == b"IEND":
            break
    if all(name not in UNPACKED for _, _, name in places):
        return file, colours
    slim = io.BytesIO()
    for place, size, name in places:
        if name not in UNPACKED:
            file.seek(place)
            slim.write(file.read(size))
    return slim, colours


def _png_colours(chunks: dict[bytes, bytes]) -> tuple[bytes | None, Coding | None]:
    """Return the profile, or the coding, that a PNG file states, in the order of precedence of the
    PNG specification."""
    if len(chunks.get(b"cICP", b"")) == 4:
        return None, coding_of(*chunks[b"cICP"][:2])
    if b"iCCP" in chunks:
        packed = chunks[b"iCCP"].partition(b"\0")[2][1:]
        try:
            return zlib.decompressobj().decompress(packed, MAX_PROFILE), None
        except zlib.error:
            return b"broken", None
    if b"sRGB" in chunks or len(chunks.get(b"gAMA", b"")) != 4:
        return None, None
    gamma = int.from_bytes(chunks[b"gAMA"], "big") / 100_000
    numbers = np.frombuffer(chunks.get(b"cHRM", b"")[:32], ">u4") / 100_000
    coding = Coding()
    if len(numbers) == 8 and numbers[1::2].min() > 0.01:
        white, *corners = [(x, y) for x, y in numbers.reshape(-1, 2).tolist()]
        coding = Coding((*corners, white))
    if np.abs(np.subtract(coding.gamut, Coding().gamut)).max() < 0.005:
        coding = Coding()
    if 0.1 <= gamma <= 5 and abs(gamma * 2.2 - 1) > 0.05:  # otherwise sRGB's own curve is meant
        coding = Coding(coding.gamut, 1 / gamma)
    return None, coding if coding != Coding() else None


# ── decoding ──────────────────────────────────────────────────────────────────────────────────────
def load_image(source: Source | BinaryIO) -> Image.Image:
    """Return a picture in mode RGB and sRGB; of an animation the first one, with
    `info["animated"]`. `info["notes"]` are keys of `colours.NOTES`. Errors as in `open_picture`."""
    with open_picture(source) as image:
        shown = as_shown(image)
        several = getattr(image, "is_animated", False)
        shown.info["animated"] = several and image.format not in ("MPO", "TIFF")  # no frames
        return shown


def as_shown(image: Image.Image) -> Image.Image:
    """Return an opened picture, or the current frame of an animation, in mode RGB and sRGB."""
    image.load()
    opened, info, orientation = image, image.info, _orientation(image)
    if image.mode == "F":
        raise Unusable("floating-point images have no stated range; save as 8 or 16 bits")
    if image.mode == "L" and _has_signed_numbers(image):  # Pillow takes -1 for 255
        raise Unusable("signed numbers of 8 bits have no stated range; save as 8 bits, unsigned")
    if image.format == "TIFF" and image.mode == "P" and 0 < max(_tags(image)[320]) < 256:
        raise Unusable("a palette in 8 bits, where TIFF has 16, would be black; save as RGB")
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    image, alpha = _without_alpha(image)
    image, note = to_srgb(image, info.get("icc_profile"))
    coding = info.get("coding")
    if coding:
        image = Image.fromarray(stored_to_srgb(np.asarray(image), coding))
        note = "hdr" if coding.hdr else "profile"
    if alpha is not None:
        ground = Image.new("RGB", image.size, BACKGROUND)
        ground.paste(image, mask=alpha)
        image = ground
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    elif image is opened and getattr(image, "is_animated", False):
        image = image.copy()  # the next frame will be drawn over it
    image.info = {"animated": False, "notes": (note,) if note else ()}
    return image


def _orientation(image: Image.Image) -> int:
    """Return the orientation that EXIF states, from 1 (upright) to 8; anything else counts as
    upright, as in viewers."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stated = image.getexif().get(ExifTags.Base.Orientation)
            return stated if stated in TURNS else 1
    except Exception:  # viewers show pictures with broken EXIF
        return 1


def is_upright(image: Image.Image) -> bool:
    """Return whether an opened picture is shown as it is stored."""
    return _orientation(image) not in TURNS


def _without_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the picture without its transparency, and the transparency as a mask, or None."""
    if image.mode not in ("LA", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return image, None
    layers = image.convert("RGBA")
    grey = image.mode in ("1", "L", "LA")
    return layers.getchannel("R") if grey else layers.convert("RGB"), layers.getchannel("A")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return a grey picture of 9 to 16 bits as mode L, rounded (Pillow would clip at 255), or as LA
    where one value means transparent."""
    top, inverted, key = 65535, False, image.info.get("transparency")
    if image.format == "TIFF":
        bits = _tags(image).get(258, (16,))[0]
        top = (1 << bits) - 1 if bits < 16 else top
        inverted = image.mode != "I" and _tags(image).get(262) == 0  # zero is white
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        low, high = cast(tuple[float, float], image.getextrema())
        # a white of 65,535 does not fit into 16 bits with a sign
        short = _has_signed_numbers(image) and _tags(image).get(258) == (16,)
        if low < 0 or high > (255 if short else 65535):
            raise Unusable(
                f"numbers from {low} to {high} have no stated range; save as 8 or 16 bits, unsigned"
            )
        top = 65535 if high > 255 else 255
    width, height = image.size
    grey = np.empty((height, width, 2), np.uint8)
    rows = max(1, PART // width)
    # in strips: wider numbers for the whole picture would take gigabytes
    for first in range(0, height, rows):
        strip = image.crop((0, first, width, min(first + rows, height)))
        part = np.asarray(strip).astype(np.uint32)
        grey[first : first + rows, :, 0] = (part * 255 + top // 2) // top
        grey[first : first + rows, :, 1] = 255 if key is None else np.where(part == key, 0, 255)
    if inverted:
        grey[..., 0] = 255 - grey[..., 0]
    return Image.fromarray(grey[..., 0] if key is None else grey)


# ── what a file is, if it is none of these ────────────────────────────────────────────────────────
FILE_TYPES = (  # offset in the file, bytes there, and what the file is
    (4, (b"ftyphe", b"ftypmif1", b"ftypmsf1"), "a HEIC picture"),
    (4, (b"ftypavif", b"ftypavis"), "an AVIF picture, damaged or too new for this Pillow (≥ 11.3)"),
    (4, (b"ftypcrx ",), "a camera's raw file"),
    (4, (b"ftyp",), "a video (name it video_path)"),
    (0, (b"\x1aE\xdf\xa3",), "a video (name it video_path)"),
    (8, (b"AVI ",), "a video (name it video_path)"),
    (0, (b"\xff\x0a", b"\0\0\0\x0cJXL "), "a JPEG XL picture"),
    (0, (b"II\xbc\x01",), "a JPEG XR picture"),
    (0, (b"%!PS", b"\xc5\xd0\xd3\xc6"), "PostScript"),
    (0, (b"%PDF",), "a PDF document"),
    (0, (b"8BPS",), "a Photoshop document"),
    (0, (b"gimp xcf",), "a GIMP document"),
    (0, (b"v/1\x01",), "an OpenEXR picture (its light has no stated range)"),
    (0, (b"#?RADIANCE", b"#?RGBE"), "a Radiance HDR picture (its light has no stated range)"),
    (0, (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "a TIFF or raw file of a layout not read"),
    (0, (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"IIU\0"), "a camera's raw file"),
    (0, (b"BPG\xfb",), "a BPG picture"),
    (0, (b"qoif",), "a QOI picture"),
    (0, (b"DDS ",), "a DDS texture"),
    (0, (b"\0\0\1\0", b"\0\0\2\0"), "an icon"),
    (0, (b"PK\3\4",), "a ZIP archive"),
    (0, (b"\x1f\x8b",), "a gzip file"),
)


def what_it_is(head: bytes) -> str:
    """Return a text that says what a file is that is not one of FORMATS, by its first bytes, and
    what to do."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head.strip(b"\0"):
        return "it holds zeros only, or nothing; get the file again"
    if b"<svg" in text and text.startswith(b"<"):
        return "it is an SVG drawing; convert it to PNG"
    if what := stand_in(head):
        return what
    for place, starts, name in FILE_TYPES:
        if head[place:].startswith(starts):
            remedy = "" if "(" in name else "; convert it to JPEG or PNG"
            return f"it is {name}{remedy}"
    return f"cannot identify it, it begins with {head[:8]!r}; convert it to JPEG or PNG"
