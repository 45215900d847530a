"""Wan transformers: the numbers of the official code, every layout of files, and one clear sentence for what does not fit."""

import json
import math
import pickle
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdit.interop.wan import diffusers_name, load_dit, official_names, save_dit
from mmdit.models.wan import WanConfig, WanDiT
from mmdit.weights import Checkpoint

GOLDEN = Path(__file__).parent / "golden" / "wan_t2v_tiny"
META = json.loads((GOLDEN / "meta.json").read_text())
KEYS = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "freq_dim", "text_dim", "text_len", "eps")
TINY = WanConfig(**{key: META["official_config"][key] for key in KEYS})
IO = load_file(GOLDEN / "io.safetensors")
INPUTS = IO["in.x"], IO["in.t"], IO["in.context_padded"]
VARIANTS = {
    "t2v": TINY,
    "i2v 2.1": replace(TINY, in_dim=36, image_dim=24),
    "flf2v": replace(TINY, in_dim=36, image_dim=24, image_positions=514),
    "i2v a14b": replace(TINY, in_dim=36),
    "ti2v 5b": replace(TINY, in_dim=48, out_dim=48, dim=96, num_heads=3),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """The golden weights as an official folder."""
    (tmp_path / "wan").mkdir()
    shutil.copy(GOLDEN / "official.safetensors", tmp_path / "wan" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "wan" / "config.json").write_text(json.dumps(META["official_config"]))
    return tmp_path / "wan"


def random_model(config: WanConfig) -> WanDiT:
    torch.manual_seed(0)
    model = WanDiT(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3 if weight.ndim < 2 else 1 / math.sqrt(weight[0].numel()))
    return model.eval()


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def refused(*words: str, call) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@torch.no_grad()
@pytest.mark.parametrize("collapse", [True, False])
def test_the_numbers_of_the_official_code(folder, collapse):
    model = load_dit(folder)
    model.collapse_padding = collapse
    seen = {}
    parts = {"block0": model.blocks[0], "block1": model.blocks[1], "block0.self_attn": model.blocks[0].self_attn,
             "block0.cross_attn": model.blocks[0].cross_attn, "block0.ffn": model.blocks[0].ffn,
             "head": model.head}  # fmt: skip
    for name, module in parts.items():
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
    assert error(model(*INPUTS), IO["out.official"]) < 2e-6
    for name, value in seen.items():
        assert error(value, IO[f"mid.{name}"]) < 2e-6, name
    assert error(model(INPUTS[0], IO["in.t_tok"], INPUTS[2]), IO["out.official"]) < 2e-6


@torch.no_grad()
def test_padding_is_one_key_with_a_bias_and_may_not_be_left_out(folder):
    model, (x, t, text) = load_dit(folder).double(), (value.double() for value in INPUTS)
    expected = model(x, t, text)
    model.collapse_padding = False
    torch.testing.assert_close(model(x, t, text), expected, rtol=0, atol=1e-10)
    trimmed = text[:, : int(IO["in.context_lens"].max())]
    torch.testing.assert_close(model(x, t, trimmed), expected, rtol=0, atol=1e-10)  # padded to text_len
    model.collapse_padding = True
    torch.testing.assert_close(model(x, t, trimmed), expected, rtol=0, atol=1e-10)
    full = torch.randn(2, TINY.text_len, TINY.text_dim, dtype=torch.float64)  # no padding at all
    collapsed = model(x, t, full)
    model.collapse_padding = False
    torch.testing.assert_close(model(x, t, full), collapsed, rtol=0, atol=1e-10)
    model.config = replace(model.config, text_len=trimmed.shape[1])  # the mistake: padding left out
    assert error(model(x, t, trimmed), expected) > 0.01


def test_the_weight_of_all_padding_survives_bfloat16():
    """log n alone would be off by up to 1.6 % there."""
    model = random_model(replace(TINY, text_len=512))
    text = torch.zeros(513, 512, TINY.text_dim)
    for words in range(513):
        text[words, :words] = 1
    _, bias = model.text_keys(text)
    assert bias[512, ..., -1] == -math.inf and (bias[512, ..., :-1] == 0).all()
    for dtype, bar in ((torch.float32, 1e-6), (torch.bfloat16, 1e-4)):
        stored = bias[1:512, 0, 0].to(dtype).double()
        weight = (stored[:, -1] - stored[:, 0]).exp()
        assert ((weight / torch.arange(511, 0, -1) - 1).abs() < bar).all()


@torch.no_grad()
def test_times_are_embedded_once_for_each_distinct_value(folder):
    model, rows = load_dit(folder), []
    for part in (model.time_embedding, model.time_projection):
        part.register_forward_pre_hook(lambda part, inputs: rows.append(len(inputs[0])))
    model(INPUTS[0], torch.tensor([[0.0] * 24 + [700.0] * 48, [0.0] * 24 + [20.0] * 48]), INPUTS[2])
    assert rows == [3, 3]


@torch.no_grad()
def test_first_frame_times_and_samples_do_not_mix(folder):
    model, (x, _, text) = load_dit(folder), INPUTS
    t = torch.full((2, 72), 700.0)
    t[:, :24] = 0.0  # TI2V: the first frame is clean
    together = model(x, t, text)
    assert error(together, model(x, torch.tensor([700.0, 700.0]), text)) > 0.01
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], text[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_of_every_variant_matters_with_and_without_recomputation(name):
    config, gradients = VARIANTS[name], []
    model = random_model(config)
    x, text = torch.randn(2, config.out_dim, 2, 4, 6), torch.randn(2, 7, config.text_dim)
    text[0, 4:] = 0
    y = torch.randn(2, 20, 2, 4, 6) if config.in_dim > config.out_dim else None
    clip = torch.randn(2, config.image_positions or 257, config.image_dim) if config.image_dim else None
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        model.zero_grad()
        output = model(x, torch.tensor([3.0, 990.0]), text, y, clip)
        assert output.shape == x.shape
        output.square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_bfloat16_keeps_its_islands_and_comes_close(folder):
    model = load_dit(folder, torch.bfloat16)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert kinds["blocks.0.ffn.0.weight"] == kinds["text_embedding.0.weight"] == torch.bfloat16
    assert {kinds[n] for n in ("head.head.weight", "blocks.1.modulation", "time_projection.1.bias")} == {torch.float32}
    assert 1e-4 < error(model(*INPUTS), IO["out.official"]) < 1e-2
    with torch.autocast("cpu", torch.bfloat16):
        assert error(load_dit(folder)(*INPUTS), IO["out.official"]) < 1e-2


def test_the_released_sizes():
    wide = {"ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "dim": 5120}
    released = {  # specification: parameters, tensors
        "T2V-1.3B": (WanConfig(1536, 8960, 12, 30), 1_418_996_800, 825),
        "T2V-14B": (WanConfig(**wide), 14_288_491_584, 1095),
        "I2V-14B": (WanConfig(**wide, in_dim=36, image_dim=1280), 16_394_878_784, 1303),
        "FLF2V-14B": (WanConfig(**wide, in_dim=36, image_dim=1280, image_positions=514), 16_395_536_704, 1304),
        "I2V-A14B": (WanConfig(**wide, in_dim=36), 14_288_901_184, 1095),
        "TI2V-5B": (WanConfig(3072, 14336, 24, 30, 48, 48), 4_999_787_712, 825),
    }
    for name, (config, parameters, tensors) in released.items():
        with torch.device("meta"):
            model = WanDiT(config)
        assert sum(p.numel() for p in model.parameters()) == parameters and len(model.state_dict()) == tensors, name
        assert name in config.variant


def test_inputs_that_do_not_belong(folder):
    model, (x, t, text) = load_dit(folder), INPUTS
    refused("y of 20", "takes 16", call=lambda: model(x, t, text, torch.randn(2, 20, 3, 8, 12)))
    refused("(2, 16, 3, 8, 11)", "even", call=lambda: model(x[..., :-1], t, text))
    refused("(3,)", "(2, 72)", call=lambda: model(x, torch.ones(3), text))
    refused("(2, 25, 40)", "24", call=lambda: model(x, t, torch.randn(2, 25, 40)))
    refused("takes no CLIP states", call=lambda: model(x, t, text, clip=torch.randn(2, 257, 1280)))
    picture = random_model(VARIANTS["i2v 2.1"])
    y = torch.randn(2, 20, 3, 8, 12)
    refused("needs CLIP states", call=lambda: picture(x, t, text, y))
    refused("(2, 514, 24)", "257", call=lambda: picture(x, t, text, y, torch.randn(2, 514, 24)))


MEASURE = """
import sys, threading, time, torch
from mmdit.interop.wan import load_dit
own_memory = lambda: int(next(line for line in open('/proc/self/status') if line.startswith('RssAnon')).split()[1]) * 1024
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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_loading_takes_the_memory_of_the_model_and_one_tensor(tmp_path):
    with torch.device("meta"):
        model = WanDiT(WanConfig(dim=768, ffn_dim=3072, num_heads=6, num_layers=12, text_dim=64))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(0.01)
    save_dit(model, tmp_path / "wan", shard_bytes=60_000_000)
    words = [sys.executable, "-c", MEASURE, str(tmp_path / "wan")]
    result = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    taken, own = map(int, result.stdout.split())
    assert own > 200e6 and taken < own + 20e6, f"{taken / 1e6:.0f} MB for a model of {own / 1e6:.0f} MB"


# ── names and files ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_names_are_those_of_diffusers():
    expected = META["key_map_official_to_diffusers"]
    assert {name: diffusers_name(name) for name in WanDiT(TINY).state_dict()} == expected
    for config in VARIANTS.values():
        names = list(WanDiT(config).state_dict())
        renamed = [diffusers_name(name) for name in names]
        back, layout, _ = official_names(renamed)
        assert layout == "diffusers" and [back[name] for name in renamed] == names


@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
def test_what_is_saved_is_what_is_read(tmp_path, name, layout, shard_bytes):
    model = random_model(VARIANTS[name])
    save_dit(model, tmp_path / "saved", layout, shard_bytes)
    shards = list((tmp_path / "saved").glob("*.safetensors"))
    assert (len(shards) > 1) == (shard_bytes < 10**9)
    again = load_dit(tmp_path / "saved")
    expected = model.config if layout == "official" else replace(model.config, text_len=512)  # Diffusers does not store it
    assert again.config == expected
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    refused("is there already", call=lambda: save_dit(model, tmp_path / "saved", layout))
    if shard_bytes < 10**9:
        shards[-1].unlink()
        refused("lacks 1 of", shards[-1].name, call=lambda: load_dit(tmp_path / "saved"))


def drawn_config(rng: random.Random) -> WanConfig:
    """Of any variant, tiny, with whatever sizes are allowed."""
    heads, width, kind = rng.randint(1, 3), 2 * rng.randint(3, 12), rng.choice(list(VARIANTS))
    channels = 48 if "5b" in kind else rng.choice([4, 16])
    image = rng.choice([8, 24]) if kind in ("i2v 2.1", "flf2v") else 0
    return WanConfig(heads * width, rng.randint(5, 40), heads, rng.randint(1, 3), channels + (4 + channels) * ("i2v" in kind or "flf" in kind),
                     channels, 2 * rng.randint(2, 20), rng.randint(3, 30), rng.randint(6, 40), rng.choice([1e-6, 1e-5]), image,
                     514 if kind == "flf2v" else 0)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("seed", range(24))
def test_any_config_of_any_variant_survives_both_layouts_and_computes_the_same(tmp_path, seed):
    rng = random.Random(seed)
    config, dtype = drawn_config(rng), rng.choice([torch.float32, torch.bfloat16])
    model = random_model(config)
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(WanDiT.stored_dtype(name, dtype))
    size = sum(p.nbytes for p in model.parameters())
    there = model
    for number, layout in enumerate(rng.sample(["official", "diffusers"], 2)):
        save_dit(there, tmp_path / str(number), layout, rng.choice([size + 1, size // 3 + 1]))
        if layout == "diffusers":  # the one thing that it does not store
            file = tmp_path / str(number) / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"text_len": config.text_len}))
        there = load_dit(tmp_path / str(number), dtype)
        assert there.config == config
        assert all(torch.equal(value, there.state_dict()[key]) and value.dtype == there.state_dict()[key].dtype
                   for key, value in model.state_dict().items())  # fmt: skip
    batch, frames, rows, columns = rng.randint(1, 2), rng.randint(1, 3), 2 * rng.randint(1, 3), 2 * rng.randint(1, 3)
    x = torch.randn(batch, config.out_dim, frames, rows, columns)
    text = torch.randn(batch, rng.randint(1, config.text_len), config.text_dim)
    text[:, rng.randint(1, text.shape[1]) :] = 0
    y = torch.randn(batch, config.in_dim - config.out_dim, *x.shape[2:]) if config.in_dim > config.out_dim else None
    clip = torch.randn(batch, config.image_positions or 257, config.image_dim) if config.image_dim else None
    t = torch.rand(batch) * 1000
    expected = model(x, t, text, y, clip)
    assert torch.equal(there(x, t, text, y, clip), expected)
    whole, there = there.float(), load_dit(tmp_path / "1").float()
    there.collapse_padding = False
    tokens = t[:, None].expand(-1, frames * rows * columns // 4)
    assert error(whole(x, tokens, text, y, clip), there(x, t, text, y, clip)) < 2e-5  # tiny widths: rounding is not averaged


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_single_files_with_and_without_a_prefix(tmp_path, prefix, suffix):
    model = random_model(replace(TINY, dim=128, num_heads=1, text_len=512))  # released heads are 128 wide: no config needed
    tensors = {prefix + name: value.clone() for name, value in model.state_dict().items()}
    file = tmp_path / f"wan{suffix}"
    if suffix == ".pth":
        torch.save(tensors, file)
    else:
        save_file(tensors, file)
    again = load_dit(file)
    assert again.config == model.config
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("high, low", [("high_noise_model", "low_noise_model"), ("transformer", "transformer_2")])
def test_experts_are_found_by_their_folders(tmp_path, high, low):
    for place, scale in ((high, 1.0), (low, 2.0)):
        model = random_model(TINY)
        with torch.no_grad():
            model.head.head.bias.fill_(scale)
        save_dit(model, tmp_path / "pair" / place, "diffusers" if place.startswith("transformer") else "official")
    for expert, scale in (("high", 1.0), ("low", 2.0)):
        assert load_dit(tmp_path / "pair", expert=expert).head.head.bias[0] == scale
    refused("two experts", "expert='high'", call=lambda: load_dit(tmp_path / "pair"))
    assert load_dit(tmp_path / "pair" / low, expert="low").head.head.bias[0] == 2.0
    refused("high-noise expert is asked", "the low-noise expert", call=lambda: load_dit(tmp_path / "pair" / low, expert="high"))


def test_a_dense_diffusers_folder_has_its_weights_in_transformer(tmp_path):
    save_dit(random_model(TINY), tmp_path / "repo" / "transformer", "diffusers")
    load_dit(tmp_path / "repo")
    refused("a model without experts", call=lambda: load_dit(tmp_path / "repo", expert="high"))


def test_headers_tell_before_anything_is_read(folder):
    entries = Checkpoint(folder).entries
    assert entries["patch_embedding.weight"].shape == (64, 16, 1, 2, 2) and entries["patch_embedding.weight"].dtype == "F32"


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
    refused("lacks 1 tensors, first blocks.1.norm3.bias", "blocks.1.norm4.bias (near", call=lambda: load_dit(folder))
    stored(lambda all: {**all, "blocks.1.norm3.bias": torch.ones(63)})
    refused("another shape", "(63,)", "(64,)", call=lambda: load_dit(folder))
    stored(lambda all: {"weight": torch.ones(3)})
    refused("no Wan transformer", "patch_embedding.weight", call=lambda: load_dit(folder))
    file.write_bytes(good)
    (folder / "config.json").write_text(json.dumps({**META["official_config"], "ffn_dim": 100}))
    refused("ffn_dim is 100", "112", "do not belong together", call=lambda: load_dit(folder))
    (folder / "config.json").write_text("[")
    refused("config.json", "no config", call=lambda: load_dit(folder))
    refused("does not exist", call=lambda: load_dit(tmp_path / "absent"))
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"patch_embedding.weight": Runs()}))
    refused("refused", "evil.pth", call=lambda: load_dit(tmp_path / "evil.pth"))
    torch.save({"patch_embedding.weight": Runs()}, tmp_path / "evil2.pth")
    refused("refused", "could run code", call=lambda: load_dit(tmp_path / "evil2.pth"))
    torch.save(tensors, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-2000])
    refused("refused", "damaged", "cut.pth", call=lambda: load_dit(tmp_path / "cut.pth"))
    assert not (tmp_path / "ran").exists()
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    refused("outside its folder", call=lambda: load_dit(folder))


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_diffusers_computes_the_same(tmp_path, name):
    """Its sinusoid is float32, which alone costs 2e-6 (specification): the bar is 1e-5."""
    diffusers = pytest.importorskip("diffusers")
    model = random_model(replace(VARIANTS[name], text_len=512))
    config = model.config
    save_dit(model, tmp_path / "saved", "diffusers")
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "saved").eval()
    x, text = torch.randn(1, config.out_dim, 2, 4, 6), torch.zeros(1, 512, config.text_dim)
    text[:, :5] = torch.randn(1, 5, config.text_dim)
    y = torch.randn(1, 20, 2, 4, 6) if config.in_dim > config.out_dim else None
    clip = torch.randn(1, config.image_positions or 257, config.image_dim) if config.image_dim else None
    t = torch.tensor([417.0])
    given = {"encoder_hidden_states_image": clip.view(-1, 257, config.image_dim)} if clip is not None else {}
    expected = theirs(x if y is None else torch.cat([x, y], 1), t, text, return_dict=False, **given)[0]
    assert error(model(x, t, text, y, clip), expected) < 1e-5
