"""What of a rollout is kept, where, and for how many bytes. Positions 0 … T are states (0 noise, T
clean), steps 0 … T - 1 lie between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mmdit.rng import key


@dataclass(frozen=True)
class StoragePlan:
    """Which positions are kept, in which type, and per step which named values (always float32)."""

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
    ) -> StoragePlan:
        """The least that training the steps `trained` reads: both ends of each, and the clean end,
        which the reward reads. Negative steps count from the end."""
        own = tuple(sorted({index + steps if index < 0 else index for index in trained}))
        needed = (
            range(steps + 1)
            if everything
            else {place for index in own for place in (index, index + 1)} | {steps}
        )
        return StoragePlan(steps, tuple(sorted(needed)), {name: own for name in extras}, dtype)

    def bytes(self, dimensions: int) -> int:
        """Of one sample with `dimensions` latent values."""
        size = torch.finfo(self.dtype).bits // 8
        return dimensions * (size * len(self.positions) + 4 * sum(map(len, self.extras.values())))


class Trajectory:
    """States `(B, ...)` by position and values by (name, step), as far as the plan keeps them."""

    def __init__(self, plan: StoragePlan):
        self.plan = plan
        self.states: dict[int, Tensor] = {}
        self.values: dict[tuple[str, int], Tensor] = {}

    def put(self, position: int, x: Tensor) -> Tensor:
        """Keep `x` if planned. Returns it rounded as storage rounds it: the sampler goes on from
        there, kept or not, so that what is scored later is what was sampled."""
        rounded = x.to(self.plan.dtype)
        if position in self.plan.positions:
            self.states[position] = rounded
        return rounded.to(x.dtype)

    def put_value(self, name: str, index: int, value: Tensor) -> None:
        if index in self.plan.extras.get(name, ()):
            self.values[name, index] = value.float()

    def get(self, position: int) -> Tensor:
        """float32. Position -1 is the clean end. ValueError for one that is not there names those
        that are."""
        place = position + self.plan.steps + 1 if position < 0 else position
        if place not in self.states:
            raise ValueError(
                f"position {position} is not stored; there are {sorted(self.states)} of 0 …"
                f" {self.plan.steps}"
            )
        return self.states[place].float()

    def value(self, name: str, index: int) -> Tensor:
        if (name, index) not in self.values:
            raise ValueError(
                f"{name!r} of step {index} is not stored; there are {sorted(self.values)}"
            )
        return self.values[name, index]

    def to(self, device: torch.device | str) -> Trajectory:
        """A new record; this one stays where it is."""
        copy = Trajectory(self.plan)
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
    ids, `indices (B,)` places in the epoch."""

    trajectory: Trajectory
    prompts: Tensor
    groups: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def clean(self) -> Tensor:
        return self.trajectory.get(-1)

    def to(self, device: torch.device | str) -> Rollout:
        """A new record with the latents on `device`; the small tensors stay on the CPU."""
        return replace(self, trajectory=self.trajectory.to(device))


def group_id(prompt: str, negative: str = "", condition: str = "") -> int:
    """Samples belong together when all of these agree; signed 64 bits, to be kept in int64 (float32
    would merge groups)."""
    return key("group", prompt, negative, condition)
