"""A cache packed into tars is read by the public WebDataset library, and by ours as the cache that
it was packed from, bit for bit; embeddings travel along, and back."""

import json
import os
import signal
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmdit.commands.cache_text import take_embeddings
from mmdit.data.cache import packing
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.packed import INDEX, read_shard
from mmdit.data.cache.tar_shards import TEXT_ENCODER, Embeddings
from mmdit.data.cache.verify import verify_cache
from mmdit.data.cache.writer import CacheWriter
from mmdit.data.dataset.captions import all_captions
from mmdit.scripts import cache_text
from mmdit.scripts.pack_cache import main
from mmdit.text_encoders.huggingface import HuggingFaceEncoder
from tests import test_packed, test_text_encoders
from tests.helpers.forks import ended, in_child
from tests.test_archives import pairs, write_tar
from tests.test_cache import contents
from tests.test_packed import MANIFEST, add, steps
from tests.test_text_encoders import hf

cache = test_packed.cache  # fixtures
checkpoint = test_text_encoders.checkpoint


def pack(cache, shard_bytes=1500, **options):
    out = cache.parent / "tars"
    return packing.pack_cache(cache, out, shard_bytes, "webdataset", **options)


def letters(captions):
    """Return embeddings that say whose they are: a row for each letter."""
    rows = []
    for text in captions:
        rows.append(torch.tensor([[ord(letter), 1.5] for letter in text]).view(-1, 2).half())
    return rows


LETTERS = Embeddings("letters", "float16", letters)


def test_tars_give_the_batches_of_the_cache(cache):
    assert pack(cache)["shards"] > 2 and pack(cache)["written"] == 0
    out = cache.parent / "tars"
    for mine, theirs in zip(steps(out), steps(cache), strict=True):
        assert torch.equal(mine.latents.view(torch.int16), theirs.latents.view(torch.int16))
        assert (mine.captions, mine.ids, mine.facts) == (theirs.captions, theirs.ids, theirs.facts)
    assert list(open_cache(out).sources) == open_cache(cache).sources
    assert verify_cache(out) == (pack(cache)["shards"], [])
    packing.pack_cache(out, cache.parent / "one", 1500)  # and back into the other format
    packing.pack_cache(cache, cache.parent / "two", 1500)
    assert contents(cache.parent / "one") == contents(cache.parent / "two")


def test_the_public_library_reads_the_tars(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    cache = add(tmp_path / "cache", ["a.b%", "plain", "猫", "d" * 150])
    pack(cache, 100, embeddings=LETTERS)
    opened, seen = open_cache(cache), {}
    urls = sorted(str(path) for path in (tmp_path / "tars").glob("*.tar"))
    assert len(urls) > 1
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
        seen[sample["json"]["id"]] = sample
        assert isinstance(sample["latents.npy"], np.ndarray)
    assert sorted(seen) == list(opened.ids)
    for number, id in enumerate(opened.ids):
        sample = seen[id]
        assert np.array_equal(sample["latents.npy"], opened.load(number).numpy())
        assert sample["txt"] == opened.captions[number]
        assert sample["json"].get("facts", {}) == opened.facts[number]
        texts = opened.facts[number].get("captions", [sample["txt"]])
        for place, text in enumerate(texts):
            name = f"text{place or ''}.npy"
            assert np.array_equal(sample[name], letters([text])[0].numpy())


def test_packing_again_writes_only_what_changed_and_a_kill_leaves_whole_tars(cache):
    expected = cache.parent / "tars"
    pack(cache)
    with CacheWriter(cache, MANIFEST) as writer:
        plain = open_cache(cache)
        writer.add("猫23", plain.load(24), "another", plain.facts[24], plain.sources[24])
    assert pack(cache)["written"] == 1 and open_cache(expected).captions[24] == "another"
    before = contents(expected)
    (expected / "shard-00001.tar").unlink()
    with pytest.raises(ValueError, match=r"shard-00001.tar is damaged: it is missing"):
        open_cache(expected)
    whole = packing._tar

    def killed(*arguments):
        yield next(whole(*arguments))
        os.kill(os.getpid(), signal.SIGKILL)

    def packed():
        packing._tar = killed
        pack(cache)

    assert ended(in_child(packed)) == -signal.SIGKILL
    with pytest.raises(ValueError, match="packing was not finished"):
        open_cache(expected)
    assert pack(cache)["written"] == 1 and contents(expected) == before


def test_a_damaged_tar_is_named(cache):
    pack(cache)
    shard = cache.parent / "tars/shard-00001.tar"
    entry, good = read_shard(shard)[1], shard.read_bytes()
    bad = bytearray(good)
    bad[entry.offset + 3] ^= 4
    shard.write_bytes(bad)
    opened = open_cache(shard.parent)
    wrong = f"shard-00001.tar is damaged: the check sum of item '{entry.id}' is wrong"
    with pytest.raises(ValueError, match=wrong):
        opened.load(list(opened.ids).index(entry.id))
    assert "its check sum is wrong" in str(verify_cache(shard.parent)[1][0])
    shard.write_bytes(good[: len(good) // 2])
    assert [finding.file for finding in verify_cache(shard.parent)[1]] == ["shard-00001.tar"]
    shard.write_bytes(good)
    assert verify_cache(shard.parent)[1] == []


def test_formats_replace_each_other_but_never_tars_of_others(cache, tmp_path):
    out = cache.parent / "tars"
    pack(cache)
    packing.pack_cache(cache, out, 1500)
    assert not list(out.glob("*.tar")) and len(open_cache(out)) == 25
    pack(cache)
    assert not list(out.glob("shard-*.safetensors")) and len(open_cache(out)) == 25
    (tmp_path / "mine").mkdir()
    path = write_tar(tmp_path / "mine/shard-00000.tar", pairs([0]))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="holds shard-00000.tar but no manifest.json"):
        packing.pack_cache(cache, tmp_path / "mine", 1500, "webdataset")
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_the_size_of_a_shard_counts_embeddings(cache):
    without = pack(cache, 5000)["shards"]
    wide = Embeddings("wide", "float16", lambda texts: [torch.zeros(1, 999).half() for _ in texts])
    assert pack(cache, 5000, embeddings=wide)["shards"] > 2 * without
    assert len(open_cache(cache.parent / "tars")) == 25


def test_embeddings_come_and_go_with_their_encoder(cache):
    out = cache.parent / "tars"
    pack(cache, embeddings=LETTERS)
    assert pack(cache, embeddings=LETTERS)["written"] == 0
    assert json.loads((out / TEXT_ENCODER).read_text())["key"] == "letters"
    other = Embeddings(
        "others", "float16", lambda captions: [text + 1 for text in letters(captions)]
    )
    made = pack(cache, embeddings=other)
    assert made["written"] == made["shards"]
    for settings, shares in (("some", 1), ("some", 0), ("others", 1)):
        made = pack(cache, embeddings=replace(other, settings=settings))
        assert made["written"] == shares * made["shards"]
    noted = json.loads((out / TEXT_ENCODER).read_text())
    del noted["settings"]  # as earlier versions
    (out / TEXT_ENCODER).write_text(json.dumps(noted))
    assert pack(cache, embeddings=replace(other, settings="some"))["written"] == 0
    made = pack(cache)
    assert made["written"] == made["shards"] and not (out / TEXT_ENCODER).exists()
    with tarfile.open(out / "shard-00000.tar") as tar:
        assert not [name for name in tar.getnames() if ".text" in name]
    assert (out / INDEX).exists() and verify_cache(out)[1] == []


def test_embeddings_go_into_tars_and_back_bit_for_bit(cache, checkpoint, tmp_path, monkeypatch):
    """Pack with the weights, as the command does, and read into a new folder without a call."""
    dtype = "bfloat16"  # which numpy lacks
    folder, _ = checkpoint("t5")
    stores = tmp_path / "there", tmp_path / "here"
    config = tmp_path / "c.yaml"
    encoder = {
        "type": "hf",
        "name_or_path": str(folder),
        "dtype": dtype,
        "max_length": 16,
        "cache_dir": str(stores[0]),
    }
    video = {"width": 32, "height": 32}
    settings = {"experiment_name": "x", "text_encoder": encoder, "model": {}, "video": video}
    config.write_text(json.dumps(settings))
    words = [
        "--cache_dir",
        str(cache),
        "--out_dir",
        str(tmp_path / "tars"),
        "--shard_megabytes",
        "1",
    ]
    with_config = ["--format", "webdataset", "--config", str(config), "--device", "cpu"]
    assert main([*words, *with_config]) == 0
    with pytest.raises(SystemExit):
        main([*words, "--config", str(config)])
    here = [f"text_encoder.cache_dir={stores[1]}", "--device", "cpu"]
    words = ["--config", str(config), "--cache_dir", str(tmp_path / "tars"), *here]
    opened = open_cache(cache)
    captions = []
    for caption, facts in zip(opened.captions, opened.facts, strict=True):
        captions += all_captions(caption, facts)
    expected = hf(folder, dtype=dtype).rows(captions)
    monkeypatch.setattr(
        HuggingFaceEncoder, "_encode_group", None
    )  # nothing is encoded from here on
    assert cache_text.main(words) == 0
    rows = hf(folder, dtype=dtype, cache_dir=str(stores[1])).rows(captions)
    for mine, theirs in zip(rows, expected, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    assert {row.dtype for row in rows if len(row)} == {torch.bfloat16}
    note = tmp_path / "tars" / TEXT_ENCODER
    note.write_text(json.dumps(json.loads(note.read_text()) | {"settings": "others"}))
    assert take_embeddings(note.parent, hf(folder, dtype=dtype, cache_dir=str(tmp_path))) == 0
