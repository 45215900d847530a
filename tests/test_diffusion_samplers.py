"""Samplers on data whose denoiser and flow are known in closed form: a Gaussian N(MEAN, STD²), and
mixtures of Gaussians."""

import math
from functools import cache

import pytest
import torch

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
from tests.helpers.thorough import thorough, thorough_unless

MEAN, STD = 0.3, 0.5
TEXT = TextTokens(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))
SOLVERS = ("ddim", "euler", "heun", "ab2", "dpmpp_2m", "unipc")
GRID = torch.linspace(-3, 3, 61, dtype=torch.float64)[
    None
]  # stands for noise in deterministic tests


def ddpm(**keys):
    return build_objective("ddpm", diffusion=DiffusionConfig(**keys))


def flow(**keys):
    return build_objective("flow_matching", flow_matching=FlowMatchingConfig(**keys))


OBJECTIVES = {
    "flow linear": flow(),
    "flow cosine": flow(path="cosine"),
    "flow x0": flow(prediction="x0"),
    "ddpm v": ddpm(),
    "ddpm eps": ddpm(prediction_type="eps"),
    "ddpm x0": ddpm(prediction_type="x0"),
    "ddpm linear eps": ddpm(prediction_type="eps", schedule="linear"),
    "ddpm zero terminal": ddpm(zero_terminal_snr=True),
}


@pytest.fixture(params=OBJECTIVES)
def objective(request):
    return OBJECTIVES[request.param]


def gaussian(objective, mean=MEAN, std=STD, error=0.0):
    """The best possible network for N(mean, std²), `error` of white noise added to what it
    predicts. As a denoiser."""
    generator = torch.Generator().manual_seed(3)

    def model(x, t, text):
        t = t.double() / objective.time_scale
        alpha, sigma = (c[:, None] for c in objective.path.alpha_sigma(t))
        surprise = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        prediction = objective.path.mix(
            objective.prediction, mean + alpha * std**2 * surprise, sigma * surprise, t
        )
        if not error:
            return prediction
        return prediction + error * torch.randn(x.shape, generator=generator, dtype=x.dtype)

    return objective.denoiser(model, TEXT)


def exact(objective, noise, mean=MEAN, std=STD):
    """Where the flow carries `noise` when started as the sampler starts it."""
    alpha, sigma = (float(c) for c in objective.path.alpha_sigma(objective.t_start))
    x = noise * math.hypot(alpha, sigma)
    return mean + std * (x - alpha * mean) / math.hypot(alpha * std, sigma)


@cache
def error_of(objective, solver, steps):
    made = sample(gaussian(objective), GRID, objective, SamplerConfig(solver, steps))
    return (made - exact(objective, GRID)).abs().max().item()


def normal(count, seed=0):
    return torch.randn(1, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "solver, order",
    [("ddim", 1), ("euler", 1), ("heun", 2), ("ab2", 2), ("dpmpp_2m", 1.5), ("unipc", 2)],
)
@pytest.mark.parametrize("name", [*thorough("flow linear"), "flow cosine", *thorough("flow x0")])
def test_order_of_accuracy(name, solver, order):
    """dpmpp_2m extrapolates in log(alpha / sigma), infinite at both ends: between first and second
    order with even steps."""
    coarse, fine = (error_of(OBJECTIVES[name], solver, steps) for steps in (48, 144))
    assert math.log(coarse / fine, 3) == pytest.approx(
        order, abs=0.35 if order == 1.5 or solver == "unipc" else 0.15
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "objective",
    thorough_unless(lambda name: name in ("flow cosine", "ddpm eps"), OBJECTIVES),
    indirect=True,
)
def test_every_solver_converges_to_the_flow_on_every_path(objective, solver):
    coarse, fine = (error_of(objective, solver, steps) for steps in (24, 192))
    assert fine < max(coarse / 4, 2e-4) and fine < 0.03
    if solver in ("heun", "ab2", "dpmpp_2m", "unipc"):
        assert coarse < error_of(objective, "ddim", 24) and fine < 0.002


def test_second_order_pays_on_a_mixture_of_gaussians():
    """At 40 network calls; the claim made in SamplerConfig."""
    means, weights = (
        torch.tensor([-1.0, 0.2, 1.0], dtype=torch.float64),
        torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64),
    )
    objective = OBJECTIVES["flow linear"]

    def denoise(x, t):
        alpha, sigma = objective.path.alpha_sigma(t)
        away, variance = x[..., None] - alpha * means, alpha**2 * 0.15**2 + sigma**2
        posterior = (weights.log() - 0.5 * away**2 / variance).softmax(-1)
        return (posterior * (means + alpha * 0.15**2 * away / variance)).sum(-1)

    true = sample(denoise, GRID, objective, SamplerConfig("heun", 1000))
    calls = {"ddim": 40, "euler": 40, "ab2": 40, "dpmpp_2m": 40, "unipc": 40, "heun": 20}
    error = {
        s: (sample(denoise, GRID, objective, SamplerConfig(s, n)) - true).square().mean().sqrt()
        for s, n in calls.items()
    }
    assert error["ab2"] < error["dpmpp_2m"] < error["heun"] < error["ddim"] / 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_n_steps_are_n_calls_from_the_start_to_the_data(objective, solver):
    """Pitfall 16: `n` steps that were n - 1, and so stopped short of t = 0."""
    asked, reached, exact_denoise = [], [], gaussian(objective)

    def denoise(x, t):
        asked.append(t)
        return exact_denoise(x, t)

    sample(
        denoise,
        GRID,
        objective,
        SamplerConfig(solver, 10),
        callback=lambda done, t, x, clean: reached.append((done, t)),
    )
    assert len(asked) == (19 if solver == "heun" else 10)
    assert asked[0] == objective.t_start and min(asked) > 0
    assert [done for done, _ in reached] == list(range(1, 11)) and reached[-1][1] == 0
    assert asked[:: 2 if solver == "heun" else 1] == [
        objective.t_start,
        *(t for _, t in reached[:-1]),
    ]


@pytest.mark.parametrize("solver", SOLVERS)
def test_width_of_narrow_data_is_right(solver):
    """The Gaussian of pitfall 16 (std 0.15), where one lost step is 6 %."""
    objective, noise = OBJECTIVES["flow linear"], normal(4000)
    made = sample(gaussian(objective, 0.0, 0.15), noise, objective, SamplerConfig(solver, 100))
    assert (made.std() / (0.15 * noise.std())).item() == pytest.approx(
        1.0, abs=0.04 if solver in ("ddim", "euler") else 0.01
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_a_point_is_hit_in_any_number_of_steps(objective, solver, steps):
    """Few steps, infinite lambdas, alpha = 0: all finite. One step lands on the clean estimate but
    for the bend of the path."""
    made = sample(gaussian(objective, MEAN, 0.0), GRID, objective, SamplerConfig(solver, steps))
    assert made.isfinite().all()
    straight = solver in ("ddim", "dpmpp_2m") or objective.path is OBJECTIVES["flow linear"].path
    if straight:
        assert torch.allclose(made, torch.full_like(made, MEAN), atol=1e-9)


@pytest.mark.parametrize("name", ["flow linear", "flow x0"])
def test_euler_is_ddim_on_straight_lines(name):
    made = [
        sample(gaussian(OBJECTIVES[name]), GRID, OBJECTIVES[name], SamplerConfig(s, 7))
        for s in ("euler", "ddim")
    ]
    assert torch.allclose(*made, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [20, *thorough(50)])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_an_imperfect_eps_network_does_not_explode(solver, steps, schedule):
    """Pitfall 7: from t = 1 of the cosine schedule, 1 % of error in eps made std 6.2 of std 1.0 in
    50 steps."""
    objective, noise = ddpm(prediction_type="eps", schedule=schedule), normal(4000)
    config = SamplerConfig(solver, steps)
    without_error = sample(gaussian(objective, 0.0, 1.0), noise, objective, config).std().item()
    for error in (0.01, 0.03):
        made = sample(gaussian(objective, 0.0, 1.0, error), noise, objective, config).std().item()
        assert made == pytest.approx(without_error, abs=0.02)
    if schedule == "cosine":  # the same from the last level: what t_start is there for
        objective.t_start = 1.0
        assert sample(gaussian(objective, 0.0, 1.0, 0.01), noise, objective, config).std() > 3


@pytest.mark.parametrize("solver", SOLVERS)
def test_networks_that_know_about_pure_noise_start_from_it(solver):
    for objective in (
        ddpm(),
        ddpm(prediction_type="x0"),
        ddpm(zero_terminal_snr=True),
        flow(),
        flow(path="cosine"),
    ):
        assert objective.t_start == 1.0
        noise = normal(4000)
        made = (
            sample(
                gaussian(objective, 0.0, 1.0, 0.03), noise, objective, SamplerConfig(solver, 50)
            ).std()
            / noise.std()
        )
        assert made.item() == pytest.approx(1.0, abs=0.035)
    assert ddpm(min_snr_gamma=5.0).t_start < 1  # its loss leaves the last levels untrained


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_eta_keeps_the_marginal_of_every_time(objective, eta):
    """Data at one point: x_s is N(alpha_s MEAN, sigma_s²) whatever part of its noise is fresh, on
    every path."""
    seen = []
    config = SamplerConfig("ddim", 10, eta)
    noise = normal(20000)
    start = math.hypot(*(float(c) for c in objective.path.alpha_sigma(objective.t_start)))
    alpha, sigma = (float(c) for c in objective.path.alpha_sigma(objective.t_start))
    noise = (alpha * MEAN + sigma * noise) / start
    draws = Draws.of(0, 0, 1)
    sample(
        gaussian(objective, MEAN, 0.0),
        noise,
        objective,
        config,
        draws,
        lambda i, t, x, clean: seen.append((t, x)),
    )
    for t, x in seen:
        alpha, sigma = (float(c) for c in objective.path.alpha_sigma(t))
        assert x.mean().item() == pytest.approx(alpha * MEAN, abs=0.03)
        assert x.std().item() == pytest.approx(sigma, rel=0.03, abs=1e-9)


def test_eta_one_is_the_posterior_of_the_forward_process(objective):
    """The spread of x_s at given x_t and x0, against Bayes: precision 1 / sigma_s² plus that of the
    step s -> t."""
    times, reached = sampling_times(objective, 4), []
    noise, draws = torch.zeros(20000, 1, dtype=torch.float64), Draws.of(0, 0, 20000)
    config = SamplerConfig("ddim", 4, 1.0)
    sample(
        lambda x, t: torch.zeros_like(x),
        noise,
        objective,
        config,
        draws,
        lambda i, t, x, clean: reached.append(x[:, 0]),
    )
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        [float(c) for c in objective.path.alpha_sigma(t)] for t in times[1:3]
    )
    ratio = alpha_t / alpha_s
    step_variance = sigma_t**2 - ratio**2 * sigma_s**2
    posterior = (1 / (1 / sigma_s**2 + ratio**2 / step_variance)) ** 0.5
    correlation = torch.corrcoef(torch.stack(reached[:2]))[0, 1]
    spread = reached[1].std() * (1 - correlation**2).sqrt()  # what x_t does not explain
    assert spread.item() == pytest.approx(posterior, rel=0.02)


def test_eta_converges_to_the_data():
    objective, noise = OBJECTIVES["flow linear"], normal(20000)
    configs = [SamplerConfig("ddim", steps, 1.0) for steps in (20, 160)]
    stds = [
        sample(gaussian(objective), noise, objective, config, Draws.of(0, 0, 1)).std()
        for config in configs
    ]
    assert stds[0] < stds[1] and stds[1].item() == pytest.approx(STD, rel=0.03)


def test_fresh_noise_belongs_to_the_sample_not_to_its_batch():
    objective, noise, config = (
        OBJECTIVES["ddpm v"],
        normal(12).reshape(4, 3),
        SamplerConfig("ddim", 5, 0.5),
    )
    together = sample(gaussian(objective), noise, objective, config, Draws.of(1, 0, 4))
    apart = sample(gaussian(objective), noise[2:], objective, config, Draws.of(1, 0, 4)[2:])
    assert torch.equal(together[2:], apart)
    assert not torch.equal(
        together, sample(gaussian(objective), noise, objective, config, Draws.of(2, 0, 4))
    )


def test_discrete_paths_visit_only_trained_levels():
    for steps in (3, 7, 30, 640):
        times = sampling_times(OBJECTIVES["ddpm eps"], steps)
        assert (
            all(t * 1000 == pytest.approx(round(t * 1000), abs=1e-9) for t in times)
            and len(times) == steps + 1
        )
    with pytest.raises(ConfigError, match="only 50 different noise levels"):
        sampling_times(ddpm(num_timesteps=50), 60)


def test_shift_spends_steps_on_noise():
    even, shifted = sampling_times(flow(), 10), sampling_times(flow(), 10, shift=3.0)
    assert shifted[0] == even[0] == 1 and shifted[-1] == even[-1] == 0
    assert shifted[5] == pytest.approx(0.75) and even[5] == pytest.approx(0.5)


def test_sampling_starts_where_training_ended():
    objective = flow(t_max=0.9)
    sizes = []

    def denoise(x, t):
        sizes.append((t, x.std().item()))
        return torch.zeros_like(x)

    sample(denoise, normal(4000), objective, SamplerConfig("euler", 4))
    assert sizes[0] == (0.9, pytest.approx(math.hypot(0.1, 0.9), rel=0.03))


def test_results_are_at_least_float32_and_need_no_gradient():
    weight = torch.ones(1, requires_grad=True)
    for given, made in [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        x = sample(lambda x, t: x * weight, GRID.to(given), flow(), SamplerConfig("heun", 3))
        assert x.dtype == made and not x.requires_grad and x.shape == GRID.shape


@pytest.mark.parametrize(
    "keys, path",
    [
        ({"steps": 0}, "steps"),
        ({"solver": "ddim", "eta": 1.5}, "eta"),
        ({"solver": "euler", "eta": 0.5}, "eta"),
        ({"shift": 0.0}, "shift"),
    ],
)
def test_impossible_settings_are_refused_by_name(keys, path):
    with pytest.raises(ConfigError) as caught:
        SamplerConfig(**keys)
    assert caught.value.path == path


def test_eta_without_draws_is_refused():
    with pytest.raises(ValueError, match="pass draws"):
        sample(lambda x, t: x, GRID, flow(), SamplerConfig("ddim", 2, 0.5))


@pytest.mark.parametrize("solver", ["ddim", "euler", "heun", "ab2", "dpmpp_2m", "unipc"])
def test_starting_from_a_guess_keeps_what_the_noise_leaves(solver):
    """Data N(0, 1) around two far modes: a guess near one of them, noised a little, comes back to
    that mode and not the other."""
    objective = build_objective("flow_matching")

    def denoise(x, t):  # exact for half the data at -5 and half at +5
        return 5 * torch.tanh(5 * x * (1 - t) / t**2)

    guess = torch.where(torch.arange(64) % 2 == 0, -4.0, 4.0)[:, None].double()
    noise = Draws.of(0, 0, 64).normal("noise", 1).double()
    clean = sample(denoise, noise, objective, SamplerConfig(solver, 20), guess=(guess, 0.5))
    torch.testing.assert_close(clean, guess.sign() * 5, rtol=0, atol=0.05)
    with pytest.raises(ValueError, match="must be above 0"):
        sample(denoise, noise, objective, SamplerConfig(solver, 20), guess=(guess, 0.0))


@pytest.mark.parametrize("shift", [0.3, 1.0, 4.0])
def test_ab2_is_exact_where_the_velocity_is_linear_in_time_however_uneven_its_steps_are(shift):
    """x' = a + b t: Adams-Bashforth of two steps makes no error but that of its first step, which
    is Euler's."""
    objective = flow()
    velocity = lambda t: 0.7 - 1.9 * t
    denoise = lambda x, t: x - t * velocity(t)  # the clean estimate that says this velocity
    times = sampling_times(objective, 6, shift)
    start = torch.full((1, 3), 0.4, dtype=torch.float64)
    reached = sample(denoise, start, objective, SamplerConfig("ab2", 6, shift=shift))
    first = times[1] - times[0]
    error_of_euler = first * velocity(times[0]) - (
        0.7 * first - 0.95 * (times[1] ** 2 - times[0] ** 2)
    )
    exact = start - 0.7 + 0.95 + error_of_euler
    torch.testing.assert_close(reached, exact, rtol=0, atol=1e-9)


def test_latents_that_a_callback_returns_take_the_place_of_those_drawn():
    objective, seen = build_objective("flow_matching"), []

    def callback(done, t, x, clean):
        seen.append(x.clone())
        return torch.full_like(x, 3.0) if done == 1 else None

    def denoise(x, t):
        return x

    noise, config = torch.randn(2, 1, 2), SamplerConfig("euler", 2)
    drawn = sample(denoise, noise, objective, config, callback=callback)
    assert len(seen) == 2 and not torch.equal(seen[0], torch.full_like(noise, 3.0))
    torch.testing.assert_close(drawn, torch.full_like(noise, 3.0))
