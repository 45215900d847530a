"""Videos and animated pictures come out in the colours and the position in which a player shows
them."""

import errno
import os
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit.data.dataset import videos
from mmdit.data.dataset.problems import Unusable
from mmdit.data.dataset.records import read_records
from mmdit.data.dataset.sources import prepare_folder
from mmdit.data.dataset.videos import Probe, probe, read_video
from mmdit.training.media import read_back, save_video
from tests.test_pictures import GOLDEN, looked, near
from tests.test_sources import write_video

av = pytest.importorskip("av")
BROWN = (200, 60, 30)


def write_frames(
    path,
    frames,
    codec="mpeg4",
    layout="yuv420p",
    equations=None,
    tags=None,
    rate=10,
    options=None,
    start=0,
):
    """A file of these uint8 RGB (or RGBA) frames. `equations`: by which they become YUV; `tags`:
    what the file says of colours; `start`: when the first is shown, in frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = layout
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(
                pixels, format="rgba" if pixels.shape[2] == 4 else "rgb24"
            )
            frame = (
                frame.reformat(format=layout, dst_colorspace=equations)
                if layout != "rgba"
                else frame
            )
            frame.pts, frame.time_base = start + number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    "name, codec",
    [
        ("a.MPG", "mpeg2video"),
        ("a.wmv", "wmv2"),
        ("a.flv", "flv"),
        ("a.3gp", "mpeg4"),
        ("a.m2ts", "mpeg2video"),
    ],
)
def test_older_containers_are_clips_of_a_folder_too(tmp_path, name, codec):
    pixels = [np.full((48, 64, 3), 40 * number, np.uint8) for number in range(1, 6)]
    write_frames(tmp_path / name, pixels, codec, rate=25)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.jfif", format="JPEG")
    report = prepare_folder(tmp_path)
    assert (report.videos, report.images) == (1, 1) and not report.other_files
    (record,) = read_records(tmp_path / "train_videos.jsonl", "video")
    shown = [np.asarray(image).mean() for image in read_video(record.source, 25)]
    assert np.abs(np.array(shown) - [40, 80, 120, 160, 200]).max() < 4


@pytest.mark.parametrize(
    "name, fps", [("a.avi", 10), ("a.avi", 2.5), ("a.wmv", 2.5), ("a.mpg", 10)]
)
def test_frames_without_times_of_their_own_are_not_taken_for_others(tmp_path, name, fps):
    """AVI and WMV have the times of decoding alone, and MPEG's streams that of the first frame."""
    pixels = [np.full((32, 32, 3), 10 * number, np.uint8) for number in range(20)]
    path = write_frames(tmp_path / name, pixels, "libx264", options={"sc_threshold": "0"})
    with pytest.raises(Unusable, match="does not say when its frames are shown.* encode it anew"):
        list(read_video(str(path), fps))
    ordered = write_frames(tmp_path / name, pixels, "mpeg4", options={"bf": "3"})
    shown = [np.asarray(image).mean() for image in read_video(str(ordered), fps)]
    assert len(shown) == 2 * fps and np.all(np.diff(shown) > -2)


def test_frames_at_uneven_times_are_taken_by_their_times_also_where_their_mean_rate_fits():
    """Ten a second on average, of which the first five come in a fifth of a second."""
    times = (0, 40, 80, 120, 160, 400, 520, 640, 760, 900)
    uneven = Probe(32, 32, times, 0.001, 0.0)
    assert uneven.fps == pytest.approx(10)
    assert uneven.plan(10) == [0, 2, 4, 4, 5, 5, 6, 7, 8, 9]
    steady = Probe(32, 32, tuple(range(0, 1000, 100)), 0.001, 0.0)
    assert steady.plan(10) == list(range(10))


def test_frames_that_all_come_at_once_are_one_frame_and_end_no_caching():
    """Two frames a tenth of a millisecond apart, as damaged times have them."""
    for fps in (1, 12, 60):
        assert Probe(32, 32, (0, 1), 0.0001, 0.0).plan(fps) == [0]


@pytest.mark.parametrize("number, reason", [(errno.ENOTSUP, Unusable), (errno.EIO, OSError)])
def test_what_a_codec_lacks_is_no_failure_of_the_disk(tmp_path, monkeypatch, number, reason):
    """A source on a disk that fails keeps what was cached of it; one that is damaged does not."""
    path = write_frames(tmp_path / "a.mp4", [np.zeros((32, 32, 3), np.uint8)] * 2)

    def fail(*_):
        raise OSError(number, "as FFmpeg says it")

    monkeypatch.setattr(videos, "_rgb", fail)
    with pytest.raises(reason, match="as FFmpeg says it"):
        list(read_video(str(path), 10))


def test_a_recording_whose_clock_does_not_begin_at_zero_is_whole(tmp_path):
    """Matroska states when its last frame ends, by the clock of a part cut out of a long stream."""
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (64, 64, 3), np.uint8) for _ in range(30)]
    late = write_frames(tmp_path / "late.mkv", frames, start=300)
    assert len(list(read_video(str(late), 10))) == 30
    data = write_frames(tmp_path / "cut.mkv", frames).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) // 3])
    with pytest.raises(ValueError, match="truncated: the video ends at .* states 3.00 s"):
        probe(str(tmp_path / "cut.mkv"))


def plain(size, colour=BROWN):
    return np.broadcast_to(np.array(colour, np.uint8), (size[1], size[0], len(colour))).copy()


def first(path):
    return next(read_video(path, probe(path).fps or 10))


# ── colours ───────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "size, equations",
    [
        ((1280, 720), "ITU709"),
        ((1280, 536), "ITU709"),
        ((720, 480), "ITU601"),
        ((63, 47), "ITU601"),
    ],
)
def test_video_that_says_nothing_of_its_colours_is_bt709_if_it_is_hd(tmp_path, size, equations):
    image = first(
        write_frames(
            tmp_path / "a.mp4", [plain(size)], equations=equations, layout="yuv444p", codec="ffv1"
        )
        if size[0] % 2
        else write_frames(tmp_path / "a.mp4", [plain(size)], equations=equations)
    )
    assert image.size == size and near(image.getpixel((20, 20)), BROWN, 4)


@pytest.mark.parametrize("space, equations", [(1, "ITU709"), (6, "ITU601"), (9, "BT2020")])
@pytest.mark.parametrize("size", [(1280, 720), (64, 48)])
def test_what_a_video_says_of_its_colours_counts_whatever_its_size(
    tmp_path, space, equations, size
):
    path = write_frames(
        tmp_path / "a.mkv", [plain(size)], "ffv1", "yuv444p", equations, {"colorspace": space}
    )
    assert near(first(path).getpixel((20, 20)), BROWN, 3)


@pytest.mark.parametrize("size", [(64, 48), (1280, 720)])
def test_a_sample_that_is_written_as_a_video_has_its_colours_when_it_is_read(tmp_path, size):
    clip = torch.from_numpy(plain(size)).movedim(-1, 0)[None].expand(2, -1, -1, -1) / 255
    path = save_video(clip, tmp_path / "a.mp4", 10)
    assert near(first(path).getpixel((20, 20)), BROWN, 3)
    assert near(read_back(path)[0, :, 20, 20].tolist(), BROWN, 3)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_primaries, frame.color_trc) == (1, 1, 1)


def test_full_range_and_ten_bits(tmp_path):
    path = write_frames(tmp_path / "a.mkv", [plain((64, 48))], "ffv1", "yuv420p10le", "ITU601")
    assert near(first(path).getpixel((20, 20)), BROWN, 3)
    path = write_frames(tmp_path / "b.mkv", [plain((64, 48))], "mjpeg", "yuvj444p", "ITU601")
    assert near(first(path).getpixel((20, 20)), BROWN, 4)


def test_hlg_is_tone_mapped():
    image = first(GOLDEN / "hlg.mp4")  # 75 % of the signal: diffuse white, BT.2408
    assert near(image.getpixel((20, 20)), (229, 229, 229), 2) and image.info["notes"] == ("hdr",)


@pytest.mark.parametrize("signal, shown", [(0, 0), (97, 100), (148, 229), (192, 255), (255, 255)])
def test_pq_is_tone_mapped(tmp_path, signal, shown):
    """BT.2408: 38 % (97 of 255) is a grey card of 26 cd/m², 0.128 of diffuse white and below the
    knee; 58 % is diffuse white."""
    tags = {"color_trc": 16, "color_primaries": 9}
    image = first(
        write_frames(
            tmp_path / "a.mkv", [plain((64, 48), [signal] * 3)], "ffv1", "bgr0", None, tags
        )
    )
    assert near(image.getpixel((20, 20)), [shown] * 3, 2) and image.info["notes"] == ("hdr",)


def test_wide_colours_become_srgb_and_grey_stays(tmp_path):
    for primaries, green in (
        (9, (0, 209, 0)),
        (12, (0, 203, 7)),
    ):  # of (90, 200, 60), by their definitions
        tags = {"color_primaries": primaries, "color_trc": 1}
        grey = first(
            write_frames(
                tmp_path / "a.mkv", [plain((64, 48), (90, 90, 90))], "ffv1", "bgr0", None, tags
            )
        )
        assert near(grey.getpixel((9, 9)), (90, 90, 90)) and grey.info["notes"] == ("profile",)
        image = first(
            write_frames(
                tmp_path / "b.mkv", [plain((64, 48), (90, 200, 60))], "ffv1", "bgr0", None, tags
            )
        )
        assert near(image.getpixel((9, 9)), green)


def test_transparency_is_laid_on_white_as_of_pictures(tmp_path):
    pixels = plain((64, 48), (200, 60, 30, 255))
    pixels[:, 32:, 3] = 0
    image = first(write_frames(tmp_path / "a.mov", [pixels], "png", "rgba"))
    assert image.getpixel((9, 9)) == BROWN and image.getpixel((60, 9)) == (255, 255, 255)


# ── position ──────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "a, b, c, d, corner",
    [
        (1, 0, 0, 1, "top left"),
        (-1, 0, 0, 1, "top right"),
        (1, 0, 0, -1, "bottom left"),
        (-1, 0, 0, -1, "bottom right"),
        (0, 1, 1, 0, "top left"),
        (0, 1, -1, 0, "top right"),
        (0, -1, 1, 0, "bottom left"),
        (0, -1, -1, 0, "bottom right"),
    ],
)
def test_every_matrix_of_quarter_turns_and_mirrors_is_followed(tmp_path, a, b, c, d, corner):
    """ISO 14496-12: (x, y) is shown at (a x + c y, b x + d y); a = d = -1 lays the top left corner
    to the bottom right."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :16] = 230
    pixels[:16, 16:48] = 115  # along the first row
    path = write_frames(tmp_path / "a.mp4", [pixels] * 2)
    raw, one = path.read_bytes(), 1 << 16
    at = raw.index(b"tkhd") + 44
    matrix = np.array([a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30], ">i4").tobytes()
    path.write_bytes(raw[:at] + matrix + raw[at + 36 :])
    shown = np.asarray(first(path)).astype(int).mean(2)
    height, width = shown.shape
    assert (width, height) == ((64, 32) if a else (32, 64))
    top, left = (4 if "top" in corner else height - 12), (4 if "left" in corner else width - 12)
    assert shown[top : top + 8, left : left + 8].min() > 200
    first_row = shown[top + 4] if a else shown[:, left + 4]
    assert sorted([first_row[24:40].mean() > 90, first_row.max() > 200]) == [True, True]


def test_pixels_of_a_turned_clip_are_made_square_before_it_is_turned(tmp_path):
    path = write_video(tmp_path / "a.mp4", np.arange(3) / 30, ratio=Fraction(3, 2))
    raw, one = path.read_bytes(), 1 << 16
    at = raw.index(b"tkhd") + 44
    matrix = np.array([0, one, 0, -one, 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    path.write_bytes(raw[:at] + matrix + raw[at + 36 :])
    assert first(path).size == (48, 96)


def test_interlaced_video_is_told(tmp_path):
    options = {"flags": "+ilme+ildct", "top": "1"}
    path = write_frames(
        tmp_path / "a.mkv", [plain((64, 64))] * 3, "mpeg2video", rate=25, options=options
    )
    assert first(path).info["notes"] == ("interlaced",)


# ── what is refused ───────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {other}\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    ],
)
def test_a_list_of_other_files_or_addresses_is_no_video(tmp_path, text):
    other = write_video(tmp_path / "other.mp4", np.arange(3) / 30)
    (tmp_path / "a.mp4").write_text(text.format(other=other.name))
    with pytest.raises(ValueError, match="unreadable video"):
        next(read_video(tmp_path / "a.mp4", 10))


def test_a_title_that_is_no_utf8_is_no_reason_to_leave_a_video_out(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "caf_ au lait"
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(plain((64, 48)), format="rgb24")))
        container.mux(stream.encode(None))
    raw = path.read_bytes()
    assert b"caf_" in raw
    path.write_bytes(raw.replace(b"caf_", b"caf\xe9"))
    assert first(path).size == (64, 48)


def test_a_codec_that_nobody_knows_is_told(tmp_path):
    path = write_video(tmp_path / "a.avi", np.arange(3) / 30)
    path.write_bytes(path.read_bytes().replace(b"FMP4", b"QQQQ").replace(b"fmp4", b"QQQQ"))
    with pytest.raises(ValueError, match="unreadable video: its codec is not known"):
        first(path)


def test_transparency_that_is_not_read_is_told(tmp_path):
    if "libvpx-vp9" not in av.codecs_available:
        pytest.skip("needs an encoder of VP9")
    path = tmp_path / "a.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuva420p"
        frame = av.VideoFrame.from_ndarray(plain((64, 48), (200, 60, 30, 0)), format="rgba")
        container.mux(stream.encode(frame.reformat(format="yuva420p")))
        container.mux(stream.encode(None))
    assert first(path).info["notes"] == ("alpha not read",)


def test_frames_of_too_many_pixels_are_refused(tmp_path, monkeypatch):
    paths = []
    for number, ratio in enumerate((1, Fraction(3, 2), 17)):
        path = tmp_path / f"{number}.mkv"
        paths.append(write_video(path, np.arange(3) / 30, (320, 240), ratio=Fraction(ratio)))
    with pytest.raises(ValueError, match="its pixels are 17 times as wide as high"):
        probe(paths[2])
    monkeypatch.setattr(videos, "MAX_FRAME_PIXELS", 320 * 240)
    assert probe(paths[0]).width == 320 and len(list(read_video(paths[0], 30))) == 3
    with pytest.raises(ValueError, match="too large: frames of 480x240 are more than"):
        probe(paths[1])
    monkeypatch.setattr(videos, "MAX_FRAME_PIXELS", 320 * 240 / 4)
    with pytest.raises(ValueError, match="too large: frames of 320x240 are more than"):
        probe(paths[0])
    monkeypatch.setattr(videos, "_check_size", lambda width, height: None)
    monkeypatch.setattr(videos, "MAX_FRAME_PIXELS", 320 * 240 // 4)
    with pytest.raises(
        ValueError, match="unreadable video"
    ):  # the file states less than its frames have
        list(read_video(paths[0], 30))


# ── animated pictures ─────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "avif"])
def test_an_animated_picture_is_a_clip(tmp_path, suffix):
    """Frames of 50, 50, 200, 50 and 50 ms: at ten a second the second is passed over, the third is
    shown twice."""
    shades = (0, 60, 120, 180, 240)
    frames = [Image.new("RGB", (48, 32), (shade, 60, 30)) for shade in shades]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(
        path,
        save_all=True,
        append_images=frames[1:],
        duration=[50, 50, 200, 50, 50],
        lossless=True,
        loop=0,
    )
    red = [image.getpixel((9, 9))[0] for image in read_video(path, 10)]
    assert np.abs(np.array(red) - [0, 120, 120, 180, 240]).max() <= 4
    found = probe(path)
    assert (found.width, found.height, found.stamps) == (48, 32, (0, 50, 100, 300, 350))
    with pytest.raises(ValueError, match="too few frames a second"):
        next(read_video(path, 30))


def test_animations_show_what_lies_under_them_as_white_and_a_still_is_one_frame(tmp_path):
    frames = [Image.new("RGBA", (32, 32), (200, 60, 30, alpha)) for alpha in (255, 0, 128)]
    frames[0].save(
        tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=100, lossless=True
    )
    assert [image.getpixel((0, 0))[1] for image in read_video(tmp_path / "a.webp", 10)][:2] == [
        60,
        255,
    ]
    frames[0].save(tmp_path / "still.png")
    assert [image.size for image in read_video(tmp_path / "still.png", 10)] == [(32, 32)]
    images = [Image.new("RGB", (8, 8), name) for name in ("white", "red", "blue")]
    images[0].save(
        tmp_path / "a.png",
        save_all=True,
        append_images=images[1:],
        duration=100,
        default_image=True,
    )
    assert [image.getpixel((0, 0)) for image in read_video(tmp_path / "a.png", 10)] == [
        (255, 0, 0),
        (0, 0, 255),
    ]
    whole = (tmp_path / "a.webp").read_bytes()
    (tmp_path / "a.webp").write_bytes(whole[: len(whole) - 40])
    assert looked(tmp_path / "a.webp", "video").reason.startswith(("damaged picture", "no picture"))
    os.remove(tmp_path / "a.webp")
    assert looked(tmp_path / "a.webp", "video").reason == "file not found"
