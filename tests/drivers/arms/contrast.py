"""Contrastive flow matching (Stoica et al. 2025, 2506.05350): a prediction is also pushed away from
the velocity of another sample of the batch."""

from __future__ import annotations

from torch import Tensor

from mmdit.diffusion.objective import FlowMatching


class Contrast(FlowMatching):
    """Subtract `config.contrast` times the mean squared distance of each predicted velocity to the
    true one of the next sample of the batch, which is in random order. Not in evaluation, so that
    losses on held-out items compare."""

    training: bool

    def measure(self, error: Tensor, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        loss = super().measure(error, clean, noise, t)
        if not (self.config.contrast and self.training):
            return loss
        velocity = self.path.mix("velocity", clean, noise, t)
        away = velocity + error - velocity.roll(-1, 0)
        return loss - self.config.contrast * away.square().flatten(1).mean(1)
