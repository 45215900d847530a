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
    """The section `ema:`. The n-th update has the decay (1 + n) / (10 + n) while that is less than
    `decay`, so that the first steps of a short run do not dominate its average."""

    # Keep a moving average of the trained weights.
    enabled: bool = True
    # The share of the average that an update keeps.
    decay: float = 0.999
    # Update after every n-th step.
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
    """Keeps the average: `shadow` holds one float32 tensor per trainable parameter, by the module's
    own names and sharded like it. Samples, validation, exports and other runs may read it at any
    step: up to `start_step` it equals the weights.
    """

    def __init__(self, config: EMAConfig, module: nn.Module):
        self.config = config
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    def updates(self, step: int) -> int:
        """Return how many updates the average has had after optimizer step `step` (counted from
        1)."""
        every = self.config.update_every
        return max(0, step // every - self.config.start_step // every)

    def steps_of(self, step: int) -> int:
        """Return how many optimizer steps the update after step `step` covers; 0 if that step has
        no update."""
        if not self.updates(step):
            return 1
        return 0 if step % self.config.update_every else self.config.update_every

    def decay_at(self, step: int) -> float:
        """Return the decay of the update after optimizer step `step`."""
        updates = self.updates(step)
        return min(self.config.decay, (1 + updates) / (10 + updates)) if updates else 0.0

    @torch.no_grad()
    def update(self, step: int, resting: tuple[str, ...] = ()) -> None:
        """Update the average after optimizer step `step`, if an update is due. Parameters whose
        names begin with a `resting` prefix were not trained in its steps, and their average
        stays."""
        if not self.steps_of(step):
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
        """Return a context within which the parameters of the module hold the average."""
        return holding(self.parameters, self.shadow)
