"""Sampling whose weights wait in the memory of the CPU draws the same samples."""

import sys
from argparse import Namespace
from functools import cache

import pytest
import torch

from mmdit.commands.sample import refines_averaged
from mmdit.config import ConfigError
from mmdit.diffusion import SamplerConfig
from mmdit.experiment.load import load_pipeline
from mmdit.models import VideoMMDiTConfig, build_model
from mmdit.nn.stored_weights import store
from mmdit.scripts import sample
from mmdit.training.media import read_back
from mmdit.training.memory.sampling_offload import VisitingTokenizer, Visits, offload_pipeline
from mmdit.training.pipeline import SampleSettings
from tests.helpers.thorough import thorough
from tests.helpers.wan_release import FLF2V, make_release

SETTINGS = SampleSettings(SamplerConfig("unipc", 4, grid="wan"), 4.0, negative_prompt="grey")
PICTURES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_release(tmp_path_factory.mktemp("pair"), pair=True)


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    return make_release(tmp_path_factory.mktemp("flf2v"), FLF2V)


def draw(release, offload, image=None):
    pipeline, _ = load_pipeline(release, "cpu", offload=offload)
    offload_pipeline(pipeline, offload)
    drawn = pipeline(["a red star", "a ring"], 32, 32, 5, SETTINGS, batch_size=1, image=image)
    return drawn, pipeline


@cache
def expected(release, image=None):
    """Return what is drawn where nothing is offloaded."""
    return draw(release, "none", image)[0]


@pytest.mark.parametrize("offload", [*thorough("model"), "sequential"])
def test_a_pair_of_experts_draws_the_same(pair, offload):
    drawn, pipeline = draw(pair, offload)
    assert torch.equal(drawn, expected(pair)) and isinstance(pipeline.tokenizer, VisitingTokenizer)
    networks = pipeline.networks()
    assert {name for name in networks if name.startswith("model")} == {
        "model",
        "model (low noise)",
    }
    for name, network in networks.items():  # of the denoisers nothing is left between calls
        away = offload == "sequential" and name.startswith("model")
        assert all(weight.is_meta == away for weight in network.parameters()), name


@pytest.mark.parametrize("offload", [*thorough("model"), "sequential"])
def test_given_pictures_reach_the_network(continued, offload):
    drawn, _ = draw(continued, offload, PICTURES)
    assert torch.equal(drawn, expected(continued, PICTURES))


@pytest.mark.thorough
@pytest.mark.parametrize("offload", [*thorough("model"), "sequential"])
def test_our_own_network_draws_the_same(offload):
    path = "assets/moving_shapes_64.safetensors"
    assert torch.equal(draw(path, offload)[0], expected(path))


def test_one_network_at_a_time_is_on_the_device():
    """On meta in place of a GPU: calling one sends the others home."""
    networks = [build_model(VideoMMDiTConfig(dim=16, depth=1, num_heads=2), 3, 5) for _ in "ab"]
    visits = Visits(networks, torch.device("cpu"))
    sent = []
    for network, hook in visits.hooks.items():
        hook.offload = lambda network=network: sent.append(networks.index(network))
    networks[0].to("meta")
    visits.send_home(networks[0])
    assert sent == []
    visits.send_home(networks[1])
    assert sent == [0]


def test_what_cannot_be_offloaded_is_one_sentence(pair, monkeypatch):
    pipeline, _ = load_pipeline(pair, "cpu", offload="sequential")
    store(pipeline.networks()["model"].blocks, "float8")
    with pytest.raises(ConfigError, match="is sequential, .* float8, int8 or nf4; use model"):
        offload_pipeline(pipeline, "sequential")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ConfigError, match="--offload: is model, which needs accelerate"):
        offload_pipeline(load_pipeline(pair, "cpu", offload="model")[0], "model")


def test_the_command_draws_the_same(pair, tmp_path):
    words = ["--checkpoint", str(pair), "--prompts", "a star", "--steps", "2", "--device", "cpu"]
    words += ["--width", "32", "--height", "32", "--frames", "5"]
    for offload in ("none", "model", "sequential"):
        sample.main([*words, "--out", str(tmp_path / offload), "--offload", offload])
    clips = [read_back(tmp_path / name / "0000.mp4") for name in ("none", "model", "sequential")]
    assert all(torch.equal(clip, clips[0]) for clip in clips)
    assert len({(tmp_path / name / "samples.json").read_text() for name in ("none", "model")}) == 1


def test_types_and_a_folder_of_embeddings_that_the_command_names_are_heeded(pair, tmp_path):
    words = ["model.dtype=bfloat16", f"text_encoder.cache_dir={tmp_path}"]
    pipeline, _ = load_pipeline(pair, "cpu", overrides=words)
    plain, config = load_pipeline(pair, "cpu")
    assert config.model.dtype == config.text_encoder.dtype == "float32", "a CPU's own"
    with pytest.raises(ValueError, match="is a release, .* leave --raw_weights out"):
        load_pipeline(pair, "cpu", use_ema=False)
    assert refines_averaged(Namespace(refine=str(pair), raw_weights=True)), "a release as it is"
    types = [
        one.model.networks()["high"].blocks[0].ffn[0].weight.dtype for one in (pipeline, plain)
    ]
    assert types == [torch.bfloat16, torch.float32]
    settings = SampleSettings(SamplerConfig(steps=1), cfg_scale=1.0)
    assert pipeline.latents(["a star"], 32, 32, 1, settings).isfinite().all()
    assert any(path.is_file() for path in tmp_path.rglob("*")), "embeddings are kept there"
