"""The benchmark's figures are JSON lines, one a part, on any machine."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import model as speed
from benchmarks.command import OF_PARTS
from benchmarks.families import family
from mmdit.scripts import benchmark
from mmdit.scripts.parsers import parser_of
from mmdit.training.distributed import World
from mmdit.training.parallel import ParallelConfig
from tests.helpers.tiny import refused

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "--device",
    "cpu",
    "--shapes",
    "2x2x4x4",
    "--model",
    "dim=32",
    "depth=1",
    "num_heads=2",
    "--repeats",
    "2",
]


@pytest.mark.thorough
def test_reading_is_measured_from_everywhere(tmp_path, capsys):
    words = ["--device", "cpu", "--items", "512", "--workers", "1", "--seconds", "0.02"]
    assert benchmark.main([*words, "--folder", str(tmp_path), "--parts", "loader"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["from"] for row in rows] == ["writing the cache", "memory", "files", "packed"]
    assert all(row["items_per_s"] > 0 for row in rows)


@pytest.mark.thorough
def test_each_part_gives_its_figures(tmp_path, capsys):
    words = [
        "--device",
        "cpu",
        "--workers",
        "1",
        "--pictures",
        "6",
        "--items",
        "512",
        "--batch_size",
        "2",
        "--seconds",
        "0.1",
    ]
    assert benchmark.main([*words, "--folder", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["part"] for row in rows] == ["cache", "encode", "decode", *["loader"] * 4]
    cache, encode, decode, *loader = rows
    assert (
        cache["ratio"] == round(cache["ratio"], 3) > 0
        and cache["decode_per_s"] > 0
        and encode["images_per_s"] > 0 < decode["images_per_s"]
    )
    assert encode["shape"] == [2, 1, 3, 256, 256] and encode["parameters"] > 1000
    for told in (encode, decode):
        assert told["ms_min"] <= told["ms"] <= told["ms_max"] and told["gflop"] > 0
        assert told["images_per_s"] == pytest.approx(2e3 / told["ms"], rel=0.01)
    assert [row["from"] for row in loader] == ["writing the cache", "memory", "files", "packed"]
    assert all(row["items_per_s"] > 0 for row in loader)


@pytest.mark.thorough
def test_training_and_sampling_are_measured_and_told_by_family(capsys):
    assert benchmark.main(["--parts", "train", "sample", "--profile", "--steps", "2", *TINY]) == 0
    train, profile, sample = (
        json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")
    )
    assert train["ms_min"] <= train["ms"] <= train["ms_max"] and train["per_s"] == pytest.approx(
        2e3 / train["ms"], rel=0.01
    )
    assert (
        train["parameters"] > 1000
        and train["shape"] == [2, 2, 4, 4]
        and sample["steps"] == 2
        and sample["ms"] > 0
    )
    assert (
        train["tokens"] == 32
        and train["gpus"] == 1
        and train["parameters"] == sample["parameters"]
        and train["gflop"] > 0
    )
    assert profile["ms"]["matmul"] > 0 and sum(profile["ms"].values()) > 0


@pytest.mark.thorough
def test_a_step_of_adapters_on_wan_is_measured(capsys, monkeypatch):
    monkeypatch.setitem(
        speed.SIZES,
        "1.3B",
        replace(speed.SIZES["1.3B"], dim=64, ffn_dim=64, num_heads=2, num_layers=2),
    )
    monkeypatch.setitem(speed.WAN, "1.3B", (8, 16, (1, 3, 4, 6)))
    words = ["--parts", "wan", "--wan", "1.3B", "--repeats", "2", "--device", "cpu"]
    assert (
        benchmark.main(
            [*words, "--profile", "--wan_model", "checkpointing=true", "--lora", "rank=2"]
        )
        == 0
    )
    wan, profile = (
        json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")
    )
    assert (
        wan["part"] == "wan"
        and wan["shape"] == [1, 3, 4, 6]
        and wan["gflop"] > 0
        and profile["part"] == "wan profile"
    )
    refused(capsys, benchmark.main, [*words, "--lora", "target_modules=[nothing]"], "nothing")


@pytest.mark.slow
def test_two_processes_train_together_and_one_tells():
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "mmdit.scripts.benchmark",
        "--parts",
        "train",
        "--parallel",
        "reduce=bfloat16",
        *TINY,
    ]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "VTP"))),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert (
        row["gpus"] == 2
        and row["shape"] == [2, 2, 4, 4]
        and row["per_s"] == pytest.approx(2 * 2e3 / row["ms"], rel=0.01)
    )
    assert row["clips_per_day"] == pytest.approx(86400 * row["per_s"], rel=0.01)


def test_an_option_of_a_part_that_is_not_measured_is_refused(capsys):
    for words, expected in (
        (["--steps", "5"], "--steps is 5, but --parts is cache encode loader: it is of sample"),
        (["--parts", "sample", "--compile"], "--compile is given, but --parts is sample"),
        (["--parts", "wan", "--model", "dim=32"], "--model is dim=32, but --parts is wan"),
        (["--parts", "train", "--vtp", "S"], "--vtp is S, but --parts is train"),
    ):
        refused(capsys, benchmark.main, words, expected)
    everywhere = {"parts", "device"}
    names = {action.dest for action in parser_of(benchmark.main)._actions} - {"help"}
    assert set(OF_PARTS) == names - everywhere
    assert {part for parts in OF_PARTS.values() for part in parts} == set(speed.PARTS)


def test_other_parts_refuse_torchrun(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(
        capsys,
        benchmark.main,
        ["--parts", "train", "encode", *TINY],
        "--parts has encode under torchrun, where only train is",
    )


def test_what_is_measured_is_what_gets_reduced(monkeypatch):
    """Else every process would train a model of its own, and faster."""
    seen, world = [], World(rank=1)
    monkeypatch.setattr(
        speed, "wrap", lambda learner, *how: lambda *inputs: seen.append(how) or learner(*inputs)
    )
    sections = {
        "model": {"dim": 16, "depth": 1, "num_heads": 2},
        "parallel": {"reduce": "bfloat16"},
    }
    bench = speed.Bench((2, 1, 2, 2), world, False, **sections)
    bench.step()
    assert seen == [
        (world, ParallelConfig(reduce="bfloat16"))
    ] and bench.batch.indices.tolist() == [2, 3]


def test_kernels_belong_to_families():
    names = {
        "nvjet_sm90_tst_192x192_64x3_2x1_v_bz_coopB_NNN": "matmul",
        "_group_kernel": "attention",
        "_text_kernel": "attention",
        "triton_red_fused__to_copy__unsafe_view_mul_sum_0": "norm/elementwise",
        "_backward": "norm/elementwise",
        "void at::native::multi_tensor_apply_kernel<FusedAdam>": "optimizer",
        "Memcpy DtoD": "copy",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16": "attention",
    }
    assert {name: family(name) for name in names} == names


def test_a_wrong_shape_is_told(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--parts", "train", "--shapes", "8x16x16"])
    assert "'8x16x16' is no shape" in capsys.readouterr().err
