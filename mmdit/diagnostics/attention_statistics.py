"""Measure attention before its softmax: how large the logits are, how spread the weights, and how
much weight goes to padding.

With norms on queries and keys, a longer key changes nothing, so that adapters of q and k are judged
by these and not by ‖ΔW‖.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from mmdit.nn import attention

QUERIES, SAMPLES = 256, 64  # the most rows of a call that are examined, evenly spaced


class Statistics:
    """Sums for each head over all calls of one attention layer."""

    def __init__(self, heads: int):
        self.heads, self.count, self.rows = heads, 0, 0
        # sums of logits, of their squares, of entropies, of the weight on padding
        self.sums = torch.zeros(4, heads, dtype=torch.float64)
        self.largest = torch.full((2, heads), -math.inf)  # largest logit, largest absolute one

    @torch.no_grad()
    def add(self, q: Tensor, k: Tensor, valid: Tensor | None) -> None:
        """Add a call of `nn.attention.attend` with these arguments; axes that are folded into the
        heads are unfolded."""
        if valid is not None and valid.ndim == 4:
            valid = valid.expand(*q.shape[:3], k.shape[2])
        q, k = self._by_head(q), self._by_head(k)
        step, skip = math.ceil(len(q) / SAMPLES), math.ceil(q.shape[2] / QUERIES)
        q, k = q[::step, :, ::skip].float(), k[::step].float()
        logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        bias, biased = torch.zeros_like(logits), False
        if valid is not None:
            mask = self._by_head(valid)[::step, :, ::skip]
            biased = mask.is_floating_point()
            bias = mask.float() if biased else bias.masked_fill(~mask, -math.inf)
        seen = bias > -math.inf
        weights = torch.softmax(logits + bias, -1)
        padding = weights[..., -1]  # for Wan, the last key stands for all padding
        if not biased:
            padding = torch.zeros_like(padding)
        entropy = torch.special.entr(weights).sum(-1)
        clean = logits.masked_fill(~seen, 0).double()
        values = (clean, clean.square(), entropy.double(), padding.double())
        self.sums += torch.stack(
            [value.transpose(0, 1).flatten(1).sum(1).cpu() for value in values]
        )
        self.count += int(seen[:, 0].sum())
        self.rows += entropy[:, 0].numel()
        largest = [
            value.masked_fill(~seen, -math.inf).amax((0, 2, 3)).cpu()
            for value in (logits, logits.abs())
        ]
        self.largest = self.largest.maximum(torch.stack(largest))

    def _by_head(self, x: Tensor) -> Tensor:
        return rearrange(x, "b (p h) l d -> (b p) h l d", h=self.heads)

    def result(self) -> dict[str, list[float]]:
        """Return `logit_std`, `max_logit`, `max_abs_logit`, `mean_entropy` and `padding_mass`, each
        as a list over heads."""
        total, squares, entropy, padding = self.sums
        variance = (squares / self.count - (total / self.count).square()).clamp(min=0)
        values = {
            "logit_std": (variance * (self.count / max(self.count - 1, 1))).sqrt(),
            "max_logit": self.largest[0],
            "max_abs_logit": self.largest[1],
            "mean_entropy": entropy / self.rows,
            "padding_mass": padding / self.rows,
        }
        return {name: value.tolist() for name, value in values.items()}


@contextmanager
def observed(model: nn.Module) -> Iterator[dict[str, Statistics]]:
    """Yield a dictionary. While the block runs, it fills with `Statistics` of the attention layers
    of `model` that are called, by their names."""
    statistics: dict[str, Statistics] = {}
    running: list[tuple[str, attention.HeadedAttention]] = []

    def observe(q: Tensor, k: Tensor, valid: Tensor | None) -> None:
        if running:
            name, module = running[-1]
            statistics.setdefault(name, Statistics(module.num_heads)).add(q, k, valid)

    def enter(name: str, module: attention.HeadedAttention, _) -> None:
        running.append((name, module))

    def leave(*_) -> None:
        running.pop()

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, attention.HeadedAttention):
            handles.append(module.register_forward_pre_hook(partial(enter, name)))
            handles.append(module.register_forward_hook(leave))
    attention.observers.append(observe)
    try:
        yield statistics
    finally:
        attention.observers.remove(observe)
        for handle in handles:
            handle.remove()


def mean_over_heads(statistics: dict[str, Statistics]) -> dict[str, dict[str, float]]:
    """Return, for each layer, the largest logits of any head and the mean over heads of all other
    values."""
    table: dict[str, dict[str, float]] = {}
    for layer, row in statistics.items():
        table[layer] = {
            name: max(values) if name.startswith("max") else sum(values) / len(values)
            for name, values in row.result().items()
        }
    return table


def format_attention(before: dict, after: dict) -> str:
    """Return a table for people that compares two results of `mean_over_heads` for the same
    layers."""
    columns = {
        "logit_std": "logit std",
        "max_logit": "largest logit",
        "mean_entropy": "entropy",
        "padding_mass": "on padding",
    }
    lines = [f"{'before, after':32}" + "".join(f"  {title:>17}" for title in columns.values())]
    for name, row in after.items():
        cells = [f"  {before[name][key]:8.3f} {row[key]:8.3f}" for key in columns]
        lines.append(f"{name:32}" + "".join(cells))
    return "\n".join(lines)
