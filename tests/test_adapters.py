"""LoKr, DoRA, rank-stabilised scale and rank dropout; which layers are chosen; what files hold of
them."""

import itertools
import math
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmdit.adapters import (
    DoRALinear,
    LoKrLinear,
    LoRAConfig,
    LoRALinear,
    adapters,
    coverage,
    inject,
    lora_state,
    merge,
    select,
)
from mmdit.adapters.layers import factorise
from mmdit.adapters.lora import add_differences
from mmdit.config import ConfigError, decode
from mmdit.interop import lora_formats
from mmdit.interop.inspection import inspect_weights
from mmdit.models import VideoMMDiTConfig, build_model
from mmdit.models.wan import WanConfig, WanDiT
from tests.helpers.thorough import thorough_unless

KINDS = {
    "lora": {"rank": 4, "alpha": 6.0},
    "rslora": {"rank": 4, "alpha": 6.0, "rslora": True},
    "dora": {"type": "dora", "rank": 4, "alpha": 6.0},
    "lokr": {"type": "lokr", "rank": 2, "alpha": 6.0, "factor": 4},
    "lokr_whole": {"type": "lokr", "full_second": True, "alpha": 6.0},
    "lokr_thin": {"type": "lokr", "rank": 1, "alpha": 6.0, "factor": 4, "decompose_first": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def base(dim=32, seed=0):
    torch.manual_seed(seed)
    model = build_model(VideoMMDiTConfig(dim=dim, depth=3, num_heads=2, window_size=2), 3, 8)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def adapted(kind="lora", trained=True, **keys):
    model = base()
    inject(model, LoRAConfig(enabled=True, **{**KINDS[kind], **keys}), seed=3)
    if trained:
        for layer in adapters(model).values():
            for parameter in layer.adapter_parameters().values():
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def outputs(model, x):
    return torch.cat(
        [
            layer(x)
            for layer in adapters(model).values()
            if layer.in_features == 32 == layer.out_features
        ]
    )


@pytest.fixture
def x():
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))


@every_kind
def test_a_fresh_adapter_changes_no_bit(kind, x):
    model = adapted(kind, trained=False)
    for layer in adapters(model).values():
        if layer.in_features == 32:
            assert torch.equal(layer(x), layer.plain()(x))


@pytest.mark.parametrize("kind", thorough_unless(lambda kind: kind in ("dora", "lokr"), KINDS))
def test_forward_is_merge_is_file_for_an_alpha_that_is_not_the_rank(kind, x, tmp_path):
    model = adapted(kind)
    expected = outputs(model, x)
    assert (
        expected
        - torch.cat(
            [
                m.plain()(x)
                for m in adapters(model).values()
                if m.in_features == 32 == m.out_features
            ]
        )
    ).norm() > 0.1
    merged = torch.cat(
        [m.merged()(x) for m in adapters(model).values() if m.in_features == 32 == m.out_features]
    )
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    save_file(lora_state(model), tmp_path / "checkpoint.safetensors")
    other = base()
    lora_formats.load_lora(other, tmp_path / "checkpoint.safetensors")
    torch.testing.assert_close(outputs(other, x), expected, rtol=1e-6, atol=1e-6)
    for format in ("kohya", "comfy", *(() if kind.startswith("lokr") else ("peft", "diffusers"))):
        path = tmp_path / (format if format == "peft" else f"{format}.safetensors")
        lora_formats.save_lora(model, path, format)
        other = base()
        lora_formats.load_lora(other, path)
        torch.testing.assert_close(outputs(other, x), expected, rtol=1e-5, atol=1e-5)
        half = {name: tensor.half() for name, tensor in lora_state(other).items()}
        assert all(tensor.isfinite().all() for tensor in half.values())
    report = inspect_weights(tmp_path / "kohya.safetensors")
    assert (report["kind"], report["layers"]) == (
        {"lo": "LoRA", "do": "DoRA", "rs": "LoRA"}.get(
            kind[:2] if kind[:4] != "lokr" else "", "LoKr"
        ),
        len(adapters(model)),
    )


def test_lokr_files_have_their_strength_in_the_first_factor(tmp_path):
    """Readers divide alpha by the rank, or, where both factors are whole, ignore alpha: both must
    give what was trained."""
    for kind, format in itertools.product(("lokr", "lokr_whole", "lokr_thin"), ("comfy", "kohya")):
        model = adapted(kind)
        lora_formats.save_lora(model, tmp_path / f"{kind}_{format}.safetensors", format)
        stored = load_file(tmp_path / f"{kind}_{format}.safetensors")
        for name, layer in adapters(model).items():
            start = (
                f"diffusion_model.{name}."
                if format == "comfy"
                else f"lora_unet_{name.replace('.', '_')}."
            )
            own = {
                part.rpartition(".")[2]: tensor
                for part, tensor in stored.items()
                if part.startswith(start)
            }
            first = own["lokr_w1"]  # whole: some readers know no other
            second = own["lokr_w2"] if "lokr_w2" in own else own["lokr_w2_a"] @ own["lokr_w2_b"]
            assert own.get("alpha") == (layer.rank if format == "kohya" else None)
            torch.testing.assert_close(
                torch.kron(first, second), layer.delta(), rtol=1e-5, atol=1e-6
            )
    with pytest.raises(ValueError, match="choose kohya or comfy"):
        lora_formats.save_lora(model, tmp_path / "no", "peft")
    with pytest.raises(ValueError, match="must end in .safetensors"):
        lora_formats.save_lora(model, tmp_path / "no", "kohya")


def test_lokr_is_the_kronecker_product():
    assert [
        factorise(*pair) for pair in ((5120, 8), (13824, 8), (127, -1), (5120, -1), (30, 8))
    ] == [(8, 640), (8, 1728), (1, 127), (64, 80), (5, 6)]
    with torch.device("meta"):
        sizes = [(5120, 5120, 8, 32), (5120, 13824, 8, 32), (5120, 5120, 16, 32)]
        layers = [
            LoKrLinear(nn.Linear(i, o), 400, 1.0, factor=f, full_second=True)
            for i, o, f, _ in sizes
        ]
    assert [sum(p.numel() for p in layer.adapter_parameters().values()) for layer in layers] == [
        409_664,
        1_105_984,
        102_656,
    ]
    torch.manual_seed(0)
    layer = LoKrLinear(nn.Linear(160, 96).double(), rank=3, alpha=5.0, factor=8)
    for parameter in layer.adapter_parameters().values():
        nn.init.normal_(parameter)
    layer = layer.double()
    first, second = layer.factors(torch.float64)
    x = torch.randn(4, 160, dtype=torch.float64)
    torch.testing.assert_close(
        layer.update(x), x @ (5 / 3 * torch.kron(first, second)).T, rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(layer.delta().norm(), 5 / 3 * first.norm() * second.norm())
    assert torch.linalg.matrix_rank(layer.delta()) == torch.linalg.matrix_rank(
        first
    ) * torch.linalg.matrix_rank(second)


@torch.no_grad()
def test_the_alpha_of_lokr_with_factors_of_two_ranks_is_over_that_of_the_second(tmp_path):
    """As ComfyUI has it, whichever of the tensors comes first in the file."""
    sizes = {"w1_a": (4, 2), "w1_b": (2, 4), "w2_a": (8, 3), "w2_b": (3, 8)}
    model, name = base(), "blocks.0.spatial.q"
    before = model.get_submodule(name).weight.clone()
    assert before.shape == (32, 32)
    parts = {end: torch.randn(size) for end, size in sizes.items()}
    tensors = {f"diffusion_model.{name}.lokr_{end}": part for end, part in parts.items()}
    tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(6.0)
    save_file(tensors, tmp_path / "x.safetensors")
    lora_formats.load_lora(model, tmp_path / "x.safetensors")
    expected = 6 / 3 * torch.kron(parts["w1_a"] @ parts["w1_b"], parts["w2_a"] @ parts["w2_b"])
    lora_formats.save_lora(model, tmp_path / "y.safetensors", "kohya")
    again = lora_formats.load_lora(base(), tmp_path / "y.safetensors")
    assert again == [name]
    torch.testing.assert_close(merge(model).get_submodule(name).weight - before, expected)


def test_dora_is_a_length_and_a_direction(x):
    """Equation 5, and the norm has no gradient: with the length fixed, a row's gradient is that of
    W' times length / norm."""
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(32, 12), rank=3, alpha=4.0).double()
    for parameter in layer.adapter_parameters().values():
        parameter.data += 0.3 * torch.randn_like(parameter)
    direction = layer.weight + 4 / 3 * layer.lora_B @ layer.lora_A
    expected = (
        layer.lora_magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True).detach()
    )
    found = layer(x.double())
    torch.testing.assert_close(found, x.double() @ expected.T + layer.bias, rtol=1e-6, atol=1e-6)
    gradients = [
        torch.autograd.grad(
            y.square().sum(), tuple(layer.adapter_parameters().values()), retain_graph=True
        )
        for y in (found, x.double() @ expected.T + layer.bias)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_rank_dropout_leaves_out_ranks_or_rows_with_that_probability():
    torch.manual_seed(0)
    lora = LoRALinear(nn.Linear(8, 64), rank=64, alpha=64.0, rank_dropout=0.25).train()
    nn.init.eye_(lora.lora_B)
    lokr = LoKrLinear(nn.Linear(8, 64), rank=64, alpha=1.0, rank_dropout=0.25).train()
    nn.init.normal_(lokr.lokr_w2)
    x = torch.randn(3, 8)
    for layer in (lora, lokr):
        whole = layer.eval().update(x)
        ratios = torch.stack([layer.train().update(x) / whole for _ in range(300)])
        assert ((ratios == 0) | ((ratios - 4 / 3).abs() < 1e-3)).all()
        assert ratios.eq(0).float().mean().item() == pytest.approx(0.25, abs=0.01) and torch.equal(
            ratios[:, 0] == 0, ratios[:, 1] == 0
        )


def chosen(**keys):
    return select(base(), LoRAConfig(**keys))


def test_what_is_included_excluded_and_in_which_blocks():
    kv = chosen(target_modules=("cross.k", "cross.v"))
    assert len(kv) == 6 and chosen(target_modules=("blocks.*.cross.[kv]",)) == kv
    assert chosen(target_modules=("cross.k", "cross.v"), exclude_modules=("v",)) == [
        name for name in kv if name.endswith("k")
    ]
    assert chosen(target_modules=("cross.k", "cross.v"), blocks=("0", "2-2")) == [
        name for name in kv if ".1." not in name
    ]
    mixed = [name for name in chosen(target_modules=("cross.k", "input"), blocks=("1",))]
    assert mixed == ["blocks.1.cross.k"], "what lies outside the blocks is in none of them"
    for keys, words in (
        ({"exclude_modules": ("kk",)}, ("lora.exclude_modules", "kk", "near names")),
        ({"blocks": ("7",)}, ("no block 7", "0 to 2")),
        ({"target_modules": ("q",), "exclude_modules": ("q",)}, ("leave no layer",)),
        (
            {"per_module": ({"modules": ("nope",), "rank": 2, "alpha": 1.0},)},
            ("lora.per_module", "nope"),
        ),
        (
            {
                "target_modules": ("q",),
                "per_module": ({"modules": ("k",), "rank": 2, "alpha": 1.0},),
            },
            ("lora.per_module[0]: k are layers that get no adapter",),
        ),
        (
            {
                "target_modules": ("q",),
                "per_module": (
                    {"modules": ("q",), "rank": 2, "alpha": 1.0},
                    {"modules": ("spatial.q",), "rank": 4, "alpha": 1.0},
                ),
            },
            ("lora.per_module[1]", "an entry before it counts"),
        ),
    ):
        with pytest.raises(ValueError) as caught:
            select(base(), decode(LoRAConfig, keys))
        assert all(word in str(caught.value) for word in words), caught.value


def test_rank_and_alpha_by_module():
    model = base()
    inject(
        model,
        decode(
            LoRAConfig,
            {
                "enabled": True,
                "rank": 8,
                "alpha": 4,
                "target_modules": ["cross.k", "cross.v", "mlp.up"],
                "per_module": [
                    {"modules": ["blocks.0.*"], "rank": 2, "alpha": 1},
                    {"modules": ["mlp.up"], "rank": 3, "alpha": 9},
                ],
            },
        ),
    )
    found = {name: (layer.rank, layer.alpha) for name, layer in adapters(model).items()}
    assert (
        found["blocks.0.mlp.up"] == (2, 1)
        and found["blocks.1.mlp.up"] == (3, 9)
        and found["blocks.2.cross.v"] == (8, 4)
    )


def test_wan_is_translated_and_its_self_attention_only_when_named():
    tiny = WanConfig(dim=32, ffn_dim=64, num_layers=2, num_heads=2, text_dim=16, freq_dim=16)
    assert {name.rpartition(".")[0][9:] for name in select(WanDiT(tiny), LoRAConfig())} == {
        "cross_attn"
    }
    assert {name[9:] for name in select(WanDiT(tiny), LoRAConfig(target_modules=("q",)))} == {
        "cross_attn.q"
    }
    assert {
        name[9:] for name in select(WanDiT(tiny), LoRAConfig(target_modules=("self_attn.q",)))
    } == {"self_attn.q"}
    for targets, warned in ((("self_attn.q",), True), (None, False)):
        model = WanDiT(tiny)
        inject(model, LoRAConfig(enabled=True, target_modules=targets))
        assert ("warning: self_attn is adapted" in coverage(model)) == warned
    with pytest.raises(ValueError, match="self_attn"):
        select(WanDiT(tiny), LoRAConfig(target_modules=("blocks.*.[!c]*.q",)))


def test_rslora_divides_by_the_root_of_the_rank():
    layer = LoRALinear(nn.Linear(4, 4), rank=16, alpha=8.0, rslora=True)
    assert layer.scale == 8.0 / math.sqrt(16)


@pytest.mark.parametrize(
    "keys,word",
    [
        ({"type": "lokr", "rslora": True}, "rslora"),
        ({"factor": 0}, "factor"),
        ({"blocks": ["a"]}, "blocks"),
        ({"rank_dropout": 1.0}, "rank_dropout"),
        ({"per_module": [{"modules": ["q"], "rank": 0, "alpha": 1}]}, "rank"),
        ({"type": "lokrr"}, "lokr"),
    ],
)
def test_bad_settings_name_the_key(keys, word):
    with pytest.raises(ConfigError, match=word):
        decode(LoRAConfig, keys)


@every_kind
def test_merging_a_model_keeps_its_outputs(kind):
    model = adapted(kind)
    from mmdit.interfaces import TextTokens

    arguments = (
        torch.randn(1, 2, 4, 4, 3),
        torch.tensor([300.0]),
        TextTokens(torch.randn(1, 3, 8), torch.ones(1, 3, dtype=torch.bool)),
    )
    expected = model(*arguments)
    torch.testing.assert_close(merge(model)(*arguments), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", thorough_unless(lambda kind: kind in ("dora", "lokr"), KINDS))
def test_a_share_of_an_adapter_is_that_share_of_its_way(kind):
    names, plain = list(adapters(adapted(kind))), base()
    whole, half, none = (merge(adapted(kind), strength) for strength in (1.0, 0.5, 0.0))
    for name in names:
        weights = [model.get_submodule(name).weight for model in (none, half, whole)]
        assert torch.equal(weights[0], plain.get_submodule(name).weight)
        assert not torch.equal(weights[0], weights[2])
        torch.testing.assert_close(weights[1], (weights[0] + weights[2]) / 2)


def test_a_share_of_a_whole_difference_is_taken_too():
    model = base()
    before = model.state_dict()
    name = next(name for name, _ in model.named_parameters() if name.endswith("bias"))
    add_differences(model, {name: torch.ones_like(before[name])})
    after = merge(model, 0.25).state_dict()
    torch.testing.assert_close(after[name], before[name] + 0.25)


@torch.no_grad()
def test_merging_into_bfloat16_says_what_it_loses():
    """It keeps what the same sum beside the weight keeps: applying an adapter unmerged is not more
    exact."""
    for ratio, wanted in ((0.02, 1.0), (0.005, 0.99), (0.002, 0.81), (0.0005, 0.29)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(512, 512, bias=False)).bfloat16()
        nn.init.normal_(model[0].weight, std=512**-0.5)
        before, x = model[0].weight.float(), torch.randn(256, 512).bfloat16()
        inject(model, LoRAConfig(enabled=True, rank=4, alpha=4.0, target_modules=("0",)))
        layer = model[0]
        nn.init.normal_(layer.lora_B)
        layer.lora_B.mul_(ratio * before.norm() / layer.delta().norm())
        change, beside = layer.delta(), layer(x).float() - layer.plain()(x).float()
        exact = x.float() @ change.T
        assert abs((beside * exact).sum() / exact.square().sum() - wanted) < 0.05
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            merge(model)
        moved = model[0].weight.float() - before
        assert abs((moved * change).sum() / change.square().sum() - wanted) < 0.05
        told = [str(warning.message) for warning in caught]
        assert bool(told) == (wanted < 0.9) and all(f"by {ratio:.2%}" in line for line in told)
