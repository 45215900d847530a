"""Files of others: whatever is wrong in them is one sentence with their name, soon, and they
choose neither code nor memory."""

import json
import random
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdit.config import ConfigError, encode, parse_yaml
from mmdit.data.dataset.inputs import read_input
from mmdit.data.dataset.pictures import load_image
from mmdit.data.dataset.videos import probe
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.experiment.load import load_pipeline
from mmdit.foreign import explain_errors, read_json
from mmdit.interfaces import LatentSpec
from mmdit.interop.inspection import inspect_weights
from mmdit.interop.wan_release import release_config
from mmdit.interop.wan_weights import load_dit
from mmdit.scripts import export, sample, train_t2v
from mmdit.text_encoders.clip_vision import load_clip_vision
from mmdit.tokenizers.wan_vae import WanVAETokenizer, WanVAETokenizerConfig
from mmdit.training import checkpoint
from mmdit.weights import Checkpoint, unpickled_tensors
from tests.helpers.tiny import Workshop, refused
from tests.helpers.wan_release import make_release
from tests.test_fuzz import damaged

ROOT = Path(__file__).resolve().parents[1]
DEEP = "[" * 100_000
NOT_OBJECTS = [
    "",
    "[]",
    "3",
    "null",
    '"x"',
    "{",
    DEEP,
    '{"a": ' * 50_000,
    "\xff",
    '{"n": 1' + "0" * 5000 + "}",
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    shop = Workshop(tmp_path_factory.mktemp("foreign"))
    shop.train("base", "train.max_steps=1")
    return shop


@pytest.mark.parametrize("text", NOT_OBJECTS, ids=range(len(NOT_OBJECTS)))
def test_json_that_is_no_object_is_one_sentence_for_every_reader(tmp_path, text):
    file = tmp_path / "file.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"{file}.*of a test"):
        read_json(file, "file of a test")
    release = make_release(tmp_path / "release") if text == DEEP else None
    weights = {"w": torch.zeros(2)}
    for name, use in (
        ("model.safetensors.index.json", lambda folder: Checkpoint(folder)),
        (
            "model_index.json",
            lambda folder: (folder / "transformer").mkdir() or release_config(folder),
        ),
    ):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        save_file(weights, folder / "model.safetensors")
        (folder / name).write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=str(folder / name)):
            use(folder)
    if release:
        (release / "config.json").write_text(text)
        for use in (
            lambda: load_dit(release),
            lambda: WanVAETokenizer(WanVAETokenizerConfig(name_or_path=str(release))),
        ):
            with pytest.raises(ValueError, match=str(release / "config.json")):
                use()


@pytest.mark.parametrize(
    "index",
    [
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": {"w": 3}}',
        '{"weight_map": {"w": ""}}',
        '{"weight_map": {"w": null}}',
    ],
)
def test_an_index_that_names_no_shards_is_refused(tmp_path, index):
    save_file({"w": torch.zeros(2)}, tmp_path / "a.safetensors")
    (tmp_path / "m.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="m.safetensors.index.json is no index of shards"):
        inspect_weights(tmp_path)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 28000000000\n"


@pytest.mark.parametrize(
    "text, what",
    [(POINTER, "a pointer of Git LFS; get .* git lfs pull"), ("<!DOCTYPE html>", "a web page")],
)
@pytest.mark.parametrize(
    "name, read",
    [
        ("x.safetensors", Checkpoint),
        ("x.pth", Checkpoint),
        ("x.safetensors", checkpoint.load_weights),
        ("x.json", lambda path: read_json(path, "config")),
        ("x.tar", lambda path: read_input(path, "image")),
        ("x.parquet", lambda path: read_input(path, "image")),
        ("x.mp4", lambda path: probe(str(path))),
        ("x.png", load_image),
    ],
)
def test_what_a_clone_or_a_download_leaves_in_place_of_a_file_is_named(
    tmp_path, name, read, text, what
):
    if name.endswith((".mp4", ".parquet")):
        pytest.importorskip("av" if name == "x.mp4" else "pyarrow")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=what):
        read(tmp_path / name)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "big.json").write_text('{"a": "' + "x" * 1000 + '"}')
    with pytest.raises(
        ValueError, match="big.json has 1009 bytes, too many for a test; at most 100"
    ):
        read_json(tmp_path / "big.json", "a test", 100)


def test_whatever_a_library_raises_is_told_once(tmp_path):
    for error in (
        KeyError("k"),
        AssertionError(),
        struct.error("s"),
        IndexError("i"),
        RecursionError("r"),
        ValueError("v"),
    ):
        with (
            pytest.raises(
                ValueError, match=r"f.bin is no picture, or is damaged .*; fetch it again"
            ) as told,
            explain_errors("f.bin", "picture"),
        ):
            raise error
        assert type(error).__name__ in str(told.value)
    with (
        pytest.raises(ValueError, match="^f.bin has it all$"),
        explain_errors("f.bin", "picture"),
    ):
        raise ValueError("f.bin has it all")


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pickles_are_refused_or_read(tmp_path, zipped):
    """Old ones and zips: every kind of error becomes one sentence."""
    file, kinds = tmp_path / "w.pth", set()
    torch.save(
        {"a.b": torch.arange(6.0).reshape(2, 3), "c": torch.zeros(4)},
        file,
        _use_new_zipfile_serialization=zipped,
    )
    whole = file.read_bytes()
    for number in range(150):
        file.write_bytes(damaged(whole, random.Random(number)))
        for read in (unpickled_tensors, lambda path: dict(Checkpoint(path).tensors())):
            try:
                assert all(isinstance(value, torch.Tensor) for value in read(str(file)).values())
            except ValueError as error:
                assert str(file) in str(error)
                kinds.add(type(error))
    assert kinds == {ValueError}


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": "2"},
        {"num_heads": 0},
        {"num_heads": -1},
        {"num_heads": 2.5},
        {"eps": "x"},
        {"eps": 7},
        {"text_len": 10**10},
        {"text_len": "512"},
        {"num_heads": True},
        {"dim": []},
    ],
)
def test_a_transformers_config_of_wrong_values_is_refused(tmp_path, change):
    release = make_release(tmp_path / "release")
    file = release / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=next(iter(change))):
        load_dit(release)


def test_a_number_in_a_name_builds_no_network(tmp_path):
    """`blocks.9999999999` would be ten thousand million blocks."""
    release, begin = make_release(tmp_path / "release"), time.monotonic()
    file = next(release.glob("diffusion*.safetensors"))
    tensors = load_file(file)
    save_file(tensors | {"blocks.9999999999.norm3.bias": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="names block 9999999999, but holds"):
        load_dit(release)
    save_file(
        {
            "pos_embedding": torch.zeros(5, 8),
            "transformer.0.mlp.0.weight": torch.zeros(8, 8),
            "patch_embedding.weight": torch.zeros(8, 3, 2, 2),
            "transformer.9999999999.x": torch.zeros(1),
        },
        tmp_path / "c.safetensors",
    )
    with pytest.raises(ValueError, match="names block 9999999999, but holds"):
        load_clip_vision(tmp_path / "c.safetensors")
    assert time.monotonic() - begin < 5


# ── configs that come with weights ──
def stored(shop, tmp_path, change):
    """A copy of a run's checkpoint whose stored config was changed."""
    source = checkpoint.latest(shop.folder / "runs/base")
    folder = tmp_path / "changed"
    folder.mkdir(exist_ok=True)
    for path in source.glob("*.safetensors"):
        (folder / path.name).write_bytes(path.read_bytes())
    meta = json.loads((source / "checkpoint.json").read_text())
    meta.pop("files", None)
    change(meta["config"])
    (folder / "checkpoint.json").write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize(
    "section, values",
    [
        ("model", {"size": None, "dim": 200_000, "num_heads": 2}),
        ("model", {"depth": 10**7}),
        ("model", {"mlp_ratio": 1e8}),
        ("text_encoder", {"max_length": 10**10}),
        ("text_encoder", {"depth": 10**7}),
        ("text_encoder", {"dim": 2_000_000}),
        ("lora", {"enabled": True, "rank": 10**8, "train_lora_only": False}),
        ("tokenizer", {"latent_f": 10**6}),
    ],
)
def test_sizes_that_a_stored_config_states_are_compared_with_the_weights_first(
    shop, tmp_path, capsys, section, values
):
    folder, begin = (
        stored(shop, tmp_path, lambda config: config[section].update(values)),
        time.monotonic(),
    )
    message = refused(
        capsys,
        sample.main,
        ["--checkpoint", folder, "--device", "cpu", "--prompts", "a", "--out", tmp_path / "o"],
    )
    names = [
        name for name, value in values.items() if isinstance(value, int | float) and value > 1000
    ]
    assert any(name in message for name in names) and time.monotonic() - begin < 3


@pytest.mark.parametrize("value", [[], None, 3, "x", {"objective": []}])
def test_stored_sections_of_wrong_types_start_no_run_with_a_trace(shop, tmp_path, value):
    folder = stored(
        shop, tmp_path, lambda config: config.update(train=value, experts=value, model=[])
    )
    name = f"from_{type(value).__name__}"
    train_t2v.main(shop.train_words(name, f"train.init_from={folder}", "train.max_steps=1"))
    assert checkpoint.latest(shop.folder / "runs" / name)


def test_a_stored_config_fetches_no_text_encoder(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    asked = []

    def from_pretrained(source, **options):
        asked.append(options["local_files_only"])
        raise OSError("not here")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    encoder = {"type": "hf", "name_or_path": "someone/encoder"}
    config = encode(ExperimentConfig("x")) | {
        "text_encoder": encoder,
        "tokenizer": {"type": "dummy", "latent_d": 4},
    }
    spec = LatentSpec(channels=4, spatial=16)
    from mmdit.tokenizers import DummyTokenizerConfig, build_tokenizer

    fingerprint = build_tokenizer(DummyTokenizerConfig(latent_d=4)).fingerprint
    tensors = {
        "model": {"w": torch.zeros(768, 768, 1), **{f"t{i}": torch.zeros(3000) for i in range(40)}}
    }
    folder = checkpoint.save(
        tmp_path / "run", checkpoint.Meta(1, config, spec, fingerprint), tensors, 0
    )
    for words in (
        [],
        ["text_encoder.name_or_path=someone/encoder"],
        ["text_encoder.local_files_only=false"],
    ):
        with pytest.raises(ValueError, match="someone/encoder"):
            load_pipeline(folder, "cpu", overrides=words)
    assert asked == [True, False, False]


# ── transformers' folders ──
@pytest.fixture
def encoder(tmp_path):
    """`encoder(changes of its config.json)`: opens a tiny T5."""
    transformers = pytest.importorskip("transformers")
    from tests.test_text_encoders import T5, hf, save_tokenizer

    folder = tmp_path / "t5"
    save_tokenizer(folder)
    transformers.T5EncoderModel(transformers.T5Config(**T5)).save_pretrained(folder)
    original = json.loads((folder / "config.json").read_text())

    def open_it(changes):
        (folder / "config.json").write_text(json.dumps(original | changes))
        return hf(str(folder))

    open_it.folder = folder
    return open_it


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel"},
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation_internal": "someone/kernel"},
        {"experts_implementation": "someone/kernel"},
        {"text_config": {"attn_implementation": "someone/kernel"}},
        {"attn_implementation": {"": "someone/kernel"}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"num_layers": 10**7},
        {"d_model": 2**40},
        {"vocab_size": 2**40},
    ],
    ids=str,
)
def test_a_text_encoders_config_chooses_neither_code_nor_memory(encoder, changes):
    with pytest.raises(ConfigError, match="name_or_path"):
        encoder(changes)


def test_the_attention_is_always_asked_for_by_name(encoder, monkeypatch):
    import transformers

    seen, original = [], transformers.T5EncoderModel.from_pretrained.__func__

    def spy(cls, *arguments, **options):
        seen.append(options.get("attn_implementation"))
        return original(cls, *arguments, **options)

    monkeypatch.setattr(transformers.T5EncoderModel, "from_pretrained", classmethod(spy))
    assert encoder({})(["a"]).embeddings.isfinite().all() and seen[0] in ("sdpa", "eager")
    (encoder.folder / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "someone/else"}'
    )
    with pytest.raises(ConfigError, match="adapter_config.json"):
        encoder({})


def test_code_that_opens_transformers_folders_names_the_attention():
    for path in (ROOT / "mmdit").rglob("*.py"):
        text = path.read_text()
        if "import transformers" in text or "from transformers" in text:
            opens = "Model.from_pretrained" in text or "model_class.from_pretrained" in text
            assert not opens or "attn_implementation" in text and "check_folder" in text, path


# ── VTP ──
@pytest.mark.parametrize(
    "changes",
    [
        {"self": 1},
        {"to_dict": 1},
        {"vision_depth": "2"},
        {"vision_num_heads": 0},
        {"vision_num_heads": 5},
        {"vision_depth": 10**7},
        {"vision_embed_dim": 2**40},
        {"vision_mlp_ratio": "x"},
        {"train_clip": "yes"},
        {"decoder_depth": None},
        {"vision_ffn_layer": 3},
        {"text_num_heads": -1},
        {"model_type": []},
    ],
    ids=str,
)
def test_a_vtp_config_of_wrong_values_is_one_sentence(tmp_path, changes):
    from vtp.models import VTPModel

    values = json.loads((ROOT / "VTP/checkpoints/vtp_tiny_f16d64/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | changes))
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError):
        VTPModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text",
    ['{"weight_map": []}', '{"weight_map": {"a": 3}}', "[]", DEEP, '{"weight_map": {}}'],
    ids=range(5),
)
def test_a_vtp_index_of_wrong_types_is_one_sentence(tmp_path, text):
    from vtp.models.pretrained import read_weights

    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json"):
        read_weights(tmp_path)


# ── YAML ──
ENDLESS = {
    "base 60": ":".join("1" * 400_000),
    "digits": "1" * 500_000,
    "a time": "1:30",
    "a negative time": "-1:30.5",
    "base 16": "0x" + "f" * 500_000,
    "base 2": "0b" + "1" * 500_000,
}


@pytest.mark.parametrize("value", ENDLESS.values(), ids=ENDLESS)
def test_numbers_to_the_base_of_60_and_endless_ones_take_no_time(value):
    begin = time.monotonic()
    with pytest.raises(ConfigError, match="seed: .*f.yaml:1"):
        parse_yaml(f"seed: {value}", "f.yaml")
    assert time.monotonic() - begin < 5
    assert parse_yaml('time: "1:30"')[0] == {"time": "1:30"}


def test_an_export_with_absurd_settings_is_refused_as_its_run_is(shop, tmp_path, capsys):
    folder = stored(shop, tmp_path, lambda config: config["model"].update(depth=9999))
    export.main(
        ["--checkpoint", str(folder), "--out", str(tmp_path / "m.safetensors"), "--dtype", "fp32"]
    )
    refused(
        capsys,
        sample.main,
        ["--checkpoint", tmp_path / "m.safetensors", "--device", "cpu", "--prompts", "a"],
        "m.safetensors does not fit its own config: model.depth is 9999",
    )
