"""Prepare the small clip that a super-resolution model is given: noised to a level that the model
is told (conditioning augmentation, Ho et al. 2021, Cascaded Diffusion Models, section 4). Errors of
the first model that are fainter than the noise are drawn anew.

Axes: b sample · f frame · r row · c column · d channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdit.interfaces import LatentSpec
from mmdit.rng import Draws

TIME_SCALE = 1000.0  # by which levels are multiplied for networks


def noised(small: Tensor, level: Tensor, draws: Draws) -> dict[str, Tensor]:
    """Return the further inputs of a network, `small` and `small_t`. `small (b, f, r, c, d)`: the
    normalised latents of the enlarged small clips; `level (b,)`: the level of the noise that they
    get, from 0 (none) to 1 (noise alone)."""
    noise = draws.normal("augmentation", *small.shape[1:])
    share = level.to(small).view(-1, 1, 1, 1, 1)
    return {"small": (1 - share) * small + share * noise, "small_t": TIME_SCALE * level.float()}


@dataclass(frozen=True)
class SmallClips:
    """Splits the latents of a cache made by `tokenizers.with_low_resolution`. `augmentation`: the
    highest noise level of the small clips; None if the model is not given them."""

    spec: LatentSpec
    augmentation: float | None

    @torch.no_grad()
    def of_latents(self, latents: Tensor, draws: Draws) -> tuple[Tensor, dict]:
        """Return the raw latents of the clips, and the further inputs of the network, from cached
        `latents (b, f, r, c, 2 d)`."""
        clips, small = latents.chunk(2, -1)
        if self.augmentation is None:
            return clips, {}
        level = self.augmentation * draws.uniform("augmentation level").to(latents.device)
        with torch.autocast(latents.device.type, enabled=False):
            return clips, noised(self.spec.normalize(small), level, draws)
