"""Distances of two sets of features: closed forms of Gaussians, a second implementation, singular
covariances, what few samples do to them."""

import itertools

import numpy as np
import pytest
import torch

from mmdit.diagnostics import distribution_distance
from mmdit.diagnostics.distribution_distance import (
    Moments,
    frechet_distance,
    frechet_limit,
    kernel_distance,
    unbiased_discrepancy,
)


def draws(count: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


def with_moments(x, mean, root):
    """Return `x` moved so that its mean and covariance are exactly `mean` and `root @ root.T`."""
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (len(x) - 1))).T
    return white @ root.T + mean


def moments(features, *sizes: int) -> Moments:
    result = Moments()
    for part in features.split(list(sizes) or len(features)):
        result.add(part)
    return result


def test_the_distance_is_that_of_a_matrix_root_by_another_library():
    linalg = pytest.importorskip("scipy.linalg")
    mean, roots = draws(2, 12, 1), draws(24, 12, 2)
    one = with_moments(draws(400, 12, 3), mean[0], roots[:12])
    two = with_moments(draws(300, 12, 4), mean[1], roots[12:])
    first, second = roots[:12] @ roots[:12].T, roots[12:] @ roots[12:].T
    middle = linalg.sqrtm((first @ second).numpy())
    expected = (mean[0] - mean[1]).square().sum() + first.trace() + second.trace()
    expected = float(expected) - 2 * float(np.trace(middle).real)
    assert frechet_distance(moments(one), moments(two)) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(moments(two), moments(one)) == pytest.approx(expected, abs=1e-6)


def test_singular_covariances_are_exact_and_their_rank_is_known():
    """The trace of (Σ₁ Σ₂)^½ of two samples is the nuclear norm of the product of their centred
    rows, which needs no covariance."""
    one, two = draws(9, 40, 1), 3 * draws(7, 40, 2) + 0.5
    rows = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (one, two)]
    shared = torch.linalg.svdvals(rows[0] @ rows[1].T).sum()
    expected = (one.mean(0) - two.mean(0)).square().sum() - 2 * shared
    expected += rows[0].square().sum() + rows[1].square().sum()
    first, second = moments(one), moments(two)
    assert frechet_distance(first, second) == pytest.approx(expected.item(), abs=1e-9)
    assert (first.root()[1], second.root()[1]) == (8, 6)
    assert 0 <= frechet_distance(first, moments(one)) < 1e-9
    still = moments(torch.ones(5, 40))  # features that do not vary at all
    assert still.root()[1] == 0 and np.isfinite(frechet_distance(first, still))
    with pytest.raises(ValueError, match="of width 40 and 3 cannot"):
        frechet_distance(first, moments(draws(9, 3)))


def test_moments_do_not_depend_on_parts_and_a_large_mean_costs_no_digits():
    x = draws(101, 5) + 1e6
    whole, centre = moments(x), x - x.mean(0)
    expected = centre.T @ centre / 100
    for sizes in ((101,), (1, 100), (50, 51), (33, 1, 1, 66)):
        parts = moments(x, *sizes)
        torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-15, atol=0)
        torch.testing.assert_close(parts.covariance, expected, rtol=1e-9, atol=1e-9)
    halves = Moments().add(x[::2]).add(x[1::2])  # as two processes would have them
    assert frechet_distance(halves, whole) == pytest.approx(0, abs=1e-6)
    root = halves.root()[0]
    halves.add(x[:1] + 100)  # the root is that of all features
    assert not torch.equal(halves.root()[0], root)


def cubic(x, y):
    return float(x @ y / len(x) + 1) ** 3


def test_the_kernel_distance_is_its_definition_and_unbiased():
    one, two = draws(5, 3, 1), draws(4, 3, 2)

    def mean(pairs):
        values = [cubic(x, y) for x, y in pairs]
        return sum(values) / len(values)

    expected = mean(itertools.permutations(one, 2)) + mean(itertools.permutations(two, 2))
    expected -= 2 * mean(itertools.product(one, two))
    assert unbiased_discrepancy(one, two) == pytest.approx(expected, abs=1e-12)
    # Over all samples of 3 of 5 points without replacement, its mean is that of the points.
    values = [
        unbiased_discrepancy(one[list(a)], two[list(b)])
        for a, b in itertools.product(
            itertools.combinations(range(5), 3), itertools.combinations(range(4), 3)
        )
    ]
    assert np.mean(values) == pytest.approx(expected, abs=1e-12)
    assert kernel_distance(one, two)["value"] == pytest.approx(expected, abs=1e-12)


def test_the_kernel_distance_of_gaussians_is_the_closed_form():
    """For one dimension, x ~ N(0, 1) and y ~ N(m, 1): E (xy + 1)³ has only even powers of x."""
    shift = 0.7
    # E k(x, x') = 1 + 3 E x² E x'² = 4; k(x, y) likewise with E y² = 1 + m²;
    # k(y, y') = E (yy')³ + 3 E (yy')² + 3 E yy' + 1
    second, third = 1 + shift**2, shift**3 + 3 * shift
    expected = 4 + (third**2 + 3 * second**2 + 3 * shift**2 + 1) - 2 * (1 + 3 * second)
    values = [
        unbiased_discrepancy(draws(200, 1, seed), draws(200, 1, seed + 999) + shift)
        for seed in range(200)
    ]
    error = np.std(values) / len(values) ** 0.5
    assert np.mean(values) == pytest.approx(expected, abs=4 * error) and error < expected / 10


def test_subsets_of_the_kernel_distance_follow_the_seed(monkeypatch):
    assert (distribution_distance.SUBSETS, distribution_distance.SUBSET_SIZE) == (100, 1000)
    monkeypatch.setattr(distribution_distance, "SUBSET_SIZE", 80)
    one, two = draws(110, 2, 1), draws(150, 2, 2) + 0.5
    result = kernel_distance(one, two, seed=1)
    assert (result["subsets"], result["subset_size"]) == (100, 80)
    assert result == kernel_distance(one, two, seed=1) != kernel_distance(one, two, seed=2)
    whole = unbiased_discrepancy(one, two)
    assert abs(result["value"] - whole) < 3 * result["deviation"]


def test_the_limit_takes_away_what_few_samples_add():
    """The distance of N samples of N(0, 1) in D dimensions to the true Gaussian is about
    D (D + 1) / 4 N too large."""
    width, count = 20, 1000
    real = moments(
        with_moments(draws(5000, width, 1), torch.zeros(width), torch.eye(width).double())
    )
    for seed in range(3):
        samples = draws(count, width, seed + 10)
        result = frechet_limit(samples, real, seed)
        plain = result["distances"][-1]
        assert plain == pytest.approx(frechet_distance(moments(samples), real), abs=1e-9)
        bias = width * (width + 1) / 4 / count + width / count
        assert plain == pytest.approx(bias, rel=0.3) and abs(result["value"]) < plain / 3
        assert result["counts"] == sorted(result["counts"]) and result["counts"][-1] == count
    assert frechet_limit(draws(39, width), real) is None
