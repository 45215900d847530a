"""Distances between two sets of features `(N, D)`, taken as samples of distributions: the Frechet
distance of two Gaussians (Heusel et al. 2017, 1706.08500), its limit for infinitely many samples
(Chong & Forsyth 2020, 1911.07023), and the kernel distance (Binkowski et al. 2018, 1801.01401).

The Frechet distance of few samples is larger than that of many from the same source, by about
`constant / N`. The kernel distance is unbiased, and therefore the one to use when samples are few.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SUBSETS, SUBSET_SIZE = 100, 1000  # of the kernel distance, as in its paper
POINTS = 15  # numbers of samples through which the limit is fitted


class Moments:
    """The count, mean and covariance of features, accumulated in float64. Up to rounding, the
    result does not depend on the parts and the order in which features are added: each part is
    centred before it is summed (Chan et al. 1979), so that a large mean costs no precision."""

    def __init__(self):
        self.count, self.mean, self.scatter = 0, torch.zeros(()), torch.zeros(())
        self._root: tuple[Tensor, int] | None = None

    def add(self, features: Tensor) -> Moments:
        """Add `features (N, D)`; return self."""
        features = features.double()
        if not len(features):
            return self
        mean = features.mean(0)
        centred = features - mean
        count = self.count + len(features)
        apart = mean - self.mean
        weight = self.count * len(features) / count
        self.scatter = self.scatter + centred.T @ centred + weight * torch.outer(apart, apart)
        self.mean = self.mean + apart * (len(features) / count)
        self.count, self._root = count, None
        return self

    @property
    def covariance(self) -> Tensor:
        """Return the unbiased covariance `(D, D)`."""
        return self.scatter / (self.count - 1)

    def root(self) -> tuple[Tensor, int]:
        """Return the square root `(D, D)` of the covariance, and its rank. In directions in which
        the features do not vary, the remainder from rounding is set to zero."""
        if self._root is None:
            values, vectors = torch.linalg.eigh(self.covariance)
            floor = values.abs().amax() * len(values) * torch.finfo(values.dtype).eps
            kept = values > floor
            root = vectors * values.clamp(min=0).sqrt().where(kept, 0.0) @ vectors.T
            self._root = root, int(kept.sum())
        return self._root


def frechet_distance(one: Moments, two: Moments) -> float:
    """Return `|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½)`. The covariances may be singular. ValueError
    if a set has fewer than two features, or the widths differ."""
    if min(one.count, two.count) < 2:
        raise ValueError(
            f"a Frechet distance needs two samples and two real items or more, these are"
            f" {one.count} and {two.count}"
        )
    if one.mean.shape != two.mean.shape:
        raise ValueError(
            f"features of width {len(one.mean)} and {len(two.mean)} cannot be compared: take the"
            " same encoder, and as many frames, for both"
        )
    # The eigenvalues of (Σ₁ Σ₂)^½ are the singular values of Σ₁^½ Σ₂^½. Small singular values are
    # as exact as the largest; the root of an eigenvalue near zero would lose half of its digits.
    shared = torch.linalg.svdvals(one.root()[0] @ two.root()[0]).sum()
    return max(0.0, _distance(one, two, shared))  # rounding may give less


def _distance(one: Moments, two: Moments, shared: Tensor) -> float:
    """Return the Frechet distance, given the trace `shared` of (Σ₁ Σ₂)^½."""
    apart = (one.mean - two.mean).square().sum()
    return float(apart + one.covariance.trace() + two.covariance.trace() - 2 * shared)


def frechet_limit(samples: Tensor, real: Moments, seed: int = 0) -> dict | None:
    """Return `{value, counts, distances}`. `distances` are those of random subsets of `samples (N,
    D)` to `real`; `value` is where a line through them, plotted over 1 / size, meets zero. There
    are 15 subsets, of N / 10 (but at least D + 1) to N samples. None if N is below 2 D, where the
    distance is not yet linear.

    This removes the bias from the number of samples, not that from the number of real pictures.
    """
    count, width = samples.shape
    if count < 2 * width:
        return None
    numbers = np.linspace(max(count // 10, width + 1), count, POINTS).astype(int)
    draws, root = np.random.default_rng(seed), real.root()[0]
    distances = []
    for number in numbers:
        chosen = torch.from_numpy(draws.choice(count, number, replace=False))
        part = Moments().add(samples[chosen])
        # takes a third of the time of `frechet_distance`; exact enough for covariances of full rank
        values = torch.linalg.eigvalsh(root @ part.covariance @ root)
        distances.append(_distance(part, real, values.clamp(min=0).sqrt().sum()))
    _, value = np.polyfit(1 / numbers, distances, 1)
    return {"value": float(value), "counts": numbers.tolist(), "distances": distances}


def kernel_distance(samples: Tensor, real: Tensor, seed: int = 0) -> dict:
    """Return an unbiased estimate of the squared maximum mean discrepancy of `samples (N, D)` and
    `real (M, D)` under the kernel `(x·y / D + 1)³`, as `{value, deviation, subsets, subset_size}`.

    `value` is the mean over 100 pairs of random subsets of 1000, as in the paper. If neither set
    has more than 1000 features, it is computed once from all of them, and `deviation` is None.
    ValueError if a set has fewer than two.
    """
    if min(len(samples), len(real)) < 2:
        raise ValueError(
            f"a kernel distance needs two samples and two real items or more, these are"
            f" {len(samples)} and {len(real)}"
        )
    if max(len(samples), len(real)) <= SUBSET_SIZE:
        value = unbiased_discrepancy(samples, real)
        return {"value": value, "deviation": None, "subsets": 1, "subset_size": None}
    draws = np.random.default_rng(seed)
    size = min(SUBSET_SIZE, len(samples), len(real))
    values = []
    for _ in range(SUBSETS):
        parts = [
            features[torch.from_numpy(draws.choice(len(features), size, replace=False))]
            for features in (samples, real)
        ]
        values.append(unbiased_discrepancy(*parts))
    return {
        "value": float(np.mean(values)),
        "deviation": float(np.std(values)),
        "subsets": SUBSETS,
        "subset_size": size,
    }


def unbiased_discrepancy(one: Tensor, two: Tensor) -> float:
    """Return the unbiased squared discrepancy of all of `one (N, D)` and `two (M, D)`; it may be
    below zero."""
    one, two = one.double(), two.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        base = x @ y.T / x.shape[1] + 1
        return base * base * base  # ten times as fast as a power

    def within(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    return float(within(one) + within(two) - 2 * kernel(one, two).mean())
