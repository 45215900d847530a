"""Self-alignment (SRA, Jiang et al. 2025, 2505.02831): an average of the network itself sees the
same clip at a smaller time, and the hidden tokens of an early block learn to tell those of a later
block there. Average and projector are trained, and kept in checkpoints, beside the model."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit.diffusion import Objective
from mmdit.interfaces import TextTokens
from mmdit.models import VideoMMDiT
from mmdit.rng import Draws
from tests.drivers.arms.frozen import Frozen
from tests.drivers.arms.hidden import projector, reveal
from tests.drivers.arms.token_times import second_times

LATE = 2 / 3  # the part of the blocks below the teacher's hidden tokens
DECAY = 0.99  # of the teacher's weights at a step
CLEANER = 0.2  # the teacher's time is smaller by up to this much


class SelfAlignment(nn.Module):
    """Return `1 - cosine` of projected and teacher's tokens, `(b,)`. To be made before the student
    is revealed: the teacher is a copy."""

    def __init__(self, model: VideoMMDiT, objective: Objective):
        super().__init__()
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        count = max(1, round(LATE * len(model.blocks)))
        self.teacher.blocks = self.teacher.blocks[:count]
        reveal(self.teacher, count)
        self.projector = projector(model.config.dim, model.config.dim)
        self.frozen = Frozen(self.teacher)
        self.outside = {"student": model, "objective": objective}  # no part of this module's state

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move the teacher towards the weights that the last step made."""
        share = 1 - min(DECAY, (1 + step) / (10 + step))
        mine, student = dict(self.teacher.named_parameters()), self.outside["student"]
        theirs = [student.get_parameter(name) for name in mine]
        torch._foreach_lerp_(list(mine.values()), theirs, share)

    def target(self, clean: Tensor, t: Tensor, text: TextTokens, draws: Draws) -> Tensor:
        objective = self.outside["objective"]
        x = objective.path.add_noise(clean, draws.normal("noise", *clean.shape[1:]), t)
        hidden = self.frozen(x, objective.network_time(t), text)[..., clean.shape[-1] :]
        return F.layer_norm(hidden, hidden.shape[-1:])

    def forward(self, hidden: Tensor, clean: Tensor, t: Tensor, text: TextTokens, draws: Draws):
        self.follow(draws.step)
        cleaner = (t - CLEANER * draws.uniform("teacher").to(t.device)).clamp(min=0)
        if self.outside["objective"].config.token_times:
            cleaner = torch.minimum(t, second_times(self.outside["objective"], clean, draws))
        target = self.target(clean, cleaner, text, draws)
        return 1 - F.cosine_similarity(self.projector(hidden), target, dim=-1).flatten(1).mean(1)
