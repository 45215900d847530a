"""The noise levels of the trained network: all of them, or those of one of two experts. At the
others, a rollout calls the frozen expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdit.config import ConfigError
from mmdit.diffusion import Objective
from mmdit.interfaces import Denoiser
from mmdit.nn.experts import Experts
from mmdit.posttrain.direct_align import window_check
from mmdit.posttrain.posttrain_config import PosttrainConfig


@dataclass(frozen=True)
class TrainedLevels:
    """Tells the trained noise levels from the others. `model`: the network of rollouts; `expert`:
    the name in `model.networks()` of the network that is trained, "" if it is the only one."""

    model: Denoiser
    expert: str
    objective: Objective

    @property
    def boundary(self) -> float | None:
        """Return the noise level that divides two experts; None for a single network."""
        return self.model.boundary.time if isinstance(self.model, Experts) else None

    @property
    def between(self) -> tuple[float, float]:
        """Return the range of the trained noise levels, as (clean end, noisy end)."""
        clean, noisy = self.objective.t_range
        if self.boundary is None:
            return clean, noisy
        return (self.boundary, noisy) if self.expert == "high" else (clean, self.boundary)

    def probes(self, usual: Sequence[float]) -> list[float]:
        """Return those of the `usual` noise levels that are trained. If none is, return as many
        levels, at the same relative positions within the trained range."""
        clean, noisy = self.between
        inside = [level for level in usual if clean <= level <= noisy and self.contains(level)]
        return inside or [clean + (noisy - clean) * share for share in usual]

    def contains(self, level: float | Tensor) -> bool:
        """Return whether sampling would call the trained network at a noise level."""
        return self.model.expert_at(self.objective.network_time(level)) == self.expert

    def inside(self, levels: Tensor) -> Tensor:
        """Return float32 `levels` that were drawn for the trained network; any that rounding took
        over the boundary are moved back."""
        if self.boundary is None:
            return levels
        high = self.expert == "high"
        edge = torch.tensor(self.boundary, dtype=torch.float64).float()
        while not self.contains(edge):
            edge = torch.nextafter(edge, torch.tensor(1.0 if high else 0.0))
        return levels.clamp(min=edge.item()) if high else levels.clamp(max=edge.item())

    def check(self, config: PosttrainConfig, times: list[float]) -> None:
        """Raise ConfigError unless the noise levels to be trained belong to the trained network,
        and were part of its training before. `times` are those of a rollout."""
        window, width = config.srpo.sigma_window, config.srpo.step
        least, most = self.objective.t_range
        if (
            config.algorithm == "srpo"
            and not least <= window[1] - width < window[0] + width <= most
        ):
            raise ConfigError(
                "posttrain.srpo.sigma_window",
                f"is {list(window)} with step {width}, but the model learnt the noise levels from"
                f" {least:g} to {most:g} alone (flow_matching.t_min, t_max): choose levels inside",
            )
        if self.boundary is None:
            return
        key, levels = "rollout.sde_steps", []
        if config.trains_steps:
            levels = [times[i] for i in config.rollout.candidates]
        if config.algorithm == "srpo":
            key, levels = "srpo.sigma_window", list(config.srpo.sigma_window)
            window_check(config.srpo.sigma_window, config.srpo.step, self.boundary)
        if not all(map(self.contains, levels)):
            clean, noisy = self.between
            raise ConfigError(
                f"posttrain.{key}",
                f"trains the noise levels {[round(level, 3) for level in levels]}, but the trained"
                f" expert serves {clean} … {noisy} (a rollout's: {[round(t, 3) for t in times]});"
                " choose others, or the other model.expert",
            )
