"""The benchmark's figures are JSON lines, one a part, on any machine."""

import json

import pytest

from mmdit.diagnostics.families import family
from mmdit.scripts import benchmark


def test_each_part_gives_its_figures(tmp_path, capsys):
    words = ["--device", "cpu", "--workers", "1", "--pictures", "6", "--items", "512", "--batch_size", "2", "--seconds", "0.1"]
    assert benchmark.main([*words, "--folder", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["part"] for row in rows] == ["cache", "encode", "decode", *["loader"] * 4]
    cache, encode, decode, *loader = rows
    assert cache["ratio"] == round(cache["ratio"], 3) > 0 and cache["decode_per_s"] > 0 and encode["images_per_s"] > 0 < decode["images_per_s"]
    assert [row["from"] for row in loader] == ["writing the cache", "memory", "files", "packed"]
    assert all(row["items_per_s"] > 0 for row in loader)


def test_training_and_sampling_are_measured_and_told_by_family(capsys):
    words = ["--device", "cpu", "--shapes", "2x2x4x4", "--model", "dim=32", "depth=1", "num_heads=2", "--repeats", "2", "--steps", "2"]
    assert benchmark.main(["--parts", "train", "sample", "--profile", *words]) == 0
    train, profile, sample = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert train["ms_min"] <= train["ms"] <= train["ms_max"] and train["per_s"] == pytest.approx(2e3 / train["ms"], rel=0.01)
    assert train["parameters"] > 1000 and train["shape"] == [2, 2, 4, 4] and sample["steps"] == 2 and sample["ms"] > 0
    assert profile["ms"]["matmul"] > 0 and sum(profile["ms"].values()) > 0


def test_kernels_belong_to_families():
    names = {"nvjet_sm90_tst_192x192_64x3_2x1_v_bz_coopB_NNN": "matmul", "_group_kernel": "attention", "_text_kernel": "attention",
             "triton_red_fused__to_copy__unsafe_view_mul_sum_0": "norm/elementwise", "_backward": "norm/elementwise",
             "void at::native::multi_tensor_apply_kernel<FusedAdam>": "optimizer", "Memcpy DtoD": "copy",
             "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16": "attention"}  # fmt: skip
    assert {name: family(name) for name in names} == names


def test_a_wrong_shape_is_told(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--parts", "train", "--shapes", "8x16x16"])
    assert "'8x16x16' is no shape" in capsys.readouterr().err
