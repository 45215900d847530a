"""Several networks as one: each sample goes to the one that its noise level belongs to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import chain

import torch
from torch import Tensor, nn


def twin(network: nn.Module) -> nn.Module:
    """A second structure over the same parameters and buffers: what is added to one (an adapter) is
    not in the other."""
    shared = chain(network.parameters(), network.buffers())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in shared})


def of_samples(inputs: dict, rows: Tensor) -> dict:
    """Return the further inputs of a network for the samples where `rows (b,)` is true. A tensor
    has a row for each sample or one for all of them; `keep` alone holds places of tokens, which are
    those of every sample."""

    def part(name: str, value: object) -> object:
        each = (
            isinstance(value, Tensor)
            and name != "keep"
            and value.ndim > 0
            and len(value) == len(rows)
        )
        return value[rows] if each else value

    return {name: part(name, value) for name, value in inputs.items()}


class Experts(nn.Module):
    """`networks` by name, in the order of the numbers that `route(t (B,)) → (B,)` gives; `model(x,
    t, text)` like any of them. They may be twins on one base, or have nothing in common (Wan 2.2).
    The state holds what is shared once, under the first.
    """

    def __init__(self, networks: dict[str, nn.Module], route: Callable[[Tensor], Tensor]):
        super().__init__()
        self.names, self.route = tuple(networks), route
        for name, network in networks.items():
            self.add_module(name, network)
        self.register_state_dict_post_hook(_once)

    @property
    def networks(self) -> list[nn.Module]:
        return [self.get_submodule(name) for name in self.names]

    def forward(self, x: Tensor, t: Tensor, text, expert: str | None = None, **inputs) -> Tensor:
        """`expert`: known to be right (no waiting for the device), or None: looked up. Training
        draws the times of a batch for one expert; ValueError if they straddle. In evaluation each
        sample finds its own."""
        if expert is None:
            numbers = self.route(t)
            own = sorted(set(numbers.tolist()))
            if len(own) > 1 and self.training:
                raise ValueError(
                    f"the times {t.min():g} … {t.max():g} of a batch belong to the experts "
                    f"{', '.join(self.names[i] for i in own)}: a training batch is for one"
                )
            if len(own) > 1:
                result = torch.empty_like(x)
                for number in own:
                    rows = numbers == number
                    some = of_samples(inputs, rows)
                    result[rows] = self(
                        x[rows], t[rows], text[rows], self.names[number], **some
                    ).to(x.dtype)
                return result
            expert = self.names[own[0]]
        return self.get_submodule(expert)(x, t, text, **inputs)

    def spread(self, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """`tensors` of one network under the names of each expert that has them; names without
        `prefix` as they are."""
        own, result = self.state_dict().keys(), {}
        for name, tensor in tensors.items():
            rest = name.removeprefix(prefix)
            places = (
                [f"{expert}.{rest}" for expert in self.names if f"{expert}.{rest}" in own]
                if rest != name
                else []
            )
            result |= {f"{prefix}{place}": tensor for place in places} or {name: tensor}
        return result

    def stored_elsewhere(self, name: str) -> bool:
        """As the expert that has it says (`Learner.is_stored`)."""
        expert, _, inner = name.partition(".")
        return getattr(self.get_submodule(expert), "stored_elsewhere", lambda name: False)(inner)

    # what the training asks of a denoiser
    @property
    def blocks(self) -> list[nn.Module]:
        return [block for network in self.networks for block in network.blocks]

    def draw_keep(self, *arguments) -> Tensor | None:
        return self.networks[0].draw_keep(*arguments)

    def train_flops(self, *arguments) -> int:
        return self.networks[0].train_flops(*arguments)

    def number_frames(self, seed: int) -> None:
        for network in self.networks:
            network.number_frames(seed)

    def undecayed(self) -> set[str]:
        return {
            f"{name}.{own}" for name in self.names for own in self.get_submodule(name).undecayed()
        }

    def matrices(self) -> set[str]:
        return {
            f"{name}.{own}" for name in self.names for own in self.get_submodule(name).matrices()
        }


def _once(module: Experts, state: dict[str, Tensor], prefix: str, local_metadata) -> None:
    """Parameters keep their identity on every device, so that twins are known by it; their buffers
    are those of the first."""
    first: dict[int, str] = {}
    twins = False
    for name, parameter in module.named_parameters(remove_duplicate=False):
        expert = name.partition(".")[0]
        if first.setdefault(id(parameter), expert) != expert:
            twins = True
            state.pop(prefix + name, None)
    for name, _ in module.named_buffers(remove_duplicate=False) if twins else ():
        if not name.startswith(module.names[0] + "."):
            state.pop(prefix + name, None)
