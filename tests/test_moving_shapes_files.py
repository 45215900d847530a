"""Moving shapes on disk: exact pictures, finished work kept, the same files from any number of
processes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.moving_shapes import Facts, caption, draw, named_attributes, render
from mmdit.data.moving_shapes.prepare import Recipe, prepare_samples
from mmdit.scripts import cache_moving_shapes
from mmdit.scripts.prepare_moving_shapes import main
from tests.helpers.tiny import Workshop, refused


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
        (["--count", "0"], "count is 0"),
        (["--width", "50"], "multiple of 16"),
        (["--frames", "0"], "frames is 0"),
    ):
        refused(capsys, main, ["--out_dir", tmp_path / "other", *words], message)
    assert not (tmp_path / "other").exists()


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
    )
    for other, told in others:
        refused(capsys, cache_moving_shapes.main, [*words, *other], told, "another --out_dir")
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
