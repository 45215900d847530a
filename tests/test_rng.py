"""Draws are pure functions of (seed, purpose, step, global index)."""

import torch

from mmdit.rng import Draws, generator, key


def test_a_rank_draws_exactly_its_part():
    whole = Draws.of(1, 7, 8)
    part = Draws(1, 7, torch.tensor([5, 2]))
    assert torch.equal(whole.normal("noise", 3, 4)[[5, 2]], part.normal("noise", 3, 4))
    assert torch.equal(whole[2:4].uniform("t"), whole.uniform("t")[2:4])


def test_one_number_a_sample_is_drawn_where_the_indices_lie_and_others_where_they_are_asked_for():
    here, elsewhere = Draws(1, 2, torch.arange(3)), torch.device("meta")
    there = Draws(1, 2, torch.arange(3), device=elsewhere)
    assert torch.equal(there.normal("time"), here.normal("time"))
    assert torch.equal(there.uniform("time"), here.uniform("time"))
    assert there.normal("noise", 4, 5).is_meta and there.normal("noise", 4, 5).shape == (3, 4, 5)
    assert there[1:].normal("noise", 4).is_meta and here.normal("noise", 4).is_cpu


def test_every_part_of_the_key_matters():
    base = Draws.of(1, 7, 4).bits("noise", 16)
    for other in (
        Draws.of(2, 7, 4).bits("noise", 16),
        Draws.of(1, 8, 4).bits("noise", 16),
        Draws.of(1, 7, 4).bits("t", 16),
    ):
        assert not (other == base).any()


def test_numbers_are_known():
    """Fixed values: a change here would silently break every exact resume."""
    assert key("a", 1) == -4522502111639797375
    assert Draws.of(0, 0, 2).bits("noise", 2).tolist() == [
        [4809000742862551574, -2650387482811921102],
        [-2190701357580808574, 1220945109309542352],
    ]


def test_moments_and_independence():
    draws = Draws.of(3, 1, 512)
    uniform, normal = draws.uniform("u", 2048), draws.normal("n", 2048).double()
    assert uniform.min() >= 0 and uniform.max() < 1
    n = normal.numel()
    assert abs(uniform.mean() - 0.5) < 5 / (12 * n) ** 0.5
    assert abs(normal.mean()) < 5 / n**0.5
    assert abs(normal.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((normal**4).mean() - 3) < 5 * (96 / n) ** 0.5
    for shifted in (normal.roll(1, 0), normal.roll(1, 1), draws.normal("m", 2048).double()):
        assert abs((normal * shifted).mean()) < 5 / n**0.5


def test_generator_is_stable():
    assert torch.equal(
        torch.rand(3, generator=generator(1, "x")), torch.rand(3, generator=generator(1, "x"))
    )
    assert not torch.equal(
        torch.rand(3, generator=generator(1, "x")), torch.rand(3, generator=generator(1, "y"))
    )
