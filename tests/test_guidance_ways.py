"""The driver that compares ways of guidance guides as it says."""

from dataclasses import replace

import pytest
import torch

from mmdit.experiment.load import load_pipeline
from mmdit.training.pipeline import SampleSettings
from tests.drivers import gpu_guidance
from tests.drivers.gpu_guidance import Guided, Way, calls, reads_itself, ways_of

SHIPPED = "assets/moving_shapes_64.safetensors"
PROMPTS = ["a large red star on a navy background", "a small blue circle on a brown background"]


@pytest.fixture(scope="module")
def shipped():
    return load_pipeline(SHIPPED, "cpu")


def guided_of(pipeline, way: Way, scale: float) -> Guided:
    return Guided(pipeline.learner, pipeline.tokenizer, way=way, scale=scale)


def settings(config, **changes) -> SampleSettings:
    sampler = config.train.sampler()
    return SampleSettings(sampler=type(sampler)(steps=3), **changes)


def test_away_from_no_text_is_classifier_free_guidance(shipped):
    pipeline, config = shipped
    text, inside = ways_of(pipeline, None, (64, 64), (0.3, 0.9))
    for way in (text, inside):
        asked = settings(config, cfg_scale=2.5, cfg_interval=way.interval)
        expected = pipeline.latents(PROMPTS, 64, 64, 1, asked)
        ours = guided_of(pipeline, way, 2.5).latents(PROMPTS, 64, 64, 1, asked)
        assert torch.allclose(ours, expected, atol=1e-4)


def test_away_from_itself_is_no_guidance_and_a_scale_moves(shipped):
    pipeline, config = shipped
    asked = settings(config, cfg_scale=1.0)
    plain = pipeline.latents(PROMPTS, 64, 64, 1, asked)
    same = Way("early", lambda text, captions: reads_itself(pipeline, True, text, captions))
    ours = guided_of(pipeline, same, 4.0).latents(PROMPTS, 64, 64, 1, asked)
    assert torch.allclose(ours, plain, atol=1e-4)
    other = ways_of(pipeline, pipeline, (64, 64), (0.0, 1.0))[3]
    assert other.name == "early-no-text"
    moved = guided_of(pipeline, other, 4.0).latents(PROMPTS, 64, 64, 1, asked)
    assert not torch.allclose(moved, plain, atol=1e-2)


def test_calls_are_counted(shipped):
    pipeline, config = shipped
    asked = settings(config)
    always, never = (Way("", lambda *_: None, (low, 1.0), 0.25) for low in (0.0, 1.0))
    assert calls(guided_of(pipeline, always, 1.0), asked, 1) == 3
    assert calls(guided_of(pipeline, always, 2.0), asked, 1) == 3 + 3 * 0.25
    assert calls(guided_of(pipeline, never, 2.0), asked, 1) == 3 + 0.25  # the first step is at 1


@pytest.mark.thorough
def test_the_table_and_its_file(shipped, tmp_path, monkeypatch, capsys):
    pipeline, config = shipped
    short = replace(config, video=replace(config.video, num_frames=2))
    monkeypatch.setattr(gpu_guidance, "load_pipeline", lambda *_: (pipeline, short))
    out = tmp_path / "rows.json"
    rows = gpu_guidance.main(
        f"--checkpoint {SHIPPED} --scales 1 2 --steps 2 --count 2 --device cpu --out {out}".split()
    )
    assert [(row["way"], row["scale"], row["calls"]) for row in rows][:2] == [
        ("text", 1, 2),
        ("text", 2, 4),
    ]
    assert out.is_file() and "| interval | 2 |" in capsys.readouterr().out
