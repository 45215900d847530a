"""WebDataset tars and parquet files give the cache that files give, bit for bit; hostile and
damaged ones harm nothing, and lose nothing without a word."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdit.__main__ import commands as subcommands
from mmdit.data.cache.caching import Caching
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.dataset import inputs, parquets, tars
from mmdit.data.dataset.buckets import BucketingConfig, VideoConfig
from mmdit.data.dataset.frames import PreprocessConfig
from mmdit.data.dataset.inputs import dealt, expand_braces, input_files, read_input
from mmdit.data.dataset.pictures import load_image
from mmdit.data.dataset.records import check_id, read_records
from mmdit.data.dataset.stamps import stamp_of
from tests.helpers.thorough import thorough
from tests.test_cache import VIDEO, MeanPixels, write_meta
from tests.test_sources import write_video

ROOT = Path(__file__).resolve().parents[1]
BUCKETS = BucketingConfig(True, buckets=((32, 32), (48, 32)))
SHIFTED = PreprocessConfig("shifted", num_crops=2)


def picture(number, suffix="png", size=None):
    """Return the bytes of a picture that no other number gives."""
    random = np.random.default_rng(number)
    width, height = size or (50 + 30 * (number % 2), 40)
    image = Image.fromarray(random.integers(0, 255, (height, width, 3), np.uint8))
    file = io.BytesIO()
    image.save(file, "JPEG" if suffix in ("jpg", "jpeg") else suffix)
    return file.getvalue()


def write_tar(path, files):
    """`files`: (name, bytes), or a TarInfo that has no bytes."""
    with tarfile.open(path, "w") as tar:
        for file in files:
            if isinstance(file, tarfile.TarInfo):
                tar.addfile(file)
                continue
            info = tarfile.TarInfo(file[0])
            info.size = len(file[1])
            tar.addfile(info, io.BytesIO(file[1]))
    return path


def pairs(numbers, suffix="png"):
    files = []
    for number in numbers:
        files += [(f"{number:04}.{suffix}", picture(number, suffix))]
        files += [(f"{number:04}.txt", f"picture {number}\n".encode())]
    return files


def write_parquet(path, rows, **options):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = rows if isinstance(rows, pyarrow.Table) else pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, path, **options)
    return path


def cache_of(data, out, media="image", tokenizer=None, records=None, **options):
    options = {"video": VIDEO, "progress": False, **options}
    records = records or read_input(data, media)
    return Caching(records, media, tokenizer or MeanPixels(), out, **options).run()


def items(folder):
    """Everything that training sees of a cache."""
    cache = open_cache(folder)
    return {
        id: (cache.load(i).numpy().tobytes(), cache.captions[i], cache.facts[i])
        for i, id in enumerate(cache.ids)
    }


def reasons(report):
    return {skip.id: skip.reason for skip in report.skipped}


# ── the same pictures ──
@pytest.mark.parametrize("workers", [*thorough(0), 2])
def test_files_tars_and_parquet_give_the_same_cache(tmp_path, workers):
    """Buckets and shifted crops, which depend on the id, included; and nothing is encoded anew when
    the files move into a tar."""
    numbers, rows, column = range(24), [], []
    for number in numbers:
        data, caption = picture(number), f"picture {number}"
        (tmp_path / f"{number:04}.png").write_bytes(data)
        rows.append({"id": f"{number:04}", "image_path": f"{number:04}.png", "caption": caption})
        image = {"bytes": data, "path": f"{number:04}.png"}
        column.append({"id": f"{number:04}", "image": image, "text": caption})
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars/a-000.tar", pairs(numbers[:15]))
    write_tar(tmp_path / "tars/a-001.tar", pairs(numbers[15:]))
    (tmp_path / "hub").mkdir()
    write_parquet(tmp_path / "hub/train-00000-of-00002.parquet", column[:15], row_group_size=7)
    write_parquet(tmp_path / "hub/train-00001-of-00002.parquet", column[15:], row_group_size=7)
    write_parquet(tmp_path / "hub/test-00000-of-00001.parquet", column[:1])
    given = {
        "jsonl": write_meta(tmp_path, rows),
        "tars": tmp_path / "tars/a-{000..001}.tar",
        "hub": tmp_path / "hub",
    }
    options = {"bucketing": BUCKETS, "preprocess": SHIFTED, "num_workers": workers}
    made = {}
    for name, data in given.items():
        report = cache_of(data, tmp_path / f"cache_{name}", **options)
        assert report.skipped == []
        made[name] = items(tmp_path / f"cache_{name}")
    assert len(made["jsonl"]) > 40 and made["jsonl"] == made["tars"] == made["hub"]
    tokenizer = MeanPixels()
    report = cache_of(given["tars"], tmp_path / "cache_jsonl", tokenizer=tokenizer, **options)
    assert (tokenizer.encoded, report.renewed, report.already) == (0, 24, 24)


def test_another_column_of_pictures_is_cached_anew(tmp_path):
    rows = [{"image": picture(i), "depth": picture(i + 50), "caption": f"{i}"} for i in range(4)]
    path = write_parquet(tmp_path / "a.parquet", rows)
    held = {}
    for column, written in (("", 4), ("image", 0), ("depth", 4), ("depth", 0), ("", 4)):
        records = read_input(path, "image", image_column=column)
        report = cache_of(None, tmp_path / "cache", records=records)
        assert (report.written, report.already) == (written, 4 - written)
        held[column] = items(tmp_path / "cache")
    assert held[""] == held["image"] and held[""].keys() == held["depth"].keys()
    assert all(held[""][id][0] != held["depth"][id][0] for id in held[""])


@pytest.mark.parametrize("world", [1, 3])
def test_processes_share_an_archive_and_resume(tmp_path, world):
    write_parquet(
        tmp_path / "a.parquet",
        [{"jpg": picture(i, "jpg"), "caption": f"{i}"} for i in range(30)],
        row_group_size=2,
    )
    write_tar(tmp_path / "b.tar", pairs(range(30)))
    for name in ("a.parquet", "b.tar"):
        for _ in range(2):
            tokenizer = MeanPixels()
            records = read_input(tmp_path / name, "image")
            ids = [record.id for rank in range(world) for record in dealt(records, rank, world)]
            assert sorted(ids) == sorted(record.id for record in records)
            for rank in range(world):
                options = {"rank": rank, "world": world, "tokenizer": tokenizer}
                cache_of(None, tmp_path / f"cache {name}", records=records, **options)
        assert tokenizer.encoded == 0  # by the second run
    cache_of(tmp_path / "b.tar", tmp_path / "alone")
    assert items(tmp_path / "cache b.tar") == items(tmp_path / "alone")
    assert open_cache(tmp_path / "cache a.parquet").ids[:2] == ["a_000000", "a_000001"]


def test_a_row_group_is_read_by_one_process_where_there_are_enough(tmp_path):
    rows = [{"jpg": b"x", "caption": f"{i}"} for i in range(60)]
    records = read_input(write_parquet(tmp_path / "a.parquet", rows, row_group_size=5), "image")
    one = {record.member.group for record in dealt(records, 0, 2)}
    two = {record.member.group for record in dealt(records, 1, 2)}
    assert one.isdisjoint(two) and len(one) == len(two) == 6
    assert [len(dealt(records, rank, 4)) for rank in range(4)] == [
        15
    ] * 4  # too few groups for four


def test_rows_are_read_in_any_order(tmp_path):
    rows = [{"id": f"{i}", "jpg": f"bytes {i}".encode(), "caption": ""} for i in range(70)]
    records = read_input(write_parquet(tmp_path / "a.parquet", rows, row_group_size=40), "image")
    for number in (0, 39, 20, 3, 69, 40, 41, 0, 0, 17, 16):
        assert records[number].source.open_binary().read() == rows[number]["jpg"]
        assert records[number].loaded().member.data == rows[number]["jpg"]


# ── what is noticed when a shard changes ──
@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_a_changed_shard_is_looked_through_and_only_what_differs_is_encoded(tmp_path, suffix):
    path = tmp_path / f"s.{suffix}"

    def write(seeds, captions):
        content = {f"{i:04}": (picture(seed), captions[i]) for i, seed in enumerate(seeds)}
        if suffix == "tar":
            files = []
            for key, (data, caption) in content.items():
                files += [(f"{key}.png", data), (f"{key}.txt", caption.encode())]
            write_tar(path, files)
        else:
            rows = [{"id": key, "image": d, "text": c} for key, (d, c) in content.items()]
            write_parquet(path, rows)

    def again():
        tokenizer = MeanPixels()
        report = cache_of(path, tmp_path / "cache", tokenizer=tokenizer)
        return tokenizer.encoded, report

    write([0, 1, 2], ["a", "b", "c"])
    assert again()[0] == 3 and again()[0] == 0
    write([0, 7, 2], ["a", "b", "new"])
    encoded, report = again()
    assert (encoded, report.renewed, report.recaptioned) == (1, 2, 1)
    assert again()[1].renewed == 0
    write([0, 7], ["a", "b"])
    assert again()[1].strangers == ["0002"]


def test_an_archive_that_is_written_to_meanwhile_is_not_read(tmp_path):
    """Look at the headers, then move the bytes: those of a picture may lie elsewhere now."""
    path = write_tar(tmp_path / "s.tar", pairs(range(3)))
    cache_of(path, tmp_path / "cache")
    before = items(tmp_path / "cache")
    write_tar(path, pairs([5]) + pairs(range(3)))
    records = read_input(path, "image")
    write_tar(path, pairs(range(3)) + pairs([5]))
    os.utime(path, (1, 1))
    report = cache_of(None, tmp_path / "cache", records=records)
    assert len(report.skipped) == 4 and "run the same command again" in report.skipped[0].reason
    assert items(tmp_path / "cache") == before  # what is not known is not taken out


# ── tars as people make them ──
def test_keys_extensions_and_captions_as_webdataset_has_them(tmp_path):
    several = json.dumps({"captions": ["one", "two"], "licence": "CC0"}).encode()
    files = [
        ("./pets/a.jpg", picture(0, "jpg")),
        ("./pets/a.txt", b"\xef\xbb\xbf a  cat\n"),
        ("./pets/a.cls", b"3"),
        ("._a.jpg", b"of a Mac"),
        ("b.JPEG", picture(1, "jpeg")),
        ("b.json", several),
        ("c.seg.png", picture(2)),
        ("c.webp", picture(3, "webp")),
        ("c.json", b'{"prompt": "a dog", "width": 50}'),
        ("d.v2.png", picture(4)),
        ("d.v2.txt", b"a bird"),
        ("e.png", picture(5)),
        ("f.mp4", b"for the other command"),
    ]
    order = [files[i] for i in (5, 4, *range(6, 13), 3, 2, 1, 0)]  # unsorted, as tar may be
    for tar in (files, order):
        records = read_input(write_tar(tmp_path / "s.tar", tar), "image")
        by_id = {record.id: record for record in records}
        captions = {id: record.caption for id, record in by_id.items()}
        assert captions == {"pets_a": "a cat", "b": "one", "c": "a dog", "d": "a bird", "e": ""}
        assert by_id["b"].facts == {"licence": "CC0", "captions": ["one", "two"]}
        assert by_id["c"].facts == {"width": 50} and by_id["c"].path.endswith("s.tar/c.webp")
    assert read_input(tmp_path / "s.tar", "image", limit=2) == records[:2]
    named = [("0.png", picture(0)), ("0.txt", b"no"), ("0.json", b'{"alt": "yes", "n": 1}')]
    (record,) = read_input(write_tar(tmp_path / "n.tar", named), "image", caption_key="alt")
    assert (record.caption, record.facts) == ("yes", {"n": 1})


def test_long_names_of_every_format_are_read(tmp_path):
    name = "/".join(["folder" * 10] * 3) + "/ünï"
    for number, format in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=format) as tar:
            info = tarfile.TarInfo(f"{name}.png")
            info.size = len(picture(0))
            tar.addfile(info, io.BytesIO(picture(0)))
        (record,) = read_input(tmp_path / f"{number}.tar", "image")
        assert record.id == name.replace("/", "_")
        with record.source.open_binary() as file:
            assert file.read() == picture(0)


def test_equal_keys_of_several_shards_get_ids_that_do_not_depend_on_later_ones(tmp_path):
    for name in ("a", "b", "c"):
        write_tar(tmp_path / f"{name}.tar", pairs([0]))
    ids = [record.id for record in read_input(tmp_path, "image")]
    assert ids == ["0000", "b_0000", "c_0000"]
    assert [record.id for record in read_input(tmp_path / "{a,b}.tar", "image")] == ids[:2]


def test_rows_of_one_id_get_ids_of_their_own_at_once(tmp_path, monkeypatch):
    """Try few ids for each: with all that are taken, a million rows would never end."""
    tried, fit = [], inputs._fit
    monkeypatch.setattr(inputs, "_fit", lambda id, name: tried.append(id) or fit(id, name))
    for key in ("same", "long" * 99, "bad\n"):
        rows = [{"id": key, "jpg": b"x", "caption": ""}] * 500
        records = read_input(write_parquet(tmp_path / "a.parquet", rows), "image")
        assert len({check_id(record.id) for record in records}) == 500
    assert len(tried) < 3 * 3 * 500


def test_bytes_changed_at_random_are_refused_or_skipped(tmp_path):
    rows = [{"image": picture(i, "jpg"), "text": f"{i}", "n": i} for i in range(4)]
    whole = {
        "tar": write_tar(tmp_path / "whole.tar", pairs(range(2), "jpg")).read_bytes()[:9000],
        "parquet": write_parquet(tmp_path / "whole", rows, row_group_size=2).read_bytes(),
    }
    opened, random = 0, np.random.default_rng(0)
    for suffix, data in whole.items():
        for _ in range(100):
            changed = np.frombuffer(data, np.uint8).copy()
            places = random.integers(0, len(changed), random.integers(1, 40))
            changed[places] = random.integers(0, 256, len(places))
            path = tmp_path / f"s.{suffix}"
            path.write_bytes(changed[: random.integers(len(changed) // 2, 2 * len(changed))])
            with contextlib.suppress(ValueError, OSError):
                for record in read_input(path, "image"):
                    with contextlib.suppress(ValueError, OSError):
                        load_image(record.loaded().source)
                        opened += 1
    assert opened > 50


def test_clips_are_read_from_tars(tmp_path):
    pytest.importorskip("av")
    video = VideoConfig(32, 32, num_frames=2, fps=10)
    path = write_video(tmp_path / "a.mp4", [0, 0.1, 0.2])
    meta = write_meta(tmp_path, [{"id": "a", "video_path": "a.mp4", "caption": "moves"}])
    data = path.read_bytes()
    tar = [("a.mp4", data), ("a.txt", b"moves"), ("b.png", picture(0)), ("c.mp4", data[:300])]
    write_tar(tmp_path / "s.tar", tar)
    cache_of(meta, tmp_path / "files", "video", video=video)
    report = cache_of(tmp_path / "s.tar", tmp_path / "tar", "video", video=video)
    assert items(tmp_path / "tar") == items(tmp_path / "files")
    assert reasons(report).keys() == {"c"}
    member = read_input(tmp_path / "s.tar", "video")[0].source
    assert stamp_of(member, 10)["content"] == stamp_of(str(path), 10)["content"]


def test_the_one_text_of_a_key_is_its_caption_whatever_stands_before_its_suffix(tmp_path):
    data = picture(1)
    files = [("a.image.png", data), ("a.text.txt", b"one"), ("b.png", data), ("b.tags.txt", b"two")]
    files += [("c.png", data), ("c.meta.json", b'{"caption": "three"}')]
    files += [("d.png", data), ("d.tags.txt", b"x"), ("d.long.txt", b"y")]
    files += [("e.png", data), ("e.tags.txt", b"x"), ("e.txt", b"five")]
    write_tar(tmp_path / "t.tar", files)
    records = {record.id: record for record in read_input(tmp_path / "t.tar", "image")}
    captions = [records[id].caption for id in "abce"]
    assert captions == ["one", "two", "three", "five"]
    assert "several texts of one key: tags.txt, long.txt" in str(records["d"].member.error)


# ── which files ──
def test_patterns_and_folders(tmp_path):
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b.parquet"):
        (tmp_path / name).write_bytes(b"")
    names = lambda pattern: [os.path.basename(f) for f in input_files(tmp_path / pattern, "image")]
    assert expand_braces("s-{08..10}{x,y}") == [
        f"s-{n}{end}" for n in ("08", "09", "10") for end in "xy"
    ]
    assert names("a-{08..10}.tar") == names("a-*.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    with pytest.raises(ValueError, match="2 of the 5 files .* are missing, .*a-11.tar"):
        names("a-{08..12}.tar")
    with pytest.raises(ValueError, match=r"holds files of .parquet, .tar; name those of one kind"):
        names(".")
    with pytest.raises(ValueError, match="no file matches"):
        names("c*.tar")
    apart = tmp_path / "set [1] {x,y}"  # the brackets of a folder that is there are its name
    apart.mkdir()
    for name in ("a-0.tar", "a-1.tar"):
        (apart / name).write_bytes(b"")
    for pattern in ("*.tar", "a-{0..1}.tar", "[a]-?.tar"):
        assert names(f"{apart.name}/{pattern}") == ["a-0.tar", "a-1.tar"]
    with pytest.raises(ValueError, match="1 of the 2 files .* are missing, .*a-2.tar"):
        names(f"{apart.name}/a-{{1..2}}.tar")
    for address in ("https://x.org/a.tar", "hf://datasets/x/y/*.parquet", "s3://b/{00..09}.tar"):
        with pytest.raises(ValueError, match="is an address: download what is there"):
            input_files(address, "image")
    for pattern in ("{a,../b}.tar", "{..,a}/x.tar", "{0..9999999}.tar", "{0..999}{0..999}.tar"):
        with pytest.raises(ValueError, match="list like|more than 100000"):
            names(pattern)
    (tmp_path / "train_images.jsonl").write_text("")
    assert names(".") == ["train_images.jsonl"]  # as ever


def test_a_folder_of_a_hub_gives_the_split_that_is_asked_for(tmp_path):
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001-0a1b.parquet"):
        (tmp_path / name).write_bytes(b"")
    assert input_files(tmp_path, "image", "test")[0].endswith("0a1b.parquet")
    with pytest.raises(ValueError, match="no split 'val'; choose one with --split: test, train"):
        input_files(tmp_path, "image", "val")


def test_a_clone_of_a_hub_is_refused_with_the_folder_that_has_the_data(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").touch()
    (tmp_path / "data" / "train-00000-of-00001.parquet").touch()
    with pytest.raises(ValueError, match=f"but {tmp_path}/data does: name that folder"):
        input_files(tmp_path, "image")
    assert input_files(tmp_path / "data", "image")
    (tmp_path / "train_images.jsonl").touch()
    assert input_files(tmp_path, "image") == [str(tmp_path / "train_images.jsonl")]


def test_shards_that_are_named_by_their_split_are_not_mixed(tmp_path):
    for name in ("train-000.tar", "train-001.tar", "val-000.tar"):
        (tmp_path / name).write_bytes(b"")
    names = lambda *split: [
        os.path.basename(file) for file in input_files(tmp_path, "image", *split)
    ]
    assert names() == names("train") == ["train-000.tar", "train-001.tar"]
    assert names("val") == ["val-000.tar"]
    with pytest.raises(ValueError, match="no split 'test'; choose one with --split: train, val"):
        names("test")
    with pytest.raises(ValueError, match="--split is 'val', but .* names files"):
        input_files(tmp_path / "*.tar", "image", "val")
    for name in ("pets-train-000.tar", "pets-validation-000.tar", "more_train_3.tar"):
        (tmp_path / name).write_bytes(b"")
    assert names() == ["more_train_3.tar", "pets-train-000.tar", "train-000.tar", "train-001.tar"]
    assert names("validation") == names("pets-validation") == ["pets-validation-000.tar"]
    other = tmp_path / "other"  # names that say nothing of splits
    other.mkdir()
    (other / "pets-000.tar").write_bytes(b"")
    assert input_files(other, "image") == [str(other / "pets-000.tar")]
    with pytest.raises(ValueError, match="no split 'val'"):
        input_files(other, "image", "val")
    (other / "val-000.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"the split val beside others \(pets\): name those"):
        input_files(other, "image")
    assert input_files(other, "image", "pets") == [str(other / "pets-000.tar")]


def test_what_is_not_there_is_told(tmp_path):
    write_tar(tmp_path / "v.tar", [("a.mp4", b"x"), ("a.txt", b"y")])
    with pytest.raises(ValueError, match=r"holds no image; .*v.tar has 1 .mp4, 1 .txt"):
        read_input(tmp_path / "v.tar", "image")
    with pytest.raises(ValueError, match="cannot read .*none.tar: it is not there"):
        read_input(tmp_path / "none.tar", "image")
    with pytest.raises(ValueError, match="--image_column is 'x', but .* has no such choice"):
        read_input(tmp_path / "v.tar", "video", image_column="x")


# ── hostile and damaged tars ──
def entry(name, type, linkname=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type, linkname
    return info


def test_hostile_entries_are_skipped_with_their_reasons_and_touch_nothing(tmp_path, monkeypatch):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(9))
    (tmp_path / "in").mkdir()
    files = [
        ("../../evil.png", picture(0)),
        (str(tmp_path / "absolute.png"), picture(0)),
        entry("link.png", tarfile.SYMTYPE, str(secret)),
        entry("hard.png", tarfile.LNKTYPE, str(secret)),
        entry("device.png", tarfile.CHRTYPE),
        entry("pipe.png", tarfile.FIFOTYPE),
        ("new\nline.png", picture(0)),
        ("empty.png", b""),
        ("text.txt", b"alone"),
        ("latin.png", picture(0)),
        ("latin.txt", b"\xff\xfe\xfa"),
        ("json.png", picture(0)),
        ("json.json", b"[1"),
        ("deep.png", picture(0)),
        ("deep.json", b'{"caption": "x", "y": ' + b"[" * 99 + b"]" * 99 + b"}"),
        ("twice.png", picture(0)),
        ("twice.png", picture(1)),
        ("two.a.png", picture(0)),
        ("two.b.png", picture(0)),
        ("script.png", b"#!/bin/sh\ntouch ran\n"),
        ("good.png", picture(3)),
    ]
    write_tar(tmp_path / "in/s.tar", files)
    monkeypatch.chdir(tmp_path)
    before = {path for path in tmp_path.rglob("*")}
    report = cache_of(tmp_path / "in/s.tar", tmp_path / "cache")
    after = {
        path for path in tmp_path.rglob("*") if tmp_path / "cache" not in (path, *path.parents)
    }
    assert after == before and open_cache(tmp_path / "cache").ids[0] == "good"
    why = reasons(report)
    assert sum("leads out of the tar" in reason for reason in why.values()) == 2
    for id, reason in {
        "link": "no file: link.png is a link",
        "hard": "is a link",
        "device": "is a device",
        "pipe": "is a named pipe",
        "empty": "an empty file",
        "text": "a key without a picture or clip: text has txt",
        "latin": "its caption cannot be read: the caption is not UTF-8",
        "json": "is not valid JSON",
        "deep": "more than 32 deep",
        "twice": "twice in one tar",
        "two": "several pictures or clips of one key: a.png, b.png",
        "script": "no picture that can be read",
    }.items():
        assert reason in why[id], id
    assert all("\n" not in id and "/" not in id for id in why)


def test_pictures_over_the_limit_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("mmdit.data.dataset.pictures.MAX_PIXELS", 1000)
    write_tar(tmp_path / "s.tar", [("a.png", picture(0)), ("b.png", picture(0, size=(20, 20)))])
    report = cache_of(tmp_path / "s.tar", tmp_path / "cache")
    assert "too large: 50x40" in reasons(report)["a"] and len(open_cache(tmp_path / "cache")) == 1


def test_a_truncated_tar_gives_what_is_whole_and_says_where_it_ends(tmp_path):
    """Wherever it is cut: nothing is lost without a word, no picture without its caption."""
    whole = write_tar(tmp_path / "whole.tar", pairs(range(3), "jpg")).read_bytes()
    captions = {f"{number:04}": f"picture {number}" for number in range(3)}
    last = list(tars.tar_entries(tars.Archive.of(tmp_path / "whole.tar")))[-1]
    for place in (600, 4000, *range(512, last.offset + 512 + 1, 512)):
        (tmp_path / "s.tar").write_bytes(whole[:place])
        samples = list(tars.tar_samples(tars.Archive.of(tmp_path / "s.tar"), "image"))
        good = {s.key: s.captions[0] for s in samples if isinstance(s.member, tars.TarMember)}
        bad = [s.member.error for s in samples if not isinstance(s.member, tars.TarMember)]
        assert bad and good.items() <= captions.items(), place
    assert last.error is None
    (tmp_path / "s.tar").write_bytes(whole[: last.offset + 512])
    *_, end = tars.tar_samples(tars.Archive.of(tmp_path / "s.tar"), "image")
    assert end.key == "s-end" and end.member.error.problem == "a tar without an end mark"


def test_damage_and_lies_of_headers_end_a_tar_with_one_reason(tmp_path):
    whole = bytearray(write_tar(tmp_path / "whole.tar", pairs(range(3))).read_bytes())
    offset = tars.Archive.of(tmp_path / "whole.tar")
    second = [entry for entry in tars.tar_entries(offset) if entry.name == "0001.png"][0].offset
    whole[second - 512] ^= 1
    (tmp_path / "s.tar").write_bytes(whole)
    report = cache_of(tmp_path / "s.tar", tmp_path / "cache")
    assert open_cache(tmp_path / "cache").ids == ["0000"]
    assert f"damaged tar: bad checksum at byte {second}" in reasons(report)["s-end"]
    info = tarfile.TarInfo("0009.png")
    for size, problem in ((1 << 40, "truncated tar"), (-5, "a file of -5 bytes")):
        info.size = size
        head = info.tobuf(tarfile.GNU_FORMAT)
        (tmp_path / "s.tar").write_bytes(head + bytes(2048))
        (record,) = read_input(tmp_path / "s.tar", "image")
        with pytest.raises(ValueError, match=problem):
            record.source.open_binary()
    huge = tarfile.TarInfo("x")
    huge.type, huge.size = tarfile.XHDTYPE, 1 << 21
    (tmp_path / "s.tar").write_bytes(huge.tobuf() + bytes(1 << 22))
    (record,) = read_input(tmp_path / "s.tar", "image")
    with pytest.raises(ValueError, match="a header of 2097152 bytes, more than 1048576"):
        record.source.open_binary()
    for data, problem in (
        (b"\x1f\x8b" + bytes(600), "gzip"),
        (b"hello", "too short"),
        (b"", "short"),
    ):
        (tmp_path / "s.tar").write_bytes(data)
        with pytest.raises(ValueError, match=f"(?s)none of the 1 records.*{problem}"):
            cache_of(tmp_path / "s.tar", tmp_path / "none")


def test_what_is_held_of_a_tar_does_not_grow_with_its_files(tmp_path):
    """Look through 6 GB (of nothing, on the disk), and open a file in it."""
    info = tarfile.TarInfo("a.png")
    info.size = 3 << 30
    with (tmp_path / "s.tar").open("wb") as file:
        for name in ("a.png", "b.png"):
            info.name = name
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.seek(info.size, os.SEEK_CUR)
        file.write(bytes(1024))
    tracemalloc.start()
    records = read_input(tmp_path / "s.tar", "image")
    with pytest.raises(ValueError, match="it holds zeros only"):
        load_image(records[1].source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(records) == 2 and peak < 1 << 20


# ── parquet ──
def test_columns_are_guessed_named_or_listed(tmp_path):
    row = {"image": {"bytes": picture(0), "path": "x.png"}, "Text": "a cat", "label": 3, "w": 0.5}
    path = write_parquet(tmp_path / "a.parquet", [row])
    (record,) = read_input(path, "image")
    assert (record.id, record.caption) == ("a_000000", "a cat")
    assert record.facts == {"label": 3, "w": 0.5} and record.source.open_binary().read() == picture(
        0
    )
    row = {"one": picture(0), "two": picture(1), "alt": ["x", "y"], "title": "t", "n": 1 << 40}
    path = write_parquet(tmp_path / "b.parquet", [row])
    with pytest.raises(
        ValueError,
        match=r"b.parquet: which column holds the images is not clear; .*"
        r"--image_column; columns here: one \(binary\), two \(binary\), alt \(list",
    ):
        read_input(path, "image")
    with pytest.raises(ValueError, match="--caption_key is 'n', which is no column of captions"):
        read_input(path, "image", image_column="two", caption_key="n")
    (record,) = read_input(path, "image", image_column="two", caption_key="alt")
    assert record.caption == "x" and record.facts == {
        "title": "t",
        "n": 1 << 40,
        "captions": ["x", "y"],
    }
    assert record.source.open_binary().read() == picture(1)


@pytest.mark.parametrize(
    "texts, wanted",
    [
        ({"caption": ["a cat", "a pet"]}, ["a cat", "a pet"]),  # as Flickr30k has them
        ({"captions": "a cat"}, ["a cat"]),
        ({"caption": "a cat", "captions": ["a pet", "a cat"]}, ["a cat", "a pet"]),
        ({"caption": None, "captions": ["a cat"]}, ["a cat"]),
        ({"caption": "a cat", "captions": []}, ["a cat"]),
        ({"text": ["a cat", "a pet"]}, ["a cat", "a pet"]),
    ],
)
def test_captions_may_be_texts_or_lists_in_rows_and_in_json(tmp_path, texts, wanted):
    rows = [{"image": picture(0), **texts}, {"image": picture(1), **{key: None for key in texts}}]
    if None in texts.values() or [] in texts.values():
        rows[1] = {"image": picture(1), "caption": "", "captions": [""]}  # types are told by values
    row = read_input(write_parquet(tmp_path / "a.parquet", rows), "image")[0]
    named = [("0.png", picture(0)), ("0.json", json.dumps(texts).encode())]
    (member,) = read_input(write_tar(tmp_path / "a.tar", named), "image")
    for record in (row, member):
        assert [record.caption, *record.facts.get("captions", [])[1:]] == wanted


def test_a_text_that_is_not_utf8_costs_its_row(tmp_path):
    """Parquet does not look at texts; nor is such a row counted as one without a caption."""
    arrow = pytest.importorskip("pyarrow")
    texts = arrow.array([b"red", b"caf\xe9", b"", b"\xed\xa0\xbd", b"blue"]).view(arrow.string())
    table = arrow.table({"image": [picture(number) for number in range(5)], "caption": texts})
    report = cache_of(write_parquet(tmp_path / "a.parquet", table), tmp_path / "cache")
    assert open_cache(tmp_path / "cache").captions == ["red", "", "blue"]
    reason = "its caption cannot be read: a text in its row is not UTF-8"
    assert reasons(report) == {"a_000001": reason, "a_000003": reason}
    assert report.empty_captions == 1


def test_columns_of_views_are_texts_and_pictures(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    if not hasattr(arrow, "string_view"):
        pytest.skip("this version of pyarrow has no views")
    pictures = arrow.array([picture(0)], arrow.binary_view())
    texts = arrow.array(["a cat"], arrow.string_view())
    table = arrow.table({"image": pictures, "caption": texts, "note": texts})
    (record,) = read_input(write_parquet(tmp_path / "a.parquet", table), "image")
    assert (record.caption, record.facts) == ("a cat", {"note": "a cat"})
    assert record.source.open_binary().read() == picture(0)


def test_numbers_that_no_json_has_become_nothing_among_the_facts_of_a_row(tmp_path):
    """They could not be stored beside the latents, nor in an index."""
    numbers = (0.5, float("nan"), float("inf"))
    rows = [{"image": picture(i), "text": "a", "score": x} for i, x in enumerate(numbers)]
    path = write_parquet(tmp_path / "a.parquet", rows)
    assert [one.facts for one in read_input(path, "image")] == [
        {"score": score} for score in (0.5, None, None)
    ]
    assert cache_of(path, tmp_path / "cache").written == 3


def test_a_dot_in_the_name_of_a_column_is_a_letter(tmp_path):
    rows = [{"my.image": picture(number), "text": "a"} for number in range(3)]
    records = read_input(write_parquet(tmp_path / "a.parquet", rows), "image")
    assert [one.source.open_binary().read() for one in records] == [picture(i) for i in range(3)]


def test_rows_that_cannot_be_used_are_skipped_with_their_reasons(tmp_path):
    rows = [
        {"image": {"bytes": picture(0), "path": None}, "text": "good"},
        {"image": {"bytes": None, "path": "/etc/passwd"}, "text": "a path alone"},
        {"image": None, "text": "nothing"},
        {"image": {"bytes": b"not a picture", "path": None}, "text": None},
    ]
    report = cache_of(
        write_parquet(tmp_path / "a.parquet", rows), tmp_path / "cache", num_workers=1
    )
    why = reasons(report)
    assert open_cache(tmp_path / "cache").captions == ["good"]
    assert "a path alone is not followed" in why["a_000001"] and "no bytes" in why["a_000002"]
    assert "no picture that can be read" in why["a_000003"]


def test_a_damaged_parquet_file_is_one_reason_or_one_a_row(tmp_path):
    rows = [{"image": picture(i), "text": f"{i}"} for i in range(8)]
    path = write_parquet(tmp_path / "a.parquet", rows, row_group_size=4, use_dictionary=False)
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-50])
    with pytest.raises(ValueError, match="(?s)none of the 1 records.*damaged parquet file"):
        cache_of(path, tmp_path / "none")
    page = parquets.import_parquet()[1].ParquetFile(io.BytesIO(bytes(data))).metadata
    start = page.row_group(0).column(0).data_page_offset
    data[start : start + 40] = bytes(40)  # the header of its first page
    path.write_bytes(data)
    report = cache_of(path, tmp_path / "cache", num_workers=1)
    assert len(report.skipped) == 4 and "damaged parquet file" in report.skipped[0].reason
    assert len(open_cache(tmp_path / "cache")) == 4


def test_types_of_extensions_are_refused_and_pickled_ones_never_loaded(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    text = pyarrow.array(["x"])
    storage = pyarrow.array([picture(0)], pyarrow.binary())
    opaque = pyarrow.opaque(pyarrow.binary(), "secret", "vendor")
    table = pyarrow.table(
        {"image": pyarrow.ExtensionArray.from_storage(opaque, storage), "text": text}
    )
    path = write_parquet(tmp_path / "a.parquet", table)
    with pytest.raises(ValueError, match=r"which column holds the images.*image \(extension<"):
        read_input(path, "image")
    run = b"cos\nsystem\n(S'touch ran'\ntR."
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": run}
    field = pyarrow.field("extra", pyarrow.binary(), metadata=metadata)
    fields = [pyarrow.field("image", pyarrow.binary()), pyarrow.field("text", text.type), field]
    table = pyarrow.table([storage, text, storage], pyarrow.schema(fields))
    path = write_parquet(tmp_path / "b.parquet", table)
    (record,) = read_input(path, "image")
    with pytest.raises(ValueError, match="pickled types"):
        record.source.open_binary()


def test_missing_pyarrow_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"need pyarrow: pip install 'mmdit\[hf\]'"):
        read_input(tmp_path / "a.parquet", "image")


def test_a_part_of_a_file_is_a_file(tmp_path):
    """Seeking and reading in a member are those of a file of its bytes, to the last one."""
    path = write_tar(tmp_path / "s.tar", pairs(range(2)))
    member = read_input(path, "image")[1].source
    data = picture(1)
    with member.open_binary() as file:
        for start, count in ((0, 10), (len(data) - 3, 99), (5, -1), (len(data) + 9, 4)):
            file.seek(start)
            assert file.read(count) == data[start:][: count if count >= 0 else None]
        assert file.seek(-4, io.SEEK_END) == len(data) - 4 and file.read() == data[-4:]
    assert file.closed


# ── what the page about data says ──
SETTINGS = """
experiment_name: x
video: {width: 32, height: 32, num_frames: 1}
tokenizer: {type: dummy, latent_d: 4}
text_encoder: {type: hash}
model: {dim: 32, depth: 1, num_heads: 2}
"""


def documented(heading):
    """Return the commands of a section of docs/data.md, and its Python."""
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8").partition(heading)[2]
    shell = re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1]
    python = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    return shell.strip().splitlines(), python


def call(command):
    """Run a command as its line says; return its exit status."""
    _, name, *words = shlex.split(command)
    module = importlib.import_module(f"mmdit.scripts.{subcommands()[name]}")
    return module.main([*words, *(["--device", "cpu"] if name.startswith("cache") else [])])


def test_the_documented_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(SETTINGS)
    for folder in ("shards", "hub", "clips"):
        (tmp_path / folder).mkdir()
    write_tar(tmp_path / "shards/my-000.tar", pairs(range(3)))
    write_tar(tmp_path / "shards/my-001.tar", pairs(range(3, 5)))
    rows = [{"image": picture(i), "text": f"{i}", "title": "x"} for i in range(4)]
    write_parquet(tmp_path / "hub/train-00000-of-00001.parquet", rows)
    pytest.importorskip("av")
    video = write_video(tmp_path / "v.mp4", [i / 16 for i in range(4)]).read_bytes()
    write_tar(tmp_path / "clips/a.tar", [("a.mp4", video), ("a.txt", b"moves")])
    commands, _ = documented("## Tars and parquet files")
    assert len(commands) == 4
    for command in commands:
        assert call(command) == 0, command
    assert "5 records: 5 usable" in capsys.readouterr().out
    for name, count in {"from_tars": 5, "from_parquet": 4, "clips": 1}.items():
        assert len(open_cache(f"data/cache/{name}")) == count
    with pytest.raises(SystemExit):
        call(f"{commands[1]} --limit 2 --prune")
    assert "would remove all that is behind the limit" in capsys.readouterr().err
    compare = "mmdit inspect-cache --config my.yaml --cache_dir data/cache/from_tars --samples 0"
    assert call(f"{compare} --data 'shards/*.tar' --limit 4") == 0
    assert "0004" in capsys.readouterr().out  # which is not among the first four
    (tmp_path / "data/cache/from_tars").rename(tmp_path / "data/cache/mine")
    (command,), code = documented("**For other programs.**")
    assert call(command) == 0
    assert len(open_cache("data/cache/mine_tars")) == 5
    if not importlib.util.find_spec("webdataset"):
        return
    names = {}
    exec(compile(code, "docs/data.md", "exec"), names)
    assert names["latents"].shape == (1, 2, 2, 4) and names["caption"] == "picture 4"


def test_other_files_are_refused_by_their_names(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(ValueError, match="cannot read .*pipe.tar: .*named pipe"):
        read_input(tmp_path / "pipe.tar", "image")
    with pytest.raises(ValueError, match="s.tar.gz: it is compressed"):
        read_input(tmp_path / "s.tar.gz", "image")
    with pytest.raises(ValueError, match="v.tar is no JSONL file, .* cache-images, cache-latents"):
        read_records(tmp_path / "v.tar", "video")
    with pytest.raises(ValueError, match="cannot read pipe:touch ran #.tar: it is not there"):
        read_input("pipe:touch ran #.tar", "image")
