"""What is told of weight files from their headers."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mmdit.adapters import LoRAConfig, adapters, inject, lora_state
from mmdit.interfaces import LatentSpec
from mmdit.interop.wan_weights import save_dit
from mmdit.models import VideoMMDiTConfig, build_model
from mmdit.models.wan import WanConfig
from mmdit.scripts import inspect_weights
from mmdit.training import checkpoint
from mmdit.weights import Checkpoint
from tests.helpers.tiny import refused
from tests.test_wan import GOLDEN, TINY, VARIANTS, random_model
from tests.test_wan_files import hollow_release


def told(capsys, *words) -> dict:
    assert inspect_weights.main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_transformer(tmp_path, capsys, layout):
    model = random_model(VARIANTS["flf2v"])
    save_dit(model, tmp_path / "wan", layout, shard_bytes=50_000)
    report = told(capsys, tmp_path / "wan")
    assert (report["kind"], report["variant"]) == ("Wan transformer", "FLF2V-14B")
    assert (report["layout"], report["prefix"]) == (layout, "")
    assert (
        report["parameters"] == sum(p.numel() for p in model.parameters()) == report["bytes"] // 4
    )
    assert report["tensors"] == len(model.state_dict()) and len(report["files"]) > 1
    assert sum(row["parameters"] for row in report["groups"]) == report["parameters"]
    assert (
        sum(row["count"] for row in report["groups"]) == report["tensors"] > len(report["groups"])
    )
    inspect_weights.main([str(tmp_path / "wan")])
    assert "FLF2V-14B" in (text := capsys.readouterr().out) and "blocks.*." in text


def test_experts_prefixes_scales_and_adapters(tmp_path, capsys):
    for name in ("transformer", "transformer_2"):
        save_dit(random_model(TINY), tmp_path / "pair" / name, "diffusers")
    report = told(capsys, tmp_path / "pair")
    assert list(report["experts"]) == ["high", "low"] and report["experts"]["low"]["path"].endswith(
        "transformer_2"
    )
    assert told(capsys, tmp_path / "pair", "--expert", "high")["kind"] == "Wan transformer"
    tensors = {
        f"model.diffusion_model.{k}": v.clone() for k, v in random_model(TINY).state_dict().items()
    }
    save_file({**tensors, "scaled_fp8": torch.ones(1)}, tmp_path / "comfy.safetensors")
    report = told(capsys, tmp_path / "comfy.safetensors")
    assert report["prefix"] == "model.diffusion_model." and not report["quantised"]
    report = told(capsys, GOLDEN / "lora_kohya.safetensors")
    assert (report["kind"], report["prefix"], report["layers"], report["alphas"]) == (
        "LoRA",
        "lora_unet_",
        20,
        20,
    )
    assert report["ranks"] == {"4": 20}
    inspect_weights.main([str(GOLDEN / "lora_comfy.safetensors")])
    assert "LoRA" in capsys.readouterr().out


def test_headers_are_enough(tmp_path, capsys, monkeypatch):
    """28.6 GB of holes: nothing but their headers is looked at."""
    count = hollow_release(tmp_path / "wan", WanConfig(5120, 13824, 40, 40), shards=6)
    monkeypatch.setattr(Checkpoint, "tensors", lambda self: pytest.fail("a tensor was read"))
    report = told(capsys, tmp_path / "wan")
    assert (
        report["parameters"] == count == 14_288_491_584
        and report["bytes"] == 2 * count
        and len(report["files"]) == 6
    )
    assert report["variant"] == "T2V-14B or a T2V-A14B expert" and report["dtypes"] == {
        "BF16": 1095
    }
    part = told(capsys, tmp_path / "wan" / report["files"][1])  # one shard alone is told, too
    assert part["tensors"] == 183


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.uint16])
def test_bytes_are_those_of_the_numbers_in_files_of_either_kind(tmp_path, capsys, dtype):
    tensors = {"a": torch.zeros(5, 3, dtype=dtype)}
    torch.save(tensors, tmp_path / "a.pth")
    save_file(tensors, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        assert told(capsys, tmp_path / name)["bytes"] == tensors["a"].nbytes


def test_our_own_files_and_what_is_none(tmp_path, capsys):
    assert (
        told(capsys, "VTP/checkpoints/vtp_tiny_f16d64/model.safetensors")["kind"] == "VTP tokenizer"
    )
    for name in ("moving_shapes_64", "moving_shapes_448x256"):
        assert told(capsys, f"assets/{name}.safetensors")["kind"] == "mmdit model"
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    assert told(capsys, tmp_path / "x.safetensors")["kind"] == "unknown"
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(SystemExit) as caught:
        inspect_weights.main([str(tmp_path / "x.safetensors")])
    assert caught.value.code and "cannot be read" in (capsys.readouterr().err + str(caught.value))


def test_checkpoints_runs_and_what_lies_beside_adapters(tmp_path, capsys):
    """A run is its latest checkpoint, file by file; a base with adapters is both; differences alone
    are no adapter."""
    run = tmp_path / "runs/r"
    torch.manual_seed(0)
    model = build_model(VideoMMDiTConfig(dim=16, depth=1, num_heads=2), 3, 5)
    inject(model, LoRAConfig(enabled=True, rank=2))
    for step in (1, 2):
        files = {
            "model": {f"model.{name}": value for name, value in model.state_dict().items()},
            "lora": lora_state(model),
        }
        checkpoint.save(run, checkpoint.Meta(step, {}, LatentSpec(3), "x"), files, 0)
    for path, step in ((run, 2), (run / "checkpoints/step_00000001", 1)):
        report = told(capsys, path)
        assert report["kind"] == f"checkpoint of step {step}"
        kinds = {name: part["kind"] for name, part in report["parts"].items()}
        assert kinds == {"lora": "LoRA", "model": "mmdit model with LoRA"}
        assert report["parts"]["lora"]["ranks"] == {"2": len(adapters(model))}
        inspect_weights.main([str(path)])
        assert (
            "mmdit model with LoRA" in (text := capsys.readouterr().out) and f"step {step}" in text
        )
    (tmp_path / "none/checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit):
        inspect_weights.main([str(tmp_path / "none")])
    assert "run without a whole checkpoint" in capsys.readouterr().err
    save_file({}, tmp_path / "empty.safetensors")
    refused(capsys, inspect_weights.main, [tmp_path / "empty.safetensors"], "holds no tensor")
    tensors = {"x.lora_A.weight": torch.tensor(1.0), "x.codes": torch.zeros(3, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "number.safetensors")
    report = told(capsys, tmp_path / "number.safetensors")
    assert (report["ranks"], report["bytes"]) == ({}, 4 + 3)
    save_file(
        {
            "diffusion_model.blocks.0.norm3.diff": torch.ones(4),
            "diffusion_model.head.head.diff_b": torch.ones(2),
        },
        tmp_path / "d.safetensors",
    )
    report = told(capsys, tmp_path / "d.safetensors")
    assert (report["kind"], report["layers"], report["prefix"]) == (
        "whole differences",
        2,
        "diffusion_model.",
    )
