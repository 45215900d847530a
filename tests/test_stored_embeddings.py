"""Embeddings in files: a caption is encoded once for all runs, and by another encoder's embedding
never mistaken."""

import errno
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from mmdit.commands.cache_text import encode_captions
from mmdit.config import ConfigError, decode
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.text_encoders import stored as stored_module
from mmdit.text_encoders.stored import StoredEmbeddings
from tests import test_text_encoders
from tests.test_text_encoders import CAPTIONS, count_calls, hf

checkpoint = test_text_encoders.checkpoint  # a fixture


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_second_run_encodes_nothing_and_sees_the_same_bits(checkpoint, tmp_path, monkeypatch):
    folder, _ = checkpoint("t5")
    expected = hf(folder)(CAPTIONS)
    assert torch.equal(
        hf(folder, cache_dir=str(tmp_path))(CAPTIONS).embeddings, expected.embeddings
    )
    again = hf(folder, cache_dir=str(tmp_path), cache_mb=0)
    calls = count_calls(again, monkeypatch)
    text = again(CAPTIONS)
    assert (
        not calls
        and torch.equal(text.embeddings, expected.embeddings)
        and torch.equal(text.valid, expected.valid)
    )
    dropped = text.drop(
        torch.arange(len(CAPTIONS)) == 0
    )  # caption dropout acts on what was read, too
    assert not dropped.valid[0].any() and torch.equal(dropped.valid[1:], text.valid[1:])
    assert len(files(tmp_path)) == len({caption.strip() for caption in CAPTIONS if caption.strip()})


def test_other_weights_lengths_and_precisions_find_nothing(checkpoint, tmp_path, monkeypatch):
    folder, _ = checkpoint("t5")
    options = {"cache_dir": str(tmp_path)}
    hf(folder, **options)(["red"])
    changed = hf(folder, **options)
    changed(["red"])  # with the weights it came with: nothing new
    assert len(files(tmp_path)) == 1
    state = changed.state_dict()
    state["encoder.shared.weight"] = state["encoder.shared.weight"] + 1e-6
    changed.load_state_dict(
        state
        | {
            name: state["encoder.shared.weight"]
            for name in state
            if name.endswith("embed_tokens.weight")
        }
    )
    calls = count_calls(changed, monkeypatch)
    changed(["red"])
    hf(folder, max_length=12, **options)(["red"])
    hf(folder, dtype="bfloat16", **options)(["red"])
    assert len(calls) == 1 and len(files(tmp_path)) == len(list(tmp_path.iterdir())) == 4


def test_another_config_with_the_same_weights_finds_nothing(checkpoint, tmp_path, monkeypatch):
    """And what an earlier version stored, which did not note the config, is taken as it is."""
    source, cache = Path(checkpoint("t5")[0]), tmp_path / "cache"
    folders = [shutil.copytree(source, tmp_path / name) for name in ("here", "there")]
    place = folders[1] / "config.json"
    config = json.loads(place.read_text())
    place.write_text(json.dumps(config | {"layer_norm_epsilon": 0.5, "transformers_version": "4"}))
    for folder in (*folders, folders[0]):
        expected = hf(str(folder))(["red"]).embeddings
        stored = hf(str(folder), cache_dir=str(cache))
        assert torch.equal(stored(["red"]).embeddings, expected)
    place.write_text(json.dumps(config | {"transformers_version": "4", "dtype": "bfloat16"}))
    older = StoredEmbeddings(cache, stored.stored().key, stored.dim)
    older.save({"blue": torch.ones(2, stored.dim)})
    same = hf(str(folders[1]), cache_dir=str(cache))
    calls = count_calls(same, monkeypatch)
    assert torch.equal(same(["red"]).embeddings, expected) and not calls
    assert (same(["blue"]).embeddings == 1).all()


def test_a_folder_that_can_only_be_read_is_read(checkpoint, tmp_path, monkeypatch, caplog):
    """What is not there is computed in each run; who fills the folder is told."""
    folder, _ = checkpoint("t5")
    weights = next(Path(folder).glob("*.safetensors"))
    expected = hf(folder)(["red", "blue"]).embeddings
    hf(folder, cache_dir=str(tmp_path))(["red"])

    def refused(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(stored_module, "write_atomically", refused)
    shared = hf(folder, cache_dir=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(shared(["red", "blue"]).embeddings, expected)
        shared(["star"])
    text, error = caplog.text, shared.unsaved
    encoder = {"type": "hf", "name_or_path": folder, "max_length": 16, "cache_dir": str(tmp_path)}
    asked = {"train": {"sample_negative_prompt": "left"}, "text_encoder": encoder}
    with pytest.raises(OSError, match="Read-only"):
        encode_captions(decode(ExperimentConfig, {"experiment_name": "x"} | asked), [], "cpu")
    assert text.count("can only be read") == 1 and error.errno == errno.EROFS
    assert len(stored_module.files_key([weights], tmp_path)) == 64  # it cannot be remembered


def test_a_long_caption_and_a_move_change_no_key(checkpoint, tmp_path):
    """Ask for the length of a caption, after which the tokenizer has forgotten to cut."""
    encoder = hf(checkpoint("t5")[0], cache_dir=str(tmp_path))
    key = encoder.stored().key
    encoder(["red " * 40])
    assert encoder.to("cpu").stored().key == key


def test_a_damaged_file_is_made_anew(checkpoint, tmp_path):
    folder, _ = checkpoint("t5")
    expected = hf(folder, cache_dir=str(tmp_path))(["red"]).embeddings
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    for damage in (whole[:20], b"", b"no safetensors at all"):
        file.write_bytes(damage)
        assert torch.equal(hf(folder, cache_dir=str(tmp_path))(["red"]).embeddings, expected)
        assert file.read_bytes() == whole


def test_an_embedding_of_another_caption_or_with_a_flipped_bit_is_not_taken(tmp_path):
    """Two machines with one process id on one disk once renamed each other's bytes."""
    store = StoredEmbeddings(tmp_path, "key", 4)
    rows = {name: torch.randn(3, 4) for name in ("red", "blue", "half \ud800")}
    store.save(rows)
    paths = {name: store._path(name) for name in rows}
    again = store.load(list(rows))
    assert all(torch.equal(again[name], rows[name]) for name in rows)
    paths["red"].write_bytes(paths["blue"].read_bytes())
    data = bytearray(paths["blue"].read_bytes())
    data[-1] ^= 4
    paths["blue"].write_bytes(data)
    assert store.load(list(rows)).keys() == {"half \ud800"}


def test_a_trained_encoder_has_no_embeddings_to_keep(checkpoint):
    with pytest.raises(ConfigError, match="cache_dir"):
        hf(checkpoint("t5")[0], freeze=False, cache_dir="somewhere")
