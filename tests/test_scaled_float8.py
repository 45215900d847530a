"""ComfyUI's `fp8_scaled` files are read as they are: codes times scales, to the bit."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdit.adapters import LoRAConfig, inject
from mmdit.interfaces import LatentSpec
from mmdit.interop.inspection import inspect_weights
from mmdit.interop.wan_weights import load_denoiser, load_dit, save_dit
from mmdit.interop.weights_in_files import unpack_weights
from mmdit.models.wan_denoiser import WanModelConfig
from mmdit.nn.stored_weights import StoredWeight
from mmdit.text_encoders import build_text_encoder
from mmdit.text_encoders.umt5 import UMT5Config
from mmdit.weights import Checkpoint
from tests.test_umt5 import GOLDEN, write_tokenizer
from tests.test_wan import TINY, random_model, refused

LARGEST = 448.0  # of e4m3
ONE_HEAD = replace(TINY, dim=128, num_heads=1)  # as wide as heads are without a config.json
PREFIX = "model.diffusion_model."


def scaled(weight: Tensor, rows: bool = False) -> tuple[Tensor, Tensor]:
    """Return the codes and the scale of a matrix: one number, or one for each row."""
    size = weight.abs().amax(1) if rows else weight.abs().amax()
    scale = size / LARGEST
    return (weight / (scale[:, None] if rows else scale)).to(torch.float8_e4m3fn), scale


def written(path: Path, name: str = "scale_weight", rows: bool = False, shape: tuple = ()):
    """Write a small Wan transformer as ComfyUI does, the matrices of its blocks as float8 with a
    scale; return what its weights are."""
    tensors, values = {}, {}
    for key, value in random_model(ONE_HEAD).state_dict().items():
        values[key] = value.half()
        tensors[PREFIX + key] = value.half()
        if key.startswith("blocks.") and value.ndim == 2 and key.endswith(".weight"):
            layer = PREFIX + key.removesuffix(".weight")
            codes, scale = scaled(value, rows)
            values[key] = codes.float() * (scale[:, None] if rows else scale)
            tensors[PREFIX + key] = codes
            tensors[f"{layer}.{name}"] = scale if rows else scale.reshape(shape)
            tensors[f"{layer}.scale_input"] = torch.ones(())
    tensors[f"{PREFIX}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(tensors, path)
    return values


@pytest.mark.parametrize(
    "layout",
    [{}, {"shape": (1,)}, {"name": "weight_scale"}, {"rows": True}],
    ids=["scalar", "vector", "new name", "rows"],
)
def test_weights_are_codes_times_scales_to_the_bit(tmp_path, layout):
    values = written(tmp_path / "x.safetensors", **layout)
    model = load_dit(tmp_path / "x.safetensors")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, values[name].float()), name
    half = load_dit(tmp_path / "x.safetensors", torch.bfloat16)
    weight = half.get_parameter("blocks.0.ffn.0.weight")
    assert torch.equal(weight, values["blocks.0.ffn.0.weight"].bfloat16())


def denoiser(path: Path, dtype: str):
    settings = WanModelConfig(name_or_path=str(path), dtype=dtype)
    return load_denoiser(settings, LatentSpec(ONE_HEAD.out_dim), ONE_HEAD.text_dim)


@pytest.mark.parametrize("rows", [False, True])
def test_float8_keeps_the_codes_of_the_file(tmp_path, rows):
    """Encoded once more, with a scale of each row, they would be other numbers."""
    path = tmp_path / "x.safetensors"
    values, stored = written(path, rows=rows), load_file(path)
    weights = dict(denoiser(path, "float8").named_parameters())
    kept = {name for name, weight in weights.items() if isinstance(weight, StoredWeight)}
    assert {PREFIX + name for name in kept} == set(Checkpoint(path).scales)
    for name in kept:
        assert torch.equal(weights[name].codes.float(), stored[PREFIX + name].float())
        assert torch.equal(weights[name].whole(), values[name].bfloat16())
        assert not weights[name].requires_grad


@pytest.mark.parametrize("in_file", [False, True])
def test_float8_keeps_the_codes_of_a_file_without_scales(tmp_path, in_file):
    path, values = tmp_path / "x.safetensors", dict(random_model(ONE_HEAD).state_dict())
    for name, value in values.items():
        if name.startswith("blocks.") and value.ndim == 2:
            values[name] = value.to(torch.float8_e4m3fn)
    save_file(values, path)
    model = load_dit(path, torch.bfloat16, encoding="float8", in_file=in_file)
    unpack_weights(model)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, values[name].to(weight.dtype)), name


def test_an_adapter_on_codes_is_that_on_the_weights_they_stand_for(tmp_path):
    path = tmp_path / "x.safetensors"
    written(path)
    gradients = []
    for dtype in ("float8", "bfloat16"):
        model = denoiser(path, dtype).requires_grad_(False)
        inject(model, LoRAConfig(enabled=True, rank=2, target_modules=("ffn.0", "q")), seed=0)
        layer = model.blocks[0].ffn[0]
        with torch.no_grad():
            for name, weight in layer.named_parameters():
                if name == "lora_B":
                    weight.fill_(0.01)
        x = torch.ones(3, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
        layer(x).float().square().sum().backward()
        gradients.append([x.grad, *(w.grad for w in layer.parameters() if w.grad is not None)])
    for kept, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, plain, rtol=0, atol=0)


def test_the_text_encoder_of_a_release_is_read_alike(tmp_path):
    """Of `umt5_xxl_fp8_e4m3fn_scaled`: the names of transformers, and the vocabulary as bytes."""
    tensors, plain = {}, load_file(GOLDEN / "official.safetensors")
    for name, value in list(plain.items()):
        if value.ndim == 2 and ".attn." in name:
            codes, scale = scaled(value)
            plain[name] = codes.float() * scale
            tensors |= {name: codes, name.removesuffix("weight") + "scale_weight": scale}
    save_file(plain, tmp_path / "plain.safetensors")
    save_file(plain | tensors, tmp_path / "scaled.safetensors")
    assert len(tensors) >= 16
    write_tokenizer(tmp_path / "tokens")
    read = []
    for name in ("plain", "scaled"):
        path, tokens = tmp_path / f"{name}.safetensors", tmp_path / "tokens"
        config = UMT5Config(name_or_path=str(path), tokenizer_path=str(tokens), dtype="float32")
        read.append(build_text_encoder(config)(["a small cat"]).embeddings)
    assert torch.equal(*read)


def test_what_is_read_is_written_as_any_model_is(tmp_path):
    values = written(tmp_path / "x.safetensors")
    save_dit(load_dit(tmp_path / "x.safetensors"), tmp_path / "whole")
    again = load_dit(tmp_path / "whole")
    for name, weight in again.named_parameters():
        assert torch.equal(weight, values[name].float())


@pytest.mark.parametrize(
    "change, words",
    [
        ({"blocks.0.ffn.0.scale_weight": torch.ones(3)}, "is quantised"),  # of blocks
        ({"blocks.0.ffn.0.weight_scale_2": torch.ones(())}, "is quantised"),  # NVFP4
        ({"blocks.0.ffn.0.weight": torch.ones(2, 2, dtype=torch.int8)}, "is quantised"),
        ({"blocks.0.nothing.scale_weight": torch.ones(())}, "is quantised"),
        ({"blocks.0.ffn.0.scale_weight": torch.tensor(torch.nan)}, "nan or infinity"),
    ],
)
def test_other_codes_and_broken_scales_are_refused(tmp_path, change, words):
    path = tmp_path / "x.safetensors"
    written(path)
    save_file(load_file(path) | {PREFIX + name: value for name, value in change.items()}, path)
    refused(words, call=partial(load_dit, path))


def test_a_scale_may_lie_in_another_shard_and_inspection_tells_of_them(tmp_path):
    path = tmp_path / "x.safetensors"
    values = written(path)
    tensors = load_file(path)
    path.unlink()
    scales = {name: value for name, value in tensors.items() if "scale" in name}
    rest = {name: value for name, value in tensors.items() if name not in scales}
    save_file(rest, tmp_path / "x-00001-of-00002.safetensors")
    save_file(scales, tmp_path / "x-00002-of-00002.safetensors")
    name = "blocks.1.ffn.2.weight"
    assert torch.equal(dict(Checkpoint(tmp_path).tensors())[PREFIX + name], values[name])
    report = inspect_weights(tmp_path)
    assert report["kind"] == "Wan transformer" and not report["quantised"]
    assert report["scaled"] == len(Checkpoint(tmp_path).scales)
