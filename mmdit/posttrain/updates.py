"""One update of the trained weights."""

from __future__ import annotations

import torch

from mmdit.posttrain.setup import Setup
from mmdit.training.optim import clip_and_guard


class Updates:
    """Moves the state forward by one update."""

    def __init__(self, setup: Setup):
        self.setup = setup

    def apply(self) -> dict[str, float]:
        """Take an optimizer step with the gradients that micro-batches have summed up, their mean
        over ranks, and return what to report of it."""
        state, train, world = self.setup.state, self.setup.train, self.setup.world
        optimizer = state.optimizer
        gradients = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        world.sum_(*gradients)
        if world.size > 1:
            torch._foreach_div_(gradients, world.size)
        optimizer.set_lr(train.learning_rate().at(state.step + 1))
        norm, skipped = clip_and_guard(optimizer, train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        if state.ema:
            state.ema.update(state.step)
        return {"grad_norm": norm.item(), "skipped": skipped.item()}
