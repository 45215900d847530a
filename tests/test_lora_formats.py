"""LoRA files of other tools: what they mean, and that what we write is read back the same, by us
and by them."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmdit.adapters import LoRAConfig, adapters, inject, merge, remove
from mmdit.interop.lora_formats import load_lora, read_lora, save_lora
from mmdit.interop.lora_names import DIFFERENCES, PARTS
from mmdit.interop.wan_weights import load_dit
from mmdit.models import VideoMMDiTConfig, build_model
from mmdit.models.wan import WanDiT
from mmdit.models.wan_names import diffusers_name
from mmdit.nn.experts import shared_copy
from mmdit.nn.stored_weights import StoredWeight, store
from mmdit.training.starting import is_lora
from tests.test_wan import GOLDEN, INPUTS, META, TINY, VARIANTS, error, random_model, refused

WANTED = load_file(GOLDEN / "lora_io.safetensors")["out.with_lora"]
FILES = {name: GOLDEN / f"lora_{name}.safetensors" for name in ("comfy", "kohya", "diffusers_peft")}


def single_precision_sinusoid(t, width):
    """As the library that recorded `out.with_lora` computes it; the difference to ours is 2.2e-6 at
    the output."""
    angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(width // 2) / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], -1)


@pytest.fixture
def model(monkeypatch) -> WanDiT:
    monkeypatch.setattr("mmdit.models.wan.sinusoid", single_precision_sinusoid)
    model = WanDiT(TINY)
    model.load_state_dict(load_file(GOLDEN / "official.safetensors"))
    return model.eval()


def official(kohya: dict) -> dict[str, dict[str, torch.Tensor]]:
    """The golden LoRA by official layer name: A, B and alpha."""
    names = {name.replace(".", "_"): name for name in META["lora"]["budget"] if name != "total"}
    parts = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"}
    result = {}
    for key, tensor in kohya.items():
        mangled, _, part = key.removeprefix("lora_unet_").partition(".")
        result.setdefault(names[mangled], {})[parts[part]] = tensor
    return result


LAYERS = official(load_file(FILES["kohya"]))


@torch.no_grad()
@pytest.mark.parametrize("name", FILES)
def test_golden_files_of_three_formats_give_the_official_numbers(model, name):
    assert error(WANTED, model(*INPUTS)) > 0.1
    assert len(load_lora(model, FILES[name])) == 20
    assert error(model(*INPUTS), WANTED) < 2e-6
    refused("adapters already", call=lambda: load_lora(model, FILES[name]))
    assert error(merge(model)(*INPUTS), WANTED) < 2e-6


def dialects(folder: Path) -> dict[str, Path]:
    """The golden LoRA as eight tools write it."""
    scaled = {name: {**p, "B": p["B"] * p["alpha"] / 4} for name, p in LAYERS.items()}
    files = {
        "2 peft": {
            f"base_model.model.{diffusers_name(n)}.lora_{k}.weight": p[k]
            for n, p in LAYERS.items()
            for k in "AB"
        },
        "3 diffusion-pipe": {
            f"diffusion_model.{n}.lora_{k}.weight": p[k] for n, p in scaled.items() for k in "AB"
        },
        "5 diffsynth": {
            f"{n}.lora_{k}.default.weight": p[k] for n, p in scaled.items() for k in "AB"
        },
        "6 fastvideo": {
            f"{diffusers_name(n)}.lora_{k}": p[k] for n, p in scaled.items() for k in "AB"
        },
        "7 distilled": {
            f"diffusion_model.{n}.lora_{end}.weight": p[k]
            for n, p in scaled.items()
            for end, k in (("down", "A"), ("up", "B"))
        },
        "8 two experts": {
            f"diffusion_model.transformer_{i}.{n}.lora_{k}.weight": p[k] * i
            for i in (1, 2)
            for n, p in scaled.items()
            for k in "AB"
        },
    }
    paths = {"1 diffusers": FILES["diffusers_peft"], "4 kohya": FILES["kohya"]}
    for name, tensors in files.items():
        place = folder / name.replace(" ", "_")
        paths[name] = place if name == "2 peft" else place.with_suffix(".safetensors")
        if name == "2 peft":
            place.mkdir()
            settings = {
                "lora_alpha": 3,
                "r": 4,
                "alpha_pattern": {r"blocks\.\d+\..*": 8},
                "rank_pattern": {},
            }
            (place / "adapter_config.json").write_text(json.dumps(settings))
        save_file(tensors, place / "adapter_model.safetensors" if name == "2 peft" else paths[name])
    return paths


@torch.no_grad()
def test_eight_dialects_mean_the_same(model, tmp_path):
    for name, path in dialects(tmp_path).items():
        load_lora(model, path, expert="high" if name.startswith("8") else None)
        assert error(model(*INPUTS), WANTED) < 2e-6, name
        remove(model)
    settings = {"lora_alpha": 4, "r": 4, "use_rslora": True}  # 4 / √4 is what the golden 8 / 4 is
    (tmp_path / "2_peft" / "adapter_config.json").write_text(json.dumps(settings))
    load_lora(model, tmp_path / "2_peft")
    assert error(model(*INPUTS), WANTED) < 2e-6
    remove(model)
    two = tmp_path / "8_two_experts.safetensors"
    refused("two experts", "expert='high'", call=lambda: load_lora(model, two))
    load_lora(model, two, expert="low")
    assert error(model(*INPUTS), WANTED) > 0.1
    refused(
        "no LoRA of the low-noise expert",
        call=lambda: read_lora(remove(model), keep_expert(two, 1), "low"),
    )


def test_a_training_knows_a_lora_that_it_starts_from_by_every_name_that_is_read(tmp_path):
    for end in PARTS:
        save_file(
            {f"transformer.blocks.0.attn1.to_q{end}": torch.ones(1)}, tmp_path / "x.safetensors"
        )
        whole = end in (".alpha", ".w_norm", ".b_norm", *DIFFERENCES)
        assert is_lora(tmp_path / "x.safetensors") is not whole, end


def keep_expert(file: Path, number: int) -> Path:
    kept = file.with_name("one.safetensors")
    save_file({k: v for k, v in load_file(file).items() if f"transformer_{number}." in k}, kept)
    return kept


@torch.no_grad()
@pytest.mark.parametrize("format", ["peft", "diffusers", "kohya", "comfy"])
@pytest.mark.parametrize("kind", ["wan", "video_mmdit"])
def test_what_is_saved_is_what_is_read(tmp_path, format, kind):
    """Partial, of two ranks, with an alpha that is not the rank."""

    def fresh():
        if kind == "wan":
            return random_model(VARIANTS["i2v 2.1"]), ("cross_attn.k_img", "cross_attn.v")
        torch.manual_seed(0)
        return build_model(VideoMMDiTConfig(dim=16, depth=2, num_heads=2), 3, 5), (
            "cross.k",
            "spatial.q",
        )

    model, targets = fresh()
    for rank, target in zip((2, 3), targets, strict=True):
        inject(
            model,
            LoRAConfig(enabled=True, rank=rank, alpha=5.0, target_modules=(target,)),
            seed=rank,
        )
    for layer in adapters(model).values():
        layer.lora_B.normal_()
    path = tmp_path / ("saved" if format == "peft" else "saved.safetensors")
    save_lora(model, path, format)
    refused("is there already", call=lambda: save_lora(model, path, format))
    other, _ = fresh()
    assert set(load_lora(other, path)) == set(adapters(model))
    for (name, a), b in zip(adapters(model).items(), adapters(other).values(), strict=True):
        assert a.rank == b.rank, name
        torch.testing.assert_close(b.scale * b.lora_B @ b.lora_A, a.scale * a.lora_B @ a.lora_A)
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "nothing is left beside it"


def test_a_strength_is_kept_whole_in_a_file_of_half_precision(tmp_path):
    """257 is 256 in bfloat16."""
    model = random_model(TINY)
    inject(model, LoRAConfig(enabled=True, rank=4, alpha=257, target_modules=("cross_attn.k",)))
    save_lora(model, tmp_path / "k.safetensors", "kohya", torch.bfloat16)
    stored = load_file(tmp_path / "k.safetensors")
    alphas = {tensor.item() for name, tensor in stored.items() if name.endswith(".alpha")}
    assert alphas == {257.0}


def test_an_update_too_small_for_a_type_is_one_sentence_with_a_remedy(tmp_path):
    model = random_model(TINY)
    inject(model, LoRAConfig(enabled=True, rank=4, target_modules=("cross_attn.k",)))
    for layer in adapters(model).values():
        torch.nn.init.normal_(layer.lora_B, std=1e-7)
    path = tmp_path / "k.safetensors"
    save = lambda dtype: save_lora(model, path, "kohya", dtype)
    words = ("k.safetensors: blocks.0.", "in float16, which has few digits", "write it in float32")
    refused(*words, call=lambda: save(torch.float16))
    save(torch.bfloat16)


def test_a_file_that_would_be_read_otherwise_does_not_get_its_name(model, tmp_path, monkeypatch):
    load_lora(model, FILES["kohya"])
    monkeypatch.setattr(
        "mmdit.interop.lora_writing.HEADER", "unknown"
    )  # as if the header were not written
    refused(
        "not be read back as it is",
        call=lambda: save_lora(model, tmp_path / "x.safetensors", "diffusers"),
    )
    assert not list(tmp_path.iterdir())


def test_differences_are_added_to_whole_parameters(model, tmp_path):
    before = model.blocks[0].norm3.bias.clone(), model.blocks[1].ffn[0].weight.clone()
    file = tmp_path / "distilled.safetensors"
    differences = {
        "blocks.0.norm3.diff_b": torch.full((64,), 0.5),
        "blocks.1.ffn.0.diff": torch.ones(112, 64),
        "blocks.0.diff_m": torch.ones(1, 6, 64),
        "blocks.0.ffn.0.diff_b": torch.ones(112),
        "blocks.0.ffn.0.lora_down.weight": torch.ones(2, 64),
        "blocks.0.ffn.0.lora_up.weight": torch.ones(112, 2),
    }
    save_file({f"diffusion_model.{key}": value for key, value in differences.items()}, file)
    before += model.blocks[0].modulation.clone(), model.blocks[0].ffn[0].bias.clone()
    assert load_lora(model, file) == ["blocks.0.ffn.0"]
    torch.testing.assert_close(model.blocks[0].modulation, before[2] + 1)
    torch.testing.assert_close(model.blocks[0].ffn[0].bias, before[3] + 1)
    torch.testing.assert_close(model.blocks[0].norm3.bias, before[0] + 0.5)
    torch.testing.assert_close(model.blocks[1].ffn[0].weight, before[1] + 1)
    refused("adapters already", call=lambda: load_lora(model, file))
    remove(model)
    after = (
        model.blocks[0].norm3.bias,
        model.blocks[1].ffn[0].weight,
        model.blocks[0].modulation,
        model.blocks[0].ffn[0].bias,
    )
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "the base as it was"
    save_file({"diffusion_model.blocks.0.norm3.diff": torch.ones(63)}, file)
    refused("(63,)", "(64,)", call=lambda: load_lora(model, file))


def test_what_does_not_fit_is_one_sentence(model, tmp_path):
    file, layer = tmp_path / "lora.safetensors", "diffusion_model.blocks.0.cross_attn."
    a, b = torch.ones(2, 64), torch.ones(64, 2)

    def stored(**tensors):
        save_file({layer + key: value for key, value in tensors.items()}, file)

    stored(**{"k_img.lora_A.weight": a, "k_img.lora_B.weight": b})
    refused("2 of 2 keys", "k_img", "near names", "I2V", call=lambda: load_lora(model, file))
    save_file(
        {
            f"lora_unet_blocks_0_cross_atn_k.lora_{end}.weight": t
            for end, t in (("down", a), ("up", b))
        },
        file,
    )
    refused(
        "2 of 2 keys", "near names: blocks_0_cross_attn_k,", call=lambda: load_lora(model, file)
    )
    stored(**{"k.lora_A.weight": a})
    refused("blocks.0.cross_attn.k", "no lora_B", call=lambda: load_lora(model, file))
    stored(**{"k.lora_A.weight": torch.ones(2, 128), "k.lora_B.weight": b})
    refused("64 → 64", "(2, 128)", "another size", call=lambda: load_lora(model, file))
    stored(**{"k.lora_A.weight": a, "k.lora_B.weight": b, "k.dora_scale": torch.ones(1, 64)})
    refused("dora_scale", "(1, 64)", "each column", call=lambda: load_lora(model, file))
    stored(**{"k.lokr_w1": torch.ones(8, 8), "k.lokr_w2_a": torch.ones(8, 2)})
    refused("lacks", "lokr_w2", call=lambda: load_lora(model, file))
    stored(**{"k.lokr_w1": torch.ones(8, 8), "k.lokr_w2": torch.ones(8, 16)})
    refused("another size", call=lambda: load_lora(model, file))
    stored(**{"norm_k.lora_A.weight": a, "norm_k.lora_B.weight": b})
    refused("RMSNorm", "linear", call=lambda: load_lora(model, file))
    assert not adapters(model)
    refused("no adapters", call=lambda: save_lora(model, tmp_path / "none.safetensors", "kohya"))


@torch.no_grad()
def test_a_lora_of_t2v_on_i2v_is_laid_over_what_both_have_and_told(tmp_path):
    """The picture's keys and values are not in it: they stay (specification, section 10). The other
    way round is refused."""
    words, both = ("cross_attn.k", "cross_attn.v", "ffn.0"), {}
    for kind, targets in (("t2v", words), ("i2v 2.1", (*words, "cross_attn.k_img"))):
        model = random_model(VARIANTS[kind])
        inject(model, LoRAConfig(enabled=True, rank=2, target_modules=targets), seed=1)
        for layer in adapters(model).values():
            layer.lora_B.normal_()
        both[kind] = tmp_path / f"{kind}.safetensors"
        save_lora(model, both[kind], "comfy")
    picture = random_model(VARIANTS["i2v 2.1"])
    before = picture.state_dict() | {}
    with pytest.warns(
        UserWarning, match="4 layers that read the text and none of the 4 .*made for a T2V model"
    ) as caught:
        assert len(load_lora(picture, both["t2v"])) == 6
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert all(
        torch.equal(merge(picture).state_dict()[n], v) for n, v in before.items() if "_img" in n
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        words_alone = random_model(VARIANTS["i2v 2.1"])
        inject(words_alone, LoRAConfig(enabled=True, rank=2))
        save_lora(words_alone, tmp_path / "words.safetensors", "comfy")  # it was made for I2V
        load_lora(random_model(VARIANTS["i2v 2.1"]), both["i2v 2.1"])
        load_lora(random_model(VARIANTS["t2v"]), both["t2v"])
    refused(
        "4 of 16 keys",
        "k_img",
        "another model (I2V, T2V",
        call=lambda: load_lora(random_model(VARIANTS["t2v"]), both["i2v 2.1"]),
    )


@torch.no_grad()
def test_diffusers_and_peft_read_our_files_the_same(tmp_path):
    peft = pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    model = random_model(replace(TINY, text_len=512))
    from mmdit.interop.wan_weights import save_dit

    save_dit(model, tmp_path / "base", "diffusers")
    inject(
        model,
        LoRAConfig(
            enabled=True,
            rank=2,
            alpha=5.0,
            target_modules=("cross_attn.k", "cross_attn.v", "ffn.0"),
        ),
        seed=1,
    )
    for layer in adapters(model).values():
        layer.lora_B.normal_()
    save_lora(model, tmp_path / "lora.safetensors", "diffusers")
    x, t, text = (
        torch.randn(1, 16, 2, 4, 6),
        torch.tensor([417.0]),
        torch.randn(1, 512, TINY.text_dim),
    )
    expected = model(x, t, text)
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "base").eval()
    with safe_open(tmp_path / "lora.safetensors", "pt") as handle:
        assert "lora_adapter_metadata" in handle.metadata()
    theirs.load_lora_adapter(str(tmp_path), weight_name="lora.safetensors", prefix="transformer")
    assert error(expected, theirs(x, t, text, return_dict=False)[0]) < 1e-5
    assert error(expected, load_dit(tmp_path / "base")(x, t, text)) > 0.05
    save_lora(model, tmp_path / "folder", "peft")
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "base").eval()
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "folder"))
    assert (
        error(
            expected,
            theirs(hidden_states=x, timestep=t, encoder_hidden_states=text, return_dict=False)[0],
        )
        < 1e-5
    )


A, B = torch.ones(2, 64), torch.ones(64, 2)


@pytest.mark.parametrize(
    "prefix, underscores",
    [
        ("", False),
        ("diffusion_model.", False),
        ("model.diffusion_model.", False),
        ("transformer.", False),
        ("unet.", False),
        ("pipe.dit.", False),
        ("module.", False),
        ("base_model.model.diffusion_model.", False),
        ("lora_unet_", True),
        ("lora_unet__", True),
        ("lycoris_", True),
        ("lora_transformer_", True),
    ],
)
def test_words_before_a_layer_s_name(model, tmp_path, prefix, underscores):
    for name in ("blocks.1.cross_attn.v", "head.head"):
        rows = model.get_submodule(name).out_features
        for layer in {name, diffusers_name(name)}:
            key = prefix + (layer.replace(".", "_") if underscores else layer)
            up = torch.ones(rows, 2)
            for down_end, up_end in (
                (".lora_A.weight", ".lora_B.weight"),
                (".lora_down.weight", ".lora_up.weight"),
                ("_lora.down.weight", "_lora.up.weight"),
                (".lora.down.weight", ".lora.up.weight"),
                (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
                (".lora_A.default.weight", ".lora_B.default.weight"),
                (".lora_A", ".lora_B"),
            ):
                save_file({key + down_end: A, key + up_end: up}, tmp_path / "x.safetensors")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # PEFT's names without PEFT's config
                    assert list(read_lora(model, tmp_path / "x.safetensors").updates) == [name]


def test_whole_differences_under_every_name(model, tmp_path):
    names = {
        "diffusion_model.blocks.0.modulation.diff": "blocks.0.modulation",
        "blocks.0.diff_m": "blocks.0.modulation",
        "transformer.blocks.0.scale_shift_table.diff": "blocks.0.modulation",
        "head.modulation.diff": "head.modulation",
        "transformer.scale_shift_table.diff": "head.modulation",
        "lora_unet_blocks_0_norm3.diff": "blocks.0.norm3.weight",
        "lycoris_blocks_0_norm3.b_norm": "blocks.0.norm3.bias",
        "lora_unet_blocks_0_norm3.w_norm": "blocks.0.norm3.weight",
        "diffusion_model.blocks.1.self_attn.q.diff_b": "blocks.1.self_attn.q.bias",
    }
    for key, name in names.items():
        save_file({key: torch.ones_like(model.get_parameter(name))}, tmp_path / "x.safetensors")
        assert list(read_lora(model, tmp_path / "x.safetensors").differences) == [name]


def test_the_high_expert_of_a_pair_by_diffusers_is_not_laid_over_the_low(model, tmp_path):
    """It writes `transformer.` for the high one, `transformer_2.` for the low one, and a config of
    each into the header."""
    file, layers = (
        tmp_path / "pair.safetensors",
        {"transformer": ("attn1.to_q", 8), "transformer_2": ("attn1.to_k", 4)},
    )
    tensors, header = {}, {}
    for word, (layer, alpha) in layers.items():
        tensors |= {
            f"{word}.blocks.0.{layer}.lora_{x}.weight": t.clone()
            for x, t in zip("AB", (A, B), strict=True)
        }
        header |= {f"{word}.r": 2, f"{word}.lora_alpha": alpha}
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(header)})
    refused("two experts", call=lambda: read_lora(model, file))
    for expert, layer, scale in (("high", "q", 4.0), ("low", "k", 2.0)):
        updates = read_lora(model, file, expert).updates
        assert {name: update.scale for name, update in updates.items()} == {
            f"blocks.0.self_attn.{layer}": scale
        }
    deep = {key.replace("_2.", "_2.module."): value for key, value in tensors.items()}
    save_file(deep, file, {"lora_adapter_metadata": json.dumps(header)})
    assert list(read_lora(model, file, "high").updates) == ["blocks.0.self_attn.q"]
    assert list(read_lora(model, file, "low").updates) == ["blocks.0.self_attn.k"]
    both = {
        f"diffusion_model.blocks.1.self_attn.v.lora_{x}.weight": t for x, t in zip("AB", (A, B))
    }
    save_file(tensors | both, file)  # what names no expert is for both
    for expert in ("high", "low"):
        assert "blocks.1.self_attn.v" in read_lora(model, file, expert).updates
    save_file({key: value for key, value in tensors.items() if "_2" not in key}, file)
    assert (
        len(read_lora(model, file, "low").updates) == 1
    )  # a file for one model may be laid over either


def test_a_distilled_lora_of_t2v_on_i2v(tmp_path):
    picture = random_model(VARIANTS["i2v 2.1"])
    width = picture.config.dim
    own, before = (
        picture.patch_embedding.weight.shape,
        picture.state_dict()["patch_embedding.weight"].clone(),
    )
    file = tmp_path / "distilled.safetensors"
    save_file(
        {
            "diffusion_model.patch_embedding.diff": torch.ones(width, own[1] - 4, *own[2:]),
            "diffusion_model.patch_embedding.diff_b": torch.ones(width),
        },
        file,
    )
    with pytest.warns(
        UserWarning, match=f"{own[1] - 4} input channels, this model has {own[1]}.*T2V"
    ):
        load_lora(picture, file)
    assert torch.equal(picture.patch_embedding.weight, before)
    save_file({"diffusion_model.patch_embedding.diff": torch.ones(width - 1, *own[1:])}, file)
    refused("patch_embedding.weight", str(tuple(own)), call=lambda: read_lora(picture, file))


@pytest.mark.parametrize(
    "ends, kind",
    [
        (("hada_w1_a", "hada_w1_b"), "LoHa"),
        (("oft_blocks",), "OFT"),
        (("lora_E", "lora_A"), "AdaLoRA"),
        (("ia3_l.weight",), "(IA)³"),
        (("set_weight",), "whole weights"),
        (("lora_mid.weight",), "Tucker"),
        (("lokr_t2", "lokr_w1"), "Tucker"),
        (("a1.weight", "b1.weight"), "GLoRA"),
        (("base_layer.bias",), "biases of the base"),
        (("reshape_weight",), "shape"),
    ],
)
def test_kinds_that_are_not_read_are_named(model, tmp_path, ends, kind):
    file = tmp_path / "x.safetensors"
    save_file(
        {f"diffusion_model.blocks.0.self_attn.q.{end}": torch.ones(2, 64) for end in ends}, file
    )
    refused(kind, "LoRA, DoRA, LoKr", call=lambda: read_lora(model, file))


@pytest.mark.parametrize("key", ["lora_te1_x.lora_down.weight", "text_encoders.t5.q.lora_A.weight"])
def test_a_lora_of_the_text_encoder_is_named(model, tmp_path, key):
    file = tmp_path / "x.safetensors"
    save_file({key: torch.ones(2, 64)}, file)
    refused("LoRA of a text encoder", key, call=lambda: read_lora(model, file))


@pytest.mark.parametrize("name", ["blocks.0.self_attn.q.weight", "text_encoders.t5.norm.weight"])
def test_whole_weights_are_no_lora(model, tmp_path, name):
    file = tmp_path / "x.safetensors"
    save_file({name: torch.ones(2, 64)}, file)
    refused("holds whole weights", name, "--checkpoint", call=lambda: read_lora(model, file))


def test_dora_over_lokr_is_named(model, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(
        {
            "diffusion_model.blocks.0.self_attn.q.lokr_w1": torch.ones(8, 8),
            "diffusion_model.blocks.0.self_attn.q.lokr_w2": torch.ones(8, 8),
            "diffusion_model.blocks.0.self_attn.q.dora_scale": torch.ones(64, 1),
        },
        file,
    )
    refused("DoRA over LoKr", call=lambda: read_lora(model, file))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"lora_A.weight": A.clone().fill_(math.nan)}, ("q.lora_A.weight", "nan or infinity")),
        ({"lora_B.weight": B.clone().fill_(math.inf)}, ("q.lora_B.weight", "nan or infinity")),
        ({"lora_A.weight": A.to(torch.int8)}, ("q.lora_A.weight", "int8")),
        ({"diff_b": torch.full((64,), math.nan)}, ("diff_b", "nan")),
        ({"alpha": torch.tensor(math.nan)}, ("alpha", "nan")),
        ({"alpha": torch.tensor(0.0)}, ("alpha", "0.0")),
        ({"alpha": torch.ones(2)}, ("alpha", "[1.0, 1.0]")),
        ({"alpha": torch.tensor(2 + 0j)}, ("alpha", "(2+0j)")),
        ({"dora_scale": torch.full((64, 1), math.nan)}, ("dora_scale", "nan")),
        ({"lora_down.weight": A.clone()}, ("blocks.0.self_attn.q.lora_A twice", "lora_down")),
    ],
)
def test_what_is_no_number_is_named(model, tmp_path, change, words):
    file = tmp_path / "x.safetensors"
    own = {"lora_A.weight": A, "lora_B.weight": B} | change
    save_file(
        {f"diffusion_model.blocks.0.self_attn.q.{end}": tensor for end, tensor in own.items()}, file
    )
    refused(str(file), *words, call=lambda: load_lora(model, file))
    assert not adapters(model)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
@torch.no_grad()
def test_a_share_of_differences_of_any_type(tmp_path, dtype):
    """And a bias that comes with an update, on top of one."""
    file, layer = tmp_path / "x.safetensors", "diffusion_model.blocks.0.self_attn.q"
    ends = {"lora_A.weight": A, "lora_B.weight": B, "lora_B.bias": torch.randn(64)}
    ends |= {"diff": torch.randn(64, 64), "diff_b": torch.randn(64)}
    tensors = {f"{layer}.{end}": tensor.to(dtype) for end, tensor in ends.items()}
    save_file(tensors, file)
    before, model = random_model(TINY), random_model(TINY)
    load_lora(model, file)
    merge(model, 0.5)
    stored = {end: tensors[f"{layer}.{end}"].float() for end in ends}
    weight = stored["diff"] + stored["lora_B.weight"] @ stored["lora_A.weight"]
    bias = stored["diff_b"] + stored["lora_B.bias"]
    for name, change in (("weight", weight), ("bias", bias)):
        moved = [getattr(one.blocks[0].self_attn.q, name) for one in (before, model)]
        torch.testing.assert_close(moved[1] - moved[0], change / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", ["kohya", "comfy"])
def test_a_distilled_lora_is_handed_on_whole(model, tmp_path, format):
    """Its differences go with it; formats that cannot hold them refuse."""
    stored = {
        "blocks.0.self_attn.q.lora_A.weight": A,
        "blocks.0.self_attn.q.lora_B.weight": B,
        "blocks.0.norm3.diff": torch.randn(64),
        "blocks.0.norm3.diff_b": torch.randn(64),
        "blocks.1.modulation.diff": torch.randn(1, 6, 64),
        "blocks.1.ffn.0.diff": torch.randn(112, 64),
    }
    save_file(
        {f"diffusion_model.{key}": value for key, value in stored.items()},
        tmp_path / "in.safetensors",
    )
    expected = read_lora(model, tmp_path / "in.safetensors").differences
    load_lora(model, tmp_path / "in.safetensors")
    save_lora(model, tmp_path / "out.safetensors", format)
    found = read_lora(random_model(TINY), tmp_path / "out.safetensors").differences
    assert found.keys() == expected.keys() and all(
        torch.equal(found[name], value) for name, value in expected.items()
    )
    start = {"kohya": "lora_unet_blocks_0_norm3", "comfy": "diffusion_model.blocks.0.norm3"}[format]
    keys = load_file(tmp_path / "out.safetensors").keys()
    assert {
        f"{start}.diff",
        f"{start}.diff_b",
        "diffusion_model.blocks.1.modulation.diff",
    } <= keys  # ComfyUI's names
    for other in ("peft", "diffusers"):
        path = tmp_path / ("p" if other == "peft" else "p.safetensors")
        refused(
            "4",
            "differences of whole parameters",
            "kohya or comfy",
            call=lambda path=path, other=other: save_lora(model, path, other),
        )
    merge(model)
    refused("no adapters", call=lambda: save_lora(model, tmp_path / "none.safetensors", format))


@pytest.mark.parametrize("encoding", ["float8", "int8", "nf4"])
def test_differences_reach_codes_and_leave_a_twin_alone(tmp_path, encoding):
    model = random_model(replace(TINY, num_layers=1))
    other = shared_copy(model)
    file, name = tmp_path / "d.safetensors", "blocks.0.self_attn.q"
    save_file({f"diffusion_model.{name}.diff": torch.randn(64, 64)}, file)
    store(model.blocks, encoding)
    layer, stored = model.get_submodule(name), model.get_submodule(name).weight
    before = stored.float().clone()
    load_lora(model, file)
    assert isinstance(layer.weight, StoredWeight) and layer.weight.encoding is stored.encoding
    moved, wanted = layer.weight.float() - before, load_file(file)[f"diffusion_model.{name}.diff"]
    assert (moved - wanted).norm() < 0.12 * wanted.norm()
    torch.testing.assert_close(
        layer(torch.eye(64)) - layer.bias, layer.weight.float().T, rtol=1e-4, atol=1e-4
    )
    remove(model)
    assert layer.weight is stored and torch.equal(stored.float(), before)
    load_lora(other, file)
    assert torch.equal(model.get_submodule(name).weight.float(), before)


def test_an_update_of_a_parameter_that_is_no_layer_is_refused(model, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(
        {"blocks.0.modulation.lora_A.weight": A, "blocks.0.modulation.lora_B.weight": B}, file
    )
    refused(
        "blocks.0.modulation",
        "a Parameter",
        "only linear layers",
        call=lambda: read_lora(model, file),
    )
