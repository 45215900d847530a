"""TREAD (Krause et al. 2025, "TREAD: Token Routing for Efficient Architecture-agnostic Diffusion
Training", arXiv 2501.04765): in training, a part of the tokens skips a span of blocks and comes
back unchanged after it.

The paper keeps tokens at random. Here the kept places are the same in every window and frame. So
every window, plain or shifted, holds equally many kept tokens, and a kept place is kept in all
frames: all sublayers shrink alike, and nothing needs padding. The blocks know nothing of it. Axes:
b sample · f frame · n window · k place in the window · d width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmdit import rng
from mmdit.config import ConfigError, Section


@dataclass(frozen=True)
class TreadConfig(Section):
    """The section `tread:`. In training, a part of the tokens skips a span of blocks."""

    # Whether tokens are routed.
    enabled: bool = False
    # The part of the tokens that skips the span.
    selection_rate: float = 0.5
    # The span of blocks [first, end), as in a Python slice: -2 is two from the end.
    apply_to: tuple[int, int] = (
        2,
        -2,
    )
    # `random`: any places of the window. `stratified`: about equally many of every 2x2 patch.
    mode: Literal["random", "stratified"] = "random"
    # Divide the change that the span makes by the share of tokens that pass through it, so that the
    # mean change is as without routing.
    rescale: bool = False

    def __post_init__(self):
        if not 0 < self.selection_rate < 1:
            message = (
                f"is {self.selection_rate}; must lie between 0 and 1, both excluded; for no routing"
                " write enabled: false"
            )
            raise ConfigError("selection_rate", message)

    def span(self, depth: int) -> tuple[int, int]:
        """Return the first block and the end of the span in a model of `depth` blocks. ConfigError
        if it is empty or reaches outside."""
        first, end = (edge + depth if edge < 0 else edge for edge in self.apply_to)
        if not 0 <= first < end <= depth:
            written = list(self.apply_to)
            which = f"which in {depth} blocks (model.depth) is {first} to {end}"
            message = f"is {written}, {which}; name a span inside, like [1, -1]"
            raise ConfigError("tread.apply_to", message)
        return first, end


def draw_keep(config: TreadConfig, window: tuple[int, int], seed: int, step: int) -> Tensor:
    """Return the kept places `(K,)` of a window of `(height, width)`, ascending int64: a function
    of `(seed, step)` alone, so that all ranks agree. K is `1 - selection_rate` of the places,
    rounded, and at least one."""
    height, width = window
    generator = rng.generator(seed, "tread", step)
    order = torch.rand(height * width, generator=generator)
    if config.mode == "stratified":  # first, number the places of each 2x2 patch at random
        patch = (torch.arange(height)[:, None] // 2) * width + torch.arange(width) // 2
        patch = patch.flatten()
        before = (patch[:, None] == patch) & (order[:, None] > order)
        order = before.sum(dim=1) + torch.rand(height * width, generator=generator)
    count = max(1, round(height * width * (1 - config.selection_rate)))
    return order.argsort()[:count].sort().values


def route(
    x: Tensor, keep: Tensor, span: Callable[[Tensor], Tensor], rescale: bool = False
) -> Tensor:
    """Apply `span` to the tokens of `x (b, f, n, k, d)` at the places `keep (K,)`; the others stay
    unchanged. `span` maps `(b, f, n, K, d)` to itself."""
    kept = x.index_select(3, keep)
    result = span(kept)
    if rescale:
        result = kept + (result - kept) * (x.shape[3] / len(keep))
    return x.index_copy(3, keep, result)
