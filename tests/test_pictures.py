"""Pictures are opened in one place, from regular files of a closed list of formats, and come out as
a viewer shows them."""

import ast
import io
import json
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from examples.edges2shoes.unpack import photo_of
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.look import look_at, look_text, totals
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.dataset.buckets import VideoConfig
from mmdit.data.dataset.frames import PreprocessConfig, load_first_frame, load_frames
from mmdit.data.dataset.pictures import load_image, shown_size
from mmdit.data.dataset.problems import Unusable
from mmdit.data.dataset.records import Record, read_records
from mmdit.data.dataset.sources import prepare_folder, read_captions
from tests.test_cache import MeanPixels, run, write_meta

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests/golden/pictures"
GREEN = (90, 200, 60)  # what the pictures there store
SHOWN = {"adobe_rgb": (0, 201, 37), "display_p3": (0, 204, 0)}  # by LittleCMS


def profile_of(name: str) -> bytes:
    with Image.open(GOLDEN / f"{name}.png") as image:
        return image.info["icc_profile"]


def colour(path, place=(0, 0)):
    return load_image(path).getpixel(place)


def near(found, wanted, levels=1):
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= levels


def with_chunks(path: Path, chunks: list[tuple[bytes, bytes]]) -> Path:
    """Put chunks behind the header of a PNG file."""
    data = path.read_bytes()
    parts = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    ]
    path.write_bytes(data[:33] + b"".join(parts) + data[33:])
    return path


def looked(path, kind="image"):
    row = look_at(
        [Record("a", str(path), "x")],
        kind,
        lambda size: (32, 32),
        PreprocessConfig(),
        VideoConfig(32, 32),
    )
    return row[0]


# ── colours ───────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", SHOWN)
def test_a_colour_profile_is_followed_in_every_kind_of_picture(tmp_path, name):
    assert near(colour(GOLDEN / f"{name}.png"), SHOWN[name]) and load_image(
        GOLDEN / f"{name}.png"
    ).info["notes"] == ("profile",)
    profile, rgb = profile_of(name), Image.new("RGB", (8, 8), GREEN)
    for suffix in ("webp", "tif", "avif"):
        rgb.save(tmp_path / f"a.{suffix}", icc_profile=profile, lossless=True, quality=100)
        assert near(colour(tmp_path / f"a.{suffix}"), SHOWN[name], 4), suffix
    rgb.quantize(4).save(tmp_path / "palette.png", icc_profile=profile)
    assert near(colour(tmp_path / "palette.png"), SHOWN[name])
    rgb.putalpha(128)  # the colour first, then white under it
    rgb.save(tmp_path / "clear.png", icc_profile=profile)
    assert near(
        colour(tmp_path / "clear.png"), [(value * 128 + 255 * 127) / 255 for value in SHOWN[name]]
    )


def test_srgb_changes_nothing_and_a_profile_that_cannot_be_used_is_told(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise.save(tmp_path / "a.png", icc_profile=srgb)
    assert (
        np.array_equal(load_image(tmp_path / "a.png"), noise)
        and load_image(tmp_path / "a.png").info["notes"] == ()
    )
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (b"no profile at all", profile_of("adobe_rgb")[:200], lab):
        noise.save(tmp_path / "a.png", icc_profile=profile)
        image = load_image(tmp_path / "a.png")
        assert np.array_equal(image, noise) and image.info["notes"] == ("profile ignored",)


def test_profiles_and_transparency_of_grey_pictures(tmp_path):
    Image.new("L", (4, 4), 20).save(tmp_path / "a.png", icc_profile=profile_of("adobe_rgb"))
    assert near(colour(tmp_path / "a.png"), (12, 12, 12))  # (20 / 255) ** 2.2 of all light
    Image.new("LA", (4, 4), (40, 0)).save(tmp_path / "b.png")
    assert colour(tmp_path / "b.png") == (255, 255, 255)


def test_lab_and_cmyk(tmp_path):
    Image.merge("LAB", [Image.new("L", (4, 4), value) for value in (128, 128, 128)]).save(
        tmp_path / "lab.tif"
    )
    assert near(colour(tmp_path / "lab.tif"), (119, 119, 119))  # L* = 50
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    assert near(colour(tmp_path / "a.tif"), (255, 0, 0))
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(
        tmp_path / "a.jpg", icc_profile=profile_of("adobe_rgb")
    )
    image = load_image(
        tmp_path / "a.jpg"
    )  # inverted, as Adobe stores it; the profile is of another kind of picture
    assert near(image.getpixel((0, 0)), (254, 0, 0), 2) and image.info["notes"] == (
        "profile ignored",
    )


def test_what_a_png_states_of_its_light(tmp_path):
    def saved(*chunks):
        Image.new("RGB", (4, 4), (188, 188, 188)).save(tmp_path / "a.png")
        return with_chunks(tmp_path / "a.png", list(chunks))

    plain = (188, 188, 188)
    linear, usual = struct.pack(">I", 100_000), struct.pack(">I", 45_455)
    assert colour(saved((b"gAMA", usual))) == plain
    assert near(colour(saved((b"gAMA", linear))), (222, 222, 222))  # (188 / 255) of all light
    assert (
        colour(saved((b"sRGB", b"\0"), (b"gAMA", linear))) == plain
    )  # sRGB is said: gamma does not count
    assert near(
        colour(saved((b"cICP", bytes([9, 16, 0, 1])))), (255, 255, 255)
    )  # PQ: brighter than diffuse white
    assert colour(saved((b"cICP", bytes([1, 13, 0, 1])))) == plain
    assert (
        colour(saved((b"gAMA", b"\0\0\0\0"), (b"cHRM", bytes(32)), (b"cICP", b"?"))) == plain
    )  # nonsense
    Image.new("RGB", (4, 4), GREEN).save(tmp_path / "a.png")
    corners = (0.3127, 0.3290, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
    p3 = struct.pack(">8I", *(round(value * 100_000) for value in corners))
    assert near(
        colour(with_chunks(tmp_path / "a.png", [(b"gAMA", usual), (b"cHRM", p3)])),
        SHOWN["display_p3"],
        8,
    )


def test_what_an_avif_states_of_its_light(tmp_path):
    path = tmp_path / "a.avif"
    Image.new("RGB", (16, 16), (188, 188, 188)).save(path, quality=100)
    raw = path.read_bytes()
    at = raw.index(b"colrnclx") + 8
    for stated, shown in ((struct.pack(">HH", 9, 16), 255), (struct.pack(">HH", 9, 1), 188)):
        path.write_bytes(raw[:at] + stated + raw[at + 4 :])
        image = load_image(path)
        assert near(image.getpixel((8, 8)), [shown] * 3, 2), stated
        assert image.info["notes"] == (("hdr",) if shown == 255 else ("profile",))


def test_packed_text_and_profiles_above_a_megabyte_are_no_reason_to_leave_a_picture_out(tmp_path):
    large = zlib.compress(bytes(100_000_000))
    texts = [(b"zTXt", b"workflow\0\0" + large), (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + large)]
    Image.new("RGB", (4, 4), GREEN).save(tmp_path / "a.png")
    assert colour(with_chunks(tmp_path / "a.png", texts)) == GREEN
    padded = zlib.compress(profile_of("display_p3") + bytes(3_000_000))
    assert near(
        colour(with_chunks(tmp_path / "a.png", [(b"iCCP", b"name\0\0" + padded)])),
        SHOWN["display_p3"],
    )


# ── depth and size ────────────────────────────────────────────────────────────────────────────────
def test_sixteen_bits_become_eight_by_their_share_of_the_range(tmp_path):
    """65,535 is white and 257 steps are one: dividing by 256 would make 51,400 (a share of 200 of
    255) 201."""
    values = np.arange(256, dtype=np.uint16)[None] * 257
    wanted = np.arange(256)
    for name in ("a.png", "a.tif", "a.jp2"):
        Image.fromarray(values.repeat(4, 0)).save(tmp_path / name)
        assert (np.asarray(load_image(tmp_path / name)) == wanted[None, :, None]).all(), name
    Image.fromarray(values).save(tmp_path / "inverted.tif", tiffinfo={262: 0})  # white is zero
    assert (np.asarray(load_image(tmp_path / "inverted.tif"))[0, :, 0] == 255 - wanted).all()
    Image.fromarray(values).save(tmp_path / "key.png", transparency=40 * 257)
    assert colour(tmp_path / "key.png", (40, 0)) == (255, 255, 255) and colour(
        tmp_path / "key.png", (41, 0)
    ) == (41, 41, 41)
    Image.fromarray(np.array([[0, 1 << 20]], np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(ValueError, match="numbers from 0 to 1048576 have no stated range"):
        load_image(tmp_path / "wide.tif")


def tiff(bits, palette=(), *, signed=False, pixels=b"\0\1\2\xff"):
    """Return a grey TIFF of one row, or one whose numbers are places in a `palette`."""
    tags = {256: (8 * len(pixels) // bits,), 257: (1,), 258: (bits,), 259: (1,), 277: (1,)}
    tags |= {262: (3 if palette else 1,), 278: (1,), 339: (2 if signed else 1,)}
    tags |= {320: palette} if palette else {}
    body, entries = struct.pack("<HHI", 0x4949, 42, 8 + len(pixels)) + pixels, b""
    after = len(body) + 2 + 12 * (len(tags) + 2) + 4
    for tag, values in sorted((tags | {273: (8,), 279: (len(pixels),)}).items()):
        stored = struct.pack("<HH", *values, 0) if len(values) == 1 else struct.pack("<I", after)
        entries += struct.pack("<HHI", tag, 3, len(values)) + stored
    ends = struct.pack("<I", 0) + struct.pack(f"<{len(palette)}H", *palette)
    return io.BytesIO(body + struct.pack("<H", len(tags) + 2) + entries + ends)


def test_numbers_of_a_tiff_are_read_as_it_states_them_or_refused():
    """Pillow takes -1 of 8 bits for 255, and drops the lower 8 bits of a palette's colours; of 16
    bits with a sign, 32,767 would become grey."""
    grey = lambda picture: np.asarray(picture)[0, :, 0].tolist()
    assert grey(load_image(tiff(8))) == [0, 1, 2, 255]
    small = np.array([0, 100, 255], "<i2").tobytes()
    assert grey(load_image(tiff(16, signed=True, pixels=small))) == [0, 100, 255]
    colours = [(level * 257, 65535 - level * 257, level * 256) for level in range(256)]
    palette = [value for channel in zip(*colours, strict=True) for value in channel]
    assert load_image(tiff(8, palette)).getpixel((2, 0)) == (2, 253, 2)
    wide = np.array([0, 32767], "<i2").tobytes()
    refused = {
        "signed numbers of 8 bits have no stated range": tiff(8, signed=True),
        "numbers from 0 to 32767 have no stated range": tiff(16, signed=True, pixels=wide),
        "numbers from -1 to 0 have": tiff(16, signed=True, pixels=b"\xff\xff\0\0"),
        "a palette in 8 bits": tiff(8, [value >> 8 for value in palette]),
    }
    for message, picture in refused.items():
        with pytest.raises(Unusable, match=message):
            load_image(picture)


@pytest.mark.parametrize("head", [b"P6 4\xf2 4 255\n", b"P6 4 4 2\x00\n", b"P6 " + b"4" * 99])
def test_damage_is_one_problem_whatever_the_decoder_says_of_it(tmp_path, head):
    """Reports count by it: what stands in a broken header would make each file a problem."""
    (tmp_path / "a.ppm").write_bytes(head + bytes(64))
    with pytest.raises(Unusable) as caught:
        load_image(tmp_path / "a.ppm")
    assert caught.value.problem == "damaged picture" and caught.value.detail


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


@pytest.mark.parametrize("bits, grey", [(1, 0), (1, 255), (2, 85), (2, 0), (4, 102), (8, 102)])
def test_the_grey_that_means_transparent_is_counted_in_the_bits_of_the_file(tmp_path, bits, grey):
    """A drawing of few greys: Pillow spreads its pixels over 0 to 255, and not the value."""
    most = (1 << bits) - 1
    values = [place % (most + 1) for place in range(8 // bits)]
    packed = sum(value << (8 - bits * (place + 1)) for place, value in enumerate(values))
    key = round(grey * most / 255)
    values[0], packed = key, packed & ((1 << (8 - bits)) - 1) | key << (8 - bits)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", len(values), 1, bits, 0, 0, 0, 0)),
        (b"tRNS", struct.pack(">H", key)),
        (b"IDAT", zlib.compress(bytes([0, packed]))),
        (b"IEND", b""),
    ]
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    shown = [255 if value == key else value * 255 // most for value in values]
    assert np.asarray(load_image(path))[0, :, 0].tolist() == shown


def test_colours_of_sixteen_bits(tmp_path):
    row = np.array([[51400, 15420, 7710], [0x0505, 5, 5]], ">u2").tobytes()
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)),
        (b"tRNS", struct.pack(">3H", 0x0505, 5, 5)),
        (b"IDAT", zlib.compress(b"\0" + row)),
        (b"IEND", b""),
    ]
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    )
    assert colour(tmp_path / "a.png") == (200, 60, 30) and colour(tmp_path / "a.png", (1, 0)) == (
        255,
        255,
        255,
    )


def test_wide_grey_is_converted_in_little_memory(tmp_path):
    Image.new("I;16", (3000, 3000)).save(tmp_path / "a.png")
    tracemalloc.start()
    load_image(tmp_path / "a.png")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * 3000 * 3000  # bytes; doubles of all of it would be 16 a pixel


@pytest.mark.parametrize("side", [13_000, 60_000])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, side):
    Image.new("I;16", (8, 8)).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match="too large: .*million pixels; scale it down"):
        load_image(tmp_path / "a.png")


# ── orientation ───────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_set_upright(tmp_path, suffix, orientation):
    """EXIF 2.3: 0th row and 0th column of what is stored lie at these sides of what is shown."""
    stored = np.zeros((32, 48, 3), np.uint8)
    stored[:16, :16] = 255  # at the corner of row 0 and column 0
    corner = {
        1: "top left",
        2: "top right",
        3: "bottom right",
        4: "bottom left",
        5: "top left",
        6: "top right",
        7: "bottom right",
        8: "bottom left",
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(stored).save(path, exif=exif)
    shown = np.asarray(load_image(path)).mean(2)
    height, width = shown.shape
    assert (width, height) == ((32, 48) if orientation >= 5 else (48, 32)) == shown_size(path)
    row, column = (0 if "top" in corner else height - 16), (0 if "left" in corner else width - 16)
    assert shown[row : row + 16, column : column + 16].mean() > 240
    assert shown.sum() < 1.1 * 255 * 16 * 16
    along_rows = shown[row + 8, :] if orientation < 5 else shown[:, column + 8]
    assert len(along_rows) == 48  # rows of what is stored are columns of what is shown from 5 on


@pytest.mark.parametrize("stated", [0, 9, 99])
@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path, suffix, stated):
    exif = Image.Exif()
    exif[0x0112] = stated
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (48, 32)).save(path, exif=exif)
    assert load_image(path).size == shown_size(path) == (48, 32)


# ── what is not opened ────────────────────────────────────────────────────────────────────────────
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def test_postscript_among_pictures_starts_no_program(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    for name in ("gs", "gswin64c", "gswin32c"):
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexit 1\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    (tmp_path / "frames").mkdir()
    for path in (tmp_path / "cat.png", tmp_path / "frames/0.png"):
        path.write_bytes(POSTSCRIPT)
    from mmdit.data.dataset.picture_folder import folder_pictures

    for read in (
        load_image,
        shown_size,
        lambda path: load_first_frame(path, (8, 8)),
        lambda path: photo_of(path.read_bytes()),
        lambda path: list(load_frames(path.parent / "frames")),
    ):
        with pytest.raises(ValueError, match="it is PostScript"):
            read(tmp_path / "cat.png")
    assert (
        "it is PostScript" in looked(tmp_path / "cat.png").reason
        and "frame 0.png" in looked(tmp_path / "frames", "video").reason
    )
    with pytest.raises(ValueError, match="no picture could be read"):
        list(folder_pictures(tmp_path, 8, 8))
    assert not (tmp_path / "started").exists()


def test_pictures_and_videos_are_opened_in_one_place():
    """Whatever opens a picture elsewhere would do so without the closed list. `media` reads back
    what it wrote itself."""
    for path in [*(ROOT / "mmdit").rglob("*.py"), *(ROOT / "VTP").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        if "Image.open" not in text and "av.open" not in text:
            continue
        nodes = ast.walk(ast.parse(text))
        calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
        assert "Image.open" not in calls or path.name in ("pictures.py", "media.py"), path
        assert "av.open" not in calls or path.name in ("videos.py", "media.py"), path


def test_a_pipe_is_refused_at_once(tmp_path):
    (tmp_path / "frames").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "frames/0.png")
    for name in ("pipe.png", "pipe.mp4", "pipe.txt", "frames/1.png"):
        os.mkfifo(tmp_path / name)
    refusal = "not a regular file: it is a named pipe"
    with pytest.raises(ValueError, match=refusal):
        read_captions(tmp_path / "pipe.txt", False)
    assert (
        looked(tmp_path / "pipe.png").reason
        == looked(tmp_path / "pipe.mp4", "video").reason
        == refusal
    )
    assert looked(tmp_path / "frames", "video").reason == f"{refusal} (frame 1.png)"
    rows = [
        {"id": "a", "image_path": "pipe.png", "caption": ""},
        {"id": "b", "image_path": "frames/0.png", "caption": ""},
        {"id": "c", "image_path": "/dev/zero", "caption": ""},
        {"id": "d", "image_path": "frames", "caption": ""},
    ]
    report = run(write_meta(tmp_path, rows), tmp_path / "cache")
    assert [skip.reason.rpartition(" a ")[2] for skip in report.skipped] == [
        "named pipe",
        "device",
        "folder",
    ]
    rows = [
        {"id": "a", "video_path": "pipe.mp4", "caption": ""},
        {"id": "b", "frames_dir": "frames", "caption": ""},
    ]
    with pytest.raises(ValueError, match=r"(?s)none of the 2 records.*named pipe.*\(frame 1.png\)"):
        run(write_meta(tmp_path, rows, "v.jsonl"), tmp_path / "clips", kind="video")
    (tmp_path / "cache/b.pt").unlink()
    os.mkfifo(tmp_path / "cache/b.pt")
    with pytest.raises(ValueError, match="b.pt is damaged: .*named pipe"):
        open_cache(tmp_path / "cache").load(0)


@pytest.mark.parametrize(
    "start, kind",
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC picture; convert it"),
        (b"\xff\x0a\xfa\x1f", "a JPEG XL picture"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture"),
        (b'<?xml version="1.0"?>\n<svg xmlns="', "an SVG drawing"),
        (b"%PDF-1.7", "a PDF"),
        (b"8BPS\0\1", "a Photoshop"),
        (b"\n<!DOCTYPE html>", "a web page"),
        (b"", "nothing; get the file again"),
        (bytes(500), "zeros only"),
        (b"\0\0\0\x20ftypisom", "a video (name it video_path)"),
        (b"qoif", "a QOI picture"),
        (b"II+\0\x08\0\0\0", "a TIFF or raw file of a layout not read; convert it"),
        (b"\0\0\0\x18ftypavif", "an AVIF picture, damaged"),
        (b"no picture", "cannot identify it, it begins with b'no pictu'"),
    ],
)
def test_what_is_no_picture_of_the_list_is_named(tmp_path, start, kind):
    (tmp_path / "a.jpg").write_bytes(start)
    with pytest.raises(ValueError) as refused:
        load_image(tmp_path / "a.jpg")
    assert kind in str(refused.value)


def test_pictures_of_other_formats_in_a_folder_are_told(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("b.HEIC", "c.jxl", "d.pdf"):
        (tmp_path / name).touch()
    assert (
        ".heic, .jxl: pictures that are not read; convert them" in prepare_folder(tmp_path).text()
    )


def test_files_that_hold_several_pictures_give_the_first(tmp_path):
    for name, kind in (("a.jpg", "MPO"), ("a.tif", "TIFF")):  # MPO: of phones
        red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
        red.save(tmp_path / name, format=kind, save_all=True, append_images=[blue])
        assert (
            near(colour(tmp_path / name), (255, 0, 0))
            and not load_image(tmp_path / name).info["animated"]
        )


def test_damage_is_an_error_and_broken_metadata_is_none(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    for name, options in (
        ("p.jpg", {"progressive": True}),
        ("a.png", {}),
        ("a.webp", {}),
        ("a.gif", {}),
        ("a.tif", {}),
        ("a.bmp", {}),
    ):
        noise.save(tmp_path / name, **options)
        whole = (tmp_path / name).read_bytes()
        for share in (0.3, 0.6, 0.9):
            (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
            with pytest.raises(ValueError, match="damaged picture|no picture"):
                load_image(tmp_path / name)
    noise.save(tmp_path / "exif.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert load_image(tmp_path / "exif.jpg").size == (64, 64)


# ── folders of frames, and what is told ───────────────────────────────────────────────────────────
def test_a_frame_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "clip").mkdir()
    for i in range(6):
        Image.effect_noise((40, 40), 90).save(tmp_path / f"clip/{i}.png")
    torn = tmp_path / "clip/4.png"
    torn.write_bytes(torn.read_bytes()[:900])
    rows = [{"id": "clip", "frames_dir": "clip", "caption": ""}]
    with pytest.raises(
        ValueError, match=r"damaged picture: image file is truncated .*\(frame 4.png\)"
    ):
        run(write_meta(tmp_path, rows), tmp_path / "cache", kind="video")
    torn.unlink()
    torn.symlink_to(tmp_path / "gone.png")
    assert looked(tmp_path / "clip", "video").reason == "file not found (frame 4.png)"
    with pytest.raises(ValueError, match=r"file not found \(frame 4.png\)"):
        run(tmp_path / "train_images.jsonl", tmp_path / "cache", kind="video")
    torn.unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 40)).save(torn, exif=exif)  # turned, of the same size
    assert looked(tmp_path / "clip", "video")["frames"] == 6
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.heic").touch()
    assert (
        looked(tmp_path / "other", "video").reason
        == "folder without pictures: it holds 1 .heic, which are not read"
    )


def test_how_pictures_were_decoded_is_counted_and_told(tmp_path):
    frames = [Image.new("RGB", (32, 32), name) for name in ("red", "green", "blue")]
    (tmp_path / "clip").mkdir()
    frames[0].save(tmp_path / "clip/0.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (32, 32)).save(tmp_path / "clip/1.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "broken.png", icc_profile=b"broken")
    rows = [
        {"id": name, "image_path": str(GOLDEN / f"{name}.png"), "caption": ""} for name in SHOWN
    ]
    meta = write_meta(
        tmp_path, [*rows, {"id": "broken", "image_path": "broken.png", "caption": ""}]
    )
    report = run(meta, tmp_path / "cache")
    assert report.notes == {"profile": 2, "profile ignored": 1}
    assert (
        "2 items had other colours than sRGB" in report.text()
        and "1 items have a colour profile that is broken" in report.text()
    )
    cache = open_cache(tmp_path / "cache")
    assert cache.sources[cache.ids.index("broken")]["notes"] == ["profile ignored"]
    looks = look_at(
        read_records(meta, "image"),
        "image",
        lambda size: (32, 32),
        PreprocessConfig(),
        VideoConfig(32, 32),
    )
    assert totals(looks)["notes"] == {
        "profile": 2,
        "profile ignored": 1,
    } and "2 had other colours" in look_text(looks, totals(looks))
    meta = write_meta(tmp_path, [{"id": "clip", "frames_dir": "clip", "caption": ""}], "v.jsonl")
    assert "1 items from animated pictures" in run(meta, tmp_path / "clips", kind="video").text()


def test_a_cache_of_an_earlier_decoding_stays_usable_and_is_told(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    rows = [{"id": id, "image_path": "a.png", "caption": ""} for id in "ab"]
    assert "decoded otherwise" not in run(write_meta(tmp_path, rows[:1]), tmp_path / "cache").text()
    manifest = json.loads((tmp_path / "cache/manifest.json").read_text())
    assert manifest.pop("decoding") == 2
    (tmp_path / "cache/manifest.json").write_text(json.dumps(manifest))
    assert (
        len(open_cache(tmp_path / "cache", CacheManifest.of(MeanPixels(), VideoConfig(32, 32))))
        == 1
    )
    for _ in range(2):  # also after new items came into it
        report = run(write_meta(tmp_path, rows), tmp_path / "cache")
        assert (
            "decoded otherwise (version 1, now 2" in report.text() and "new folder" in report.text()
        )
    assert len(open_cache(tmp_path / "cache")) == 2


def test_a_picture_in_memory_is_read_like_a_file():
    assert load_image(io.BytesIO((GOLDEN / "display_p3.png").read_bytes())).getpixel(
        (0, 0)
    ) == colour(GOLDEN / "display_p3.png")
