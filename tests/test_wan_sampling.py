"""Wan's schedules and UniPC, the law of times inside an expert's range, first frames that are
given."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdit.diffusion import FlowMatching, FlowMatchingConfig, SamplerConfig, sample, sampling_times
from mmdit.interfaces import TextTokens
from mmdit.interop.wan_release import NEGATIVE_PROMPT, PUBLISHED
from mmdit.rng import Draws

ROWS = json.loads((Path(__file__).parent / "golden" / "wan_schedules.json").read_text())["rows"]
FLOW = FlowMatching(FlowMatchingConfig())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["case"])
def test_schedules_are_those_of_both_codes(row):
    for grid, name in (("wan", "upstream"), ("diffusers", "diffusers")):
        times = sampling_times(FLOW, row["steps"], row["shift"], grid=grid)
        torch.testing.assert_close(
            torch.tensor(times), torch.tensor(row[f"{name}_sigmas"]), rtol=0, atol=2e-7
        )
        told = [FLOW._network_time(t, torch.zeros(1)).floor().item() for t in times[:-1]]
        assert told == row[f"{name}_timesteps"] == [math.floor(1000 * t) for t in times[:-1]]
    if row["boundary"]:
        times = sampling_times(FLOW, row["steps"], row["shift"], grid="wan")
        assert sum(t >= row["boundary"] for t in times) == row["high_noise_steps"]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_whole_times_are_those_of_diffusers_where_float32_would_round_them_up(shift):
    """334 is 333.99999999999994 there, which is cut off to 333."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    for steps in (3, 9, 27, 37, 111, 177, 333):
        theirs.set_timesteps(steps)
        times = sampling_times(FLOW, steps, shift, grid="diffusers")
        whole = [FLOW.network_time(t).floor().item() for t in times[:-1]]
        assert whole == theirs.timesteps.tolist(), steps
        torch.testing.assert_close(torch.tensor(times), theirs.sigmas, rtol=0, atol=2e-7)


@pytest.mark.parametrize("shift, steps", [(3.0, 98), (3.0, 325), (7.0, 329), (8.0, 151), (5.0, 50)])
def test_whole_times_are_those_of_the_official_code(shift, steps):
    """Its largest level is 0.999 in float32, from which numpy divides the range in float64."""
    highest = torch.tensor(1.0 - 1 / 1000, dtype=torch.float64).float().item()
    even = np.linspace(highest, 0.0, steps + 1)[:-1]
    levels = shift * even / (1 + (shift - 1) * even)
    times = sampling_times(FLOW, steps, shift, grid="wan")
    whole = [FLOW.network_time(t).floor().item() for t in times[:-1]]
    assert whole == np.floor(levels * 1000).tolist()
    np.testing.assert_allclose(times[:-1], levels, rtol=0, atol=1e-7)


def test_what_was_published_is_in_the_table():
    for row in ROWS:
        (name,) = {name for name in PUBLISHED if row["case"].lower().startswith(name.lower())}
        steps, shift, _, boundary, _ = PUBLISHED[name]
        assert (steps, shift, boundary) == (row["steps"], row["shift"], row["boundary"]), name
    guided = {
        name: guidance for name, (_, _, guidance, _, _) in PUBLISHED.items()
    }  # specification: high, then low
    assert (
        guided["T2V-A14B"] == (4.0, 3.0)
        and guided["I2V-A14B"] == (3.5, 3.5)
        and guided["T2V-1.3B"] == (6.0, 6.0)
    )
    assert {guided[name] for name in ("T2V-14B", "I2V-14B", "FLF2V-14B", "TI2V-5B")} == {(5.0, 5.0)}
    assert PUBLISHED["FLF2V-14B"][:2] == (50, 16.0) and PUBLISHED["T2V-14B"][:2] == (50, 5.0)
    digest = hashlib.sha256(NEGATIVE_PROMPT.encode()).hexdigest()
    assert digest == "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"


def gaussian(x, t):
    """The exact clean estimate for data of deviation 0.5 around 2, on the linear path."""
    t = float(t)
    a, variance = 1 - t, (1 - t) ** 2 * 0.25 + t**2
    return 2 + a * 0.25 / variance * (x - a * 2)


def test_unipc_beats_euler_and_calls_the_network_once_a_step():
    noise = torch.randn(64, 1, 1, 1, 1, dtype=torch.float64)
    exact, errors, calls = 2 + 0.5 * noise, {}, 0

    def denoise(x, t):
        nonlocal calls
        calls += 1
        return gaussian(x, t)

    for steps in (20, 40, 80):
        calls = 0
        result = sample(denoise, noise, FLOW, SamplerConfig("unipc", steps, shift=3.0, grid="wan"))
        assert calls == steps
        errors[steps] = (result - exact).abs().max().item()
    assert errors[80] < 1e-2 and errors[20] / errors[80] > 4
    euler = sample(gaussian, noise, FLOW, SamplerConfig("euler", 20, shift=3.0, grid="wan"))
    assert errors[20] < (euler - exact).abs().max() / 3
    even = sample(
        gaussian, noise, FLOW, SamplerConfig("unipc", 40)
    )  # starts at t = 1, where alpha = 0
    assert (even - exact).abs().max() < 1e-2


@pytest.mark.parametrize("grid", ["wan", "diffusers"])
def test_unipc_is_that_of_diffusers(grid):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    noise, weight = (
        torch.randn(2, 3, 4, 4, 8, dtype=torch.float64),
        torch.randn(8, 8, dtype=torch.float64) / 4,
    )
    network = lambda x, t: torch.tanh(x @ weight) * (1 + t) + 0.1 * x
    theirs = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    theirs.set_timesteps(12)
    times = sampling_times(FLOW, 12, 5.0, grid=grid)
    theirs.sigmas = torch.tensor(times, dtype=torch.float64)
    x = noise
    for index, t in enumerate(theirs.timesteps):
        x = theirs.step(network(x, times[index]), t, x, return_dict=False)[0]
    ours = sample(
        lambda x, t: x - t * network(x, t),
        noise,
        FLOW,
        SamplerConfig("unipc", 12, shift=5.0, grid=grid),
    )
    assert (ours - x).norm() / x.norm() < 1e-5, (
        "from the same noise, not scaled to the size of x at that time"
    )


@pytest.mark.parametrize(
    "law", [{}, {"shift": 5.0}, {"time": "logit_normal", "logit_mean": 0.3, "shift": 3.0}]
)
@pytest.mark.parametrize("between", [(0.875, 1.0), (0.0, 0.9), (0.3, 0.6)])
def test_an_expert_sees_its_part_of_the_law_and_its_shape(law, between):
    draws = Draws.of(0, 0, 200_000)
    whole = FlowMatching(FlowMatchingConfig(**law)).draw_time(draws)
    own = FlowMatching(FlowMatchingConfig(**law, between=between)).draw_time(Draws.of(1, 0, 50_000))
    inside = whole[(whole >= between[0]) & (whole <= between[1])]
    assert between[0] <= own.min() and own.max() <= between[1]
    quantiles = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    torch.testing.assert_close(
        own.quantile(quantiles),
        inside.quantile(quantiles),
        rtol=0,
        atol=0.01 * (between[1] - between[0]) + 0.002,
    )


def test_given_frames_stay_clean_and_are_not_in_the_loss():
    seen = {}
    clean, text = (
        torch.randn(3, 4, 2, 2, 5),
        TextTokens(torch.zeros(3, 1, 2), torch.ones(3, 1, dtype=torch.bool)),
    )

    def model(x, t, text, given=0):
        seen.update(x=x, given=given)
        return torch.cat(
            [torch.full_like(x[:, :1], 1e6), x[:, 1:]], 1
        )  # nonsense where nobody looks

    losses = FLOW.loss(model, clean, text, Draws.of(0, 3, 3), given=1).per_sample
    assert (
        seen["given"] == 1
        and torch.equal(seen["x"][:, :1], clean[:, :1])
        and not torch.equal(seen["x"][:, 1:], clean[:, 1:])
    )
    assert (losses < 100).all()
    noise = Draws.of(0, 3, 3).normal("noise", *clean.shape[1:])
    expected = (seen["x"] - (noise - clean))[:, 1:].square().flatten(1).mean(1)
    torch.testing.assert_close(losses, expected)
