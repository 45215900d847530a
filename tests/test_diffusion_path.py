"""Paths: what they are at the ends, and that no conversion loses anything."""

import math

import pytest
import torch

from mmdit.diffusion import CosinePath, LinearPath, ddpm_path, shift_time

PATHS = {
    "linear": LinearPath(),
    "cosine": CosinePath(),
    "ddpm cosine": ddpm_path("cosine", 1000),
    "ddpm linear": ddpm_path("linear", 1000),
    "ddpm zero terminal": ddpm_path("linear", 1000, zero_terminal_snr=True),
}
DISCRETE = [name for name in PATHS if name.startswith("ddpm")]
KINDS = ("x0", "eps", "v", "velocity")


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


def random_pair(count: int):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, count, 3, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_clean_and_noise_come_back_from_every_prediction_in_float64(path, kind):
    t = torch.tensor([0.001, 0.1, 0.25, 0.5004, 0.75, 0.9], dtype=torch.float64)
    clean, noise = random_pair(len(t))
    x, prediction = path.add_noise(clean, noise, t), path.mix(kind, clean, noise, t)
    assert torch.allclose(path.to_clean(kind, prediction, x, t), clean, rtol=0, atol=1e-9)
    assert torch.allclose(path.to_noise(kind, prediction, x, t), noise, rtol=0, atol=1e-9)
    for i, time in enumerate(t.tolist()):  # a float means the same as a tensor
        row = slice(i, i + 1)
        assert torch.equal(path.add_noise(clean[row], noise[row], time), x[row])
        assert torch.equal(
            path.to_clean(kind, prediction[row], x[row], time),
            path.to_clean(kind, prediction, x, t)[row],
        )


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_gain_is_how_an_error_shows_in_another_prediction(path, source, target):
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    clean, noise = random_pair(2)
    x, error = path.add_noise(clean, noise, t), 0.01
    wrong = path.mix(source, clean, noise, t) + error
    implied = path.mix(
        target, path.to_clean(source, wrong, x, t), path.to_noise(source, wrong, x, t), t
    )
    shown = implied - path.mix(target, clean, noise, t)
    assert torch.allclose(
        shown,
        (error * path.gain(source, target, t))[:, None, None].expand_as(shown),
        rtol=0,
        atol=1e-10,
    )


def test_ends_are_exact(path):
    assert [float(c) for c in path.alpha_sigma(0.0)] == [1.0, 0.0]
    alpha, sigma = path.alpha_sigma(1.0)
    assert float(sigma) == pytest.approx(1.0, abs=3e-5) and 0 <= float(alpha) < 0.0064
    if path is not PATHS["ddpm cosine"] and path is not PATHS["ddpm linear"]:
        assert (float(alpha), float(sigma)) == (0.0, 1.0)
    x, x0 = torch.ones(1, 2), torch.full((1, 2), 3.0)
    assert torch.equal(path.to_clean("x0", x0, x, 0.0), x0)  # no 0 / 0
    assert torch.equal(path.to_noise("eps", x0, x, 1.0), x0)


def test_signal_falls_and_noise_rises(path):
    alpha, sigma = path.alpha_sigma(torch.linspace(0, 1, 2001))
    assert (alpha.diff() < 0).all() and (sigma.diff() > 0).all()


def test_velocity_is_the_derivative_along_the_clock(path):
    t, h = torch.tensor([0.3002, 0.6002, 0.9002], dtype=torch.float64), 1e-4
    width = path.clock(t + h) - path.clock(t - h)
    ahead, behind, velocity = (
        path.alpha_sigma(t + h),
        path.alpha_sigma(t - h),
        path.mixture("velocity", t),
    )
    for after, before, rate in zip(ahead, behind, velocity, strict=True):
        assert torch.allclose((after - before) / width, rate, atol=1e-6)


def test_flow_velocities_are_those_of_the_papers():
    assert [float(c) for c in PATHS["linear"].mixture("velocity", 0.3)] == [-1.0, 1.0]
    a, b = PATHS["cosine"].mixture("velocity", 0.5)
    assert float(-a) == pytest.approx(math.pi / 2 * math.sqrt(0.5)) and float(b) == pytest.approx(
        math.pi / 2 * math.sqrt(0.5)
    )


def test_ddpm_levels_have_the_published_noise():
    cosine, linear = PATHS["ddpm cosine"], PATHS["ddpm linear"]
    assert float(linear.alphas_cumprod[0]) == pytest.approx(1 - 1e-4)
    assert float(linear.alphas_cumprod[-1]) == pytest.approx(
        4.0358e-5, rel=1e-3
    )  # Ho et al.: prod(1 - beta)
    assert float(cosine.alphas_cumprod[-1]) == pytest.approx(
        2.4288e-9, rel=1e-3
    )  # the last beta is clipped at 0.999
    level = 499
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (level + 1, 0)]
    assert float(cosine.alphas_cumprod[level]) == pytest.approx(f[0] / f[1], rel=1e-10)


@pytest.mark.parametrize("name", DISCRETE)
def test_level_k_is_time_k_plus_one_over_T(name):
    path = PATHS[name]
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha, sigma = path.alpha_sigma(t)
    assert torch.allclose(alpha.square(), path.alphas_cumprod, rtol=1e-9, atol=1e-16)
    assert torch.allclose(alpha.square() + sigma.square(), torch.ones_like(t), rtol=0, atol=1e-12)
    between, _ = path.alpha_sigma(0.5005)
    assert alpha[500] < between < alpha[499]
    assert path.snap(0.50049) == 0.5 and path.snap(0.0) == 0.0 and path.snap(1.0) == 1.0


def test_zero_terminal_snr_moves_the_last_level_and_keeps_the_first():
    plain, stretched = (
        PATHS["ddpm linear"].alphas_cumprod,
        PATHS["ddpm zero terminal"].alphas_cumprod,
    )
    assert float(stretched[-1]) == 0.0 and float(stretched[0]) == pytest.approx(float(plain[0]))
    assert float(stretched[-2]) > 0


def test_latest_is_the_last_level_with_that_much_signal():
    path = PATHS["ddpm cosine"]
    t = path.latest(0.03)
    ratios = [float(a / s) for a, s in (path.alpha_sigma(t), path.alpha_sigma(t + 1e-3))]
    assert ratios[0] >= 0.03 > ratios[1]


def test_shift_keeps_the_ends_and_divides_the_odds():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_time(t, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert torch.allclose(
        (shifted / (1 - shifted))[1:-1], 3 * (t / (1 - t))[1:-1]
    )  # sigma / alpha times 3 on the linear path
    assert torch.equal(shift_time(t, 1.0), t)
