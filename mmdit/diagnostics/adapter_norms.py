"""How far an adapter moves its base: ‖ΔW‖ / ‖W‖ of each layer, in the Frobenius and the spectral
norm."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdit.adapters import Adapter, DoRALinear, LoKrLinear
from mmdit.weights import check_numbers

EXACT = 1024  # up to this width a spectral norm comes from an eigenvalue


@dataclass(frozen=True)
class Change:
    """Of one layer: norms of its weight and of the update."""

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


def spectral_norm(matrix: Tensor, rounds: int = 40, block: int = 8) -> float:
    """The largest singular value; of large matrices by power iteration on a block of vectors (Halko
    et al. 2011, algorithm 4.4), from below and to about 1e-3."""
    if min(matrix.shape) <= EXACT:
        matrix = matrix.double()
        gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        return math.sqrt(max(torch.linalg.eigvalsh(gram)[-1].item(), 0.0))
    matrix = matrix.float()
    vectors = torch.randn(matrix.shape[1], block, generator=torch.Generator().manual_seed(0)).to(
        matrix.device
    )
    for _ in range(rounds):
        vectors = torch.linalg.qr(matrix.T @ (matrix @ vectors)).Q
    return torch.linalg.matrix_norm(matrix @ vectors, 2).item()


@torch.no_grad()
def update_norms(layer: Adapter) -> tuple[float, float]:
    """Frobenius and spectral norm of the update. LoRA: from its thin factors (B = Q R, A = (Q'
    R')ᵀ: the r x r matrix R R'ᵀ has the singular values of B A). LoKr: products of those of the
    factors. Neither is formed whole; DoRA's is.
    """
    if isinstance(layer, LoKrLinear):
        first, second = layer.factors(torch.float64)
        scale = abs(layer.scale)
        return (
            scale * (first.norm() * second.norm()).item(),
            scale * spectral_norm(first) * spectral_norm(second),
        )
    if isinstance(layer, DoRALinear):
        delta = (layer.merged_weight() - layer.weight).double()
        return delta.norm().item(), spectral_norm(delta)
    parts = (layer.lora_B.double(), layer.lora_A.double().T)
    core = torch.linalg.multi_dot([torch.linalg.qr(parts[0]).R, torch.linalg.qr(parts[1]).R.T])
    values = abs(layer.scale) * torch.linalg.svdvals(core)
    return values.norm().item(), values.max().item()


@torch.no_grad()
def delta_budget(layers: Iterable[tuple[str, Adapter]]) -> list[Change]:
    """Measure one layer at a time, so that weights may be read one at a time. ValueError: one
    holds nan or infinity, with which
    no limit can be compared."""
    changes = []
    for name, layer in layers:
        for part, value in layer.named_parameters():
            check_numbers(f"{name}.{part}", value.detach(), "the base or its adapter")
        delta, spectral = update_norms(layer)
        changes.append(
            Change(
                name,
                layer.weight.double().norm().item(),
                delta,
                spectral_norm(layer.weight),
                spectral,
            )
        )
    return changes


def summarise(changes: list[Change]) -> dict:
    """Ready for JSON: `total`, and `layers`, `kinds` (numbered blocks as one), `blocks`, each with
    `ratio` (of the norms of all that it covers), `max_ratio` and `max_spectral_ratio`."""
    groups: dict[str, dict[str, list[Change]]] = {
        "total": {"": changes},
        "layers": {},
        "kinds": {},
        "blocks": {},
    }
    for change in changes:
        number = re.search(r"(?:^|\.)blocks\.(\d+)\.", change.layer)
        kind = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", change.layer)
        for group, key in (
            ("layers", change.layer),
            ("kinds", kind),
            ("blocks", number[1] if number else "outside"),
        ):
            groups[group].setdefault(key, []).append(change)

    def row(own: list[Change]) -> dict:
        whole = math.hypot(*(c.delta for c in own)) / max(
            math.hypot(*(c.weight for c in own)), 1e-30
        )
        return {
            "count": len(own),
            "ratio": whole,
            "max_ratio": max(c.ratio for c in own),
            "max_spectral_ratio": max(c.spectral_ratio for c in own),
        }

    table: dict = {
        group: {key: row(own) for key, own in members.items()} for group, members in groups.items()
    }
    return table | {"total": table["total"][""]}


def format_budget(summary: dict) -> str:
    lines = [f"{'':28}  layers  ‖ΔW‖/‖W‖   largest  spectral"]
    rows = defaultdict(
        dict,
        {
            "kinds": summary["kinds"],
            "blocks": {f"block {key}": row for key, row in summary["blocks"].items()},
            "all": {"all": summary["total"]},
        },
    )
    for group in ("kinds", "blocks", "all"):
        for key, row in rows[group].items():
            lines.append(
                f"{key:28}  {row['count']:>6}  {row['ratio']:>9.4f} {row['max_ratio']:>9.4f}"
                f" {row['max_spectral_ratio']:>9.4f}"
            )
    return "\n".join(lines)
