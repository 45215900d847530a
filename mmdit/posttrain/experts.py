"""Two experts of which one is trained, as in Wan 2.2: its frozen sibling serves the other noise
levels of a rollout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmdit.config import ConfigError
from mmdit.diffusion import Denoise
from mmdit.posttrain.direct_align import window_check
from mmdit.posttrain.posttrain_config import PosttrainConfig


def rounded(level: float) -> float:
    """Return a noise level as float32 has it, which batches of levels come in."""
    return torch.tensor(level, dtype=torch.float64).float().item()


@dataclass(frozen=True)
class Pair:
    """`between`: noise levels (clean, noisy end) of the trained expert, one of them 0 or 1; a level
    at the boundary is the noisier expert's. `sibling`: the network of the other levels."""

    sibling: nn.Module
    between: tuple[float, float]

    @property
    def trains_high(self) -> bool:
        return self.between[1] == 1

    @property
    def boundary(self) -> float:
        return self.between[0] if self.trains_high else self.between[1]

    def owns(self, level: float) -> bool:
        """Whether the trained expert serves this noise level; a level is compared as float32 has
        it."""
        return (rounded(level) >= rounded(self.boundary)) == self.trains_high

    def inside(self, levels: Tensor) -> Tensor:
        """Return float32 `levels` that were drawn for the trained expert, those that rounding took
        to the boundary of the other one put back."""
        if self.trains_high:
            return levels
        boundary = torch.tensor(self.boundary, dtype=torch.float64).float()
        return levels.clamp(max=torch.nextafter(boundary, torch.zeros(())).item())

    def routed(self, own: Denoise, sibling: Denoise) -> Denoise:
        """Return a denoiser that asks the expert of a batch's noise level, a number or `(B,)`.
        ValueError: the batch has levels of both experts."""

        def denoise(x: Tensor, t: float | Tensor) -> Tensor:
            levels = torch.as_tensor(t, dtype=torch.float64).reshape(-1).tolist()
            mine = {self.owns(level) for level in levels}
            if len(mine) > 1:
                raise ValueError(
                    "the noise levels of a batch lie on both sides of the experts' boundary"
                    f" {self.boundary}"
                )
            ask = own if mine == {True} else sibling
            return ask(x, t)

        return denoise

    def check(self, config: PosttrainConfig, times: list[float]) -> None:
        """ConfigError unless the noise levels that are trained are the trained expert's; `times`
        are those of a rollout."""
        key, levels = (
            "rollout.sde_steps",
            [times[i] for i in config.rollout.candidates] if config.trains_steps else [],
        )
        if config.algorithm == "srpo":
            key, levels = "srpo.sigma_window", config.srpo.sigma_window
            window_check(levels, config.srpo.step, self.boundary)
        if not all(map(self.owns, levels)):
            raise ConfigError(
                f"posttrain.{key}",
                f"trains the noise levels {[round(level, 3) for level in levels]}, but the "
                f"trained expert serves {self.between[0]} … {self.between[1]} (a rollout's: "
                f"{[round(t, 3) for t in times]}); choose others, or the other model.expert",
            )
