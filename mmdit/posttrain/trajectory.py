"""Keep the parts of a rollout that are needed, and know how many bytes they take.

Positions 0 … T are states (0 noise, T clean); steps 0 … T - 1 lie between them.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Storage:
    """The rule for what is kept of a rollout: states in `dtype` and, in float32, the means of the
    steps that are `trained`. Training reads the states at both ends of these steps, and rewards the
    clean end; with `everything`, the other states are kept, too."""

    steps: int
    trained: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    everything: bool = False

    @property
    def positions(self) -> set[int]:
        """Return the positions whose states are kept."""
        if self.everything:
            return set(range(self.steps + 1))
        return {self.steps, *self.trained, *(index + 1 for index in self.trained)}

    def bytes(self, dimensions: int) -> int:
        """Return the size in bytes of what is kept of one sample with `dimensions` latent
        values."""
        return dimensions * (self.dtype.itemsize * len(self.positions) + 4 * len(self.trained))


class Trajectory:
    """The states `(B, ...)` by position and the means by step, as far as `storage` keeps them."""

    def __init__(self, storage: Storage):
        self.storage = storage
        self.states: dict[int, Tensor] = {}
        self.means: dict[int, Tensor] = {}

    def put(self, position: int, x: Tensor) -> Tensor:
        """Keep `x` if `storage` does, and return it rounded to the stored dtype. The sampler
        continues from the rounded state, kept or not, so that what is scored later is what was
        sampled."""
        rounded = x.to(self.storage.dtype)
        if position in self.storage.positions:
            self.states[position] = rounded
        return rounded.to(x.dtype)

    def put_mean(self, index: int, mean: Tensor) -> None:
        """Keep the mean of a step if it is trained."""
        if index in self.storage.trained:
            self.means[index] = mean.float()

    def get(self, position: int) -> Tensor:
        """Return the state at `position` as float32. ValueError names the positions that are
        stored."""
        if position not in self.states:
            raise ValueError(f"position {position} is not stored; there are {sorted(self.states)}")
        return self.states[position].float()

    @property
    def clean(self) -> Tensor:
        """Return the clean end as float32."""
        return self.get(self.storage.steps)

    def to(self, device: torch.device | str) -> Trajectory:
        """Return a copy on `device`; this one stays where it is."""
        copy = Trajectory(self.storage)
        copy.states = {place: x.to(device) for place, x in self.states.items()}
        copy.means = {index: x.to(device) for index, x in self.means.items()}
        return copy


@dataclass(frozen=True)
class Rollout:
    """One micro-batch of samples. `prompts (B,)`: places in the prompt list, which also tell the
    groups that are compared (two places may hold the same words); `indices (B,)`: places in the
    epoch; `rewards`: a future of `(B,)` by name."""

    trajectory: Trajectory
    prompts: Tensor
    indices: Tensor
    rewards: Future

    @property
    def clean(self) -> Tensor:
        return self.trajectory.clean

    def to(self, device: torch.device | str) -> Rollout:
        """Return a copy with the latents on `device`; the small tensors stay on the CPU."""
        return replace(self, trajectory=self.trajectory.to(device))
