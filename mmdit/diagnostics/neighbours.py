"""Measure samples by their nearest neighbours: precision and recall (Kynkaanniemi et al. 2019,
1904.06991), density and coverage (Naeem et al. 2020, 2002.09797), and whether samples are copies.

Distances are Euclidean, in float64, and computed for a block of rows at a time: they take the
memory of `BLOCK × BLOCK` numbers, whatever the number of features. Two features count as the same
if their distance is below its rounding error.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2048
NEIGHBOURS = 3  # for precision and recall, as in their paper
DENSITY_NEIGHBOURS = 5  # for density and coverage, likewise
ROUNDING = 1e-5  # a smaller share of a usual distance: the same picture, encoded twice
SLACK = 1e-9  # relative rounding error of a squared distance that should equal a radius


def squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the squared distances `(N, M)`, float64, of `rows (N, D)` and `columns (M, D)`; they
    are exactly 0 between features that are the same."""
    rows, columns = rows.double(), columns.double()
    middle = columns.mean(0)  # a large common mean would cost precision
    rows, columns = rows - middle, columns - middle
    lengths = rows.square().sum(1)[:, None] + columns.square().sum(1)
    distances = lengths - 2 * rows @ columns.T
    return distances.where(distances > 1e-12 * lengths, 0.0)


def blocks(features: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the blocks of `features`: the place of the first row, and the rows."""
    for start in range(0, len(features), BLOCK):
        yield start, features[start : start + BLOCK]


def nearest_distances(
    features: Tensor, others: Tensor, count: int, same: bool = False
) -> tuple[Tensor, Tensor]:
    """Return, for each of `features (N, D)`, the squared distances to the `count` nearest of
    `others (M, D)` in ascending order, and the places of these: both `(N, count)`. `same`: both are
    the same set, and no feature is its own neighbour. ValueError if `others` has too few."""
    if len(others) - same < count:
        raise ValueError(
            f"{len(others)} features are too few for the {count} nearest of each; give more"
            " samples and pictures"
        )
    distances, places = [], []
    for start, rows in blocks(features):
        best = torch.full((len(rows), count), torch.inf, dtype=torch.float64)
        where = torch.zeros(len(rows), count, dtype=torch.int64)
        for first, columns in blocks(others):
            part = squared_distances(rows, columns)
            if same and start == first:
                part.fill_diagonal_(torch.inf)
            near, near_at = part.topk(min(count, part.shape[1]), dim=1, largest=False)
            merged = torch.cat([best, near], 1)
            best, order = merged.topk(count, dim=1, largest=False)
            where = torch.cat([where, near_at + first], 1).gather(1, order)
        distances.append(best)
        places.append(where)
    return torch.cat(distances), torch.cat(places)


def manifold_scores(samples: Tensor, real: Tensor) -> dict[str, float]:
    """Return `precision`, `recall`, `density` and `coverage` of `samples (N, D)` against `real (M,
    D)`.

    Around each real feature there is a ball that reaches to its k-th nearest other one. Precision
    is the share of samples inside any ball, border included; recall is the same with the sets
    exchanged (both k = 3). Density is the mean number of balls around a sample, divided by k;
    coverage is the share of balls that hold a sample (both k = 5, without the border).
    """
    most = max(NEIGHBOURS, DENSITY_NEIGHBOURS)
    around_real = nearest_distances(real, real, most, same=True)[0]
    around_samples = nearest_distances(samples, samples, NEIGHBOURS, same=True)[0]
    real_radius, sample_radius = around_real[:, NEIGHBOURS - 1], around_samples[:, NEIGHBOURS - 1]
    density_radius = around_real[:, DENSITY_NEIGHBOURS - 1]
    precise = torch.zeros(len(samples), dtype=torch.bool)
    recalled, covered = torch.zeros(2, len(real), dtype=torch.bool)
    inside = 0
    for start, rows in blocks(samples):
        here = slice(start, start + len(rows))
        for first, columns in blocks(real):
            there = slice(first, first + len(columns))
            distances = squared_distances(rows, columns)
            precise[here] |= (distances <= real_radius[there] * (1 + SLACK)).any(1)
            recalled[there] |= (distances <= sample_radius[here, None] * (1 + SLACK)).any(0)
            in_ball = distances < density_radius[there] * (1 - SLACK)
            covered[there] |= in_ball.any(0)
            inside += int(in_ball.sum())
    return {
        "precision": float(precise.double().mean()),
        "recall": float(recalled.double().mean()),
        "density": inside / (DENSITY_NEIGHBOURS * len(samples)),
        "coverage": float(covered.double().mean()),
    }


def closer_share(samples: Tensor, control: Tensor) -> float:
    """Return the probability that a value of `samples` is below one of `control`, where equal ones
    count half (Mann-Whitney U over N M): 0.5 if both come from one distribution."""
    ordered = control.sort().values
    below = len(ordered) - torch.searchsorted(ordered, samples, right=True)
    equal = len(ordered) - torch.searchsorted(ordered, samples) - below
    return float((below + equal / 2).double().mean() / len(ordered))


def copy_scores(samples: Tensor, control: Tensor) -> dict:
    """Return how near samples are to training items: `samples (N,)` are their distances to the
    nearest training item, `control (K,)` those of items that were not trained on.

    `closer`: see `closer_share`. `suspicious`: the share of samples that are nearer than all but 1
    % of the control, so that about 0.01 is expected. `identical`: samples at distance 0, up to the
    rounding of an encoder, whose last digits depend on the batch.
    """
    return {
        "sample_distances": _quantiles(samples),
        "control_distances": _quantiles(control),
        "closer": closer_share(samples, control),
        "suspicious": float((samples < control.quantile(0.01)).double().mean()),
        "identical": int((samples <= ROUNDING * control.median()).sum()),
    }


def _quantiles(values: Tensor) -> dict[str, float]:
    """Return the count, least, 1 % quantile, median and largest of distances."""
    least, low, median, most = values.quantile(values.new_tensor([0.0, 0.01, 0.5, 1.0])).tolist()
    return {"count": len(values), "least": least, "low": low, "median": median, "largest": most}
