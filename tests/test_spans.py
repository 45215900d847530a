"""A line of the metadata may name some frames of a long video: they are exactly those frames,
wherever decoding begins, and nothing is encoded anew for another line of the same file."""

import json
import os
from fractions import Fraction

import numpy as np
import pytest
import torch

from mmdit.data.dataset import videos
from mmdit.data.dataset.members import VideoSpan
from mmdit.data.dataset.records import read_records
from mmdit.data.dataset.sources import extract_frames
from mmdit.data.dataset.stamps import compare_stamp, stamp_of
from mmdit.data.dataset.videos import probe, read_video, thumbnails
from tests.helpers.thorough import thorough
from tests.test_cache import VIDEO, run, write_meta
from tests.test_videos import write_frames

av = pytest.importorskip("av")
COUNT = 40


def write_film(path, codec="mpeg4", b_frames=0, options=None, count=COUNT):
    """Frame `i` is grey 20 + 5·i on the right, and noise on the left, which every codec spoils
    differently: equal pixels come from the same frame, decoded in the same way."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 48, 32, 3), np.uint8)
    with av.open(str(path), "w") as container:
        # key frames in every tenth frame, and nowhere else
        options = options or {"sc_threshold": "1000000000"}
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.bit_rate = 8_000_000
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 10, b_frames
        for number in range(count):
            pixels = np.full((48, 64, 3), 20 + 5 * number, np.uint8)
            pixels[:, :32] = noise[number]
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def pixels(source, fps=25):
    return np.stack([np.asarray(image) for image in read_video(source, fps)])


OPEN = {"x264-params": "open-gop=1:bframes=3:keyint=10:min-keyint=10"}  # frames refer beyond keys


@pytest.mark.parametrize(
    "name, codec, b_frames, options",
    [
        *thorough(("a.mp4", "mpeg4", 0, None)),
        ("b.mp4", "mpeg4", 2, None),  # stored in another order than shown
        ("a.avi", "mpeg4", 2, None),  # whose container finds no key frames
        ("a.ts", "mpeg2video", 2, None),  # the same
        ("a.mkv", "libx264", 3, OPEN),
        ("c.mp4", "libx264", 3, OPEN),
    ],
)
def test_a_span_is_exactly_its_frames_wherever_it_begins(tmp_path, name, codec, b_frames, options):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    path = str(write_film(tmp_path / name, codec, b_frames, options))
    whole = pixels(path)
    assert len(whole) == COUNT
    for first in range(COUNT - 2):
        end = min(COUNT, first + 4)
        assert (pixels(VideoSpan(path, first, end)) == whole[first:end]).all(), first


def test_a_span_of_frames_so_small_that_several_share_a_pack_is_exactly_its_frames(tmp_path):
    """FFmpeg gives frames other times where it begins in the middle of an MPEG stream."""
    greys = [np.full((64, 96, 3), 20 + 5 * number, np.uint8) for number in range(COUNT)]
    path = str(write_frames(tmp_path / "a.mpg", greys, "mpeg1video", rate=24, options={"bf": "3"}))
    whole = pixels(path, 24)
    for first in range(24, COUNT - 1):
        assert (pixels(VideoSpan(path, first, first + 2), 24) == whole[first:][:2]).all(), first


def test_decoding_begins_at_the_key_frame_before_a_span(tmp_path, monkeypatch):
    path = str(write_film(tmp_path / "a.mp4"))
    assert [probe(path).stamps.index(key) for key in probe(path).keys][:2] == [0, 10]
    decoded = []
    original = videos._decoded_from

    def counted(*arguments, **options):
        for pair in original(*arguments, **options):
            decoded.append(pair)
            yield pair

    monkeypatch.setattr(videos, "_decoded_from", counted)
    assert len(pixels(VideoSpan(path, 25, 28))) == 3
    assert len(decoded) <= 9  # 20 … 28, not 0 … 28


def test_a_span_is_read_at_the_rate_that_is_asked_for(tmp_path):
    path = str(write_film(tmp_path / "a.mp4"))
    half = pixels(VideoSpan(path, 10, 30), 12.5)
    assert (half == pixels(path)[10:30:2]).all()


def test_thumbnails_of_the_end_are_those_of_the_whole(tmp_path):
    path = str(write_film(tmp_path / "a.mp4"))
    whole = list(thumbnails(path, probe(path), (16, 9)))
    assert [round(second * 25) for second, _ in whole] == list(range(COUNT))
    assert whole[0][1].shape == (3, 9, 16) and int(whole[30][1][0, 4, 12]) == pytest.approx(
        161, abs=3
    )
    for (second, thumbnail), (other, again) in zip(
        whole[23:], thumbnails(path, probe(path), (16, 9), 23)
    ):
        assert second == other and (thumbnail == again).all()


def test_damage_in_the_middle_costs_frames_up_to_the_next_key_frame(tmp_path):
    path = write_film(tmp_path / "a.mkv")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        place, size = packets[13].pos, packets[13].size
    start = data.index(bytes(packets[13]), place)
    data[start : start + size] = bytes(size)  # frame 13, of the group 10 … 19
    path.write_bytes(data)
    lost = [
        number
        for number, (_, small) in enumerate(thumbnails(str(path), probe(path), (8, 8)))
        if small is None
    ]
    assert lost and set(lost) <= set(range(13, 20))


def test_what_is_no_span_is_refused_with_its_line(tmp_path):
    write_film(tmp_path / "a.mp4")
    rows = [
        {"id": str(number), "video_path": "a.mp4", "caption": "", "video_span": span}
        for number, span in enumerate([[0], [3, 3], [-1, 4], ["0", 4], [True, 4], "0-4", [0.0, 4]])
    ]
    with pytest.raises(ValueError) as refusal:
        read_records(write_meta(tmp_path, rows), "video")
    lines = str(refusal.value).splitlines()
    assert len(lines) == len(rows) and all("must be [first, end]" in line for line in lines)
    with pytest.raises(ValueError, match="video_span ends at 41, of 40 frames"):
        pixels(VideoSpan(str(tmp_path / "a.mp4"), 30, 41))


@pytest.mark.parametrize("key, media", [("frames_dir", "video"), ("image_path", "image")])
def test_a_span_beside_no_film_is_refused(tmp_path, key, media):
    meta = write_meta(tmp_path, [{"id": "a", key: "b", "caption": "", "video_span": [3, 9]}])
    with pytest.raises(ValueError, match=f'1: "video_span" stands beside "{key}"'):
        read_records(meta, media)


def test_the_folder_of_frames_of_a_line_with_both_is_whole(tmp_path):
    row = {"id": "a", "video_path": "a.mp4", "frames_dir": "b", "caption": "", "video_span": [3, 9]}
    meta = write_meta(tmp_path, [row])
    assert read_records(meta, "video")[0].span is None
    record = read_records(meta, "video", "video_path")[0]
    assert record.span == VideoSpan(str(tmp_path / "a.mp4"), 3, 9)
    write_film(tmp_path / "a.mp4")
    assert extract_frames(record, tmp_path / "frames", 25) == 6


def clip_row(first, end):
    return {"id": "a", "video_path": "a.mp4", "caption": "", "video_span": [first, end]}


def test_a_cache_holds_the_frames_of_a_span_and_notices_another_one(tmp_path):
    write_film(tmp_path / "a.mp4")
    options = {"kind": "video", "video": type(VIDEO)(32, 32, fps=25, num_frames=2)}
    meta = write_meta(tmp_path, [clip_row(10, 16), clip_row(30, 34) | {"id": "b"}])
    assert run(meta, tmp_path / "cache", **options).written == 2
    stored = {id: torch.load(tmp_path / "cache" / f"{id}.pt", weights_only=True) for id in "ab"}
    for id, first, end in (("a", 10, 16), ("b", 30, 34)):
        expected = torch.arange(20 + 5 * first, 20 + 5 * end, 5).float()
        grey = stored[id]["latents"][:, 0, 1, 0].float() * 255
        assert (grey - expected).abs().max() < 4
    assert stored["b"]["source"]["span"] == [30, 34]
    assert run(meta, tmp_path / "cache", **options).already == 2
    meta = write_meta(tmp_path, [clip_row(11, 16), clip_row(30, 34) | {"id": "b"}])
    report = run(meta, tmp_path / "cache", **options)
    assert (report.written, report.already) == (1, 1)


def test_the_stamp_of_a_span_follows_the_file(tmp_path):
    path = write_film(tmp_path / "a.mp4")
    span = VideoSpan(str(path), 3, 9)
    stamp = stamp_of(span, 25)
    assert compare_stamp(span, stamp, 25) == ("same", None)
    assert compare_stamp(VideoSpan(str(path), 3, 8), stamp, 25)[0] == "changed"
    os.utime(path, (1, 1))
    state, renewed = compare_stamp(span, stamp, 25)
    assert state == "renewed" and renewed["content"] == stamp["content"]
    write_film(path, count=30)
    assert compare_stamp(span, stamp, 25)[0] == "changed"
    path.unlink()
    assert compare_stamp(span, stamp, 25) == ("gone", None)
    assert json.dumps(stamp)  # as an item stores it
