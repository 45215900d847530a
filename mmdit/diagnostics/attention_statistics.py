"""What attention does, before its softmax: how large logits are, how spread the weights, how much
of them goes to padding.

With norms on queries and keys, a longer key changes nothing, so q and k adapters are judged here
and not by ‖ΔW‖.
"""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch
from einops import rearrange
from torch import Tensor, nn

from mmdit.nn import attention

QUERIES, SAMPLES = 256, 64  # at most so many rows of a call are looked at, evenly spaced


class Statistics:
    """Sums over all calls of one attention layer, by head."""

    def __init__(self, heads: int):
        self.heads, self.count, self.rows = heads, 0, 0
        self.sums = torch.zeros(
            4, heads, dtype=torch.float64
        )  # logits, their squares, entropies, padding
        self.largest = torch.full((2, heads), -math.inf)  # logit, absolute

    @torch.no_grad()
    def add(self, q: Tensor, k: Tensor, valid: Tensor | None) -> None:
        """As `nn.attention.attend` is called; axes folded into its heads are unfolded."""
        full = (
            None
            if valid is None
            else valid.expand(*q.shape[:3], k.shape[2])
            if valid.ndim == 4
            else valid
        )
        parts = [z for z in (q, k, full) if z is not None]
        q, k, *mask = (rearrange(z, "b (p h) l d -> (b p) h l d", h=self.heads) for z in parts)
        step, skip = math.ceil(len(q) / SAMPLES), math.ceil(q.shape[2] / QUERIES)
        logits = (
            q[::step, :, ::skip].float()
            @ k[::step].float().transpose(-1, -2)
            / math.sqrt(q.shape[-1])
        )
        seen, bias = torch.ones_like(logits, dtype=torch.bool), torch.zeros_like(logits)
        if mask:
            picked = mask[0][::step, :, ::skip]
            biased = picked.is_floating_point()
            bias = picked.float() if biased else bias.masked_fill(~picked, -math.inf)
            seen = bias > -math.inf
        weights = torch.softmax(logits + bias, -1)
        padding = (
            weights[..., -1] if mask and biased else torch.zeros_like(weights[..., -1])
        )  # Wan: the last key is all padding
        entropy = torch.special.entr(weights).sum(-1)
        clean = logits.masked_fill(~seen, 0).double()
        over = lambda z: z.double().transpose(0, 1).flatten(1).sum(1).cpu()  # noqa: E731
        self.sums += torch.stack([over(clean), over(clean.square()), over(entropy), over(padding)])
        self.count += int(seen[:, 0].sum())
        self.rows += entropy[:, 0].numel()
        for row, values in zip(self.largest, (logits, logits.abs()), strict=True):
            torch.maximum(
                row,
                values.masked_fill(~seen, -math.inf).transpose(0, 1).flatten(1).amax(1).cpu(),
                out=row,
            )

    def result(self) -> dict[str, list[float]]:
        """`logit_std`, `max_logit`, `max_abs_logit`, `mean_entropy` and `padding_mass`, each by
        head."""
        total, squares, entropy, padding = self.sums
        mean = total / self.count
        std = (
            (squares / self.count - mean.square()).clamp(min=0)
            * (self.count / max(self.count - 1, 1))
        ).sqrt()
        values = {
            "logit_std": std,
            "max_logit": self.largest[0],
            "max_abs_logit": self.largest[1],
            "mean_entropy": entropy / self.rows,
            "padding_mass": padding / self.rows,
        }
        return {name: value.tolist() for name, value in values.items()}


@contextmanager
def observed(model: nn.Module):
    """Yields a dictionary that fills with `Statistics` by the names of the attention layers of
    `model` that run inside."""
    found: dict[str, Statistics] = {}
    inside: list[tuple[str, nn.Module]] = []

    def observe(q: Tensor, k: Tensor, valid: Tensor | None) -> None:
        if inside:
            name, module = inside[-1]
            found.setdefault(name, Statistics(module.num_heads)).add(q, k, valid)

    handles = []
    for name, module in model.named_modules():
        if hasattr(module, "num_heads") and hasattr(module, "k"):
            handles.append(
                module.register_forward_pre_hook(
                    lambda module, _, name=name: inside.append((name, module))
                )
            )
            handles.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    attention.observers.append(observe)
    try:
        yield found
    finally:
        attention.observers.remove(observe)
        for handle in handles:
            handle.remove()


def mean_over_heads(found: dict[str, Statistics]) -> dict[str, dict[str, float]]:
    """By layer, over its heads: the largest logits, the mean of all else."""
    rows = {name: statistics.result() for name, statistics in found.items()}
    return {
        name: {
            key: max(values) if key.startswith("max") else sum(values) / len(values)
            for key, values in row.items()
        }
        for name, row in rows.items()
    }


def format_attention(before: dict, after: dict) -> str:
    """A table for people of two summaries of the same layers."""
    columns = {
        "logit_std": "logit std",
        "max_logit": "largest logit",
        "mean_entropy": "entropy",
        "padding_mass": "on padding",
    }
    lines = [f"{'before, after':32}" + "".join(f"  {title:>17}" for title in columns.values())]
    for name, row in after.items():
        lines.append(
            f"{name:32}" + "".join(f"  {before[name][key]:8.3f} {row[key]:8.3f}" for key in columns)
        )
    return "\n".join(lines)
