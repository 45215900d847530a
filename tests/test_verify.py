"""Every kind of damage to a cache is found and mended by caching again."""

import json

import pytest
import torch

from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.verify import verify_cache
from mmdit.data.dataset.buckets import BucketingConfig
from mmdit.data.dataset.frames import PreprocessConfig
from mmdit.scripts import verify_cache as verify_script
from tests.test_cache import contents, flip, images, run  # noqa: F401 (images is a fixture)


def truncated(raw):
    return raw[: len(raw) // 2]


def damage_all(folder):
    """One file of each kind of damage; returns the name → a word of what must be told."""
    (folder / "画1.pt").write_bytes(truncated((folder / "画1.pt").read_bytes()))
    (folder / "画2.pt").write_bytes(flip((folder / "画2.pt").read_bytes()))
    (folder / "画3.pt").write_bytes(b"")
    (folder / "画4.pt").write_bytes((folder / "画5.pt").read_bytes())  # whole, but another item's
    torch.save(
        {"latents": torch.zeros(1, 3, 3, 3, dtype=torch.float16), "caption": ""}, folder / "画6.pt"
    )
    torch.save(
        {
            "latents": torch.full((1, 2, 2, 3), torch.nan, dtype=torch.float16),
            "caption": "picture 7",
        },
        folder / "画7.pt",
    )
    torch.save(
        {"latents": torch.zeros(1, 2, 2, 3, dtype=torch.float16), "caption": "picture 8"},
        folder / "画8.pt",
    )
    (folder / ".writing-0-1.tmp").touch()
    return {
        "画1.pt": "cannot be read",
        "画2.pt": "check sum",
        "画3.pt": "cannot be read",
        "画4.pt": "index says otherwise",
        "画8.pt": "index says otherwise",
        "画6.pt": "48x48 does not belong",
        "画7.pt": "not finite",
        ".writing-0-1.tmp": "killed process",
    }


def test_a_whole_cache_has_no_findings_and_each_damage_is_named(images, tmp_path, capsys):
    run(images, tmp_path / "cache")
    before = contents(tmp_path / "cache")
    assert verify_cache(tmp_path / "cache") == (10, [])
    assert (
        verify_script.main(["--cache_dir", str(tmp_path / "cache")]) == 0
        and "0 findings" in capsys.readouterr().out
    )
    expected = damage_all(tmp_path / "cache")
    count, damage = verify_cache(tmp_path / "cache")
    assert count == 10 and {row.file for row in damage} == set(expected)
    assert all(expected[row.file] in row.problem and row.delete for row in damage)
    assert verify_script.main(["--cache_dir", str(tmp_path / "cache"), "--delete", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["damage"]) == 8
    assert run(images, tmp_path / "cache").written == 7
    assert verify_cache(tmp_path / "cache") == (10, []) and contents(tmp_path / "cache") == before


def test_files_and_index_that_contradict_each_other_are_told(images, tmp_path):
    buckets = BucketingConfig(True, buckets=((32, 32), (48, 32)))
    run(images, tmp_path / "cache", bucketing=buckets)
    cache = tmp_path / "cache"
    (cache / "48x32/画0.pt").write_bytes((cache / "32x32/画0.pt").read_bytes())
    (cache / "32x32/画2.pt").unlink()
    index = cache / "index.jsonl"
    index.write_text(
        "".join(line for line in index.read_text().splitlines(True) if "画4" not in line)
        + '{"id": "torn'
    )
    told = {
        (row.file, row.problem.partition(" (")[0], row.delete) for row in verify_cache(cache)[1]
    }
    assert told == {
        ("48x32/画0.pt", "its size is 32x32, its folder is for another", True),
        ("48x32/画0.pt", "its id is there 2 times", False),
        ("32x32/画0.pt", "its id is there 2 times", False),
        ("48x32/画0.pt", "not in the index", False),
        ("32x32/画2.pt", "listed in the index, but missing", False),
        ("32x32/画4.pt", "not in the index", False),
        ("index.jsonl:10", "the line cannot be read", False),
    }
    with pytest.raises(ValueError, match="is no latent cache"):
        verify_cache(tmp_path)


def test_crop_coordinates_are_stored_for_every_crop(images, tmp_path):
    run(images, tmp_path / "cache", preprocess=PreprocessConfig("shifted", num_crops=2))
    cache = open_cache(tmp_path / "cache")
    for source, file in zip(cache.sources, cache.columns.files, strict=True):
        left, top, right, bottom = source["crop"]
        assert (
            (right - left, bottom - top) == (40, 40)
            and right <= source["size"][0]
            and bottom <= source["size"][1]
        )
        assert torch.load(tmp_path / "cache" / file, weights_only=True)["source"] == source
