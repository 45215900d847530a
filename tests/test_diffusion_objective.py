"""Objectives: what is drawn, what is asked of the network, and what an error costs."""

import pytest
import torch

from mmdit import config as configs
from mmdit.config import ConfigError
from mmdit.diffusion import (
    DiffusionConfig,
    FlowMatchingConfig,
    SamplerConfig,
    build_objective,
    sample,
    sampling_times,
)
from mmdit.interfaces import TextTokens
from mmdit.rng import Draws

TEXT = TextTokens(torch.zeros(4, 2, 3), torch.ones(4, 2, dtype=torch.bool))


def ddpm(**keys):
    return build_objective("ddpm", diffusion=DiffusionConfig(**keys))


def flow(**keys):
    return build_objective("flow_matching", flow_matching=FlowMatchingConfig(**keys))


OBJECTIVES = {
    "ddpm eps": ddpm(prediction_type="eps"),
    "ddpm v": ddpm(prediction_type="v"),
    "ddpm x0": ddpm(prediction_type="x0", schedule="linear"),
    "ddpm v zero terminal": ddpm(zero_terminal_snr=True),
    "flow linear": flow(),
    "flow cosine": flow(path="cosine"),
    "flow x0": flow(prediction="x0"),
    "flow cosine x0": flow(path="cosine", prediction="x0"),
}


@pytest.fixture(params=OBJECTIVES)
def objective(request):
    return OBJECTIVES[request.param]


def latents(count: int = 4):
    return torch.randn(count, 1, 2, 3, 5, generator=torch.Generator().manual_seed(1))


def knows(objective, clean, error=0.0):
    """A network that knows the clean latents, and errs by a constant in what it predicts."""

    def model(x, t, text):
        t = t.double() / objective.time_scale
        noise = objective.path.to_noise("x0", clean.double(), x.double(), t)
        return (objective.path.mix(objective.prediction, clean.double(), noise, t) + error).float()

    return model


def times(objective, count=4096):
    return objective.draw_time(Draws.of(0, 0, count))


def test_a_network_that_knows_the_data_has_no_loss_and_denoises_exactly(objective):
    clean = latents()
    parts = objective.loss(knows(objective, clean), clean, TEXT, Draws.of(0, 1, 4))
    assert (
        parts.per_sample.shape == parts.t.shape == (4,)
        and parts.per_sample.dtype == parts.t.dtype == torch.float32
    )
    assert parts.per_sample.max() < 1e-6
    for t in (0.3, torch.tensor(0.7), torch.tensor([0.1, 0.4, 0.6, 0.9])):
        x = objective.path.add_noise(clean, torch.randn(clean.shape), t)
        assert torch.allclose(
            objective.denoiser(knows(objective, clean), TEXT)(x, t), clean, atol=2e-5
        )


def test_the_input_is_the_mixture_at_the_time_the_network_is_told(objective):
    clean, seen = latents(), {}

    def model(x, t, text, keep):
        seen.update(x=x, t=t, text=text, keep=keep)
        return torch.zeros_like(x)

    draws = Draws.of(7, 3, 4)
    parts = objective.loss(model, clean, TEXT, draws, keep="passed on")
    expected = objective.path.add_noise(clean, draws.normal("noise", *clean.shape[1:]), parts.t)
    assert torch.allclose(seen["x"], expected, atol=1e-6)
    assert (
        torch.allclose(seen["t"], parts.t * 1000)
        and seen["t"].shape == (4,)
        and seen["t"].dtype == torch.float32
    )
    assert seen["text"] is TEXT and seen["keep"] == "passed on"


def test_a_rank_computes_its_own_rows_of_the_global_batch(objective):
    clean, model = latents(), lambda x, t, text: 0.5 * x
    whole = objective.loss(model, clean, TEXT, Draws.of(5, 9, 4))
    part = objective.loss(model, clean[2:], TEXT[2:], Draws.of(5, 9, 4)[2:])
    assert torch.equal(part.per_sample, whole.per_sample[2:]) and torch.equal(part.t, whole.t[2:])
    other_step = objective.loss(model, clean, TEXT, Draws.of(5, 10, 4))
    assert (other_step.t != whole.t).all() and (other_step.per_sample != whole.per_sample).all()


def test_loss_is_float32_under_autocast(objective):
    layer = torch.nn.Linear(5, 5)
    seen = []

    def model(x, t, text):
        seen.append(layer(x))
        return seen[-1]

    clean = latents()
    with torch.autocast("cpu", torch.bfloat16):
        parts = objective.loss(model, clean, TEXT, Draws.of(0, 0, 4))
    assert seen[0].dtype == torch.bfloat16 and parts.per_sample.dtype == torch.float32
    plain = objective.loss(lambda x, t, text: seen[0].detach(), clean, TEXT, Draws.of(0, 0, 4))
    assert torch.equal(parts.per_sample, plain.per_sample)  # nothing but the network was rounded
    parts.per_sample.mean().backward()
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "prediction, published",
    [  # Hang et al. 2303.09556, section 3.4
        ("x0", lambda snr, gamma: snr.clamp(max=gamma)),
        ("eps", lambda snr, gamma: snr.clamp(max=gamma) / snr),
        ("v", lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1)),
    ],
)
def test_min_snr_weights_are_the_published_ones(prediction, published):
    objective, clean = ddpm(prediction_type=prediction, min_snr_gamma=5.0), latents(64)
    parts = objective.loss(knows(objective, clean, error=0.1), clean, TEXT, Draws.of(0, 0, 64))
    alpha, sigma = objective.path.alpha_sigma(parts.t)
    expected = 0.01 * published((alpha / sigma).square(), 5.0)
    assert torch.allclose(parts.per_sample.double(), expected, rtol=2e-2, atol=1e-7)
    plain = ddpm(prediction_type=prediction)
    unweighted = plain.loss(
        knows(plain, clean, error=0.1), clean, TEXT, Draws.of(0, 0, 64)
    ).per_sample
    assert torch.allclose(unweighted, torch.full((64,), 0.01), rtol=2e-2)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_x0_network_pays_for_its_velocity(path):
    """An error in x0 costs what the velocity made from it would, and no more than that of t = 0.05
    nearer to the data."""
    objective, clean, error = flow(path=path, prediction="x0", time="uniform"), latents(256), 0.1
    parts = objective.loss(knows(objective, clean, error), clean, TEXT, Draws.of(0, 0, 256))
    t = parts.t.double().clamp(min=0.05)
    rate = (
        1 / t if path == "linear" else torch.pi / 2 / torch.sin(torch.pi / 2 * t)
    )  # |d velocity / d x0| at fixed x
    assert (parts.t < 0.05).any()
    assert torch.allclose(parts.per_sample.double(), (error * rate).square(), rtol=1e-3)


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_direction_weight_adds_one_minus_the_cosine_over_channels(prediction):
    clean, weight = latents(), 0.7
    plain, directed = (
        flow(prediction=prediction, t_min=0.1),
        flow(prediction=prediction, t_min=0.1, direction_weight=weight),
    )
    draws, seen = Draws.of(2, 2, 4), {}

    def model(x, t, text):
        seen["x"] = x
        return torch.tanh(2 * x + 0.3)

    base = plain.loss(model, clean, TEXT, draws)
    parts = directed.loss(model, clean, TEXT, draws)
    x, t = seen["x"], base.t.reshape(-1, 1, 1, 1, 1)
    true = draws.normal("noise", *clean.shape[1:]) - clean
    predicted = model(x, None, None) if prediction == "velocity" else (x - model(x, None, None)) / t
    cosine = (true * predicted).sum(-1) / (true.norm(dim=-1) * predicted.norm(dim=-1))
    assert torch.allclose(
        parts.per_sample - base.per_sample, weight * (1 - cosine).flatten(1).mean(1), atol=1e-4
    )


def test_ddpm_draws_every_level_equally():
    t = times(ddpm(num_timesteps=8), 8000)
    levels, counts = torch.unique(t, return_counts=True)
    assert torch.equal(levels, torch.arange(1, 9, dtype=torch.float64) / 8)
    assert (counts - 1000).abs().max() < 120  # 4 standard deviations


def test_flow_times_follow_their_distribution():
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0).icdf(quantiles)
    for keys, expected in [
        ({}, quantiles),
        ({"t_min": 0.2, "t_max": 0.6}, 0.2 + 0.4 * quantiles),
        ({"shift": 3.0}, 3 * quantiles / (1 + 2 * quantiles)),
        ({"time": "logit_normal"}, torch.sigmoid(normal)),
        (
            {"time": "logit_normal", "logit_mean": 0.8, "logit_std": 0.5},
            torch.sigmoid(0.8 + 0.5 * normal),
        ),
    ]:
        t = times(flow(**keys), 20000)
        assert torch.allclose(t.quantile(quantiles), expected, atol=0.015), keys


@pytest.mark.parametrize("between", [(0.0, 0.875), (0.875, 1.0), (0.3, 0.6)])
@pytest.mark.parametrize(
    "law",
    [
        {"shift": 3.0},
        {"time": "logit_normal", "logit_mean": 0.7, "logit_std": 1.4, "shift": 0.4},
        {"time": "logit_normal", "shift": 5.0, "t_min": 0.02, "t_max": 0.98},
    ],
)
def test_times_of_a_range_are_those_of_the_whole_law_that_lie_inside(law, between):
    low, high = between
    whole, part = times(flow(**law), 60_000), times(flow(**law, between=between), 20_000)
    assert low <= part.min() and part.max() <= high
    inside = whole[(whole >= low) & (whole <= high)].sort().values
    shares = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    seen = torch.searchsorted(inside, part.quantile(shares)) / len(inside)
    limit = 1.6 * (1 / len(inside) + 1 / len(part)) ** 0.5  # of Kolmogorov and Smirnov at 1 %
    assert (seen - shares).abs().max() < limit


def test_clips_are_shifted_by_the_square_root_of_their_frames_in_training_and_in_sampling():
    by_frames = flow(shift=1.5, shift_by_frames=True)
    draws = Draws.of(0, 0, 64)
    assert torch.equal(by_frames.draw_time(draws, 16), flow(shift=6.0).draw_time(draws))
    assert torch.equal(by_frames.draw_time(draws), flow(shift=1.5).draw_time(draws, 16))
    clip, seen = torch.randn(64, 16, 1, 1, 2), []
    losses = by_frames.loss(lambda x, t, text: torch.zeros_like(x), clip, TEXT, draws)
    assert torch.equal(losses.t, flow(shift=6.0).draw_time(draws).float())

    def model(x, t, text):
        seen.append(t[0].item())
        return torch.zeros_like(x)

    sample(by_frames.denoiser(model, TEXT), clip, by_frames, SamplerConfig("euler", 5, shift=2.0))
    expected = [1000 * t for t in sampling_times(by_frames, 5, 8.0)[:-1]]
    assert seen == pytest.approx(expected, rel=1e-6)


def test_network_is_told_scaled_times_within_its_training_range():
    told = []

    def model(x, t, text):
        told.extend(t.tolist())
        return x

    denoise = flow(t_min=0.1, t_max=0.9, time_scale=10.0).denoiser(model, TEXT)
    for t in (0.0, 0.5, 1.0):
        denoise(torch.zeros(1, 2), t)
    ddpm(num_timesteps=50).denoiser(model, TEXT)(torch.zeros(1, 2), 1.0)
    assert told == pytest.approx([1.0, 5.0, 9.0, 1000.0])


def test_denoiser_answers_at_least_in_float32():
    denoise = flow().denoiser(lambda x, t, text: x.bfloat16(), TEXT)
    for given, answered in [
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        assert denoise(torch.zeros(1, 2, dtype=given), 0.5).dtype == answered


@pytest.mark.parametrize(
    "kind, keys, path",
    [
        (DiffusionConfig, {"num_timesteps": 1}, "num_timesteps"),
        (DiffusionConfig, {"min_snr_gamma": 0.0}, "min_snr_gamma"),
        (
            DiffusionConfig,
            {"prediction_type": "eps", "zero_terminal_snr": True},
            "zero_terminal_snr",
        ),
        (DiffusionConfig, {"min_snr_gamma": 5.0, "zero_terminal_snr": True}, "zero_terminal_snr"),
        (DiffusionConfig, {"prediction_type": "epsilon"}, "prediction_type"),
        (FlowMatchingConfig, {"t_min": 0.9, "t_max": 0.1}, "t_min"),
        (FlowMatchingConfig, {"t_max": 1.5}, "t_min"),
        (FlowMatchingConfig, {"shift": 0.0}, "shift"),
        (FlowMatchingConfig, {"time_scale": -1.0}, "time_scale"),
        (FlowMatchingConfig, {"logit_mean": 1.0}, "logit_mean"),
        (FlowMatchingConfig, {"time": "logit_normal", "logit_std": 0.0}, "logit_std"),
        (FlowMatchingConfig, {"direction_weight": -0.1}, "direction_weight"),
    ],
)
def test_impossible_settings_are_refused_by_name(kind, keys, path):
    with pytest.raises(ConfigError) as caught:
        configs.decode(kind, keys, "section")
    assert caught.value.path == f"section.{path}"


def test_configs_survive_yaml():
    for config in (
        DiffusionConfig(min_snr_gamma=5.0),
        FlowMatchingConfig(time="logit_normal", logit_mean=0.5),
    ):
        assert (
            configs.decode(type(config), configs.parse_yaml(configs.to_yaml(config))[0]) == config
        )
