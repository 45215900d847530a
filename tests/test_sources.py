"""Video files move as a player shows them; a folder of media becomes metadata with every file
accounted for."""

import errno
import json
import os
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.dataset.buckets import VideoConfig
from mmdit.data.dataset.media_sets import media_records
from mmdit.data.dataset.picture_folder import folder_pictures
from mmdit.data.dataset.records import Record, read_records
from mmdit.data.dataset.sources import extract_frames, files_below, ids_for, prepare_folder
from mmdit.data.dataset.videos import probe, read_video
from mmdit.data.dataset.written_lines import write_lines
from mmdit.files import held_folder
from mmdit.scripts import cache_vtp_images, cache_vtp_latents, inspect_data
from mmdit.scripts import prepare_folder as folder_script
from mmdit.scripts import prepare_frames as frames_script
from tests.helpers.tiny import Workshop, refused
from tests.test_cache import VIDEO, MeanPixels, contents, run, write_meta

av = pytest.importorskip("av")


def write_video(path, times, size=(64, 48), unit=600, codec="mpeg4", ratio=None, b_frames=0):
    """A clip whose frame at `t` seconds has brightness 40 + 70·t: what was taken can be read off
    it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, unit)
        stream.codec_context.qmin, stream.codec_context.qmax = 1, 2
        stream.codec_context.max_b_frames = b_frames
        if ratio:
            stream.codec_context.sample_aspect_ratio = ratio
        container.start_encoding()  # a clip without frames has a header, too
        for t in times:
            frame = av.VideoFrame.from_ndarray(
                np.full((size[1], size[0], 3), 40 + 70 * t, np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = round(t * unit), Fraction(1, unit)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def seconds(path, fps):
    return np.array([(np.asarray(image).mean() - 40) / 70 for image in read_video(path, fps)])


@pytest.mark.parametrize(
    "name, b_frames", [("a.mp4", 0), ("a.mkv", 0), ("a.mov", 2)]
)  # 2: stored in another order than shown
def test_a_clip_at_a_lower_rate_shows_the_frame_that_is_on_screen(tmp_path, name, b_frames):
    path = write_video(tmp_path / name, np.arange(60) / 30, b_frames=b_frames)
    assert probe(path).fps == pytest.approx(30, rel=0.01) and len(probe(path).stamps) == 60
    taken = seconds(path, 15)
    assert len(taken) == 30 and np.abs(taken - np.arange(30) / 15).max() < 0.03
    taken = seconds(
        path, 16
    )  # no whole number: never a frame that is not yet shown, never one that is gone
    late = np.arange(32) / 16 - taken
    assert len(taken) == 32 and late.min() > -0.03 and late.max() < 1 / 30 + 0.03


def test_a_rate_near_the_asked_one_is_taken_whole_and_a_slow_one_is_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4", np.arange(40) / 15)
    assert len(list(read_video(path, 16))) == 40  # neither repeated nor left out
    with pytest.raises(
        ValueError, match="too few frames a second: the file has 15, video.fps asks for 24"
    ):
        next(read_video(path, 24))


def test_variable_frame_rate_is_followed_by_its_times(tmp_path):
    times = np.concatenate([np.arange(20) / 20, 1 + np.arange(5) / 5, 2 + np.arange(20) / 20])
    path = write_video(tmp_path / "a.mkv", times, unit=1000)
    for fps in (10, 15):  # 15 is the mean rate: taken whole, the clip would run at the wrong speed
        taken = seconds(path, fps)
        shown = np.array([times[times <= k / fps + 1e-3].max() for k in range(3 * fps)])
        assert (
            len(taken) in (3 * fps, 3 * fps + 1) and np.abs(taken[: 3 * fps] - shown).max() < 0.03
        )


def test_one_frame_no_frame_and_damage_are_told(tmp_path):
    assert len(list(read_video(write_video(tmp_path / "one.mkv", [0.0]), 16))) == 1
    whole = write_video(tmp_path / "a.mkv", np.arange(90) / 30).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated: the video ends at .* states 3"):
        next(read_video(tmp_path / "cut.mkv", 30))
    for content in (
        b"",
        b"no video at all" * 100,
        write_video(tmp_path / "b.mp4", np.arange(9) / 30).read_bytes()[:700],
    ):
        (tmp_path / "bad.mp4").write_bytes(content)
        with pytest.raises(ValueError, match="unreadable video|without frames|no video"):
            next(read_video(tmp_path / "bad.mp4", 30))
    with pytest.raises(FileNotFoundError):
        next(read_video(tmp_path / "gone.mp4", 30))


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    path = write_video(tmp_path / "a.mkv", np.arange(3) / 30, ratio=Fraction(3, 2))
    assert probe(path).width == 96 and next(read_video(path, 30)).size == (96, 48)


def test_a_clip_filmed_with_a_turned_camera_is_shown_upright(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        pixels = np.zeros((32, 64, 3), np.uint8)
        pixels[:, :32] = 200
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    raw = path.read_bytes()
    one, minus = b"\0\1\0\0", b"\xff\xff\0\0"
    at = raw.index(b"tkhd") + 44  # the matrix of the track: ISO 14496-12, 8.3.2
    turned = (
        bytes(4) + one + bytes(4) + minus + bytes(20)
    )  # a quarter turn clockwise, as phones store it
    assert raw[at : at + 4] == one
    path.write_bytes(raw[:at] + turned[:32] + raw[at + 32 :])
    shown = np.asarray(next(read_video(path, 10)))
    assert shown.shape == (64, 32, 3) and shown[:28].mean() > 180 and shown[36:].mean() < 20


def test_video_files_are_cached_with_every_frame_and_every_record_is_accounted_for(tmp_path):
    write_video(tmp_path / "a.mp4", np.arange(24) / 24)
    write_video(tmp_path / "slow.mp4", np.arange(10) / 5)
    (tmp_path / "bad.mp4").write_bytes(b"")
    rows = [
        {"id": name, "video_path": f"{name}.mp4", "caption": name}
        for name in ("a", "slow", "bad", "gone")
    ]
    meta = write_meta(tmp_path, rows, "train_videos.jsonl")
    video = VideoConfig(32, 32, fps=12)
    report = run(meta, tmp_path / "cache", kind="video", video=video, num_workers=1)
    assert [skip.problem for skip in report.skipped] == [
        "too few frames a second",
        "unreadable video",
        "file not found",
    ]
    cache = open_cache(tmp_path / "cache")
    shown = (cache.load(0)[:, 0, 0].float().mean(-1) * 255 - 40) / 70
    torch.testing.assert_close(shown, torch.arange(12) / 12, atol=0.04, rtol=0)
    tokenizer = MeanPixels()
    assert (
        run(meta, tmp_path / "cache", tokenizer, kind="video", video=video).already == 1
        and tokenizer.encoded == 0
    )
    with pytest.raises(ValueError, match="at 12 frames a second, the config has video.fps: 6"):
        BatchPlan(cache, VideoConfig(32, 32, fps=6), 1, seed=0)
    assert (
        run(meta, tmp_path / "cache", kind="video", video=VideoConfig(32, 32, fps=6)).written == 1
    )
    assert open_cache(tmp_path / "cache").shapes[0, 0] == 6


def test_a_line_may_have_both_sources_and_several_captions(tmp_path):
    row = {"id": "a", "frames_dir": "f", "video_path": "v.mp4", "captions": ["one", " two ", "one"]}
    meta = write_meta(tmp_path, [row], "m.jsonl")
    (record,) = read_records(meta, "video")
    assert (
        record.path.endswith("f")
        and record.caption == "one"
        and record.facts["captions"] == ["one", "two"]
    )
    assert read_records(meta, "video", prefer="video_path")[0].path.endswith("v.mp4")
    with pytest.raises(ValueError, match='"captions" is .*must be a list of texts'):
        read_records(write_meta(tmp_path, [row | {"captions": [1]}], "m.jsonl"), "video")


def test_frames_are_extracted_whole_and_once(tmp_path):
    write_video(tmp_path / "a.mp4", np.arange(30) / 30)
    meta = write_meta(
        tmp_path, [{"id": "a", "video_path": "a.mp4", "caption": "moves"}], "train_videos.jsonl"
    )
    for _ in range(2):
        assert (
            frames_script.main(
                ["--meta_jsonl", str(meta), "--out_dir", str(tmp_path / "out"), "--fps", "10"]
            )
            == 0
        )
    (record,) = read_records(tmp_path / "out/train_videos.jsonl", "video")
    assert record.caption == "moves" and record.facts == {"num_frames": 10, "frames_fps": 10.0}
    assert sorted(os.listdir(record.path))[::9] == ["000000.png", "000009.png"]
    (tmp_path / "cut.mkv").write_bytes((tmp_path / "a.mp4").read_bytes()[:500])
    with pytest.raises(ValueError):
        extract_frames(Record("cut", str(tmp_path / "cut.mkv"), ""), tmp_path / "frames/cut", 10)
    assert not (tmp_path / "frames/cut").exists()  # a folder of frames is whole or not there


def test_frames_of_another_rate_than_the_config_asks_for_are_told(tmp_path, capsys):
    """They are used as they are, and would move at another speed."""
    write_video(tmp_path / "a.mp4", np.arange(30) / 30)
    meta = write_meta(
        tmp_path, [{"id": "a", "video_path": "a.mp4", "caption": ""}], "train_videos.jsonl"
    )
    frames = tmp_path / "out/train_videos.jsonl"
    frames_script.main(["--meta_jsonl", str(meta), "--out_dir", str(frames.parent), "--fps", "10"])
    shop = Workshop(tmp_path)
    words = ["--config", str(shop.config), "--meta_jsonl", str(frames)]
    caching = [*words, "--out_dir", str(tmp_path / "cache"), "--device", "cpu"]
    told = "1 clips are folders of frames at another rate (for example a: frames_fps 10, video.fps"
    for main, line in ((inspect_data.main, words), (cache_vtp_latents.main, caching)):
        for rate in (5, 10, 10.5):
            capsys.readouterr()
            assert main([*line, f"video.fps={rate}"]) == 0
            assert (f"{told} 5)" in capsys.readouterr().out) == (rate == 5)


def test_what_was_written_into_the_lines_by_hand_stays_when_the_folder_is_read_again(tmp_path):
    """Captions without a text file, and facts; text files decide where they are."""
    for name in "abc":
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("of the file")
    prepare_folder(tmp_path)
    path = tmp_path / "train_images.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0] |= {"caption": "by hand", "licence": "CC0"}
    rows[1] |= {"caption": "by hand", "captions": ["by hand", "too"], "author": "me"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (32, 32)).save(tmp_path / "d.png")
    report = prepare_folder(tmp_path)
    records = {record.id: record for record in read_records(path, "image")}
    assert records["a"].caption == "of the file" and records["a"].facts == {"licence": "CC0"}
    assert records["b"].caption == "by hand"
    assert records["b"].facts == {"captions": ["by hand", "too"], "author": "me"}
    assert records["c"].caption == records["d"].caption == "" and report.without_caption == 2
    assert "1 captions have no text file, and stay" in report.text()


def test_what_mmdit_wrote_into_a_folder_is_no_data(tmp_path):
    """Sheets of several pictures, previews and samples would be trained on."""
    made = {
        "cache": ("manifest.json", "index.jsonl", "sheet.png"),
        "runs/a": ("config.yaml", "metrics.jsonl", "samples/step_00000002/grid.png"),
        "drawn": ("samples.json", "0000.png", "grid.png"),
        "x/frames_16fps/a": ("000000.png", "000001.png"),
        "mine": ("manifest.json", "sheet.png", "0000.png"),
    }
    for folder, names in made.items():
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
            if path.suffix == ".png":
                Image.new("RGB", (8, 8)).save(path)
    report = prepare_folder(tmp_path)
    (record,) = read_records(tmp_path / "train_images.jsonl", "image")
    assert record.id == "mine_0000", "a manifest.json alone is no cache"
    assert "cache (a cache), drawn (drawn samples), runs/a (a run)" in report.text()
    assert "x/frames_16fps (frames of videos)" in report.text()
    shutil.rmtree(tmp_path / "x")
    assert [item.id for item in media_records(tmp_path, 1)] == ["drawn/0000.png", "mine/0000.png"]
    assert len(list(folder_pictures(tmp_path, 8, 8))) == 2
    report = prepare_folder(tmp_path / "drawn")  # asked for by name
    assert (report.images, report.made_here) == (1, {})


def test_lines_of_parts_of_videos_are_not_replaced_by_whole_videos(tmp_path, capsys):
    write_video(tmp_path / "a.mp4", np.arange(6) / 30)
    row = {"video_path": "a.mp4", "caption": ""}
    rows = [row | {"id": f"a{n}", "video_span": [n, n + 3]} for n in (0, 3)]
    path = write_meta(tmp_path, rows, "train_videos.jsonl")
    before = path.read_bytes()
    refused(capsys, folder_script.main, ["--folder", str(tmp_path)], "names frames of videos")
    assert path.read_bytes() == before


def test_a_place_that_cannot_hold_the_lines_is_told(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    words = ["--folder", str(tmp_path)]
    refused(capsys, folder_script.main, [*words, "--split", "a/b"], "'a/b', must be a name without")
    there = str(tmp_path / "a.png")
    refused(capsys, folder_script.main, [*words, "--out_dir", there], "where a folder is to be")


def test_a_line_that_would_be_lost_is_told_and_one_that_cannot_be_read_is_refused(tmp_path, capsys):
    """A file that is named in another way is the same file; a second line for it has no place."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    row = {"id": "mine", "image_path": str(tmp_path / "x/../a.png"), "caption": "by hand"}
    gone = {"id": "gone", "image_path": "gone.png", "caption": "by hand"}
    path = write_meta(tmp_path, [row, gone], "train_images.jsonl")
    report = prepare_folder(tmp_path)
    (record,) = read_records(path, "image")
    assert (record.id, record.caption) == ("mine", "by hand")
    assert report.left_out == ["gone.png"]
    assert "1 files of the lines that were there are not in the folder (any more)" in report.text()
    line = json.dumps(row)
    broken = {"more than once": line, ":2: is not valid JSON": line[:-1], ":2: must have": "{}"}
    broken |= {":2: is not an object": "[]", ":2: id is 3": '{"id": 3, "image_path": "a.png"}'}
    for message, second in broken.items():
        path.write_text(f"{line}\n{second}\n", encoding="utf-8")
        refused(capsys, folder_script.main, ["--folder", str(tmp_path)], message)
        assert path.read_text(encoding="utf-8") == f"{line}\n{second}\n"


def test_lines_that_somebody_edited_are_kept_when_they_are_written_anew(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    assert write_lines(path, "one\n") == write_lines(path, "two\n") == ""
    path.write_text("two, mine\n")
    said = write_lines(path, "three\n")
    (kept,) = tmp_path.glob("a.before-*.jsonl")
    assert kept.name in said and kept.read_text() == "two, mine\n"
    assert path.read_text() == "three\n" and write_lines(path, "four\n") == ""
    write_video(tmp_path / "a.mp4", np.arange(6) / 30)
    meta = write_meta(tmp_path, [{"id": "a", "video_path": "a.mp4", "caption": ""}], "v.jsonl")
    words = ["--meta_jsonl", str(meta), "--out_dir", str(tmp_path / "out"), "--fps", "10"]
    for lines in ("", "mine\n"):
        if lines:
            (tmp_path / "out/v.jsonl").write_text(lines)
        assert frames_script.main(words) == 0
        assert ("v.before-" in capsys.readouterr().out) == bool(lines)


def test_frames_of_one_list_are_not_replaced_by_those_of_another(tmp_path, capsys):
    """Write frames of two lists that share an id but not its video into one folder; a video that
    changed is its own successor, whatever lists name it."""
    words = ["--out_dir", str(tmp_path / "out"), "--fps", "10", "--meta_jsonl"]
    lists = {}
    for split, shift in (("train", 0), ("val", 1)):
        (tmp_path / split).mkdir()
        write_video(tmp_path / split / "a.mp4", np.arange(6) / 30 + shift)
        row = {"id": "a", "video_path": "a.mp4", "caption": split}
        lists[split] = str(write_meta(tmp_path / split, [row], f"{split}_videos.jsonl"))
    frame = tmp_path / "out/frames_10fps/a/000000.png"
    assert frames_script.main([*words, lists["train"]]) == 0
    before = frame.read_bytes()
    expected = ("out/train_videos.jsonl names", "val/a.mp4", "name another --out_dir")
    refused(capsys, frames_script.main, [*words, lists["val"]], *expected)
    assert frame.read_bytes() == before and not (tmp_path / "out/val_videos.jsonl").exists()
    same = str(shutil.copy(lists["train"], tmp_path / "train/all.jsonl"))
    write_video(tmp_path / "train/a.mp4", np.arange(6) / 30 + 2)
    assert frames_script.main([*words, same]) == 0 and frame.read_bytes() != before


def test_a_full_disk_ends_the_extraction_and_drops_no_clip(tmp_path, capsys, monkeypatch):
    """The lines of an earlier run stay, and no clip is called unusable."""
    rows = [{"id": id, "video_path": f"{id}.mp4", "caption": ""} for id in "ab"]
    for row in rows:
        write_video(tmp_path / row["video_path"], np.arange(6) / 30)
    meta = write_meta(tmp_path, rows, "train_videos.jsonl")
    words = ["--meta_jsonl", str(meta), "--out_dir", str(tmp_path / "out"), "--fps", "10"]
    assert frames_script.main(words) == 0
    before = (tmp_path / "out/train_videos.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "out/frames_10fps/b")
    original = Image.Image.save

    def full(image, path, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    refused(capsys, frames_script.main, words, "No space left", "frames_10fps/b", "Free disk space")
    assert (tmp_path / "out/train_videos.jsonl").read_bytes() == before
    monkeypatch.setattr(Image.Image, "save", original)
    assert frames_script.main(words) == 0
    assert (tmp_path / "out/train_videos.jsonl").read_bytes() == before


def test_frames_are_written_beside_no_lines_of_videos_and_by_one_process(tmp_path, capsys):
    write_video(tmp_path / "a.mp4", np.arange(6) / 30)
    row = {"id": "a", "video_path": "a.mp4", "caption": ""}
    meta = write_meta(tmp_path, [row], "train_videos.jsonl")
    before = meta.read_bytes()
    here = ["--meta_jsonl", str(meta), "--out_dir", str(tmp_path), "--fps", "10"]
    refused(capsys, frames_script.main, here, "would be replaced by frames")
    assert meta.read_bytes() == before
    words = ["--meta_jsonl", str(meta), "--out_dir", str(tmp_path / "out"), "--fps", "10"]
    with held_folder(tmp_path / "out", ""):
        refused(capsys, frames_script.main, words, "another process is writing frames into")
    assert frames_script.main(words) == 0


def test_frames_of_a_video_that_is_another_now_are_extracted_anew(tmp_path):
    def extract(suffix="png"):
        extract_frames(Record("a", str(tmp_path / "a.mkv"), ""), tmp_path / "a", 10, suffix)
        frames = sorted(path for path in (tmp_path / "a").iterdir() if path.name[0] != ".")
        return [
            round((np.asarray(Image.open(frame)).mean() - 40) / 70, 1) for frame in frames
        ], frames[0].suffix

    write_video(tmp_path / "a.mkv", [0, 0.1, 0.2], unit=1000)
    assert extract() == ([0, 0.1, 0.2], ".png")
    (tmp_path / "a/000001.png").unlink()  # cleaned by hand
    os.utime(tmp_path / "a.mkv", (1, 1))
    assert extract() == ([0, 0.2], ".png")
    (tmp_path / ".a.json").unlink()  # of an older version
    assert extract() == extract() == ([0, 0.2], ".png")
    assert extract("jpg") == ([0, 0.1, 0.2], ".jpg")
    write_video(tmp_path / "a.mkv", [0.5, 0.6, 0.7], unit=1000)
    assert extract("jpg") == ([0.5, 0.6, 0.7], ".jpg")


def test_a_hostile_folder_ends_with_every_file_accounted_for(tmp_path, capsys):
    folder = tmp_path / "my pictures 猫"
    (folder / "sub").mkdir(parents=True)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    noise.save(folder / "good one.png")
    (folder / "good one.txt").write_text("\ufeffa  good\none\n")
    noise.save(folder / "sub/同じ.jpg")
    noise.save(folder / "sub_同じ.jpg")  # would meet the one above
    noise.save(
        folder / "good one.webp", save_all=True, append_images=[noise.rotate(90)], duration=100
    )  # animated, same stem
    noise.convert("CMYK").save(folder / "cmyk.jpg")
    (folder / "cmyk.txt").write_bytes("caf\xe9".encode("latin-1"))
    Image.new("RGB", (30000, 10)).save(folder / "panorama.png")
    (folder / "zero.png").touch()
    (folder / "text.png").write_text("no picture")
    (folder / "cut.jpg").write_bytes((folder / "sub/同じ.jpg").read_bytes()[:900])
    write_video(folder / "walk.mp4", np.arange(8) / 16)
    write_video(folder / "one frame.mp4", [0.0])
    write_video(folder / "no frame.mp4", [])
    write_video(folder / "changing.mkv", np.cumsum([1, 2, 1, 1, 3, 1, 1, 1, 2, 1]) / 40, unit=1000)
    (folder / "torn.webm").write_bytes((folder / "walk.mp4").read_bytes()[:300])
    (folder / "notes.pdf").touch()
    os.symlink(folder, folder / "sub/loop")
    os.symlink(folder / "gone.png", folder / "dangling.png")
    os.symlink("ring.png", folder / "ring.png")
    assert folder_script.main(["--folder", str(folder), "--out_dir", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "11 images and 5 video files, 14 of them without a caption" in told and "1 .pdf" in told
    assert "cmyk.jpg: used without its caption, the caption is not UTF-8" in told
    records = read_records(tmp_path / "train_images.jsonl", "image")
    assert len({record.id for record in records}) == 11
    assert [record.caption for record in records if record.caption] == ["a good one"] * 2
    report = run(tmp_path / "train_images.jsonl", tmp_path / "cache")
    assert report.written == 6 and report.written + len(report.skipped) == report.records == 11
    assert report.animated == 1 and "1 items from animated pictures" in report.text()
    skipped = sorted(skip.path.rpartition("/")[2] for skip in report.skipped)
    assert skipped == ["cut.jpg", "dangling.png", "ring.png", "text.png", "zero.png"]
    clips = run(tmp_path / "train_videos.jsonl", tmp_path / "clips", kind="video")
    assert clips.records == 5 and sorted(skip.id for skip in clips.skipped) == ["no frame", "torn"]
    cached = open_cache(tmp_path / "clips")
    assert dict(zip(cached.ids, cached.shapes[:, 0].tolist(), strict=True)) == {
        "changing": 6,
        "one frame": 1,
        "walk": 8,
    }
    (tmp_path / "config.yaml").write_text(
        "{experiment_name: a, num_workers: 1, tokenizer: {type: dummy}, video: {width: 32, height:"
        " 32}}"
    )
    for shell in (
        ["--out_dir", str(tmp_path / "again")],
        ["--out_dir", str(tmp_path / "cache"), "--verify"],
    ):  # as a person does it
        words = [
            "--config",
            str(tmp_path / "config.yaml"),
            "--meta_jsonl",
            str(tmp_path),
            "--device",
            "cpu",
        ]
        assert cache_vtp_images.main([*words, *shell]) == 0
    twice = (tmp_path / "train_images.jsonl").read_text().splitlines()
    (tmp_path / "train_images.jsonl").write_text("\n".join([*twice, twice[0]]))
    with pytest.raises(
        ValueError, match=r"train_images.jsonl:12: id .* was already used in line 1"
    ):
        read_records(tmp_path / "train_images.jsonl", "image")
    (tmp_path / "train_images.jsonl").write_text("\n".join(twice))
    before = contents(tmp_path / "cache")
    assert (
        run(tmp_path / "train_images.jsonl", tmp_path / "cache").already == 6
        and contents(tmp_path / "cache") == before
    )


def test_ids_are_distinct_stable_and_fit_to_be_file_names():
    files = [
        "a/b.png",
        "a_b.png",
        "c.png",
        "c.jpg",
        ".x/y.png",
        "back\\slash.png",
        "字" * 100 + ".png",
        "plain.png",
    ]
    ids = ids_for(files)
    assert len(set(ids.values())) == len(files) and ids["plain.png"] == "plain"
    assert ids_for(files[::-1]) == ids and ids_for(files + ["new.png"]).items() > ids.items()


def test_a_file_keeps_its_id_when_another_appears(tmp_path):
    def ids(*new):
        for name in new:
            Image.new("RGB", (8, 8)).save(tmp_path / name)
        prepare_folder(tmp_path)
        return {
            Path(record.path).name: record.id
            for record in read_records(tmp_path / "train_images.jsonl", "image")
        }

    first = ids("cat.jpg")
    assert first == {"cat.jpg": "cat"}
    second = ids("cat.png", "cat.bmp")
    assert second.items() > first.items() and len(set(second.values())) == 3
    third = ids("cat.gif")
    assert third.items() > second.items() and len(set(third.values())) == 4
    (tmp_path / "cat.jpg").unlink()
    assert ids().items() < third.items()


def test_captions_are_found_whatever_their_suffix_is_and_orphans_are_told(tmp_path, capsys):
    for name in ("upper.jpg", "booru.jpg", "both.png", "capt.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    texts = {
        "upper.TXT": "capitals",
        "booru.jpg.txt": "1girl, solo",
        "both.txt": "its own",
        "both.png.txt": "the other",
        "orphan.txt": "nothing",
        "capt.caption": "kohya",
        "metadata.jsonl": '{"file_name": "upper.jpg", "text": "of the library datasets"}',
        "val_images.jsonl": "",
        "skipped-0.jsonl": "",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert folder_script.main(["--folder", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    captions = {
        record.id: record.caption
        for record in read_records(tmp_path / "train_images.jsonl", "image")
    }
    assert captions == {"upper": "capitals", "booru": "1girl, solo", "both": "its own", "capt": ""}
    assert "2 text files belong to no picture or clip, for example both.png.txt" in told
    assert "1 of them without a caption" in told
    assert "other files, not used: 1 .caption, 1 .jsonl\n" in told, "ours are none of them"
    assert "captions in .caption, .jsonl files are not read, but those of .txt files" in told


def test_captions_are_found_however_accents_are_composed(tmp_path):
    """A name from a Mac has an `e` and an accent, where a caption from elsewhere has one letter."""
    for name, letter in (("apart", "e\u0301"), ("whole", "\u00e9")):
        other = "\u00e9" if letter != "\u00e9" else "e\u0301"
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}{letter}.png")
        (tmp_path / f"{name}{other}.txt").write_text(name, encoding="utf-8")
    report = prepare_folder(tmp_path)
    assert not report.orphans and not report.without_caption
    records = read_records(tmp_path / "train_images.jsonl", "image")
    assert sorted(record.caption for record in records) == ["apart", "whole"]


def test_lines_of_pictures_that_are_all_gone_are_gone(tmp_path):
    for name in ("a.png", "b.mp4"):
        (tmp_path / name).touch()
    prepare_folder(tmp_path)
    (tmp_path / "a.png").unlink()
    assert prepare_folder(tmp_path).left_out == ["a.png"]
    assert sorted(files_below(tmp_path)) == ["b.mp4", "train_videos.jsonl"]


def test_folder_without_media_and_captions_per_line(tmp_path):
    with pytest.raises(ValueError, match="no picture or video in"):
        prepare_folder(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    text = (
        "one\u2028of a\x0cpage\r\n\rtwo\x85\n"  # what only str.splitlines takes for ends of lines
    )
    (tmp_path / "a.txt").write_bytes(text.encode())
    prepare_folder(tmp_path, per_line=True)
    (record,) = read_records(tmp_path / "train_images.jsonl", "image")
    assert record.facts["captions"] == ["one of a page", "two"]
    assert list(files_below(tmp_path)) == ["a.png", "a.txt", "train_images.jsonl"]
    assert VIDEO.fps == 16
