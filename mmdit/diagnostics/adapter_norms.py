"""Measure how far an adapter moves its base: ‖ΔW‖ / ‖W‖ of each layer, in the Frobenius and the
spectral norm."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdit.adapters import Adapter, DoRALinear, LoKrLinear
from mmdit.adapters.lora import kind_of
from mmdit.weights import check_numbers

EXACT = 1024  # up to this width, spectral norms are computed from eigenvalues


@dataclass(frozen=True)
class Change:
    """The norms of one layer's weight and of its update, or of a parameter and its whole
    difference."""

    layer: str
    weight: float
    delta: float
    spectral_weight: float
    spectral_delta: float

    @property
    def ratio(self) -> float:
        return self.delta / max(self.weight, 1e-30)

    @property
    def spectral_ratio(self) -> float:
        return self.spectral_delta / max(self.spectral_weight, 1e-30)


def spectral_norm(matrix: Tensor) -> float:
    """Return the largest singular value. For large matrices it comes from power iteration on a
    block of vectors (Halko et al. 2011, algorithm 4.4), which approaches it from below, to about
    1e-3."""
    if min(matrix.shape) <= EXACT:
        matrix = matrix.double()
        gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        return math.sqrt(max(torch.linalg.eigvalsh(gram)[-1].item(), 0.0))
    matrix = matrix.float()
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(matrix.shape[1], 8, generator=generator).to(matrix.device)
    for _ in range(40):
        vectors = torch.linalg.qr(matrix.T @ (matrix @ vectors)).Q
    return torch.linalg.matrix_norm(matrix @ vectors, 2).item()


@torch.no_grad()
def update_norms(layer: Adapter) -> tuple[float, float]:
    """Return the Frobenius and the spectral norm of the update. For LoRA they come from the thin
    factors (with B = Q R and A = (Q' R')ᵀ, the r x r matrix R R'ᵀ has the singular values of B A),
    for LoKr they are products of the norms of the factors; neither update is formed. DoRA's is."""
    if isinstance(layer, LoKrLinear):
        first, second = layer.factors(torch.float64)
        scale = abs(layer.scale)
        norm = (first.norm() * second.norm()).item()
        return scale * norm, scale * spectral_norm(first) * spectral_norm(second)
    if isinstance(layer, DoRALinear):
        delta = (layer.merged_weight() - layer.weight).double()
        return delta.norm().item(), spectral_norm(delta)
    parts = (layer.lora_B.double(), layer.lora_A.double().T)
    core = torch.linalg.multi_dot([torch.linalg.qr(parts[0]).R, torch.linalg.qr(parts[1]).R.T])
    values = abs(layer.scale) * torch.linalg.svdvals(core)
    return values.norm().item(), values.max().item()


@torch.no_grad()
def delta_budget(layers: Iterable[tuple[str, Adapter]]) -> list[Change]:
    """Return the change of each layer, measured one layer at a time, so that weights may be read
    one at a time. ValueError if a tensor holds nan or infinity, which cannot be compared with a
    limit."""
    changes = []
    for name, layer in layers:
        for part, value in layer.named_parameters():
            check_numbers(f"{name}.{part}", value.detach(), "the base or its adapter")
        delta, spectral = update_norms(layer)
        weight = layer.weight.double().norm().item()
        changes.append(Change(name, weight, delta, spectral_norm(layer.weight), spectral))
    return changes


@torch.no_grad()
def difference_budget(changes: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> list[Change]:
    """Return the change of each parameter that has a whole difference, relative to its value
    `before`. For parameters that are no matrices, the spectral norm is the Frobenius norm."""
    result = []
    for name, change in changes.items():
        norms = []
        for value in (before[name], change):
            check_numbers(name, value.detach(), "the base or its adapter")
            norm = value.double().norm().item()
            norms.append((norm, spectral_norm(value.double()) if value.ndim == 2 else norm))
        (weight, spectral_weight), (delta, spectral_delta) = norms
        result.append(Change(name, weight, delta, spectral_weight, spectral_delta))
    return result


def summarise(changes: list[Change]) -> dict:
    """Return, ready for JSON, `total` and the groups `layers`, `kinds` (numbered blocks taken
    together) and `blocks`. Each row has `count`, `ratio` (of the joint norms of all that it
    covers), `max_ratio` and `max_spectral_ratio`."""
    groups: dict[str, dict[str, list[Change]]] = {"layers": {}, "kinds": {}, "blocks": {}}
    for change in changes:
        number = re.search(r"(?:^|\.)blocks\.(\d+)\.", change.layer)
        names = {
            "layers": change.layer,
            "kinds": kind_of(change.layer),
            "blocks": number[1] if number else "outside",
        }
        for group, name in names.items():
            groups[group].setdefault(name, []).append(change)
    table: dict = {"total": _row(changes)}
    for group, members in groups.items():
        table[group] = {name: _row(part) for name, part in members.items()}
    return table


def _row(changes: list[Change]) -> dict:
    delta = math.hypot(*(change.delta for change in changes))
    weight = math.hypot(*(change.weight for change in changes))
    return {
        "count": len(changes),
        "ratio": delta / max(weight, 1e-30),
        "max_ratio": max(change.ratio for change in changes),
        "max_spectral_ratio": max(change.spectral_ratio for change in changes),
    }


def format_budget(summary: dict) -> str:
    """Return the result of `summarise` as a table for people."""
    blocks = {f"block {name}": row for name, row in summary["blocks"].items()}
    lines = [f"{'':28}  layers  ‖ΔW‖/‖W‖   largest  spectral"]
    for name, row in (*summary["kinds"].items(), *blocks.items(), ("all", summary["total"])):
        lines.append(
            f"{name:28}  {row['count']:>6}  {row['ratio']:>9.4f} {row['max_ratio']:>9.4f}"
            f" {row['max_spectral_ratio']:>9.4f}"
        )
    return "\n".join(lines)
