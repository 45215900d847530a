"""Adapter files of PEFT, Diffusers and LyCORIS mean here what they mean to the library that wrote
them, and ours mean to ComfyUI and PEFT what they mean here: kinds by options by writers."""

import json
import math
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdit.adapters import LoRAConfig, adapters, inject, merge, remove
from mmdit.interop.lora_formats import load_lora, read_lora, save_lora
from mmdit.interop.wan_weights import save_dit
from tests.helpers import lora_writers
from tests.helpers.lora_writers import CASES, LAYERS, RECORDED, base, place, seen
from tests.helpers.thorough import thorough
from tests.test_wan import refused

KINDS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"type": "dora"},
    "dora_rslora": {"type": "dora", "rslora": True},
    "lokr": {"type": "lokr", "factor": 4},
    "lokr_whole": {"type": "lokr", "full_second": True},
    "lokr_both": {"type": "lokr", "factor": 4, "rank": 1, "decompose_first": True},
}


def changes_of(path) -> dict[str, torch.Tensor]:
    """Return what a file changes in the weights, as we read it."""
    model, before = base(), base()
    load_lora(model, path)
    merge(model)
    result = {
        name: model.get_submodule(name).weight.detach() - before.get_submodule(name).weight.detach()
        for name in LAYERS
    }
    biases = {
        f"{name}.bias": (
            model.get_parameter(f"{name}.bias").detach()
            - before.get_parameter(f"{name}.bias").detach()
        )
        for name in LAYERS
    }
    return result | {name: change for name, change in biases.items() if change.any()}


def assert_same(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize("name", CASES)
def test_recorded_files_mean_what_their_writer_merged(name):
    folder = RECORDED / name
    expected = load_file(folder / "seen.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(seen(changes_of(place(folder))), expected)
        if name.startswith("peft"):  # and the file, named instead of its folder
            assert_same(seen(changes_of(folder / "adapter_model.safetensors")), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_files_of_the_installed_libraries_mean_what_they_merge(name, tmp_path):
    library = name.partition("_")[0]
    pytest.importorskip(library)
    if library == "diffusers":  # which makes adapters with peft
        pytest.importorskip("peft")
    (tmp_path / name).mkdir()
    merged = CASES[name](tmp_path / name)
    assert_same(changes_of(place(tmp_path / name)), merged)


SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 5}


@pytest.mark.parametrize(
    "words, change",
    {
        ("peft_type is 'LOHA'",): {"peft_type": "LOHA"},
        ("init_lora_weights is 'pissa'", "changes the base"): {"init_lora_weights": "pissa"},
        ("init_lora_weights is 'olora'",): {"init_lora_weights": "olora"},
        ("init_lora_weights is 'pissa_niter_4'",): {"init_lora_weights": "pissa_niter_4"},
        ("bias is 'lora_only'",): {"bias": "lora_only"},
        ("modules_to_save is ['head']",): {"modules_to_save": ["head"]},
        ("use_qalora is True",): {"use_qalora": True},
        ("layer_replication",): {"layer_replication": [[0, 1]]},
        ("to_come is 0.5", "not known here"): {"to_come": 0.5},
        ("use_dora", "no magnitude"): {"use_dora": True},
        ("lora_alpha is nan",): {"lora_alpha": math.nan},
        ("lora_alpha is 0",): {"lora_alpha": 0},
        ("lora_alpha is '5'",): {"lora_alpha": "5"},
        ("alpha_pattern is [1]",): {"alpha_pattern": [1]},
        ("alpha_pattern['q'] is None",): {"alpha_pattern": {"q": None}},
        ("'(q'", "no regular expression"): {"alpha_pattern": {"(q": 1}},
        ("(.+)+!', which repeats a group",): {"alpha_pattern": {"(.+)+!": 1}},
        ("(a|a){9}', which repeats",): {"rank_pattern": {"(a|a){9}": 1}},
        ("which repeats", "more than 4 parts"): {"rank_pattern": {".*" * 30 + "!": 1}},
        ("(?x:(.+) +)', which",): {"rank_pattern": {"(?x:(.+) +)": 1}},
        ("the rank 3", "tensors have 2"): {"rank_pattern": {"q": 3}},
        ("says LOKR",): {"peft_type": "LOKR"},
    }.items(),
)
def test_settings_that_are_not_understood_are_refused_by_name(tmp_path, words, change):
    save_file(
        load_file(RECORDED / "peft_plain" / "adapter_model.safetensors"),
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS | change))
    refused("adapter_config.json", *words, call=lambda: read_lora(base(), tmp_path))
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(SETTINGS | dict.fromkeys(change, None) | {"peft_type": "LORA"})
    )
    if "lora_alpha" not in change:
        assert len(read_lora(base(), tmp_path).updates) == 2  # what is off changes nothing


def test_a_config_that_is_none_and_one_that_is_missing(tmp_path):
    save_file(
        load_file(RECORDED / "peft_plain" / "adapter_model.safetensors"),
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.warns(UserWarning, match="adapter_config.json is not beside it"):
        read_lora(base(), tmp_path / "adapter_model.safetensors")
    for text in ("[", "[1]", "[" * 100_000):
        (tmp_path / "adapter_config.json").write_text(text)
        refused(
            "adapter_config.json", "config of an adapter", call=lambda: read_lora(base(), tmp_path)
        )


def test_a_header_that_is_no_config(tmp_path):
    file = tmp_path / "x.safetensors"
    tensors = load_file(RECORDED / "lycoris_plain" / "lycoris.safetensors")
    for text in ("[", "[1]", "[" * 100_000):
        save_file(tensors, file, {"lora_adapter_metadata": text})
        refused(str(file), "no config of an adapter", call=lambda: read_lora(base(), file))


# ── what we write ─────────────────────────────────────────────────────────────────────────────
def trained(kind: str):
    model = base()
    options = {"rank": 2, "alpha": 5.0, "target_modules": LAYERS} | KINDS[kind]
    inject(model, LoRAConfig(enabled=True, **options))
    lora_writers.shake(
        p for layer in adapters(model).values() for p in layer.adapter_parameters().values()
    )
    return model


def as_comfy_computes(path) -> dict[str, torch.Tensor]:
    """Return the change of each weight by ComfyUI's rules: alpha / rank, or 1 without alpha or
    where no factor has a rank; lengths of DoRA over those of W."""
    stored, model, result = load_file(path), base(), {}
    for name in LAYERS:
        weight = model.get_submodule(name).weight.detach()
        own = {}
        for start in (f"diffusion_model.{name}.", f"lora_unet_{name.replace('.', '_')}."):
            own |= {
                key.removeprefix(start): value
                for key, value in stored.items()
                if key.startswith(start)
            }
        rank = None
        if "lokr_w1" in own:
            second = own.get("lokr_w2")
            if second is None:
                rank, second = len(own["lokr_w2_b"]), own["lokr_w2_a"] @ own["lokr_w2_b"]
            change = torch.kron(own["lokr_w1"], second)
        else:
            up, down = (
                own[a] if a in own else own[b]
                for a, b in (
                    ("lora_B.weight", "lora_up.weight"),
                    ("lora_A.weight", "lora_down.weight"),
                )
            )
            rank, change = len(down), up @ down
        if "alpha" in own and rank:
            change = change * own["alpha"] / rank
        if "dora_scale" in own:
            change = (weight + change) * (
                own["dora_scale"] / weight.norm(dim=1, keepdim=True)
            ) - weight
        result[name] = change
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ["comfy", "kohya", "peft", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, *thorough(torch.bfloat16)])
def test_what_we_write_is_what_was_trained(tmp_path, kind, format, dtype):
    model = trained(kind)
    path = tmp_path / ("saved" if format == "peft" else "saved.safetensors")
    if kind.startswith("lokr") and format in ("peft", "diffusers"):
        refused("hold no LoKr", call=lambda: save_lora(model, path, format))
        return
    told = (
        pytest.warns(UserWarning, match="ComfyUI reads")
        if "dora" in kind and format == "kohya"
        else warnings.catch_warnings()
    )
    with told:
        save_lora(model, path, format, dtype)
    stored = load_file(path / "adapter_model.safetensors" if format == "peft" else path)
    factors = {name: tensor for name, tensor in stored.items() if not name.endswith(".alpha")}
    assert {tensor.dtype for tensor in factors.values()} == {dtype}
    plain = base()
    expected = {
        name: layer.merged_weight().detach() - plain.get_submodule(name).weight.detach()
        for name, layer in adapters(model).items()
    }
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert_same(changes_of(path), expected, tolerance)
    if format == "comfy" or format == "kohya" and "dora" not in kind:
        assert_same(as_comfy_computes(path), expected, tolerance)


def test_lengths_of_dora_are_of_the_kind_that_a_file_says(tmp_path):
    """Files of other tools, and those written before there was a mark, have lengths of W + ΔW."""
    model = trained("dora")
    save_lora(model, tmp_path / "new.safetensors", "comfy")
    tensors = load_file(tmp_path / "new.safetensors")
    for name, layer in adapters(model).items():
        assert not torch.allclose(
            tensors[f"diffusion_model.{name}.dora_scale"][:, 0], layer.lora_magnitude, rtol=0.05
        )
        tensors[f"diffusion_model.{name}.dora_scale"] = layer.lora_magnitude.detach()[
            :, None
        ].contiguous()
    save_file(tensors, tmp_path / "old.safetensors")
    assert_same(changes_of(tmp_path / "old.safetensors"), changes_of(tmp_path / "new.safetensors"))


@pytest.mark.parametrize("format", ["comfy", "peft"])
def test_whoever_may_read_files_beside_it_may_read_a_lora_and_nothing_else_is_left(
    tmp_path, format
):
    killed = tmp_path / ".writing-0123456789abcdef.tmp"
    killed.mkdir()
    (killed / "half.safetensors").touch()
    (tmp_path / "beside").touch()
    model = base()
    inject(model, LoRAConfig(enabled=True, rank=2, target_modules=("cross_attn.k",)))
    path = tmp_path / ("x.safetensors" if format == "comfy" else "x")
    save_lora(model, path, format)
    assert {one.name for one in tmp_path.iterdir()} == {path.name, "beside"}
    weights = path if path.is_file() else path / "adapter_model.safetensors"
    assert weights.stat().st_mode == (tmp_path / "beside").stat().st_mode


def test_numbers_beyond_the_type_are_not_written(tmp_path):
    model = trained("lora")
    with torch.no_grad():
        adapters(model)[LAYERS[0]].lora_B.fill_(1e6)
    refused(
        "not finite in float16",
        call=lambda: save_lora(model, tmp_path / "x.safetensors", "comfy", torch.float16),
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "dora_rslora"])
def test_peft_reads_our_folders_the_same(tmp_path, kind):
    peft = pytest.importorskip("peft")
    model = trained(kind)
    save_lora(model, tmp_path / "saved", "peft")
    import diffusers

    save_dit(remove(trained(kind)), tmp_path / "base", "diffusers")
    theirs = peft.PeftModel.from_pretrained(
        diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "base"), str(tmp_path / "saved")
    )
    theirs = theirs.merge_and_unload()
    ours = merge(model)
    names = {
        "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
        "blocks.1.ffn.0": "blocks.1.ffn.net.0.proj",
    }
    assert_same(
        *(
            {name: part.get_submodule(own).weight for name, own in pairs.items()}
            for part, pairs in ((theirs, names), (ours, {name: name for name in names}))
        )
    )
