"""Wan transformers in files: every layout, what loading costs, and one clear sentence for what is
no such file."""

import json
import pickle
import random
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdit.adapters import LoRAConfig, adapters, inject, merge
from mmdit.interop.wan_weights import (
    config_json,
    expert_in_name,
    load_dit,
    locate,
    official_names,
    save_dit,
)
from mmdit.models.wan import WanConfig, WanDiT
from mmdit.models.wan_names import diffusers_name
from mmdit.nn.stored_weights import StoredWeight, store
from mmdit.weights import Checkpoint
from tests.helpers import warm
from tests.helpers.thorough import thorough, thorough_unless
from tests.test_wan import META, TINY, VARIANTS, error, golden_release, random_model, refused


@pytest.fixture
def folder(tmp_path) -> Path:
    return golden_release(tmp_path)


MEASURE = """
import sys, threading, time, torch
from mmdit.interop.wan_weights import load_dit
def own_memory():
    lines = open('/proc/self/status').read().splitlines()
    return int(next(line for line in lines if line.startswith('RssAnon')).split()[1]) * 1024
peak, before, done = 0, own_memory(), threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, own_memory())
        time.sleep(5e-4)
watching = threading.Thread(target=watch)
watching.start()
model = load_dit(sys.argv[1], torch.bfloat16)
done.set(), watching.join()
print(max(peak, own_memory()) - before, sum(p.nbytes for p in model.parameters()))
"""


def hollow_release(folder: Path, config: WanConfig, dtype: str = "BF16", shards: int = 3) -> int:
    """Weights of any size that take no room on the disk: headers, and behind them holes that are
    read as zeros. Their number."""
    with torch.device("meta"):
        named = list(WanDiT(config).named_parameters())
    folder.mkdir()
    places = {}
    for number in range(shards):
        header, end, name = (
            {},
            0,
            f"diffusion_pytorch_model-{number + 1:05d}-of-{shards:05d}.safetensors",
        )
        for key, weight in named[number::shards]:
            start, end = end, end + weight.numel() * {"BF16": 2, "F32": 4}[dtype]
            header[key], places[key] = (
                {"dtype": dtype, "shape": list(weight.shape), "data_offsets": [start, end]},
                name,
            )
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": places})
    )
    return sum(weight.numel() for _, weight in named)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    "config",
    [
        *thorough(WanConfig(dim=768, ffn_dim=3072, num_heads=6, num_layers=12, text_dim=64)),
        pytest.param(WanConfig(5120, 13824, 40, 6), marks=pytest.mark.slow),  # six blocks of a 14B
    ],
    ids=["small", "14b"],
)
def test_loading_takes_the_memory_of_the_model_alone(tmp_path, config):
    """As bfloat16, from float32 files, which is harder."""
    hollow_release(tmp_path / "wan", config, "F32")
    result = warm.run("-c", MEASURE, tmp_path / "wan")
    assert result.returncode == 0, result.stderr
    taken, own = map(int, result.stdout.split())
    assert own > 200e6 and taken < own + 20e6, (
        f"{taken / 1e6:.0f} MB for a model of {own / 1e6:.0f} MB"
    )


def test_names_are_those_of_diffusers():
    expected = META["key_map_official_to_diffusers"]
    assert {name: diffusers_name(name) for name in WanDiT(TINY).state_dict()} == expected
    for config in VARIANTS.values():
        names = list(WanDiT(config).state_dict())
        renamed = [diffusers_name(name) for name in names]
        back, layout, _ = official_names(renamed)
        assert layout == "diffusers" and [back[name] for name in renamed] == names


FEW = {"t2v", "flf2v"}


@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize("name", thorough_unless(lambda name: name in FEW, VARIANTS))
@pytest.mark.parametrize("shard_bytes", [*thorough(10**9), 30_000])
def test_what_is_saved_is_what_is_read(tmp_path, name, layout, shard_bytes):
    model = random_model(VARIANTS[name])
    save_dit(model, tmp_path / "saved", layout, shard_bytes)
    shards = list((tmp_path / "saved").glob("*.safetensors"))
    assert (len(shards) > 1) == (shard_bytes < 10**9)
    # whoever may read the config may read the weights
    assert {path.stat().st_mode for path in (tmp_path / "saved").iterdir()} == {
        (tmp_path / "saved/config.json").stat().st_mode
    }
    again = load_dit(tmp_path / "saved")
    expected = (
        model.config if layout == "official" else replace(model.config, text_len=512)
    )  # Diffusers does not store it
    assert again.config == expected
    assert all(
        torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items()
    )
    refused("is there already", call=lambda: save_dit(model, tmp_path / "saved", layout))
    if shard_bytes < 10**9:
        shards[-1].unlink()
        refused("lacks 1 of", shards[-1].name, call=lambda: load_dit(tmp_path / "saved"))
        refused("is 1 of", "shards", call=lambda: load_dit(shards[0]))
        next((tmp_path / "saved").glob("*.index.json")).unlink()
        refused(f"and lacks {shards[-1].name}", call=lambda: load_dit(tmp_path / "saved"))
        found = f"holds {len(shards) - 1} of {len(shards)} shards without their index"
        refused(found, call=lambda: load_dit(tmp_path / "saved"))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_a_model_with_adapters_is_written_as_it_computes(tmp_path, layout, kind):
    """Merged in the file, once rounded; the model keeps them. Others would not see adapters beside
    the weights."""
    model = random_model(TINY)
    inject(
        model,
        LoRAConfig(
            enabled=True, type=kind, rank=2, alpha=5.0, target_modules=("cross_attn.k", "ffn.0")
        ),
    )
    for layer in adapters(model).values():
        for parameter in layer.adapter_parameters().values():
            parameter.normal_()
    expected = {name: layer.merged_weight() for name, layer in adapters(model).items()}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    save_dit(model, tmp_path / "saved", layout, shard_bytes=100_000)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    again = load_dit(tmp_path / "saved")
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, expected.get(name.removesuffix(".weight"), before[name])), (
            name
        )
    assert all(
        torch.equal(a, b)
        for a, b in zip(merge(model).parameters(), again.parameters(), strict=True)
    )


@torch.no_grad()
@pytest.mark.parametrize("encoding", ["float8", "nf4"])
def test_what_is_kept_in_fewer_bits_is_written_unpacked_in_the_type_asked_for(tmp_path, encoding):
    model = random_model(TINY)
    store(model.blocks, encoding)
    inject(model, LoRAConfig(enabled=True, rank=2, target_modules=("ffn.0",)))
    plain = {
        name: p.whole() if isinstance(p, StoredWeight) else p
        for name, p in model.named_parameters()
    }
    for dtype in (None, torch.bfloat16, torch.float16):
        save_dit(model, tmp_path / str(dtype), shard_bytes=50_000, dtype=dtype)
        for name, entry in Checkpoint(tmp_path / str(dtype)).entries.items():
            less = dtype and WanDiT.stored_dtype(name, dtype) == dtype
            assert entry.dtype == (
                {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype] if less else "F32"
            )
        index = next((tmp_path / str(dtype)).glob("*.index.json"))
        assert json.loads(index.read_text())["metadata"]["total_size"] == sum(
            tensor.nbytes for _, tensor in Checkpoint(tmp_path / str(dtype)).tensors()
        )
        again = load_dit(tmp_path / str(dtype))
        tolerance = {None: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        for name, parameter in again.named_parameters():
            torch.testing.assert_close(
                parameter, plain[name], rtol=tolerance, atol=1e-7 if dtype else 0
            )
    model.get_parameter("blocks.0.ffn.2.bias").fill_(1e5)
    refused(
        "blocks.0.ffn.2.bias",
        "not finite in float16",
        call=partial(save_dit, model, tmp_path / "x", dtype=torch.float16),
    )
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".*"))


def test_shards_that_are_all_there_need_no_index(tmp_path):
    model = random_model(TINY)
    save_dit(model, tmp_path / "saved", shard_bytes=30_000)
    next((tmp_path / "saved").glob("*.index.json")).unlink()
    again = load_dit(tmp_path / "saved")
    assert all(
        torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items()
    )
    save_file({"x": torch.ones(1)}, tmp_path / "saved" / "other.safetensors")
    refused("other files beside them", call=lambda: load_dit(tmp_path / "saved"))
    (tmp_path / "saved" / "other.safetensors").unlink()
    next((tmp_path / "saved").glob("*-00002-of-*")).unlink()
    refused(
        "without their index",
        "lacks diffusion_pytorch_model-00002-of",
        call=lambda: load_dit(tmp_path / "saved"),
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda own: (
                own
                | {
                    "blocks.0.ffn.0.lora_A": torch.ones(2, 64),
                    "blocks.0.ffn.0.lora_B": torch.ones(112, 2),
                }
            ),
            ("adapters apart from its weights", "2 tensors", "blocks.0.ffn.0.lora_A", "merged"),
        ),
        (
            lambda own: (
                {f"model.diffusion_model.{name}": value for name, value in own.items()}
                | {"vae.conv1.weight": torch.ones(1)}
            ),
            ("whole pipeline in one file (vae.", "by itself"),
        ),
        (
            lambda own: {
                name.replace("0.ffn.0.weight", "0.ffn.0.qweight"): value
                for name, value in own.items()
            },
            ("is quantised", "blocks.0.ffn.0.qweight"),
        ),
        (
            lambda own: own | {"blocks.0.ffn.0.weight.absmax": torch.ones(1)},
            ("is quantised", "absmax"),
        ),
        (
            lambda own: (
                own | {"blocks.0.ffn.0.weight": own["blocks.0.ffn.0.weight"].to(torch.int8)}
            ),
            ("int8", "real numbers"),
        ),
        (
            lambda own: own | {"patch_embedding.weight": torch.ones(64, 48, 1, 2, 2)},
            ("takes 48 channels and gives 16", "Fun-Control"),
        ),
    ],
)
def test_neighbouring_files_are_told_for_what_they_are(folder, change, words):
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: value.clone() for name, value in change(load_file(file)).items()}, file)
    refused(*words, call=lambda: load_dit(folder))


def drawn_config(rng: random.Random, kind: str) -> WanConfig:
    """Of a variant, tiny, with whatever sizes are allowed."""
    heads, width = rng.randint(1, 3), 2 * rng.randint(3, 12)
    channels = 48 if "5b" in kind else rng.choice([4, 16])
    image = rng.choice([8, 24]) if kind in ("i2v 2.1", "flf2v") else 0
    return WanConfig(
        heads * width,
        rng.randint(5, 40),
        heads,
        rng.randint(1, 3),
        channels + (4 + channels) * ("i2v" in kind or "flf" in kind),
        channels,
        2 * rng.randint(2, 20),
        rng.randint(3, 30),
        rng.randint(6, 40),
        rng.choice([1e-6, 1e-5]),
        image,
        514 if kind == "flf2v" else 0,
    )


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, *thorough(1, 2, 3, 4)])
@pytest.mark.parametrize("kind", VARIANTS)
def test_any_config_of_any_variant_survives_both_layouts_and_computes_the_same(
    tmp_path, kind, seed
):
    rng = random.Random(f"{kind} {seed}")
    config, dtype = drawn_config(rng, kind), rng.choice([torch.float32, torch.bfloat16])
    model = random_model(config)
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(WanDiT.stored_dtype(name, dtype))
    size = sum(p.nbytes for p in model.parameters())
    there = model
    for number, layout in enumerate(rng.sample(["official", "diffusers"], 2)):
        save_dit(there, tmp_path / str(number), layout, rng.choice([size + 1, size // 3 + 1]))
        if layout == "diffusers":  # the one thing that it does not store
            file = tmp_path / str(number) / "config.json"
            file.write_text(
                json.dumps(json.loads(file.read_text()) | {"text_len": config.text_len})
            )
        there = load_dit(tmp_path / str(number), dtype)
        assert there.config == config
        assert all(
            torch.equal(value, there.state_dict()[key])
            and value.dtype == there.state_dict()[key].dtype
            for key, value in model.state_dict().items()
        )
    batch, frames, rows, columns = (
        rng.randint(1, 2),
        rng.randint(1, 3),
        2 * rng.randint(1, 3),
        2 * rng.randint(1, 3),
    )
    x = torch.randn(batch, config.out_dim, frames, rows, columns)
    text = torch.randn(batch, rng.randint(1, config.text_len), config.text_dim)
    text[:, rng.randint(1, text.shape[1]) :] = 0
    y = (
        torch.randn(batch, config.in_dim - config.out_dim, *x.shape[2:])
        if config.in_dim > config.out_dim
        else None
    )
    clip = (
        torch.randn(batch, config.image_positions or 257, config.image_dim)
        if config.image_dim
        else None
    )
    t = torch.rand(batch) * 1000
    expected = model(x, t, text, y, clip)
    assert torch.equal(there(x, t, text, y, clip), expected)
    whole, there = there.float(), load_dit(tmp_path / "1").float()
    there.collapse_padding = False
    tokens = t[:, None].expand(-1, frames * rows * columns // 4)
    assert (
        error(whole(x, tokens, text, y, clip), there(x, t, text, y, clip)) < 2e-5
    )  # tiny widths: rounding is not averaged


@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", *thorough("diffusion_model.", "model.")]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_single_files_with_and_without_a_prefix(tmp_path, prefix, suffix):
    model = random_model(
        replace(TINY, dim=128, num_heads=1, text_len=512)
    )  # released heads are 128 wide: no config needed
    tensors = {prefix + name: value.clone() for name, value in model.state_dict().items()}
    file = tmp_path / f"wan{suffix}"
    if suffix != ".safetensors":
        torch.save(tensors, file, _use_new_zipfile_serialization=suffix == ".pth")
    else:
        save_file(tensors, file)
    again = load_dit(file)
    assert again.config == model.config
    assert all(
        torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items()
    )


@pytest.mark.parametrize(
    "high, low", [("high_noise_model", "low_noise_model"), ("transformer", "transformer_2")]
)
def test_experts_are_found_by_their_folders(tmp_path, high, low):
    for place, scale in ((high, 1.0), (low, 2.0)):
        model = random_model(TINY)
        with torch.no_grad():
            model.head.head.bias.fill_(scale)
        save_dit(
            model,
            tmp_path / "pair" / place,
            "diffusers" if place.startswith("transformer") else "official",
        )
    for expert, scale in (("high", 1.0), ("low", 2.0)):
        assert load_dit(tmp_path / "pair", expert=expert).head.head.bias[0] == scale
    refused("two experts", "expert='high'", call=lambda: load_dit(tmp_path / "pair"))
    assert load_dit(tmp_path / "pair" / low, expert="low").head.head.bias[0] == 2.0
    file = tmp_path / "pair" / low / "diffusion_pytorch_model.safetensors"
    for place in (tmp_path / "pair" / low, file):
        refused(
            "high-noise expert is asked",
            "is the low-noise expert",
            call=partial(load_dit, place, expert="high"),
        )
    assert (
        load_dit(file, expert="low").config.num_heads == TINY.num_heads
    )  # its config.json lies beside it
    (tmp_path / "pair" / high).rename(tmp_path / "elsewhere")
    assert load_dit(tmp_path / "pair", expert="low").head.head.bias[0] == 2.0
    refused(
        "expert is asked",
        "holds the low-noise expert alone",
        call=partial(load_dit, tmp_path / "pair", expert="high"),
    )


@pytest.mark.parametrize(
    "name, expert",
    [
        ("wan2.2_t2v_high_noise_14B_fp8_scaled", "high"),
        ("Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ", "low"),
        ("Wan2.2-Lightning-4steps-lora_HIGH_fp16", "high"),
        ("Wan2.2-I2V-A14B-LowNoise", "low"),
        ("high_quality_low_noise", "low"),
        ("lora_high", "high"),
        ("wan_yellow_highway", None),
        ("high_and_low", None),
    ],
)
def test_the_names_of_files_in_the_wild_tell_their_expert(tmp_path, name, expert):
    assert expert_in_name(f"{name}.safetensors") == expert
    file = tmp_path / f"{name}.safetensors"
    file.touch()
    for asked in ("high", "low"):
        if asked == expert:
            assert locate(file, asked) == file
            continue
        reason = f"is the {expert}-noise expert" if expert else "its name does not tell of which"
        refused(f"the {asked}-noise expert is asked for", reason, call=partial(locate, file, asked))


def test_a_dense_diffusers_folder_has_its_weights_in_transformer(tmp_path):
    save_dit(random_model(TINY), tmp_path / "repo" / "transformer", "diffusers")
    load_dit(tmp_path / "repo")
    refused("a model without experts", call=lambda: load_dit(tmp_path / "repo", expert="high"))
    file = tmp_path / "repo" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"blocks.0.attn2.norm_added_q.weight": torch.ones(64)}, file)
    load_dit(tmp_path / "repo")  # which Diffusers ignores, too


def test_heads_that_no_release_has_must_be_said(tmp_path):
    """Weights do not tell them: 192 numbers are one head of 128 and a half."""
    save_dit(random_model(replace(TINY, dim=192, num_heads=2)), tmp_path / "x")
    assert load_dit(tmp_path / "x").config.num_heads == 2
    (tmp_path / "x/config.json").unlink()
    with pytest.raises(ValueError, match="a width of 192 is no multiple of 128"):
        load_dit(tmp_path / "x")


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_config_says_whether_pictures_have_keys_of_their_own(kind):
    """Else Diffusers makes no layers for them."""
    config = VARIANTS[kind]
    stored = config_json(config, "diffusers")
    expected = config.dim if config.image_dim else None
    assert stored["added_kv_proj_dim"] == expected
    assert stored["image_dim"] == (config.image_dim or None)


def test_null_in_a_config_is_the_usual_number(folder, tmp_path):
    """Not 0: with that epsilon a norm of nothing is no number."""
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    stored = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(stored | {"eps": None, "text_len": None}))
    config = load_dit(whole).config
    assert (config.eps, config.text_len) == (1e-6, 512)


def test_headers_tell_before_anything_is_read(folder):
    entries = Checkpoint(folder).entries
    assert (
        entries["patch_embedding.weight"].shape == (64, 16, 1, 2, 2)
        and entries["patch_embedding.weight"].dtype == "F32"
    )


class Runs:
    def __reduce__(self):
        return (exec, ("open('ran', 'w').close()",))


def test_what_is_no_wan_transformer_is_refused_in_one_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = folder / "diffusion_pytorch_model.safetensors"
    good, tensors = file.read_bytes(), load_file(file)

    def stored(change) -> None:
        save_file(change(dict(tensors)), file)

    file.write_bytes(good[:-100])
    refused("cut off", str(file), call=lambda: load_dit(folder))
    stored(lambda all: {**all, "blocks.0.ffn.0.scale_weight": torch.ones(1)})
    refused("quantised", "blocks.0.ffn.0.scale_weight", call=lambda: load_dit(folder))
    stored(lambda all: {k.replace("1.norm3.bias", "1.norm4.bias"): v for k, v in all.items()})
    refused(
        "lacks 1 tensors, first blocks.1.norm3.bias",
        "blocks.1.norm4.bias (near",
        call=lambda: load_dit(folder),
    )
    stored(lambda all: {f"{k}x" if "norm_q" in k else k: v for k, v in all.items()})
    both = "blocks.0.self_attn.norm_q.weight, blocks.0.cross_attn.norm_q.weight, "
    refused(f"lacks 4 tensors, first {both}", "4 unknown", call=lambda: load_dit(folder))
    stored(lambda all: {**all, "blocks.1.norm3.bias": torch.ones(63)})
    refused("another shape", "(63,)", "(64,)", call=lambda: load_dit(folder))
    stored(lambda all: {"weight": torch.ones(3)})
    refused("no Wan transformer", "patch_embedding.weight", call=lambda: load_dit(folder))
    file.write_bytes(good)
    (folder / "config.json").write_text(json.dumps({**META["official_config"], "ffn_dim": 100}))
    refused("ffn_dim is 100", "112", "do not belong together", call=lambda: load_dit(folder))
    (folder / "config.json").write_text("[")
    refused("config.json", "no config", call=lambda: load_dit(folder))
    file.rename(tmp_path / "alone.safetensors")
    refused(
        "width of 64", "128", "config.json", call=lambda: load_dit(tmp_path / "alone.safetensors")
    )
    (tmp_path / "alone.safetensors").rename(file)
    refused("does not exist", call=lambda: load_dit(tmp_path / "absent"))
    (tmp_path / "evil.pth").write_bytes(
        pickle.dumps({"patch_embedding.weight": Runs()}, protocol=2)
    )
    refused("refused", "evil.pth", "could run code", call=lambda: load_dit(tmp_path / "evil.pth"))
    torch.save({"patch_embedding.weight": Runs()}, tmp_path / "evil2.pth")
    refused(
        "refused",
        "it holds exec, which could run code",
        call=lambda: load_dit(tmp_path / "evil2.pth"),
    )
    torch.save(tensors, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-2000])
    refused("refused", "damaged", "cut.pth", call=lambda: load_dit(tmp_path / "cut.pth"))
    assert not (tmp_path / "ran").exists()
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*tensors, "another"], file.name)}))
    refused("names 1 tensors that its shards lack, first another", call=lambda: load_dit(folder))
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    refused("outside its folder", call=lambda: load_dit(folder))
