"""Budgets and logits of adapters against the recorded ones and against their definitions."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdit.adapters import adapters
from mmdit.commands import inspect_adapter as adapter_report
from mmdit.diagnostics.adapter_norms import Change, delta_budget, spectral_norm, summarise
from mmdit.diagnostics.attention_statistics import Statistics, observed
from mmdit.interfaces import TextTokens
from mmdit.interop.lora_formats import load_lora
from mmdit.models.wan import WanDiT
from mmdit.nn.attention import attend, observers
from mmdit.scripts import inspect_adapter
from mmdit.training import checkpoint
from tests.helpers.tiny import Workshop, refused
from tests.test_adapters import KINDS, adapted, base
from tests.test_wan import GOLDEN, INPUTS, META, TINY


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def wan():
    model = WanDiT(TINY, collapse_padding=False)
    model.load_state_dict(load_file(GOLDEN / "official.safetensors"))
    return model.eval()


def test_the_budget_is_the_recorded_one(wan):
    load_lora(wan, GOLDEN / "lora_kohya.safetensors")
    report = summarise(delta_budget(adapters(wan).items()))
    recorded = META["lora"]["budget"]
    assert report["layers"].keys() == recorded.keys()
    for name, row in recorded.items():
        assert report["layers"][name]["ratio"] == pytest.approx(row["fro_ratio"], rel=1e-6)
        assert report["layers"][name]["max_spectral_ratio"] == pytest.approx(
            row["spec_ratio"], rel=1e-5
        )
    assert report["total"]["ratio"] == pytest.approx(META["lora"]["total_fro_ratio"], rel=1e-6)
    assert (
        sum(row["count"] for row in report["blocks"].values())
        == sum(row["count"] for row in report["kinds"].values())
        == len(recorded)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_an_update_are_those_of_the_whole_matrix(kind):
    model = adapted(kind)
    for change in delta_budget(adapters(model).items()):
        layer = model.get_submodule(change.layer)
        delta = (layer.merged_weight() - layer.weight).double()
        assert change.delta == pytest.approx(delta.norm().item(), rel=1e-5)
        assert change.spectral_delta == pytest.approx(
            torch.linalg.matrix_norm(delta, 2).item(), rel=1e-5
        )
        assert change.spectral_weight == pytest.approx(
            torch.linalg.matrix_norm(layer.weight.double(), 2).item(), rel=1e-9
        )


def test_large_matrices_have_their_norm_from_a_few_products():
    torch.manual_seed(0)
    matrix = torch.randn(1100, 1300)
    assert spectral_norm(matrix) == pytest.approx(
        torch.linalg.matrix_norm(matrix, 2).item(), rel=3e-3
    )


def test_a_budget_adds_squares():
    report = summarise(
        [
            Change("blocks.0.q", 3.0, 0.3, 1.0, 0.5),
            Change("blocks.1.q", 4.0, 0.4, 1.0, 0.2),
            Change("head", 12.0, 0.0, 1.0, 0.0),
        ]
    )
    assert report["total"]["ratio"] == pytest.approx(0.5 / 13) and report["kinds"]["blocks.*.q"][
        "ratio"
    ] == pytest.approx(0.1)
    assert (
        report["blocks"]["1"]["max_spectral_ratio"] == 0.2
        and report["blocks"]["outside"]["ratio"] == 0
    )


def test_the_probe_gives_the_recorded_logits(wan):
    with observed(wan) as found, torch.no_grad():
        wan(*INPUTS)
    assert not observers, "nothing is left behind"
    for row in META["attention_probe"]:
        own = found[f"blocks.{row['block']}.{row['kind']}_attn"].result()
        for name in ("logit_std", "max_logit", "max_abs_logit", "mean_entropy"):
            assert own[name] == pytest.approx(row[name], rel=2e-4), (
                row["block"],
                row["kind"],
                name,
            )


def test_weight_on_padding_is_measured_where_padding_is_attended_to(wan):
    wan.collapse_padding = True
    with observed(wan) as found, torch.no_grad():
        wan(*INPUTS)
    mass = found["blocks.0.cross_attn"].result()["padding_mass"]
    assert (
        all(0.01 < value < 1 for value in mass)
        and found["blocks.0.self_attn"].result()["padding_mass"] == [0.0] * 4
    )
    statistics = Statistics(2)
    torch.manual_seed(0)
    q, k = torch.randn(3, 2, 5, 8), torch.randn(3, 2, 4, 8)
    valid = torch.tensor([True, True, False, True]).expand(3, 1, 1, 4)
    statistics.add(q, k, valid)
    logits = (q @ k.transpose(-1, -2) / 8**0.5)[..., [0, 1, 3]]
    assert statistics.result()["max_logit"] == pytest.approx(
        logits.transpose(0, 1).flatten(1).amax(1).tolist()
    )
    assert statistics.result()["logit_std"] == pytest.approx(
        logits.transpose(0, 1).flatten(1).std(1).tolist()
    )
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1).mean((0, 2))
    assert (
        statistics.result()["mean_entropy"] == pytest.approx(entropy.tolist())
        and attend(q, k, k, valid).isfinite().all()
    )


def test_every_attention_of_our_model_is_seen_head_by_head():
    model = base()
    text = TextTokens(torch.randn(2, 3, 8), torch.tensor([[True, True, False], [True, True, True]]))
    with observed(model) as found, torch.no_grad():
        model(torch.randn(2, 3, 4, 6, 3), torch.tensor([100.0, 900.0]), text)
    kinds = {name.rpartition(".")[2] for name in found}
    assert kinds == {"spatial", "temporal", "cross"} and len(found) == 9
    assert all(len(statistics.result()["logit_std"]) == 2 for statistics in found.values())
    json.dumps({name: statistics.result() for name, statistics in found.items()})


def test_a_base_that_is_damaged_or_of_another_network_is_one_sentence(tmp_path, capsys):
    adapter = str(GOLDEN / "lora_kohya.safetensors")
    words = ["--adapter", adapter, "--base", str(tmp_path / "base.safetensors")]
    (tmp_path / "base.safetensors").write_bytes(b"half")
    refused(capsys, inspect_adapter.main, words, "cannot be read as safetensors")
    save_file({"patch_embedding.weight": torch.ones(2)}, tmp_path / "base.safetensors")
    refused(
        capsys, inspect_adapter.main, words, "is no Wan transformer: its tensors have other names"
    )


def coded(weights: dict, dtype: torch.dtype, scale: str) -> dict:
    """Return weights whose matrices of blocks are codes, each with a scale of this name."""
    result = {}
    for name, weight in weights.items():
        result[name] = weight
        if weight.ndim == 2 and name.startswith("blocks."):
            largest = weight.abs().max() / 100
            result[name] = (weight / largest).to(dtype)
            result |= {name.removesuffix("weight") + scale: largest.reshape(1)} if scale else {}
    return result


@pytest.mark.parametrize(
    ("dtype", "scale", "expected"),
    [
        (torch.int8, "weight_scale", "is quantised: "),
        (torch.float8_e5m2, "scale_weight", "is quantised: "),
        (torch.float8_e4m3fn, "weight_scale_inv", "unknown tensors, first blocks.0."),
        (torch.int8, "", "holds int8, must hold real numbers"),
        (None, "", "lacks 1 tensors, first blocks.0.self_attn.q.weight"),
    ],
)
def test_a_base_that_no_model_is_made_of_is_not_measured_either(
    tmp_path, capsys, monkeypatch, dtype, scale, expected
):
    """Codes are no weights, and of what is not there no change is counted: the ratio would be any,
    and pass each limit."""
    weights = load_file(GOLDEN / "official.safetensors")
    if dtype is None:
        del weights["blocks.0.self_attn.q.weight"]
    else:
        weights = coded(weights, dtype, scale)
    base = tmp_path / "base.safetensors"
    save_file(weights, base)
    monkeypatch.setattr(adapter_report, "infer_config", lambda *_: TINY)
    words = ["--base", base, "--adapter", GOLDEN / "lora_kohya.safetensors", "--max_ratio", 1]
    refused(capsys, inspect_adapter.main, words, expected)


def test_whole_differences_are_measured_beside_updates(tmp_path, capsys, monkeypatch):
    """Of distilled models: a limit that looks at the updates alone would pass them."""
    base = str(GOLDEN / "official.safetensors")
    weights, k = load_file(base), "blocks.0.self_attn.q"
    changes = {f"{k}.weight": "diff", f"{k}.bias": "diff_b", "blocks.0.norm3.weight": "diff"}
    tensors = {}
    for name, end in changes.items():
        tensors[f"diffusion_model.{name.rpartition('.')[0]}.{end}"] = 2 * weights[name]
    save_file(tensors, tmp_path / "x.safetensors")
    monkeypatch.setattr(adapter_report, "infer_config", lambda *_: TINY)
    words = ["--base", base, "--adapter", str(tmp_path / "x.safetensors"), "--out", str(tmp_path)]
    assert inspect_adapter.main(words) == 0
    report = json.loads((tmp_path / "report.json").read_text())["budget"]
    assert report["layers"].keys() == changes.keys()
    for row in (report["total"], *report["layers"].values()):
        assert row["ratio"] == pytest.approx(2) == pytest.approx(row["max_spectral_ratio"])
    assert inspect_adapter.main([*words, "--max_ratio", "1.9"]) == 1


def test_differences_over_a_run_are_measured_against_what_was_before(shop, tmp_path):
    run = shop.train("for_differences", "train.max_steps=1")
    weights = checkpoint.load_weights(run).tensors
    name = "blocks.0.spatial.q.weight"
    change = 3 * weights[f"model.{name}"]
    save_file(
        {f"diffusion_model.{name.removesuffix('weight')}diff": change}, tmp_path / "x.safetensors"
    )
    (found,) = adapter_report.changes(str(run), str(tmp_path / "x.safetensors"), None)
    assert found.layer == name and found.ratio == pytest.approx(3, rel=1e-5)


def test_the_command_reads_wan_layer_by_layer_and_keeps_to_limits(tmp_path, capsys, monkeypatch):
    base, adapter = (
        str(GOLDEN / "official.safetensors"),
        str(GOLDEN / "lora_diffusers_peft.safetensors"),
    )
    monkeypatch.setattr(adapter_report, "infer_config", lambda *_: TINY)
    assert (
        inspect_adapter.main(
            ["--base", base, "--adapter", adapter, "--out", str(tmp_path), "--max_ratio", "0.6"]
        )
        == 0
    )
    report = json.loads((tmp_path / "report.json").read_text())["budget"]
    assert report["total"]["ratio"] == pytest.approx(META["lora"]["total_fro_ratio"], rel=1e-6)
    assert (
        inspect_adapter.main(
            [
                "--base",
                base,
                "--adapter",
                adapter,
                "--max_ratio",
                "0.4",
                "--max_spectral_ratio",
                "1",
            ]
        )
        == 1
    )
    told = capsys.readouterr().out
    assert "max_ratio is 0.4957, the limit 0.4" in told and "max_spectral_ratio is 1." in told
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star")
    words = ["--base", base, "--adapter", adapter, "--out", str(tmp_path / "no")]
    refused(
        capsys,
        inspect_adapter.main,
        [*words, "--prompts_file", str(prompts)],
        "without text encoder",
    )
    refused(
        capsys,
        inspect_adapter.main,
        [*words, "--max_logit", "3"],
        "--max_logit is 3.0",
        "give --prompts_file",
    )


def test_the_command_draws_before_and_after(shop, tmp_path, capsys):
    base = shop.train("base", "train.max_steps=2")
    run = shop.train(
        "adapted",
        "train.max_steps=2",
        f"train.init_from={base}",
        "lora.enabled=true",
        "lora.target_modules=[cross.k]",
        "train.lr=0.3",
        "ema.enabled=false",
    )
    (tmp_path / "prompts.txt").write_text("a red star\na blue ring\n")
    words = [
        "--base",
        str(run),
        "--prompts_file",
        str(tmp_path / "prompts.txt"),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    assert inspect_adapter.main(words) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (tmp_path / "out/before_after.png").is_file() and report["budget"]["kinds"].keys() == {
        "blocks.*.cross.k"
    }
    assert (
        report["before"].keys() == report["after"].keys()
        and min(report["pixels_moved"].values()) > 0
    )
    moved = [
        name
        for name in report["before"]
        if report["before"][name]["logit_std"] != report["after"][name]["logit_std"]
    ]
    assert "blocks.0.cross" in moved
    assert inspect_adapter.main([*words, "--max_logit", "1e-6"]) == 1
    refused(capsys, inspect_adapter.main, ["--base", str(base)], "holds no adapter")
