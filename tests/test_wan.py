"""Wan transformers: the numbers of the official code, and one clear sentence for inputs that do not
fit."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmdit.interop.wan_weights import load_dit, save_dit
from mmdit.models.wan import WanConfig, WanDiT
from tests.helpers.thorough import thorough_unless

GOLDEN = Path(__file__).parent / "golden" / "wan_t2v_tiny"
META = json.loads((GOLDEN / "meta.json").read_text())
KEYS = (
    "dim",
    "ffn_dim",
    "num_heads",
    "num_layers",
    "in_dim",
    "out_dim",
    "freq_dim",
    "text_dim",
    "text_len",
    "eps",
)
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


def golden_release(parent: Path) -> Path:
    """The golden weights as an official folder."""
    (parent / "wan").mkdir()
    shutil.copy(
        GOLDEN / "official.safetensors", parent / "wan" / "diffusion_pytorch_model.safetensors"
    )
    (parent / "wan" / "config.json").write_text(json.dumps(META["official_config"]))
    return parent / "wan"


@pytest.fixture
def folder(tmp_path) -> Path:
    return golden_release(tmp_path)


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


# ── numbers ───────────────────────────────────────────────────────────────────────────────────────
@torch.no_grad()
@pytest.mark.parametrize("collapse", [True, False])
def test_the_numbers_of_the_official_code(folder, collapse):
    model = load_dit(folder)
    model.collapse_padding = collapse
    seen = {}
    parts = {
        "block0": model.blocks[0],
        "block1": model.blocks[1],
        "block0.self_attn": model.blocks[0].self_attn,
        "block0.cross_attn": model.blocks[0].cross_attn,
        "block0.ffn": model.blocks[0].ffn,
        "head": model.head,
    }
    for name, module in parts.items():
        module.register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output})
        )
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
    torch.testing.assert_close(
        model(x, t, trimmed), expected, rtol=0, atol=1e-10
    )  # padded to text_len
    model.collapse_padding = True
    torch.testing.assert_close(model(x, t, trimmed), expected, rtol=0, atol=1e-10)
    full = torch.randn(2, TINY.text_len, TINY.text_dim, dtype=torch.float64)  # no padding at all
    gap = trimmed.clone()
    gap[:, 1] = 0  # a word that is zero is no padding
    for given in (full, gap):
        model.collapse_padding = True
        collapsed = model(x, t, given)
        model.collapse_padding = False
        torch.testing.assert_close(model(x, t, given), collapsed, rtol=0, atol=1e-10)
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
    clip = (
        torch.randn(2, config.image_positions or 257, config.image_dim)
        if config.image_dim
        else None
    )
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
    exact = (
        "head.head.weight",
        "blocks.1.modulation",
        "time_projection.1.bias",
        "patch_embedding.weight",
        "blocks.0.norm3.bias",
    )
    assert {kinds[n] for n in exact} == {torch.float32}
    assert 1e-4 < error(model(*INPUTS), IO["out.official"]) < 1e-2
    with torch.autocast("cpu", torch.bfloat16):
        assert error(load_dit(folder)(*INPUTS), IO["out.official"]) < 1e-2


def test_the_released_sizes():
    wide = {"ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "dim": 5120}
    released = {  # specification: parameters, tensors
        "T2V-1.3B": (WanConfig(1536, 8960, 12, 30), 1_418_996_800, 825),
        "T2V-14B": (WanConfig(**wide), 14_288_491_584, 1095),
        "I2V-14B": (WanConfig(**wide, in_dim=36, image_dim=1280), 16_394_878_784, 1303),
        "FLF2V-14B": (
            WanConfig(**wide, in_dim=36, image_dim=1280, image_positions=514),
            16_395_536_704,
            1304,
        ),
        "I2V-A14B": (WanConfig(**wide, in_dim=36), 14_288_901_184, 1095),
        "TI2V-5B": (WanConfig(3072, 14336, 24, 30, 48, 48), 4_999_787_712, 825),
    }
    for name, (config, parameters, tensors) in released.items():
        with torch.device("meta"):
            model = WanDiT(config)
        assert (
            sum(p.numel() for p in model.parameters()) == parameters
            and len(model.state_dict()) == tensors
        ), name
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


@torch.no_grad()
@pytest.mark.parametrize("name", thorough_unless(lambda name: name == "flf2v", VARIANTS))
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
    clip = (
        torch.randn(1, config.image_positions or 257, config.image_dim)
        if config.image_dim
        else None
    )
    t = torch.tensor([417.0])
    given = (
        {"encoder_hidden_states_image": clip.view(-1, 257, config.image_dim)}
        if clip is not None
        else {}
    )
    expected = theirs(
        x if y is None else torch.cat([x, y], 1), t, text, return_dict=False, **given
    )[0]
    assert error(model(x, t, text, y, clip), expected) < 1e-5
