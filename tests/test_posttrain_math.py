"""Post-training before any network: dynamics against exact moments, storage, advantages, and
identities of the losses."""

import math
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

from mmdit.config import ConfigError
from mmdit.diffusion import FlowMatching, FlowMatchingConfig, SamplerConfig, sample
from mmdit.interfaces import LatentSpec
from mmdit.posttrain import direct_align, dynamics, losses, online
from mmdit.posttrain.advantages import advantages, check_geometry, ranks
from mmdit.posttrain.posttrain_config import NFTConfig
from mmdit.posttrain.rewards import (
    Brightness,
    BrightnessRank,
    Noise,
    RewardPool,
    Samples,
)
from mmdit.posttrain.rollouts import Rollouts
from mmdit.posttrain.session import average_gradients
from mmdit.posttrain.shapes import PromptAccuracy
from mmdit.posttrain.trajectory import Rollout, Storage, Trajectory
from mmdit.rng import Draws


# ── C1: dynamics, exact moments for data N(1, 0.5²) ───────────────────────────────────────────────
def moments(
    step_of,
    steps: int,
    spread: float = 0.5,
    shift: float = 1.0,
    ode_last: bool = True,
    first: float = 1.0,
) -> tuple[float, float]:
    """Mean and deviation of what a sampler makes of pure noise, when the velocity is the exact one:
    both are linear, so no sample is drawn. `first`: the time at which it begins."""
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    times = (first * shift * even / (1 + (shift - 1) * even)).tolist()
    mean, variance = 0.0, 1.0
    for index, t in enumerate(times[:-1]):
        total = (1 - t) ** 2 * spread**2 + t**2
        slope = (t - (1 - t) * spread**2) / total  # v = slope (x - (1 - t)) - 1
        step = (
            step_of(times, index)
            if not (ode_last and index == steps - 1)
            else dynamics.step("ode", 0, times, index)
        )
        mean = step.state * mean + step.velocity * (slope * (mean - (1 - t)) - 1)
        variance = (step.state + step.velocity * slope) ** 2 * variance + step.std**2
    return mean, math.sqrt(variance)


def of(kind, level=0.7):
    return lambda times, index: dynamics.step(kind, level, times, index)


@pytest.mark.parametrize(
    "kind, level, steps",
    [
        ("flow_sde", 0.7, 200),
        ("flow_sde", 0.7, 1000),
        ("dance_sde", 0.3, 200),
        ("dance_sde", 0.7, 200),
    ],
)
def test_stochastic_dynamics_keep_the_marginals(kind, level, steps):
    mean, std = moments(of(kind, level), steps)
    assert abs(mean - 1) < 1e-3 and abs(std - 0.5) < 0.01


@pytest.mark.parametrize("steps, expected", [(10, 0.431), (50, 0.485), (200, 0.496)])
def test_the_ode_has_the_known_discretisation(steps, expected):
    assert moments(of("ode"), steps)[1] == pytest.approx(expected, abs=2e-3)


def test_cps_has_the_known_bias():
    assert moments(of("cps"), 1000)[1] == pytest.approx(0.4245, abs=1e-3)


def mutant(kind: str):
    """Flow-SDE written wrongly in one place."""

    def step(times, index):
        t, s = times[index], times[index + 1]
        clean = 1 - (times[1] if t == 1 else t)
        width, g = t - s, 0.7 * math.sqrt(clean / t if kind == "inverted" else t / clean)
        drift = g * g / (2 * t) * {"no drift": 0, "sign": -1, "doubled": 2}.get(kind, 1)
        gap = 1 if kind == "no (1 - t)" else 1 - t
        return dynamics.Step(
            1 - width * drift,
            -width * (1 + drift * gap),
            g * (width if kind == "no root" else math.sqrt(width)),
        )

    return step


@pytest.mark.parametrize(
    "kind", ["no drift", "sign", "doubled", "no (1 - t)", "no root", "inverted"]
)
def test_every_mutant_of_the_sde_is_found(kind):
    def off(step_of):
        mean, std = moments(step_of, 200)
        return abs(mean - 1) >= 1e-3 or abs(std - 0.5) >= 0.01

    assert off(mutant(kind)) and not off(mutant("none"))


def test_the_first_step_has_the_noise_of_the_second_level():
    """At t = 1 Flow-SDE would divide by zero: the denominator is that of the next time."""
    first, second = (dynamics.step("flow_sde", 0.7, [1.0, 0.8, 0.6, 0.0], i) for i in (0, 1))
    assert first.std**2 == pytest.approx(0.7**2 * 1.0 / (1 - 0.8) * 0.2)
    assert second.std**2 == pytest.approx(0.7**2 * 0.8 / (1 - 0.8) * 0.2)


@pytest.mark.parametrize("first", [0.9999, 0.999, 0.99, 0.95, 0.8])
@pytest.mark.parametrize("steps", [4, 10])
def test_a_first_time_just_below_1_has_no_noise_beyond_all_states(first, steps):
    """flow_matching.t_max 0.999 is usual: by its own time alone the first step of ten would have
    noise of deviation 7, and clips eight times the contrast of data."""
    whole, below = (moments(of("flow_sde"), steps, first=t)[1] for t in (1.0, first))
    assert below == pytest.approx(whole, abs=0.1)


def test_an_ode_last_step_leaves_no_noise():
    left = [moments(of("flow_sde"), 10, 0.02, 3.0, ode_last)[1] for ode_last in (True, False)]
    assert left[0] < 0.005 and left[1] == pytest.approx(0.227, abs=1e-3)


def test_the_kl_of_a_step_has_its_closed_form_in_the_velocity():
    """What `kl.space: exact` divides by, against torch's divergence of two Gaussians."""
    times = torch.linspace(1, 0, 11).tolist()
    for index in range(1, 9):
        step, t = dynamics.step("flow_sde", 0.7, times, index), times[index]
        width = t - times[index + 1]
        g = step.std / math.sqrt(width)
        v, w, state = torch.randn(3, 4, 30).double()
        one, two = (torch.distributions.Normal(step.mean(state, x), step.std) for x in (v, w))
        torch.testing.assert_close(
            torch.distributions.kl_divergence(one, two).mean(1),
            width / 2 * (g * (1 - t) / (2 * t) + 1 / g) ** 2 * (v - w).square().mean(1),
            rtol=1e-5,
            atol=0,
        )


@pytest.mark.parametrize("dimensions", [48, 3072, 2_096_640])
def test_the_factored_log_ratio_is_exact_where_the_difference_is_not(dimensions):
    old, noise, turn = torch.randn(3, 1, dimensions)
    std, new = 0.3, old + 1e-5 * turn
    y = old + std * noise
    exact = [-(y.double() - m.double()).square().mean() / (2 * std * std) for m in (new, old)]
    exact = (exact[0] - exact[1]).item()
    assert abs(dynamics.log_ratio(y, old, new, std).item() - exact) < 1e-9
    if dimensions > 1e6:
        naive = [torch.distributions.Normal(m, std).log_prob(y).mean() for m in (new, old)]
        assert abs((naive[0] - naive[1]).item() - exact) > 1e-9


def test_the_normed_ratio_has_one_spread_for_every_size():
    spreads = []
    for dimensions in (48, 1024, 50_000):
        old, noise = torch.randn(2, 64, dimensions)
        ratio = dynamics.log_ratio(
            old + 0.3 * noise, old, old + 1e-3 * torch.randn(64, dimensions), 0.3, "sqrt_dim"
        )
        spreads.append(ratio.std().item())
    assert max(spreads) / min(spreads) < 2.5


# ── C2: storage ───────────────────────────────────────────────────────────────────────────────────
def filled(storage: Storage, *shape: int) -> Trajectory:
    """A trajectory in which the state at position p is p, and the mean of step i is i + 0.5."""
    trajectory = Trajectory(storage)
    for position in range(storage.steps + 1):
        trajectory.put(position, torch.full(shape, float(position)))
        if position < storage.steps:
            trajectory.put_mean(position, torch.full(shape, position + 0.5))
    return trajectory


def test_the_least_positions_are_stored_and_their_bytes_are_counted():
    for trained, count in (((2, 5, 8), 6), ((0, 1, 2), 4), ((), 0)):
        assert len([p for p in Storage(20, trained).positions if p < 20]) == count
    storage = Storage(20, (2, 5), torch.bfloat16)
    assert storage.positions == {2, 3, 5, 6, 20}
    trajectory = filled(storage, 3, 7)
    kept = [*trajectory.states.values(), *trajectory.means.values()]
    size = sum(x.numel() * x.element_size() for x in kept)
    assert size == 3 * storage.bytes(7) == 3 * 7 * (5 * 2 + 2 * 4)
    assert Storage(40, (0,)).bytes(16 * 21 * 60 * 104) == 4 * 4 * 16 * 21 * 60 * 104


def test_reading_what_is_not_stored_is_an_error_that_names_what_is():
    trajectory = filled(Storage(4, (1,)), 1, 2)
    assert trajectory.get(2).mean() == 2 and trajectory.clean.mean() == 4
    for missing in (0, 3, -1):
        with pytest.raises(ValueError, match=r"\[1, 2, 4\]"):
            trajectory.get(missing)


def test_random_storages_give_back_what_was_put():
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        steps = int(torch.randint(1, 12, (), generator=generator))
        count = int(torch.randint(0, steps + 1, (), generator=generator))
        trained = tuple(torch.randperm(steps, generator=generator)[:count].tolist())
        storage = Storage(steps, trained, everything=seed % 2 == 0)
        trajectory = filled(storage, 1, 1)
        for index in trained:
            states = trajectory.get(index), trajectory.get(index + 1)
            assert (*states, trajectory.means[index]) == (index, index + 1, index + 0.5)
        assert trajectory.states.keys() == storage.positions
        assert trajectory.means.keys() == set(trained)


def test_offloading_copies_and_one_micro_batch_at_a_time_is_on_the_device():
    rollouts = []
    for _ in range(4):
        trajectory = Trajectory(Storage(1))
        trajectory.put(1, torch.randn(2, 3))
        places = torch.arange(2)
        rollouts.append(Rollout(trajectory, places, places, Future()))
    for rollout in rollouts:
        local = rollout.to("meta")
        assert local.clean.is_meta and not rollout.clean.is_meta
    assert sum(r.clean.is_meta for r in rollouts) == 0


# ── C3: advantages and rewards ────────────────────────────────────────────────────────────────────
GROUPS = torch.arange(6).repeat_interleave(5)


def test_advantages_have_the_moments_and_invariances_they_should():
    a, b = torch.randn(2, 30).double()
    weights = {"a": 1.0, "b": 0.5}
    for mode in ("sum", "gdpo"):
        value, report = advantages({"a": a, "b": b}, weights, GROUPS, mode, clip=1e9)
        assert value.reshape(6, 5).mean(1).abs().max() < 1e-12 and report["zero_std_share"] == 0
        offset = torch.randn(6).double().repeat_interleave(5)
        centred = advantages({"a": a + offset, "b": b}, weights, GROUPS, mode, "group", clip=1e9)[0]
        torch.testing.assert_close(
            advantages({"a": a, "b": b}, weights, GROUPS, mode, "group", clip=1e9)[0], centred
        )
        scaled = advantages({"a": 10 * a, "b": b}, weights, GROUPS, mode, clip=1e9)[0]
        assert torch.allclose(scaled, value) == (mode == "gdpo")
    assert advantages({"a": a, "b": b}, weights, GROUPS, "gdpo", clip=1e9)[0].std(
        correction=0
    ) == pytest.approx(1, abs=1e-6)
    value, report = advantages({"a": a}, {"a": 1.0}, GROUPS, clip=0.5)
    assert value.min() == -0.5 and value.max() == 0.5
    assert report["advantage_clipped"] == (value.abs() == 0.5).double().mean(), "on both sides"


def test_advantages_of_two_groups_of_two_are_those_by_hand():
    groups = torch.tensor([7, 7, 3, 3])
    rewards = {"a": torch.tensor([0.0, 1, 2, 6]), "b": torch.tensor([1.0, 0, 0, 3])}
    only_a = {"a": rewards["a"]}
    centred = torch.tensor([-0.5, 0.5, -2, 2], dtype=torch.float64)
    for std, size in (("global", 5.1875**0.5), ("group", centred.abs())):
        value = advantages(only_a, {"a": 1.0}, groups, "sum", std)[0]
        torch.testing.assert_close(value, centred / size)
    # a gives ∓1, ∓1 and b ±1, ∓1 in the two groups
    value = advantages(rewards, {"a": 1.0, "b": 0.5}, groups, "gdpo")[0]
    torch.testing.assert_close(
        value, torch.tensor([-0.5, 0.5, -1.5, 1.5], dtype=torch.float64) / 1.25**0.5
    )


@pytest.mark.parametrize("mode", ["sum", "gdpo"])
@pytest.mark.parametrize("weight", [1.0, 1e-3])
def test_a_small_difference_counts_where_rounding_does_not_explain_it(mode, weight):
    groups, weights = torch.tensor([0, 0, 1, 1]), {"a": weight}
    for gap, counts in ((1.5e-4, False), (3e-4, True)):  # of a pair, twice the deviation
        value, report = advantages(
            {"a": torch.tensor([0.5, 0.5 + gap, 0, 1])}, weights, groups, mode
        )
        assert bool(value[0]) == counts and report["zero_std_share"] == (0 if counts else 0.5)


def test_equal_rewards_give_nothing_and_are_reported_and_a_group_of_one_is_refused():
    for mode in ("sum", "gdpo"):
        for std in ("global", "group"):
            for rounding in (0.0, 1e-5):
                rewards = torch.arange(6.0).repeat_interleave(5) + rounding * torch.rand(30)
                value, report = advantages({"a": rewards}, {"a": 1.0}, GROUPS, mode, std)
                assert (value == 0).all() and report["zero_std_share"] == 1.0
    with pytest.raises(ValueError, match="single sample"):
        advantages({"a": torch.randn(3)}, {"a": 1.0}, torch.tensor([0, 0, 1]))
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 0.0])).tolist() == pytest.approx(
        [2.5 / 3, 1 / 3, 2.5 / 3, 0]
    )


def test_every_legal_geometry_has_equal_steps_and_every_other_is_refused():
    legal = 0
    for prompts in range(1, 9):
        for group in range(2, 9):
            for processes in range(1, 9):
                for batch in range(1, 9):
                    own = prompts * group // processes
                    fits = prompts % processes == 0 and own % batch == 0
                    if fits:
                        assert (
                            check_geometry(prompts, group, processes, batch, 1) * batch * processes
                            == prompts * group
                        )
                        legal += 1
                    else:
                        with pytest.raises(ConfigError):
                            check_geometry(prompts, group, processes, batch, 1)
    assert legal > 200


def samples(count=8, **changes) -> Samples:
    fields = {
        "captions": [f"c{i}" for i in range(count)],
        "latents": torch.zeros(count, 1),
        "groups": torch.arange(count) // 4,
        "draws": Draws.of(0, 0, count),
        "pixels": torch.rand(count, 1, 3, 4, 4),
    }
    return Samples(**(fields | changes))


def test_rewards_are_the_same_in_a_thread_and_whole_groups_keep_their_order():
    given = samples()
    pools = [RewardPool((Brightness(), BrightnessRank(), Noise()), workers) for workers in (0, 2)]
    at_once, later = (pool.submit(given).result() for pool in pools)
    assert all(torch.equal(at_once[name], later[name]) for name in at_once) and at_once.keys() == {
        "brightness",
        "brightness_rank",
        "noise",
    }
    order = torch.randperm(8)
    shuffled = pools[0].score(given.rows(order))
    assert all(torch.equal(shuffled[name], at_once[name][order]) for name in shuffled)
    assert sorted(at_once["brightness_rank"][:4].tolist()) == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_a_wrong_reward_is_an_error_with_its_name_and_prompt():
    bad = samples()
    bad.pixels[5] = float("nan")
    for workers in (0, 1):
        with pytest.raises(ValueError, match="'brightness' gave nan for 'c5'"):
            RewardPool((Brightness(),), workers).submit(bad).result()
    for pixel in (3.0, -0.5):
        wrong = samples()
        wrong.pixels[5] = pixel
        with pytest.raises(ValueError, match=rf"'brightness' gave {pixel} for 'c5'; .* 0.0 … 1.0"):
            RewardPool((Brightness(),), 0).submit(wrong)
    with pytest.raises(ValueError, match="'prompt_accuracy' needs facts"):
        RewardPool((PromptAccuracy(),)).score(samples())
    with pytest.raises(ConfigError, match="must differ"):
        RewardPool((Brightness(), Brightness(weight=2.0)))


# ── C4: identities of the losses ──────────────────────────────────────────────────────────────────
def test_on_policy_the_gradient_is_that_of_the_log_probability():
    old, y = torch.randn(2, 3, 5).double()
    new, advantage = old.clone().requires_grad_(), torch.tensor([1.0, -2.0, 0.5]).double()
    losses.clipped(
        dynamics.log_ratio(y, old, new, 0.3).double(), advantage, -1e-3, 1e-3
    ).sum().backward()
    by_hand = -advantage[:, None] * (y - old) / 0.3**2 / 5
    torch.testing.assert_close(new.grad, by_hand, atol=1e-6, rtol=1e-6)


def test_the_clip_stops_the_two_sides_that_it_should():
    for advantage, ratio, moves in (
        (1.0, 0.1, False),
        (-1.0, -0.1, False),
        (1.0, -0.1, True),
        (-1.0, 0.1, True),
    ):
        log_ratio = torch.tensor([ratio], requires_grad=True)
        losses.clipped(log_ratio, torch.tensor([advantage]), -0.05, 0.05).sum().backward()
        assert bool(log_ratio.grad.any()) == moves


def test_the_guard_is_the_plain_ratio_without_its_drift_in_units_of_the_noise():
    y, old, new = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)) + 2
    for norm in ("mean", "sqrt_dim", "sum"):
        plain = dynamics.log_ratio(y, old, new, 0.3, norm)
        drift = dynamics._normed(dynamics.mean_d((new - old).square()) / (2 * 0.3**2), y, norm)
        guard = dynamics.guard_log_ratio(y, old, new, 0.3, norm)
        torch.testing.assert_close(guard, 0.3 * (plain + drift))


def test_the_mean_of_a_step_is_linear_in_state_and_velocity():
    step = dynamics.Step(0.5, -0.25, 0.1)
    assert step.mean(torch.tensor(4.0), torch.tensor(8.0)) == 0.5 * 4 - 0.25 * 8


def test_the_guard_is_centred_and_the_plain_ratio_is_not():
    old, std = torch.zeros(800, 48), 0.4
    new = old + 0.05 * torch.randn(48)
    y = old + std * torch.randn(800, 48)
    guard, raw = dynamics.guard_log_ratio(y, old, new, std), dynamics.log_ratio(y, old, new, std)
    error = lambda x: 3 * x.std() / math.sqrt(800)
    assert guard.mean().abs() < error(guard)
    expected = -(new - old)[0].square().mean() / (2 * std**2)
    assert (raw.mean() - expected).abs() < error(raw) and expected.abs() > error(raw) / 3
    z, delta = (y - old) / std, new - old
    torch.testing.assert_close(guard, (z * delta).mean(1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        guard, std * (raw + delta.square().mean(1) / (2 * std**2)), atol=1e-6, rtol=1e-5
    )
    small = old + 1e-6 * torch.randn(48)
    y = old + torch.randn(800, 48)
    torch.testing.assert_close(
        dynamics.guard_log_ratio(y, old, small, 1.0),
        dynamics.log_ratio(y, old, small, 1.0),
        atol=1e-6,
        rtol=0,
    )


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_has_the_optimum_of_its_derivation(beta):
    """Data N(0, 1), reward 0.5 + 0.2 x0 at sigma 0.5: v = v_old + (2 / beta) E[r (v - v_old)], -0.4
    at beta 1."""
    sigma, count = 0.5, 100_001
    quantiles = (torch.arange(count).double() + 0.5) / count
    x = torch.full(
        (count, 1), 0.4
    ).double()  # one x_sigma; of what may lie beneath it every quantile
    clean = 0.4 + math.sqrt(0.5) * torch.special.ndtri(quantiles)[:, None]
    noise = (x - (1 - sigma) * clean) / sigma
    exact = (noise - clean).mean()
    v, v_old = exact.clone().requires_grad_(), exact
    share = 0.5 + 0.2 * clean[:, 0]
    level = torch.full((len(x),), sigma).double()
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = losses.nft(
        (v_old + shift).expand_as(x),
        v_old.expand_as(x),
        x,
        clean,
        level,
        share,
        beta,
        weighted=False,
    ).mean()
    (slope,) = torch.autograd.grad(loss, shift, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, shift)
    assert (-slope / curvature).item() == pytest.approx(-0.4 / beta, rel=0.01)
    # Whatever beta is, samples that are wholly positive pull as flow matching does.
    pull = (1 - 2 * share) * 2 * sigma * (x - sigma * v_old - clean)[:, 0]
    assert slope.item() == pytest.approx(pull.mean().item(), rel=1e-9)
    balanced = losses.nft(
        v.expand_as(x),
        v_old.expand_as(x),
        x,
        clean,
        level,
        torch.full_like(share, 0.5),
        beta,
        weighted=False,
    ).mean()
    (reconstruction,) = torch.autograd.grad(balanced, v)
    assert reconstruction.abs() < 1e-7
    assert losses.positive_share(torch.tensor([-9.0, 0.0, 2.5, 9.0]), 5.0).tolist() == [
        0,
        0.5,
        0.75,
        1,
    ]


def test_nft_divides_by_an_error_that_is_not_differentiated():
    x, clean, old = torch.randn(3, 4, 6)
    v, sigma, share = torch.randn(4, 6, requires_grad=True), torch.rand(4), torch.ones(4)
    weighted, plain = (
        losses.nft(v, old, x, clean, sigma, share, 1.0, weighted) for weighted in (True, False)
    )
    gap = (x - losses.wide(sigma, x) * v - clean).abs().mean(1).detach()
    torch.testing.assert_close(weighted, plain / gap)
    (found,) = torch.autograd.grad(weighted.sum(), v)
    (expected,) = torch.autograd.grad((plain / gap).sum(), v)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("most, size", [(1.0, 1.0), (0.6, math.hypot(0.4, 0.6))])
def test_a_rollout_begins_as_large_as_states_of_its_first_time_are(most, size):
    """As in `diffusion.sample`, which draws the samples of evaluation."""
    setup = SimpleNamespace(times=[most, 0.0], shape=(1, 4, 4, 8))
    config = SimpleNamespace(rollout=SimpleNamespace(steps=1, dynamics="ode", noise_level=0.7))
    seen = []

    def velocity(x, t):
        seen.append(x)
        return torch.zeros_like(x)

    draws = Draws.of(0, 0, 64)
    Rollouts.sample(SimpleNamespace(setup=setup, config=config), velocity, draws)
    assert seen[0].std().item() == pytest.approx(size, rel=0.02)
    objective = FlowMatching(FlowMatchingConfig(t_max=most))
    noise, first = draws.normal("rollout", *setup.shape), []
    sample(
        lambda x, t: first.append(x) or x, noise, objective, SamplerConfig(steps=1, solver="euler")
    )
    torch.testing.assert_close(seen[0], first[0], rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_an_epoch_is_shared_out_once_update_by_update(size):
    config = SimpleNamespace(prompts_per_epoch=4, group_size=4, updates_per_epoch=2, micro_batch=2)
    ranks = []
    for rank in range(size):
        setup = SimpleNamespace(world=SimpleNamespace(rank=rank, size=size))
        ranks.append(list(Rollouts.rank_indices(SimpleNamespace(setup=setup, config=config))))
    half = len(ranks[0]) // 2
    for update, own in enumerate((slice(0, half), slice(half, None))):
        places = torch.cat([part for batches in ranks for part in batches[own]])
        assert sorted(places.tolist()) == list(range(8 * update, 8 * update + 8))


def test_gradients_of_processes_are_averaged_and_a_missing_one_is_zero():
    class Two:
        """Stands for two processes, of which the other one has the gradients 3."""

        size = 2

        def gather(self, there):
            return [there, [True, True, False]]

        def sum_(self, *gradients):
            for gradient in gradients:
                gradient += 3

    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.ones(2)
    average_gradients(parameters, Two())
    found = [None if p.grad is None else p.grad.tolist() for p in parameters]
    assert found == [[2, 2], [1.5, 1.5], None]


def test_no_draw_of_an_update_comes_again_in_another():
    session = SimpleNamespace(seed=0, device="cpu", frames=1, shape=(6,), state=SimpleNamespace())
    session.learner = SimpleNamespace(objective=FlowMatching(FlowMatchingConfig()))
    session.levels = SimpleNamespace(inside=lambda sigma: sigma)
    levels = []
    for session.state.step in range(3):
        for number in range(2):
            x, noise, sigma = online.noised(session, torch.zeros(1, 6), torch.arange(1), number, 2)
            torch.testing.assert_close(x, sigma[:, None] * noise)
            levels.append(sigma.item())
    assert len(set(levels)) == 6


@pytest.mark.parametrize("place, needed", [(0, 1), (1, 2), (4, 2), (5, 3), (-1, 3)])
def test_as_many_latent_frames_are_decoded_as_rewards_need(place, needed):
    """Of 9 frames, which are 3 latent ones."""

    def decode(latents):
        frames = torch.arange(1.0 + 4 * (latents.shape[1] - 1))
        return frames[None, :, None, None, None] + 100 * latents.shape[1]

    learner = SimpleNamespace(spec=LatentSpec(channels=3, temporal=4))
    setup = SimpleNamespace(frames=9, learner=learner, tokenizer=SimpleNamespace(decode=decode))
    rollouts = SimpleNamespace(setup=setup, config=SimpleNamespace(reward_frames=(place,)))
    pixels = Rollouts.decode(rollouts, torch.zeros(1, 3, 2, 2, 3))
    assert pixels.flatten().tolist() == [place % 9 + 100 * needed]


def test_the_slow_copy_of_nft_stays_behind_more_and_more():
    nft = NFTConfig(rate=0.01, most=0.5, flat=10)
    config = SimpleNamespace(algorithm="nft", nft=nft)

    def share(step: int) -> float:
        return online.share_of_old(SimpleNamespace(config=config, state=SimpleNamespace(step=step)))

    assert [share(step) for step in (0, 10, 20, 60, 99)] == pytest.approx([0, 0, 0.1, 0.5, 0.5])


@pytest.mark.parametrize(
    "weighting, slope, at_16",
    [
        ("one", 1, 16),
        ("t", 0.3, 4.8),
        ("t2", 0.09, 1.44),
        ("huber", 0.15, 0.3 * (4 - 1e-5)),
        ("ghuber", 0.3, 1.2 * (2 - 10**-2.5)),
    ],
)
def test_the_weightings_of_awm_have_their_slope_at_an_error_of_one(weighting, slope, at_16):
    error = torch.tensor([0.0, 1.0, 16.0], dtype=torch.float64, requires_grad=True)
    weight = losses.weigh(error, torch.full((3,), 0.3), weighting)
    assert weight[0].item() == pytest.approx(0, abs=1e-12)
    assert weight[2].item() == pytest.approx(at_16, rel=1e-6)
    (found,) = torch.autograd.grad(weight[1], error)
    assert found[1].item() == pytest.approx(slope, rel=1e-6)


def test_the_matching_error_is_that_of_the_way_from_data_to_noise():
    clean, noise = torch.randn(2, 4, 6)
    assert losses.matching(noise - clean, clean, noise).eq(0).all()
    # in double precision, for it is multiplied by hundreds (dpo.beta) and subtracted
    off = losses.matching(noise - clean + 1e-6, clean, noise)
    torch.testing.assert_close(off, torch.full((4,), 1e-12, dtype=torch.float64), rtol=0.3, atol=0)


def test_awm_on_policy_is_matching_weighted_by_the_advantage():
    clean, noise = torch.randn(2, 4, 6)
    v, advantage, sigma = torch.randn(4, 6, requires_grad=True), torch.randn(4), torch.rand(4)
    error = losses.matching(v, clean, noise)
    for weighting in ("one", "t", "t2", "huber", "ghuber"):
        loss = losses.clipped(
            losses.awm_log_ratio(error, error.detach(), sigma, weighting), advantage, -1e-3, 1e-3
        ).sum()
        (got,) = torch.autograd.grad(loss, v, retain_graph=True)
        (want,) = torch.autograd.grad(
            (advantage * losses.weigh(error, sigma, weighting)).sum(), v, retain_graph=True
        )
        torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-5)
    assert losses.weigh(torch.tensor([4.0]), torch.tensor([0.5]), "t2").item() == 1.0


def test_dpo_at_the_reference_is_ln_2_and_knows_which_is_which():
    win, lose = (torch.tensor([0.3], requires_grad=True, dtype=torch.float64) for _ in range(2))
    fixed, beta = torch.tensor([0.3]).double(), 500.0
    loss = losses.dpo(losses.dpo_margin(win, fixed, lose, fixed, beta))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert (win.grad.item(), lose.grad.item()) == pytest.approx((beta / 4, -beta / 4), abs=1e-6)


def test_a_shift_favours_noise():
    draws = Draws.of(0, 0, 20_000)
    objective = FlowMatching(FlowMatchingConfig(time="logit_normal", shift=3.0))
    assert objective.draw_time(draws).median().item() == pytest.approx(0.75, abs=0.01)


# ── C6: Direct-Align ──────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "entered, landed", [(0.9643, 0.9429), (0.99, 0.97), (0.5, 0.48), (0.75, 0.7714)]
)
def test_direct_align_recovers_what_went_in_with_a_known_gain(entered, landed):
    clean, noise = torch.randn(2, 4, 1, 8, 8, 4)
    x = direct_align.add_noise(clean, noise, entered)
    v = (noise - clean).requires_grad_()
    found = direct_align.recover(x, v, noise, entered, landed)
    assert (found - clean).abs().max() < 5e-5
    (gain,) = torch.autograd.grad(found.sum(), v)
    torch.testing.assert_close(
        gain, torch.full_like(gain, (landed - entered) / (1 - landed)), rtol=1e-5, atol=0
    )
    for part in ("add_noise", "recover"):
        with pytest.raises(AssertionError, match="float32"):
            half = [z.detach().bfloat16() for z in (x, v, noise)]
            (
                direct_align.add_noise(*half[:2], entered)
                if part == "add_noise"
                else direct_align.recover(*half, entered, landed)
            )


def test_the_relative_score_is_antisymmetric_and_bounded_scorers_are_required():
    pixels = torch.rand(2, 1, 3, 4, 4)

    def scorer(pixels, texts):
        return torch.tensor([0.1 * len(text) for text in texts]) * pixels.mean((1, 2, 3, 4))

    def score(a: str, b: str, k: float):
        return direct_align.relative_score(scorer, pixels, [a] * 2, [b] * 2, k)

    assert score("same", "same", 0).abs().max() < 1e-7
    torch.testing.assert_close(score("long", "no", 0), -score("no", "long", 0), atol=1e-7, rtol=0)
    assert not torch.allclose(score("long", "no", 0.5), score("long", "no", 0))
    with pytest.raises(ValueError, match="within -1 … 1"):
        direct_align.relative_score(
            lambda pixels, texts: pixels.sum((1, 2, 3, 4)), pixels, ["a"] * 2, ["b"] * 2, 0
        )


def test_windows_stay_on_one_side_and_off_the_ends():
    direct_align.window_check((0.8, 0.6), 0.02, boundary=0.875)
    for window, boundary in (
        ((0.98, 0.75), None),
        ((0.75, 0.96), None),
        ((0.9, 0.01), None),
        ((0.96, 0.75), 0.875),
    ):
        with pytest.raises(ConfigError, match="sigma_window"):
            direct_align.window_check(window, 0.02, boundary)
    assert [
        round(direct_align.discount((0.1, 0.25), (0.96, 0.75), s), 6) for s in (0.75, 0.96)
    ] == [0.1, 0.25]
