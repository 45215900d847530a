"""Numbers that are not finite are told by name, where they come in: none of them becomes a
black picture with exit code 0."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmdit.adapters import LoRAConfig, inject
from mmdit.diagnostics.adapter_norms import delta_budget
from mmdit.experiment.load import load_pipeline
from mmdit.interfaces import LatentSpec
from mmdit.pixels import to_shown
from mmdit.scripts import (
    evaluate,
    export,
    inspect_adapter,
    plan_memory,
    prepare_frames,
    sample,
    train_t2v,
)
from mmdit.training import checkpoint
from mmdit.training.errors import RunError
from mmdit.training.pipeline import SampleSettings
from tests.helpers.tiny import Workshop, forget_sums, refused
from tests.helpers.wan_release import make_release

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    shop = Workshop(tmp_path_factory.mktemp("finite"))
    shop.train("base", "ema.enabled=false")
    return shop


@pytest.fixture
def damaged(shop, tmp_path):
    """`damaged(change)`: a copy of the run whose weight `name` was changed; with the name."""

    def make(change):
        folder = tmp_path / "checkpoint"
        shutil.copytree(checkpoint.latest(shop.folder / "runs/base"), folder)
        tensors = load_file(folder / "model.safetensors")
        name = next(
            name
            for name in tensors
            if name.startswith("model.blocks.1") and name.endswith(".weight")
        )
        tensors[name] = change(tensors[name])
        save_file(tensors, folder / "model.safetensors")
        forget_sums(folder)
        return folder, name

    return make


def spoil(value):
    def change(tensor):
        tensor.view(-1)[3] = value
        return tensor

    return change


CHANGES = [
    (spoil(float("nan")), "nan or infinity"),
    (spoil(float("inf")), "nan or infinity"),
    (lambda tensor: tensor.int(), "int32"),
    (lambda tensor: tensor.bool(), "bool"),
    (lambda tensor: tensor.to(torch.complex64), "complex64"),
]


@pytest.mark.parametrize("change, word", CHANGES)
def test_weights_that_are_no_numbers_are_refused_by_every_command_that_reads_them(
    shop, damaged, capsys, tmp_path, change, word
):
    folder, name = damaged(change)
    drawn, file = tmp_path / "drawn", tmp_path / "model.safetensors"
    words = ["--checkpoint", folder, "--device", "cpu"]
    refused(
        capsys, sample.main, [*words, "--prompts", "a", "--out", drawn], str(folder), name, word
    )
    refused(capsys, evaluate.main, [*words, "--count", 2], str(folder), name, word)
    refused(capsys, export.main, ["--checkpoint", folder, "--out", file], str(folder), name, word)
    refused(
        capsys, train_t2v.main, shop.train_words("next", f"train.init_from={folder}"), name, word
    )
    assert not drawn.exists() and not file.exists()


def test_an_export_says_which_weight_is_too_large_for_its_type(damaged, capsys, tmp_path):
    folder, name = damaged(spoil(1e5))
    words = ["--checkpoint", folder, "--out", tmp_path / "m.safetensors", "--dtype"]
    refused(
        capsys, export.main, [*words, "fp16"], name, "too large for torch.float16", "--dtype bf16"
    )
    assert export.main([str(word) for word in [*words, "bf16"]]) == 0


def test_a_release_with_one_tensor_of_nan_is_refused(tmp_path, capsys):
    release = make_release(tmp_path / "release")
    file = next(release.glob("diffusion_pytorch_model*.safetensors"))
    tensors = load_file(file)
    tensors["blocks.0.ffn.0.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    words = [
        "--checkpoint",
        release,
        "--device",
        "cpu",
        "--prompts",
        "a",
        "--out",
        tmp_path / "out",
    ]
    refused(capsys, sample.main, words, "blocks.0.ffn.0.weight", "nan or infinity")


def test_whatever_makes_a_sample_not_finite_is_named(shop):
    """Weights that became so after loading (an adapter, a step of training), the decoder, or no
    weight at all."""
    pipeline, config = load_pipeline(shop.folder / "runs/base", "cpu")
    settings = SampleSettings.of(config.train)
    draw = lambda settings=settings: pipeline(["a", "b"], 48, 32, 1, settings)
    weights = pipeline.learner.model.named_parameters()
    name, weight = next(
        (name, value)
        for name, value in weights
        if name.startswith("blocks.1") and name.endswith("weight")
    )
    kept = weight.detach().clone()
    weight.data.fill_(float("nan"))
    with pytest.raises(
        ValueError, match=rf"sample 0, 1: not finite.*first: model\.{re.escape(name)}\)"
    ):
        draw()
    weight.data.copy_(kept)
    assert draw().isfinite().all()
    with pytest.raises(
        ValueError, match="all weights are: numbers overflowed at guidance 1e[+]300"
    ):
        draw(SampleSettings(settings.sampler, cfg_scale=1e300))
    decode = pipeline.tokenizer.decode
    second = torch.tensor([1.0, float("nan")])[:, None, None, None, None]
    pipeline.tokenizer.decode = lambda latents: decode(latents) * second
    with pytest.raises(ValueError, match="sample 1: not finite"):
        draw()
    pipeline.tokenizer.decode = lambda latents: decode(latents) * float("nan")
    with pytest.raises(ValueError, match="sample 0: not finite"):
        pipeline.refine(torch.rand(1, 1, 3, 16, 16), ["a"], 48, 32, 0.5, settings)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_option_takes_a_number_that_is_none(value, capsys, tmp_path):
    draw = ["--checkpoint", tmp_path, "--prompts", "a"]
    commands = [
        (sample.main, [*draw, f"--guidance={value}"]),
        (sample.main, [*draw, "--interval", "0", value]),
        (sample.main, [*draw, f"--strength={value}"]),
        (evaluate.main, ["--checkpoint", tmp_path, f"--shift={value}"]),
        (inspect_adapter.main, ["--base", tmp_path, f"--max_ratio={value}"]),
        (plan_memory.main, ["--config", tmp_path, f"--gpu_gb={value}"]),
        (prepare_frames.main, ["--meta_jsonl", "m", "--out_dir", "o", f"--fps={value}"]),
    ]
    for main, words in commands:
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        assert stop.value.code == 2
        assert (
            "finite number" in capsys.readouterr().err or value == "-inf"
        )  # argparse takes -inf for an option


def test_every_option_that_is_a_number_is_read_as_a_finite_one():
    """`type=float` in a command is the mistake that this file is about."""
    sources = {path.name: path.read_text() for path in (ROOT / "mmdit/scripts").glob("*.py")}
    assert len(sources) > 20 and not [
        name for name, text in sources.items() if "type=float" in text
    ]


def test_settings_and_latents_that_would_give_no_numbers_are_refused():
    for wrong in (
        {"cfg_scale": float("nan")},
        {"cfg_scale_low": float("inf")},
        {"cfg_interval": (0.0, float("nan"))},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SampleSettings(**wrong)
    for wrong in (
        {"std": (1.0, 0.0)},
        {"std": (1.0, float("nan"))},
        {"scale": 0.0},
        {"scale": float("inf")},
    ):
        with pytest.raises(ValueError, match=f"latent {next(iter(wrong))} holds"):
            LatentSpec(channels=2, **wrong)
    with pytest.raises(ValueError, match="pixels hold nan or infinity"):
        to_shown(torch.tensor([0.5, float("nan")]))


def test_limits_of_an_adapter_are_not_passed_by_one_that_holds_nan():
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, LoRAConfig(enabled=True, rank=2, target_modules=("0",)))
    model[0].lora_A.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"0\.lora_A holds nan"):
        delta_budget([("0", model[0])])


def test_stored_settings_with_nan_are_refused(damaged, tmp_path, capsys):
    folder, _ = damaged(lambda tensor: tensor)
    meta = json.loads((folder / "checkpoint.json").read_text())
    meta["config"]["train"]["sample_cfg_scale"] = float("nan")
    (folder / "checkpoint.json").write_text(json.dumps(meta))
    refused(
        capsys,
        sample.main,
        ["--checkpoint", folder, "--device", "cpu", "--prompts", "a"],
        "train.sample_cfg_scale",
        "nan",
    )


def test_post_training_that_meets_no_number_ends_with_an_error(tmp_path, monkeypatch):
    """Not with exit code 0, as if it had come to its end."""
    from mmdit.posttrain import loop
    from tests.helpers.toy_posttrain import pretrained, session

    monkeypatch.setattr(loop, "epochs_of", lambda session: (lambda: {"loss": float("nan")}, 1))
    with pytest.raises(RunError, match="stopped at update .*not finite"):
        loop.post_train(session(tmp_path, epochs=3, model=pretrained(steps=1)))
