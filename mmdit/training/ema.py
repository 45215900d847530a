"""Exponential moving average of the trainable parameters, in float32."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmdit.config import ConfigError
from mmdit.training.stored import local


@dataclass(frozen=True)
class EMAConfig:
    """`ema:` section. The decay warms up as (1 + n) / (10 + n), so short runs are not averages of their first steps."""

    enabled: bool = True
    decay: float = 0.999
    update_every: int = 1
    start_step: int = 0
    use_for_sampling: bool = True

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ConfigError("decay", f"is {self.decay}, must be in [0, 1), for example 0.999")
        if self.update_every < 1:
            raise ConfigError("update_every", f"is {self.update_every}, must be at least 1")


class EMA:
    """`shadow` holds one float32 tensor per trainable parameter, by the module's own names and sharded like it."""

    def __init__(self, config: EMAConfig, module: nn.Module):
        self.config = config
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    def decay_at(self, step: int) -> float:
        """The decay used for the update after optimizer step `step` (counted from 1)."""
        updates = max(0, step - self.config.start_step) // self.config.update_every
        return min(self.config.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self, step: int, resting: tuple[str, ...] = ()) -> None:
        """After optimizer step `step`; parameters whose names begin with a `resting` prefix had no part in it."""
        if step < self.config.start_step or step % self.config.update_every:
            return
        names = [name for name in self.parameters if not name.startswith(resting)]
        sources = [local(self.parameters[name].detach()).float() for name in names]
        torch._foreach_lerp_([local(self.shadow[name]) for name in names], sources, 1.0 - self.decay_at(step))

    @contextmanager
    def applied(self):
        """The module's parameters hold the average inside the `with` block and their own values after it."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._write(self.shadow)
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            local(parameter).copy_(local(values[name]))
