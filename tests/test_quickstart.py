"""The quickstart on a small plan: the files and numbers it promises, from the shipped model and
tokenizer."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmdit.commands import quickstart
from mmdit.commands.quickstart import Plan
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.moving_shapes.prepare import Recipe, claim
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.experiment.load import load_pipeline
from mmdit.interfaces import LatentSpec
from mmdit.scripts.quickstart import main
from mmdit.training.pipeline import Pipeline, SampleSettings
from mmdit.training.train_config import TrainConfig
from tests.helpers.tiny import refused

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SETTINGS = SampleSettings.of
RATES = {
    "prompt_accuracy",
    "color",
    "shape",
    "size",
    "background",
    "held_out_accuracy",
    "tokenizer_ceiling",
    "control",
}


@pytest.mark.parametrize("name", ["shipped", "from_scratch"])
def test_report_and_files(name, finished):
    folder, report = finished
    part = report[name]
    assert part.keys() >= RATES and all(0 <= part[key] <= 1 for key in RATES)
    low, high = part["prompt_accuracy_interval"]
    assert low <= part["prompt_accuracy"] <= high
    assert part["parameters"] > 1e5
    assert {"seconds", "parameters", "versions"} <= report.keys()
    assert (
        folder / "samples" / ("grid.png" if name == "shipped" else "from_scratch.png")
    ).stat().st_size > 1000


def test_the_shipped_model_draws_what_is_asked(finished):
    folder, report = finished
    assert report["shipped"]["prompt_accuracy"] >= 0.75  # of 8; 0.93 of 256
    assert report["shipped"]["color"] >= 0.9 and report["shipped"]["tokenizer_ceiling"] >= 0.9
    assert (folder / "video.mp4").exists() or (folder / "video.png").exists()


def fewer_steps(train: TrainConfig) -> SampleSettings:
    """Return how samples are drawn, in six steps: most of the time of this file is theirs."""
    settings = SAMPLE_SETTINGS(train)
    return replace(settings, sampler=replace(settings.sampler, steps=6))


def with_short_clips(*words) -> tuple[Pipeline, ExperimentConfig]:
    """Open a model whose clips have 2 frames in place of 16."""
    pipeline, config = load_pipeline(*words)
    return pipeline, replace(config, video=replace(config.video, num_frames=2))


DIFFERS = {"captions": "complete_captions False there", "latents": "tokenizer: the cache has"}


@pytest.mark.parametrize("older", list(DIFFERS))
def test_data_of_another_version_are_refused_before_anything_is_drawn(
    tmp_path, capsys, monkeypatch, older
):
    data = tmp_path / "data"
    if older == "captions":
        claim(data, Recipe(64, 64))
    else:
        spec = LatentSpec(64)
        other = CacheManifest("other", "a tokenizer", spec, ((64, 64),), False)
        (data / "latents").mkdir(parents=True)
        other.write(data / "latents")
    monkeypatch.setattr(quickstart, "DATA", data)
    monkeypatch.setattr(quickstart, "OUT", tmp_path / "runs" / "quickstart")
    monkeypatch.setattr(quickstart, "draw_shipped", lambda *_: pytest.fail("drawn"))
    message = refused(capsys, main, ["--device", "cpu"], DIFFERS[older], "remove that folder")
    assert "out_dir" not in message and "new folder" not in message


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One small run in an empty folder."""
    folder = tmp_path_factory.mktemp("quickstart")
    plan = Plan(images=64, train_seconds=1.0, max_steps=30, batch_size=8, count=8, video_count=2)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart.Plan, "for_device", staticmethod(lambda device: plan))
        patch.setattr(quickstart, "DATA", folder / "data")
        patch.setattr(quickstart, "OUT", folder / "runs" / "quickstart")
        patch.setattr(quickstart, "SETTINGS", ["model.depth=1", "train.max_steps=30"])
        patch.setattr(quickstart.SampleSettings, "of", fewer_steps)
        patch.setattr(quickstart, "load_pipeline", with_short_clips)
        assert main(["--device", "cpu"]) == 0
    torch.set_num_threads(threads)
    out = folder / "runs" / "quickstart"
    return out, json.loads((out / "report.json").read_text())
