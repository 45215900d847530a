"""What of a rollout is kept, where, and for how many bytes. Positions 0 … T are states (0 noise, T
clean), steps 0 … T - 1 lie between them."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mmdit.rng import key


@dataclass(frozen=True)
class Storage:
    """Which positions are kept, in which type, and at which steps which named values (always
    float32)."""

    steps: int
    positions: tuple[int, ...]
    extras: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        for position in self.positions:
            if not 0 <= position <= self.steps:
                raise ValueError(
                    f"position {position} is not in a trajectory of {self.steps} steps; must be 0 …"
                    f" {self.steps}"
                )
        for name, steps in self.extras.items():
            if any(not 0 <= index < self.steps for index in steps):
                raise ValueError(
                    f"{name} is asked for at steps {steps}; must be 0 … {self.steps - 1}"
                )

    @staticmethod
    def for_steps(
        trained: Iterable[int],
        steps: int,
        extras: Iterable[str] = (),
        dtype: torch.dtype = torch.float32,
        everything: bool = False,
    ) -> Storage:
        """Return the least that training the steps `trained` reads: both ends of each, and the
        clean end, which the reward reads."""
        trained = tuple(sorted(set(trained)))
        needed = {steps, *trained, *(index + 1 for index in trained)}
        positions = range(steps + 1) if everything else sorted(needed)
        return Storage(steps, tuple(positions), {name: trained for name in extras}, dtype)

    def bytes(self, dimensions: int) -> int:
        """Return the size of one sample with `dimensions` latent values."""
        size = torch.finfo(self.dtype).bits // 8
        return dimensions * (size * len(self.positions) + 4 * sum(map(len, self.extras.values())))


class Trajectory:
    """States `(B, ...)` by position and values by (name, step), as far as `storage` keeps them."""

    def __init__(self, storage: Storage):
        self.storage = storage
        self.states: dict[int, Tensor] = {}
        self.values: dict[tuple[str, int], Tensor] = {}

    def put(self, position: int, x: Tensor) -> Tensor:
        """Keep `x` if it is wanted, and return it rounded as storage rounds it: the sampler goes on
        from there, kept or not, so that what is scored later is what was sampled."""
        rounded = x.to(self.storage.dtype)
        if position in self.storage.positions:
            self.states[position] = rounded
        return rounded.to(x.dtype)

    def put_value(self, name: str, index: int, value: Tensor) -> None:
        if index in self.storage.extras.get(name, ()):
            self.values[name, index] = value.float()

    def get(self, position: int) -> Tensor:
        """Return a state as float32; position -1 is the clean end. ValueError names the positions
        that are stored."""
        place = position + self.storage.steps + 1 if position < 0 else position
        if place not in self.states:
            raise ValueError(
                f"position {position} is not stored; there are {sorted(self.states)} of 0 …"
                f" {self.storage.steps}"
            )
        return self.states[place].float()

    def value(self, name: str, index: int) -> Tensor:
        if (name, index) not in self.values:
            raise ValueError(
                f"{name!r} of step {index} is not stored; there are {sorted(self.values)}"
            )
        return self.values[name, index]

    def to(self, device: torch.device | str) -> Trajectory:
        """Return a copy on `device`; this one stays where it is."""
        copy = Trajectory(self.storage)
        copy.states = {place: x.to(device) for place, x in self.states.items()}
        copy.values = {name: x.to(device) for name, x in self.values.items()}
        return copy

    def bytes(self) -> int:
        return sum(
            x.numel() * x.element_size() for x in (*self.states.values(), *self.values.values())
        )


@dataclass(frozen=True)
class Rollout:
    """One micro-batch of samples: `prompts (B,)` are places in the prompt list, `groups (B,)` int64
    ids, `indices (B,)` places in the epoch; `rewards`: to come, `(B,)` by name."""

    trajectory: Trajectory
    prompts: Tensor
    groups: Tensor
    indices: Tensor
    rewards: Future

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def clean(self) -> Tensor:
        return self.trajectory.get(-1)

    def to(self, device: torch.device | str) -> Rollout:
        """Return a copy with the latents on `device`; the small tensors stay on the CPU."""
        return replace(self, trajectory=self.trajectory.to(device))


def group_id(prompt: str) -> int:
    """Return a number of signed 64 bits for samples that are compared: those of one prompt. It must
    be kept in int64, for float32 would merge groups."""
    return key("group", prompt, "", "")
