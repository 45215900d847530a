"""Frechet distance of features (Heusel et al. 2017, 1706.08500): how far what a model draws is from
real pictures, as two Gaussians in the space of a feature encoder."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from mmdit.data.dataset.picture_folder import folder_pictures
from mmdit.interop.feature_encoder import FeatureEncoder

FEWEST = 2048  # samples below which the distance says more of their number than of the model
KEYS = {"name", "weights", "reference"}
BATCH = 64


class Moments:
    """Count, mean and covariance of features, summed up in float64 as they come."""

    def __init__(self):
        self.count, self.total, self.products = 0, torch.zeros(()), torch.zeros(())

    def add(self, features: Tensor) -> None:
        """Take in `features (N, D)`."""
        features = features.double()
        self.count += len(features)
        self.total = self.total + features.sum(0)
        self.products = self.products + features.T @ features

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Return the unbiased `(D, D)`."""
        return (self.products - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(one: Moments, two: Moments) -> float:
    """Return `|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½)`."""
    if min(one.count, two.count) < 2:
        raise ValueError("a Frechet distance needs two samples and two reference pictures or more")
    values, vectors = torch.linalg.eigh(one.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # Σ₁ Σ₂ has the eigenvalues of the symmetric Σ₁^½ Σ₂ Σ₁^½
    shared = torch.linalg.eigvalsh(root @ two.covariance @ root).clamp(min=0).sqrt().sum()
    apart = (one.mean - two.mean).square().sum()
    return float(apart + one.covariance.trace() + two.covariance.trace() - 2 * shared)


def sample_in_turn(
    sample: Callable[[list[str], int], Tensor], prompts: list[str], count: int, batch: int
) -> None:
    """Have `sample(captions, first)` draw `count` samples of the prompts, one after the other and
    again from the beginning."""
    if count < 2:
        raise ValueError(f"--count is {count}, must be at least 2")
    captions = [prompts[i % len(prompts)] for i in range(count)]
    for first in range(0, count, batch):
        sample(captions[first : first + batch], first)


class FeatureDistance:
    """Compares samples with a folder of real pictures, all of one size. `setting`:
    `name=MODEL,weights=FILE,reference=FOLDER`. Of a clip the middle frame counts."""

    def __init__(self, setting: str, width: int, height: int, device: torch.device):
        values = dict(part.partition("=")[::2] for part in setting.split(","))
        if values.keys() != KEYS or not all(values.values()):
            raise ValueError(
                f"--features is {setting!r}, must be"
                " name=TIMM_MODEL,weights=FILE.safetensors,reference=FOLDER"
            )
        self.name, self.reference, self.device = values["name"], values["reference"], device
        self.encoder = FeatureEncoder(self.name, Path(values["weights"]).expanduser()).to(device)
        self.real, self.drawn = Moments(), Moments()
        pictures = folder_pictures(Path(self.reference).expanduser(), width, height)
        while batch := list(islice(pictures, BATCH)):
            self.real.add(self._features(torch.stack(batch)))

    @torch.no_grad()
    def _features(self, pictures: Tensor) -> Tensor:
        return self.encoder(pictures.to(self.device)).cpu()

    def add(self, pixels: Tensor) -> None:
        """Take in samples `(B, F, 3, H, W)` in [0, 1]."""
        for part in pixels[:, pixels.shape[1] // 2].split(BATCH):
            self.drawn.add(self._features(part))

    def report(self) -> dict:
        """Return the distance with what it rests on, ready for JSON."""
        report = {
            "encoder": self.name,
            "reference": self.reference,
            "frechet_distance": frechet_distance(self.drawn, self.real),
            "samples": self.drawn.count,
            "pictures": self.real.count,
            "width": len(self.real.mean),
        }
        fewest = min(self.drawn.count, self.real.count)
        if fewest < FEWEST:
            report["warning"] = (
                f"{fewest} samples or pictures: below {FEWEST} the distance is larger than it"
                " should be; compare it only with one of as many samples and the same folder"
            )
        return report


def format_features(report: dict) -> str:
    """Return the report as lines for a person."""
    line = (
        f"Frechet distance of {report['encoder']} features {report['frechet_distance']:.3f}:"
        f" {report['samples']} samples, {report['pictures']} pictures of {report['reference']}"
    )
    return "\n".join([line, f"  {report['warning']}"] if "warning" in report else [line])
