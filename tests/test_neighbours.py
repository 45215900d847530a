"""Precision, recall, density, coverage and copies: cases with known answers, a brute-force second
implementation, any size of blocks."""

import pytest
import torch

from mmdit.diagnostics import neighbours
from mmdit.diagnostics.neighbours import (
    closer_share,
    copy_scores,
    manifold_scores,
    nearest_distances,
    squared_distances,
)


def cloud(count: int, width: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator)


def brute(samples, real) -> dict:
    """The definitions, one pair at a time."""

    def away(x, y):
        return (x.double() - y.double()).norm().item()

    def radii(points, k):
        return [sorted(away(x, y) for y in points)[k] for x in points]  # place 0 is itself

    def inside(points, centres, reach):
        return [any(away(x, c) <= r for c, r in zip(centres, reach)) for x in points]

    balls = radii(real, 5)
    hits = [[away(x, c) < r for x in samples] for c, r in zip(real, balls)]
    precise, recalled = (
        inside(samples, real, radii(real, 3)),
        inside(real, samples, radii(samples, 3)),
    )
    return {
        "precision": sum(precise) / len(samples),
        "recall": sum(recalled) / len(real),
        "density": sum(map(sum, hits)) / (5 * len(samples)),
        "coverage": sum(map(any, hits)) / len(real),
    }


@pytest.mark.parametrize("block", [6, 64])
def test_scores_are_those_of_their_definitions_in_blocks_of_any_size(monkeypatch, block):
    monkeypatch.setattr(neighbours, "BLOCK", block)
    samples, real = 1.3 * cloud(23, seed=1) + 0.4, cloud(31, seed=2)
    assert manifold_scores(samples, real) == pytest.approx(brute(samples, real), abs=1e-12)
    distances, places = nearest_distances(samples, real, 4)
    expected = torch.cdist(samples.double(), real.double()).topk(4, largest=False)
    torch.testing.assert_close(distances.sqrt(), expected.values)
    assert torch.equal(places, expected.indices)
    others = nearest_distances(real, real, 1, same=True)[1][:, 0]
    assert (others != torch.arange(len(real))).all()


def test_known_cases():
    points = cloud(40)
    same = manifold_scores(points, points)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert same["density"] == 1  # inside of each ball: its centre and 4 of 5 neighbours
    apart = manifold_scores(points, points + 1000)
    assert set(apart.values()) == {0}
    # One picture, drawn again and again: precise, and nearly nothing of the others is covered.
    one = manifold_scores(points[:1].expand(40, -1), points)
    assert one["precision"] == 1 and one["recall"] <= 1 / 40 and one["coverage"] < 0.4
    with pytest.raises(ValueError, match="too few for the 5 nearest"):
        manifold_scores(points, points[:5])


def test_equal_features_are_at_distance_zero_whatever_their_size():
    points = 30 + 0.1 * cloud(50, 2048)
    distances = squared_distances(points, points.flip(0))
    assert (distances.flip(1).diagonal() == 0).all() and (distances > 0).sum() == 50 * 49


def test_copies_are_seen_and_fresh_samples_are_not():
    training, held_out, fresh = cloud(300, 8, 1), cloud(200, 8, 2), cloud(200, 8, 3)

    def nearest(points):
        return nearest_distances(points, training, 1)[0][:, 0].sqrt()

    honest = copy_scores(nearest(fresh), nearest(held_out))
    assert honest["closer"] == pytest.approx(0.5, abs=0.06) and honest["suspicious"] < 0.04
    assert honest["identical"] == 0
    half = torch.cat([training[:100] + 1e-3 * fresh[:100], fresh[100:]])
    copied = copy_scores(nearest(half), nearest(held_out))
    assert copied["closer"] > 0.7 and copied["suspicious"] >= 0.5
    assert copy_scores(nearest(training[:7]), nearest(held_out))["identical"] == 7
    rounded = copy_scores(torch.tensor([0.0, 4e-5, 0.1]), torch.tensor([20.0, 21.0, 22.0]))
    assert rounded["identical"] == 2
    assert honest["control_distances"]["count"] == 200


def test_the_share_of_closer_values_counts_equal_ones_half():
    values = torch.tensor
    assert closer_share(values([1.0, 2.0, 5.0]), values([2.0, 4.0])) == (1 + 0.75 + 0) / 3
    assert closer_share(values([0.0]), values([1.0, 2.0])) == 1
