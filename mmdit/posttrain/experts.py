"""Two experts of which one is trained, as in Wan 2.2: its frozen sibling serves the other noise levels of a rollout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from mmdit.config import ConfigError
from mmdit.posttrain.direct_align import window_check
from mmdit.posttrain.settings import PosttrainConfig


@dataclass(frozen=True)
class Pair:
    """`between`: noise levels (clean, noisy end) of the trained expert, one of them 0 or 1; a level at the boundary is the
    noisier expert's. `sibling`: the network of the other levels."""

    sibling: nn.Module
    between: tuple[float, float]

    @property
    def trains_high(self) -> bool:
        return self.between[1] == 1

    @property
    def boundary(self) -> float:
        return self.between[0] if self.trains_high else self.between[1]

    def owns(self, level: float) -> bool:
        """Whether the trained expert serves this noise level."""
        return (level >= self.boundary) == self.trains_high

    def routed(self, own: Callable, time_scale: float) -> Callable:
        """`network(x, t, text)` of a batch's noise level, `t (B,)` on the network's scale. ValueError: it has both experts'."""

        def call(x: Tensor, t: Tensor, *rest) -> Tensor:
            mine = {self.owns(level) for level in (t.double() / time_scale).tolist()}
            if len(mine) > 1:
                raise ValueError(f"the noise levels of a batch lie on both sides of the experts' boundary {self.boundary}")
            return (own if mine == {True} else self.sibling)(x, t, *rest)

        return call

    def check(self, config: PosttrainConfig, times: list[float]) -> None:
        """ConfigError unless the noise levels that are trained are the trained expert's; `times` are those of a rollout."""
        key, levels = "rollout.sde_steps", [times[i] for i in config.rollout.candidates] if config.trains_steps else []
        if config.algorithm == "srpo":
            key, levels = "srpo.sigma_window", config.srpo.sigma_window
            window_check(levels, config.srpo.step, self.boundary)
        if not all(map(self.owns, levels)):
            raise ConfigError(f"posttrain.{key}", f"trains the noise levels {[round(level, 3) for level in levels]}, but the "
                              f"trained expert serves {self.between[0]} … {self.between[1]} (a rollout's: "
                              f"{[round(t, 3) for t in times]}); choose others, or the other model.expert")
