"""Exponential moving average of the trainable parameters, in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from mmdit.config import ConfigError, Section, least
from mmdit.training.memory.shards import holding, local


@dataclass(frozen=True)
class EMAConfig(Section):
    """The section `ema:`. The n-th decay is (1 + n) / (10 + n) while that is less than `decay`: a
    short run is no average of its first steps."""

    # Keep a moving average of the trained weights.
    enabled: bool = True
    # How much of the average stays at an update.
    decay: float = 0.999
    # Update at every n-th step.
    update_every: int = 1
    # Up to this step the average is the weights themselves.
    start_step: int = 0
    # Draw previews with the average.
    use_for_sampling: bool = True

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ConfigError("decay", f"is {self.decay}, must be in [0, 1), for example 0.999")
        least(self, 1, "update_every")
        least(self, 0, "start_step")


class EMA:
    """`shadow` holds one float32 tensor per trainable parameter, by the module's own names and
    sharded like it. Who asks for the average (samples, validation, exports, other runs) asks at any
    step: until something was averaged it is the weights.
    """

    def __init__(self, config: EMAConfig, module: nn.Module):
        self.config = config
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    def updates(self, step: int) -> int:
        """Return how often the average has moved when optimizer step `step` (counted from 1) is
        done."""
        every = self.config.update_every
        return max(0, step // every - self.config.start_step // every)

    def decay_at(self, step: int) -> float:
        """Return the decay of the update after optimizer step `step`."""
        updates = self.updates(step)
        return min(self.config.decay, (1 + updates) / (10 + updates)) if updates else 0.0

    @torch.no_grad()
    def update(self, step: int, resting: tuple[str, ...] = ()) -> None:
        """Move the average after optimizer step `step`; parameters whose names begin with a
        `resting` prefix had no part in it."""
        if self.updates(step) and step % self.config.update_every:
            return
        names = [name for name in self.parameters if not name.startswith(resting)]
        shadows = [local(self.shadow[name]) for name in names]
        weights = [local(self.parameters[name]) for name in names]
        share = 1.0 - self.decay_at(step)
        if all(weight.dtype == torch.float32 for weight in weights):
            torch._foreach_lerp_(shadows, weights, share)
        else:  # one at a time: float32 copies of all at once would be as large as the average
            for shadow, weight in zip(shadows, weights, strict=True):
                shadow.lerp_(weight.float(), share)

    def applied(self) -> AbstractContextManager[None]:
        """Have the parameters of the module hold the average inside the `with` block."""
        return holding(self.parameters, self.shadow)
