"""UMT5: the numbers of the official code, every layout, cleaning and token numbers, what an empty
caption is, what is trained."""

import html
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdit.config import ConfigError
from mmdit.text_encoders import UMT5Config, build_text_encoder
from mmdit.text_encoders.umt5 import transformers_name

transformers = pytest.importorskip("transformers")
GOLDEN = Path(__file__).parent / "golden" / "umt5_tiny"
IO = load_file(GOLDEN / "io.safetensors")


def write_tokenizer(folder: Path) -> None:
    """A tokenizer.json of letters: `<pad>` 0, `</s>` 1, `<unk>` 2, space mark 3, a … z from 4."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz,"]
    tokenizer = Tokenizer(models.Unigram([(letter, -1.0) for letter in letters], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def opened(folder: Path, layout: str = "official", **keys):
    weights = load_file(GOLDEN / "official.safetensors")
    if layout == "official":
        torch.save(weights, folder / "models_t5_umt5-xxl-enc-bf16.pth")
        write_tokenizer(folder / "google" / "umt5-xxl")
    elif layout == "diffusers":
        (folder / "text_encoder").mkdir()
        renamed = {transformers_name(name): value for name, value in weights.items()}
        save_file(
            renamed | {"encoder.embed_tokens.weight": renamed["shared.weight"].clone()},
            folder / "text_encoder/model.safetensors",
        )
        write_tokenizer(folder / "tokenizer")
    else:
        save_file(weights, folder / "umt5.safetensors")
        write_tokenizer(folder / "tokens")
        keys = {"tokenizer_path": str(folder / "tokens")} | keys
        folder = folder / "umt5.safetensors"
    return build_text_encoder(
        UMT5Config(**{"name_or_path": str(folder), "dtype": "float32"} | keys)
    )


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_names_are_those_of_transformers():
    table = json.loads((GOLDEN / "meta.json").read_text())["key_map_official_to_hf"]
    assert {name: transformers_name(name) for name in table} == table


@torch.no_grad()
@pytest.mark.parametrize("layout", ["official", "diffusers", "single"])
def test_the_numbers_of_the_official_code(tmp_path, layout):
    encoder = opened(tmp_path, layout)
    assert error(encoder._hidden(IO["in.ids"], IO["in.mask"]), IO["out.official"]) < 2e-6
    rows = [ids[: int(mask.sum())].tolist() for ids, mask in zip(IO["in.ids"], IO["in.mask"])]
    encoder._tokenize = lambda captions: [rows[int(caption or 0)] for caption in captions]
    text = encoder(["0", "1"])
    padded = text.pad(40).embeddings
    assert error(padded, IO["out.context"]) < 2e-6 and torch.equal(
        text.pad(40).valid, IO["in.mask"].bool()
    )
    assert not padded[~IO["in.mask"].bool()].any()


@torch.no_grad()
def test_an_empty_caption_is_one_token_and_so_is_a_dropped_one(tmp_path):
    encoder = opened(tmp_path)
    text = encoder(["a red star", "", "  \n"])
    assert text.valid.sum(1).tolist() == [12, 1, 1] and text.empty.shape == (1, 24)
    dropped = text.drop(torch.tensor([True, False, False]))
    assert dropped.valid.sum(1).tolist() == [1, 1, 1] and torch.equal(
        dropped.embeddings[0, :1], text.embeddings[1, :1]
    )
    assert torch.equal(text.null().embeddings[2, :1], text.empty)
    assert torch.equal(encoder(["blue"]).empty, text.empty)


def test_cleaning_and_token_numbers(tmp_path):
    ftfy = pytest.importorskip("ftfy")
    encoder = opened(tmp_path, max_length=9)
    assert encoder.clean("  a &amp;amp; b\n\t c ") == "a & b c"
    assert encoder.clean("schÃ¶n，ＡＢ") == "schön,AB"
    # ASCII that ftfy changes: terminal escapes, control characters, entities of entities
    for caption in (
        "a \x1b[31mred\x1b[0m ball",
        "a\x00 b\x0bc\x7f",
        "&amp;amp;amp;lt;",
        "a\r\nb\x0cc",
    ):
        official = html.unescape(html.unescape(ftfy.fix_text(caption))).strip()
        assert encoder.clean(caption) == re.sub(r"\s+", " ", official).strip()
    assert encoder.clean("a \x1b[31mred\x1b[0m ball") == "a red ball"
    assert encoder._tokenize(["ab c", "", "abcdefghijk"]) == [
        [3, 4, 5, 3, 6, 1],
        [1],
        [3, 4, 5, 6, 7, 8, 9, 10, 1],
    ]


def test_a_caption_that_is_cut_is_told_once(tmp_path, caplog):
    encoder = opened(tmp_path, max_length=9)
    encoder(["abcdefg"])  # with its first mark and the end it is as long as may be
    assert not caplog.records
    encoder(["abcdefgh", "abcdefghi"])
    encoder(["abcdefghj"])
    (record,) = caplog.records
    assert "10 tokens, text_encoder.max_length is 9: the rest is not read" in record.getMessage()


def test_sentencepiece_files_serve_as_well(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red star", "a blue ball on a gray floor"] * 20),
        model_writer=stream,
        vocab_size=20,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    encoder = opened(tmp_path)
    shutil.rmtree(tmp_path / "google")
    (tmp_path / "spiece.model").write_bytes(stream.getvalue())
    config = UMT5Config(name_or_path=str(tmp_path), dtype="float32")
    expected = sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue()).encode(
        "a red ball"
    ) + [1]
    assert build_text_encoder(config)._tokenize(["a red ball"]) == [expected]
    weights = {name: value for name, value in load_file(GOLDEN / "official.safetensors").items()}
    save_file(
        weights
        | {"spiece_model": torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)},
        tmp_path / "comfy.safetensors",
    )
    (tmp_path / "spiece.model").unlink()
    inside = build_text_encoder(
        UMT5Config(name_or_path=str(tmp_path / "comfy.safetensors"), dtype="float32")
    )
    assert inside._tokenize(["a red ball"]) == [expected]
    assert encoder._tokenize([""]) == [[1]]


def test_what_is_trained_and_stored(tmp_path):
    frozen = opened(tmp_path)
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.is_stored(
        "anything"
    )
    shutil.rmtree(tmp_path / "google")
    top = opened(tmp_path, freeze=False, train_blocks=1)
    trained = {name for name, p in top.named_parameters() if p.requires_grad}
    assert len(trained) == 11 and all(
        ".block.1." in name or "final_layer_norm" in name for name in trained
    )
    top(["a red star"]).embeddings.square().sum().backward()
    assert all((p.grad is not None) == (name in trained) for name, p in top.named_parameters())
    assert {name for name in top.state_dict() if top.is_stored(name)} == trained
    shutil.rmtree(tmp_path / "google")
    whole = opened(tmp_path, freeze=False)
    assert all(p.requires_grad for p in whole.parameters()) and whole.is_stored("anything")


@torch.no_grad()
def test_transformers_computes_the_same(tmp_path):
    theirs = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2
        )
    ).eval()
    theirs.save_pretrained(tmp_path / "folder")
    write_tokenizer(tmp_path / "tokens")
    ours = build_text_encoder(
        UMT5Config(
            name_or_path=str(tmp_path / "folder"),
            tokenizer_path=str(tmp_path / "tokens"),
            dtype="float32",
        )
    )
    ids = torch.tensor([ours._tokenize(["a small cat"])[0]])
    torch.testing.assert_close(
        ours(["a small cat"]).embeddings, theirs(input_ids=ids).last_hidden_state, rtol=0, atol=2e-6
    )


def test_what_does_not_belong_is_refused_in_one_sentence(tmp_path):
    weights = load_file(GOLDEN / "official.safetensors")

    def refused(words: str, content: dict | None = None, **keys) -> None:
        if content is not None:
            save_file(content, tmp_path / "x.safetensors")
        config = {
            "name_or_path": str(tmp_path / "x.safetensors"),
            "tokenizer_path": str(tmp_path / "tokens"),
            "dtype": "float32",
        }
        with pytest.raises(ConfigError, match=words) as caught:
            build_text_encoder(UMT5Config(**config | keys))
        assert "\n" not in str(caught.value)

    write_tokenizer(tmp_path / "tokens")
    refused("no tokenizer.json or spiece.model", weights, tokenizer_path="")
    refused("is no UMT5 encoder", {"a": torch.ones(1)})
    shared = {
        name: value for name, value in weights.items() if "blocks.1.pos_embedding" not in name
    }
    refused("is no UMT5 encoder.*block.1", shared)
    refused("quantised", weights | {"blocks.0.attn.q.scale_weight": torch.ones(1)})
    refused(
        "lacks 1 tensors, first encoder.block.1.layer.1.layer_norm",
        {n: v for n, v in weights.items() if n != "blocks.1.norm2.weight"},
    )
    refused(
        "the tokenizer has 31 entries, the embedding 20",
        weights | {"token_embedding.weight": torch.ones(20, 24)},
    )
    refused(
        "train_blocks: is 3, but the encoder has 2 blocks", weights, freeze=False, train_blocks=3
    )
    with pytest.raises(ConfigError, match="freeze: false"):
        UMT5Config(name_or_path="x", train_blocks=2)


@torch.no_grad()
def test_kept_captions_need_no_encoder(tmp_path):
    encoder = opened(tmp_path)
    keys = {"name_or_path": str(tmp_path), "dtype": "float32", "cache_dir": str(tmp_path / "kept")}
    first, second = (build_text_encoder(UMT5Config(**keys)) for _ in range(2))
    captions = ["a red star", "", "a cat"]
    expected = encoder(captions)
    for filled in (first, second):
        text = filled(captions)
        assert torch.equal(text.embeddings, expected.embeddings) and torch.equal(
            text.valid, expected.valid
        )
        assert torch.equal(text.empty, expected.empty) and filled.dim == 24
    assert list(first.parameters()) and not list(
        second.parameters()
    )  # the second one was never loaded
    second(["a new one"])
    assert list(second.parameters())
    other = build_text_encoder(UMT5Config(**keys | {"max_length": 4}))
    assert other(["a cat"]).valid.shape[1] == 4
    with pytest.raises(ConfigError, match="cache_dir"):
        UMT5Config(**keys, freeze=False)


def test_kept_captions_belong_to_the_weights_and_not_to_their_place(tmp_path):
    """One weight changed deep inside is another encoder; a copy elsewhere is the same."""
    (tmp_path / "a").mkdir()
    opened(tmp_path / "a")
    keys = {"dtype": "float32", "cache_dir": str(tmp_path / "kept")}
    first = build_text_encoder(UMT5Config(name_or_path=str(tmp_path / "a"), **keys))
    first(["a cat"])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copied = build_text_encoder(UMT5Config(name_or_path=str(tmp_path / "b"), **keys))
    assert torch.equal(copied(["a cat"]).embeddings, first(["a cat"]).embeddings) and not list(
        copied.parameters()
    )
    (file,) = (
        path for path in (tmp_path / "b").rglob("*") if path.suffix in (".pth", ".safetensors")
    )
    weights = torch.load(file, weights_only=True) if file.suffix == ".pth" else load_file(file)
    name = next(name for name in weights if name.endswith("attn.q.weight"))
    weights[name] = weights[name] + 1
    torch.save(weights, file) if file.suffix == ".pth" else save_file(weights, file)
    changed = build_text_encoder(UMT5Config(name_or_path=str(tmp_path / "b"), **keys))
    assert not torch.equal(changed(["a cat"]).embeddings, first(["a cat"]).embeddings)
