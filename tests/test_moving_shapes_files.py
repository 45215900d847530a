"""Moving shapes on disk: exact pictures, finished work kept, the same files from any number of
processes."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.dataset.buckets import BucketingConfig, VideoConfig
from mmdit.data.dataset.frames import PreprocessConfig, crop_shares
from mmdit.data.moving_shapes import Facts, caption, draw, named_attributes, render
from mmdit.data.moving_shapes import latents as module
from mmdit.data.moving_shapes.canvases import Canvases
from mmdit.data.moving_shapes.latents import cache_moving_shapes as make_cache
from mmdit.data.moving_shapes.prepare import Recipe, prepare_samples
from mmdit.pixels import to_unit
from mmdit.scripts import cache_moving_shapes
from mmdit.scripts.prepare_moving_shapes import main
from mmdit.tokenizers import DummyTokenizerConfig, build_tokenizer
from tests.helpers.tiny import Workshop, refused
from tests.test_cache import contents

VIDEO = VideoConfig(32, 32)
BUCKETS = BucketingConfig(True, buckets=((64, 48), (48, 64), (64, 64)))
SHIFTED = PreprocessConfig("shifted", num_crops=2, seed=1)
TOKENIZER = build_tokenizer(DummyTokenizerConfig(latent_d=12))


def bucketed(preprocess=None, buckets=BUCKETS, recipe=None):
    """Return a manifest of buckets, and the canvases of its samples."""
    recipe, preprocess = recipe or Recipe(32, 32, seed=2), preprocess or PreprocessConfig()
    manifest = CacheManifest.of(TOKENIZER, VIDEO, buckets, preprocess)
    return manifest, Canvases.of(manifest, preprocess, recipe)


def test_prepared_images_are_exact_and_finished_work_is_kept(tmp_path):
    recipe = Recipe(64, 64, seed=3)
    path = prepare_samples(tmp_path / "shapes", recipe, 6)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    facts = draw(3, range(6), video=False, width=64, height=64)
    for i, (record, item) in enumerate(zip(records, facts, strict=True)):
        picture = torch.from_numpy(
            np.array(Image.open(path.parent / record["image_path"]))
        ).permute(2, 0, 1)
        assert torch.equal(picture, render([item], 64, 64)[0, 0])
        assert Facts.from_json(record["facts"]) == item and record["caption"] == caption(
            item, 3, i, False
        )
        assert set(record["facts"]["named"]) == named_attributes(item, 3, i, False)
    before = {p: p.stat().st_mtime_ns for p in (path.parent / "images").iterdir()}
    (path.parent / "images/000002.png").unlink()
    (path.parent / "images/.writing-1.tmp").write_bytes(b"cut off")
    prepare_samples(tmp_path / "shapes", recipe, 8)
    after = {p: p.stat().st_mtime_ns for p in (path.parent / "images").iterdir()}
    assert len(after) == 8 and sum(after[p] == t for p, t in before.items()) == 5
    assert len(path.read_text().splitlines()) == 8
    with pytest.raises(ValueError, match="seed 3 there and 4 now.*another --out_dir"):
        prepare_samples(tmp_path / "shapes", replace(recipe, seed=4), 6)
    (path.parent / "moving_shapes.json").unlink()
    with pytest.raises(ValueError, match="no moving_shapes.json"):
        prepare_samples(tmp_path / "shapes", recipe, 6)


@pytest.mark.thorough
def test_prepared_clips_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("mmdit.data.moving_shapes.prepare.CHUNK_FRAMES", 6)
    one, two = (
        prepare_samples(tmp_path / str(n), Recipe(32, 48, 3, variant="many"), 4, workers=n)
        for n in (1, 2)
    )
    assert one.name == "train_videos.jsonl" and one.read_bytes() == two.read_bytes()
    frames = sorted(p.relative_to(one.parent) for p in one.parent.rglob("*.png"))
    assert len(frames) == 12 and str(frames[0]) == "frames/000000/0000.png"
    assert all((one.parent / p).read_bytes() == (two.parent / p).read_bytes() for p in frames)


def test_the_command_explains_mistakes(tmp_path, capsys):
    main(["--out_dir", str(tmp_path), "--count", "2", "--width", "32", "--height", "32"])
    for words, message in (
        (["--count", "0"], "--count: is 0"),
        (["--width", "50"], "multiple of 16"),
        (["--frames", "0"], "--frames: is 0"),
    ):
        refused(capsys, main, ["--out_dir", tmp_path / "other", *words], message)
    assert not (tmp_path / "other").exists()


def test_complete_captions_state_every_fact_on_disk_and_in_a_cache(tmp_path, capsys):
    words = ["--out_dir", tmp_path / "files", "--count", 40, "--width", 32, "--height", 32]
    main([*map(str, words), "--complete_captions"])
    lines = (tmp_path / "files/train_images.jsonl").read_text().splitlines()
    files = [json.loads(line) for line in lines]
    facts = draw(0, range(40), video=False, width=32, height=32)
    assert [line["caption"] for line in files] == [
        caption(item, 0, i, True) for i, item in enumerate(facts)
    ]
    named = [set(line["facts"]["named"]) for line in files]
    assert named == [set(item.attributes) for item in facts]
    refused(capsys, main, words, "complete_captions True there and False now")
    refused(
        capsys,
        main,
        [*words, "--complete_captions", "--split", "held_out"],
        "--complete_captions is given, but captions of --split held_out state all facts anyway",
    )
    config = Workshop(tmp_path).folder / "tiny.yaml"
    cached = ["--config", config, "--out_dir", tmp_path / "cache", "--device", "cpu"]
    cache_moving_shapes.main([*map(str, cached), "--count", "40", "--complete_captions"])
    assert open_cache(tmp_path / "cache").captions == [line["caption"] for line in files]


def test_a_folder_older_than_complete_captions_goes_on_with_others_alone(tmp_path):
    recipe = Recipe(32, 32)
    prepare_samples(tmp_path, recipe, 2)
    path = tmp_path / "moving_shapes.json"
    stored = json.loads(path.read_text())
    del stored["complete_captions"]
    path.write_text(json.dumps(stored))
    prepare_samples(tmp_path, recipe, 3)
    with pytest.raises(ValueError, match="complete_captions False there and True now"):
        prepare_samples(tmp_path, replace(recipe, complete_captions=True), 3)


def test_a_cache_of_another_recipe_is_refused_and_items_beyond_the_count_are_told(tmp_path, capsys):
    def cache(*words, count=4):
        out = Workshop(tmp_path).folder / "c"
        words = [
            "--config",
            tmp_path / "tiny.yaml",
            "--out_dir",
            out,
            "--device",
            "cpu",
            "--count",
            count,
            *words,
        ]
        assert cache_moving_shapes.main([str(word) for word in words]) == 0
        return open_cache(out)

    before = cache().captions
    words = [
        "--config",
        tmp_path / "tiny.yaml",
        "--out_dir",
        tmp_path / "c",
        "--device",
        "cpu",
        "--count",
        6,
    ]
    others = (
        (["--seed", 1], "seed 0 there and 1 now"),
        (["--variant", "many"], "variant"),
        (["--frames", 2], "frames 1 there"),
        (["--complete_captions"], "complete_captions False there and True now"),
    )
    for other, message in others:
        refused(capsys, cache_moving_shapes.main, [*words, *other], message, "another --out_dir")
    (tmp_path / "c/moving_shapes.json").unlink()  # a cache of an older version
    for other, _ in others:
        refused(
            capsys,
            cache_moving_shapes.main,
            [*words, *other],
            "made otherwise",
            "another --out_dir",
        )
    assert cache(count=6).captions[:4] == before and (tmp_path / "c/moving_shapes.json").exists()
    capsys.readouterr()
    assert (
        len(cache(count=3)) == 6
        and "3 items of the cache are not among these 3 samples" in capsys.readouterr().out
    )
    assert cache("--prune", count=3).captions == before[:3]


def test_the_bucket_of_a_sample_is_a_function_of_seed_and_number():
    """Whatever the order of the buckets in a config; each is as likely."""
    _, canvases = bucketed()
    sizes = [canvases.size(i) for i in range(3000)]
    assert all(900 < sizes.count(size) < 1100 for size in BUCKETS.buckets)
    turned = BucketingConfig(True, buckets=BUCKETS.buckets[::-1])
    assert [bucketed(buckets=turned)[1].size(i) for i in range(99)] == sizes[:99]
    other = bucketed(recipe=Recipe(32, 32, seed=3))[1]
    assert [other.size(i) for i in range(99)] != sizes[:99]
    budget = BucketingConfig(True, "pixel_budget", max_pixels_per_frame=4096)
    with pytest.raises(ValueError, match="pixel_budget.*set strategy: closest_ar"):
        bucketed(buckets=budget)


def test_a_bucketed_cache_of_generated_pictures_goes_on_and_is_the_same_in_any_portions(
    tmp_path, monkeypatch
):
    manifest, canvases = bucketed()
    recipe = Recipe(32, 32, seed=2)
    for count, made in ((5, 5), (12, 7), (12, 0)):
        out = tmp_path / "grown"
        assert make_cache(TOKENIZER, out, manifest, recipe, count, canvases=canvases) == made
    monkeypatch.setattr(module, "CHUNK_PIXELS", {"cpu": 1})  # a sample at a time
    make_cache(TOKENIZER, tmp_path / "whole", manifest, recipe, 12, canvases=canvases)
    files = sorted(path.relative_to(tmp_path / "whole") for path in tmp_path.glob("whole/**/*.*"))
    assert len(files) == 12 + 3
    for file in files:
        assert (tmp_path / "grown" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    cache = open_cache(tmp_path / "whole", manifest)
    for i in range(12):
        width, height = canvases.size(i)
        assert cache.ids[i] == f"{i:06d}" and manifest.size_of(cache.shapes[i]) == (width, height)
        (item,) = draw(2, [i], video=False, width=width, height=height)
        assert cache.captions[i] == caption(item, 2, i, False)
        alone = TOKENIZER.encode(to_unit(render([item], width, height)))[0].half()
        assert torch.equal(cache.load(i), alone)
    plan = BatchPlan(cache, VIDEO, 2, seed=0)
    grids = {plan.batch(step).grid for step in range(24)}
    assert grids == {(3, 4), (4, 3), (4, 4)}


def test_helping_processes_write_what_this_one_does_and_a_run_goes_on_where_one_failed(
    tmp_path, monkeypatch
):
    manifest, canvases = bucketed(SHIFTED)
    recipe = Recipe(32, 32, seed=2, variant="many")

    def cached(name):
        make_cache(TOKENIZER, tmp_path / name, manifest, recipe, 10, canvases=canvases)
        return contents(tmp_path / name)

    alone, here = cached("alone"), os.getpid()
    monkeypatch.setattr("mmdit.data.dataset.workers.ITEMS_PER_HELPER", 5)
    monkeypatch.setattr(module, "DRAWN", 2)

    def full(id):
        raise OSError(28, "No space left on device")

    def die(id):
        os.kill(os.getpid(), signal.SIGKILL if os.getpid() != here else 0)

    for fault, message in ((full, "No space left.*free disk space"), (die, "helps was killed")):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=message):
            patch.setattr("mmdit.data.cache.writer.check_id", fault)
            cached("helped")
    assert not list((tmp_path / "helped").rglob("*.pt"))
    assert cached("helped") == alone


def test_shifted_crops_of_generated_pictures_lie_within_a_longer_canvas(tmp_path):
    manifest, canvases = bucketed(SHIFTED)
    recipe = Recipe(32, 32, seed=2)
    make_cache(TOKENIZER, tmp_path, manifest, recipe, 10, canvases=canvases)
    cache = open_cache(tmp_path, manifest)
    expected = [id for i in range(10) for id in canvases.item_ids(i)]
    assert cache.ids == sorted(expected) and {f"{i:06d}_c0" for i in range(10)} < set(cache.ids)
    longer = set()
    for i in range(10):
        (width, height), size = canvases.canvas(i), canvases.size(i)
        assert (width - size[0], height - size[1]) in ((16, 0), (0, 16))
        longer.add(width > size[0])
        picture = render(draw(2, [i], video=False, width=width, height=height), width, height)
        for id in canvases.item_ids(i):
            item = cache.ids.index(id)
            left, top, right, bottom = cache.sources[item]["crop"]
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert crop_shares(cache.sources[item])[0] == left / width
            shown = picture[..., top:bottom, left:right]
            assert torch.equal(cache.load(item), TOKENIZER.encode(to_unit(shown))[0].half())
    assert longer == {True, False} and len(cache) > 15, "second crops that are no repetition"
    # half of a sample's crops were lost
    lost = canvases.item_ids(0)[-1]
    next(tmp_path.rglob(f"{lost}.pt")).unlink()
    assert make_cache(TOKENIZER, tmp_path, manifest, recipe, 10, canvases=canvases) == 1
    # of crops that older versions have cached from canvases without overhang nothing is known
    path = tmp_path / "moving_shapes.json"
    path.write_text(path.read_text().replace('"overhang"', '"other"'))
    with pytest.raises(ValueError, match="overhang None there and 0.125 now"):
        make_cache(TOKENIZER, tmp_path, manifest, recipe, 10, canvases=canvases)


def test_the_command_caches_clips_in_buckets_and_says_how_many_each_got(tmp_path, capsys):
    words = ["bucketing={enabled: true, buckets: [[64, 32], [32, 64]]}", "video.num_frames=3"]
    cache = open_cache(Workshop(tmp_path).cache("clips", *words, count=6))
    sizes = {tuple(shape) for shape in cache.shapes.tolist()}
    assert sizes == {(3, 2, 4, 8), (3, 4, 2, 8)}
    wide = int((cache.shapes[:, 1] == 2).sum())
    assert f"32x64: {6 - wide} items\n  64x32: {wide} items" in capsys.readouterr().out
