"""The information that captions hold, measured by errors, against closed forms."""

import math
from types import SimpleNamespace

import pytest
import torch

from mmdit.data.dataset.buckets import VideoConfig
from mmdit.diagnostics.caption_levels import (
    Level,
    caption_levels,
    format_levels,
    log_snr_at,
    peak,
    shares,
    time_of,
)
from mmdit.diffusion import FlowMatchingConfig, SamplerConfig, build_objective
from mmdit.diffusion.objective import DDPM, DiffusionConfig
from mmdit.interfaces import LatentSpec, TextTokens
from mmdit.scripts import cache_moving_shapes, inspect_levels
from tests.helpers.tiny import Workshop, refused

FLOW = build_objective(
    "flow_matching",
    flow_matching=FlowMatchingConfig(time="logit_normal", shift=4.0, logit_std=1.5),
)


def encode(captions: list[str]) -> TextTokens:
    signs = torch.tensor([1.0 if caption == "plus" else -1.0 for caption in captions])
    return TextTokens(signs[:, None, None], torch.ones(len(captions), 1, dtype=torch.bool))


def two_points(mean: torch.Tensor):
    """The perfect velocity for samples that are `mean` or `-mean`, as the caption says."""

    def velocity(x, t, text):
        t = (t / 1000).view(-1, 1, 1, 1, 1)
        likely = torch.tanh((x * mean).flatten(1).sum(1).view_as(t) * (1 - t) / t**2)
        stated = text.embeddings[:, 0, 0].view_as(t)
        sign = torch.where(text.valid.any(1).view_as(t), stated, likely)
        return (x - sign * mean) / t

    return velocity


@pytest.mark.parametrize("size", [4.0, 40.0])
def test_a_caption_that_tells_two_samples_apart_says_ln_2_where_noise_begins_to_hide_them(size):
    mean = torch.randn(1, 2, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    mean *= size / mean.norm()
    captions = ["plus", "minus"] * 500
    signs = encode(captions).embeddings.view(-1, 1, 1, 1, 1)
    learner = SimpleNamespace(
        model=two_points(mean), text_encoder=encode, objective=FLOW, spec=LatentSpec(4)
    )
    levels = caption_levels(learner, signs * mean, captions, batch_size=500)
    assert sum(level.nats for level in levels) == pytest.approx(math.log(2), rel=0.05)
    most = peak(levels)
    assert most.log_snr == pytest.approx(-2 * math.log(size) + 1, abs=1.5)
    assert all(level.error < 1e-6 * size**2 for level in levels)


def test_a_network_of_tiles_is_told_where_each_lies_and_one_of_clips_is_measured_on_clips():
    asked = []

    def network(x, t, text, place, crop):
        assert torch.equal(crop, 2 * place[:, :4])
        asked.append((x.flatten().tolist(), place[:, 1].tolist()))
        return torch.zeros_like(x)

    learner = SimpleNamespace(
        model=network, text_encoder=encode, objective=FLOW, spec=LatentSpec(1)
    )
    places = torch.arange(15).view(3, 5)
    clean = torch.ones(3, 1, 1, 1, 1)
    given = {"crops": 2 * places[:, :4], "places": places}
    caption_levels(learner, clean, ["plus"] * 3, [0.0], batch_size=2, **given)
    assert [rows for _, rows in asked] == [[1, 6], [1, 6], [11], [11]]
    mixed = VideoConfig(num_frames=4, image_fraction=0.5)
    assert inspect_levels.of_clips(mixed).image_fraction == 0
    pictures = VideoConfig(num_frames=4, image_fraction=1.0)
    assert inspect_levels.of_clips(pictures) == pictures


def test_times_and_log_snrs_are_inverse_and_levels_that_no_training_draws_are_left_out():
    assert log_snr_at(FLOW, time_of(FLOW, -6.0)) == pytest.approx(-6.0)
    ddpm = DDPM(DiffusionConfig())
    t = time_of(ddpm, -6.0)
    assert t == ddpm.path.snap(t) and log_snr_at(ddpm, t) == pytest.approx(-6.0, abs=0.1)
    assert log_snr_at(FLOW, 0.0) == math.inf and log_snr_at(FLOW, 1.0) == -math.inf
    low = build_objective("flow_matching", flow_matching=FlowMatchingConfig(t_max=0.5))
    learner = SimpleNamespace(
        model=two_points(torch.ones(1)), text_encoder=encode, objective=low, spec=LatentSpec(1)
    )
    levels = caption_levels(learner, torch.ones(2, 1, 1, 1, 1), ["plus"] * 2)
    assert [level.log_snr for level in levels] == [0.0, 1.0, 2.0]
    learner.objective = build_objective(
        "flow_matching", flow_matching=FlowMatchingConfig(t_min=0.4, t_max=0.45)
    )
    with pytest.raises(ValueError, match="between 0.4 and 0.45, where none of the noise levels"):
        caption_levels(learner, torch.ones(2, 1, 1, 1, 1), ["plus"] * 2)


def test_shares_of_training_follow_its_law_and_every_step_of_the_sampler_is_counted():
    levels = [Level(float(k), 0.5, 0.0, 0.0, 0.0) for k in range(-16, 3)]
    found = shares(FLOW, levels, 1, SamplerConfig(steps=20, shift=4.0))
    trained, steps = zip(*found, strict=True)
    assert sum(trained) == pytest.approx(1) and sum(steps) == 20
    # log SNR is -2 logit(t): a normal of mean -2 ln 4 and deviation 3
    normal = torch.distributions.Normal(-2 * math.log(4.0), 2 * 1.5)
    share = normal.cdf(torch.tensor(-5.5)) - normal.cdf(torch.tensor(-6.5))
    assert trained[10] == pytest.approx(share.item(), abs=0.01)


def test_the_report_names_the_peak_and_what_training_and_sampling_spend_there():
    nats = [0.0, 0.05, 0.02, 1.0, 3.0, 1.0, 9.0]
    levels = [
        Level(float(k), time_of(FLOW, float(k)), 0.1, 0.2, n) for k, n in zip(range(-9, -2), nats)
    ]
    assert peak(levels).log_snr == -5.0, "chance at -8, and growth at low noise, are no peaks"
    text = format_levels(FLOW, levels, 1, SamplerConfig(steps=10, shift=4.0))
    assert "captions decide most at t = 0.9241" in text and "of its 10 steps" in text
    falling = levels[4:6]  # where training comes to no noisier ones
    assert peak(falling) is falling[0] and peak(levels[3:5]) is None
    silent = [Level(float(k), 0.5, 0.1, 0.1, 0.0) for k in range(3)]
    assert peak(silent) is None
    assert "decide nothing" in format_levels(FLOW, silent, 1, SamplerConfig(steps=10))


@pytest.mark.thorough
def test_the_command_reads_a_run_and_its_cache(tmp_path, capsys):
    config = ["--config", "configs/moving_shapes_64_t2i.yaml", "--device", "cpu"]
    cache_moving_shapes.main([*config, "--count", "8", "--out_dir", str(tmp_path / "cache")])
    words = [
        "--checkpoint=assets/moving_shapes_64.safetensors",
        f"--train_cache_dir={tmp_path / 'cache'}",
        "--device=cpu",
        "--count=8",
        "video.num_frames=1",
        "video.image_fraction=0",
    ]
    assert inspect_levels.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "log SNR" in lines[-21] and "captions decide" in lines[-1]
    nats = {float(line.split()[0]): float(line.split()[4]) for line in lines[-20:-1]}
    assert nats[-4.0] > 0.5 > 0.1 > nats[-9.0], "an object of a few cells"


def test_the_command_tells_crops_and_puts_prefixes_before_captions(tmp_path, capsys, monkeypatch):
    shop, seen = Workshop(tmp_path), []
    words = ["model.crop=true", "preprocess={crop: shifted, num_crops: 2}"]
    run = shop.train("crops", *words, "train.max_steps=1", cache=shop.cache("crops", *words))

    def levels(*arguments, **given):
        seen.append((given["crops"], arguments[2]))
        return caption_levels(*arguments, **given)

    monkeypatch.setattr(inspect_levels, "caption_levels", levels)
    words = ["--checkpoint", str(run), "--train_cache_dir", str(tmp_path / "crops")]
    words += ["--device", "cpu", "--count", "4"]
    assert inspect_levels.main(words) == 0
    source = f"data.sources=[{{path: {tmp_path / 'crops'}, caption_prefix: 'seen: '}}]"
    assert inspect_levels.main([*words, source]) == 0
    (crops, captions), (_, prefixed) = seen
    assert prefixed == [f"seen: {caption}" for caption in captions]
    assert crops.shape == (4, 4) and (crops[:, 2:] - crops[:, :2] < 1).any(), "not whole pictures"
    for path in (tmp_path / "crops").glob("*.pt"):
        item = torch.load(path)
        item["latents"].fill_(math.nan)
        torch.save(item, path)
    refused(capsys, inspect_levels.main, words, "are not finite", "mmdit verify-cache --cache_dir")


def test_a_cache_of_another_tokenizer_with_as_many_channels_is_refused(tmp_path, capsys):
    config = ["--config", "configs/moving_shapes_64_t2i.yaml", "--device", "cpu"]
    other = [*config, "--count", "2", "tokenizer={type: dummy, latent_d: 64}"]
    cache_moving_shapes.main([*other, "--out_dir", str(tmp_path / "cache")])
    words = ["--checkpoint=assets/moving_shapes_64.safetensors", "--device=cpu"]
    words += [f"--train_cache_dir={tmp_path / 'cache'}", "video.num_frames=1"]
    words += ["video.image_fraction=0"]
    refused(capsys, inspect_levels.main, words, "is not what the config asks for", "tokenizer:")
