"""Two networks as one: each sample goes to the one that its noise level belongs to."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmdit.interfaces import Boundary, Denoiser

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def shared_copy(network: AnyModule) -> AnyModule:
    """Return a copy of the tree of modules over the same parameters and buffers: what is added to
    one tree (an adapter) is not in the other."""
    shared = chain(network.parameters(), network.buffers())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in shared})


def of_samples(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Return the further inputs of a network for the samples where `rows (b,)` is true. A tensor
    has a row for each sample, and is cut, or serves all of them; `keep` is never cut, since it
    holds places of tokens, which are the same in every sample."""

    def part(name: str, value: Any) -> Any:
        for_each = isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(rows)
        return value[rows] if for_each and name != "keep" else value

    return {name: part(name, value) for name, value in inputs.items()}


class Experts(Denoiser):
    """The networks `high`, for the noisy side of `boundary`, and `low`, for the clean one. They may
    share one base, or have nothing in common (Wan 2.2). The state dict holds shared tensors once,
    under `high`."""

    names = ("high", "low")
    # Whether all processes must make every call, because each holds a part of each network.
    together = False

    def __init__(self, high: Denoiser, low: Denoiser, boundary: Boundary):
        super().__init__()
        self.high, self.low, self.boundary = high, low, boundary
        self.patch, self.variant, self.first_frame = high.patch, high.variant, high.first_frame
        self.picture, self.takes_first_frame = high.picture, high.takes_first_frame
        self.encoding = high.encoding
        self.register_state_dict_post_hook(_store_shared_once)

    def networks(self) -> dict[str, Denoiser]:
        return {"high": self.high, "low": self.low}

    def expert_at(self, t: Tensor | float, whole_times: bool = False) -> str:
        high = self.boundary.is_high(torch.as_tensor(t).reshape(-1), whole_times)
        if high.all():
            return "high"
        if high.any():
            times = torch.as_tensor(t)
            raise ValueError(
                f"the times {times.min():g} … {times.max():g} of a batch belong to the experts"
                f" high, low: they lie on both sides of the boundary {self.boundary.threshold:g},"
                " and a batch is for one"
            )
        return "low"

    def forward(
        self, x: Tensor, t: Tensor, text: Any, expert: str | None = None, **inputs: Any
    ) -> Tensor:
        """Return the prediction of `expert`, if the caller knows it (which saves waiting for the
        device), or of the expert that the times belong to. A training batch belongs to one expert:
        ValueError if its times lie on both sides. In evaluation each sample goes to its own expert;
        with `together`, both are called whatever the times are, since other processes may need
        either."""
        if expert is not None:
            return self.networks()[expert](x, t, text, **inputs)
        high = self.boundary.is_high(t)
        both = self.together or (high.any() and not high.all())
        if self.training or not both:
            return self.networks()[self.expert_at(t)](x, t, text, **inputs)
        result = torch.empty_like(x)
        for rows, network in ((high, self.high), (~high, self.low)):
            some = bool(rows.any())
            asked = rows if some else torch.arange(len(rows), device=rows.device) == 0
            prediction = network(x[asked], t[asked], text[asked], **of_samples(inputs, asked))
            if some:
                result[rows] = prediction.to(x.dtype)
        return result

    def spread(self, stored: Iterable[str], prefix: str) -> dict[str, str]:
        """Return new name → old name for the tensors `stored` of one network: under its new names a
        tensor belongs to each of the experts that have it. Names without `prefix`, or that no
        expert has, stay as they are."""
        names = self.state_dict().keys()
        result: dict[str, str] = {}
        for name in stored:
            places = [f"{expert}.{name.removeprefix(prefix)}" for expert in self.names]
            new = [prefix + place for place in places if place in names]
            if not new or not name.startswith(prefix):
                new = [name]
            result |= dict.fromkeys(new, name)
        return result

    # ── the contract: answers of both networks together, or of the first where they agree ─────────
    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.high.blocks, *self.low.blocks]

    def is_stored(self, name: str) -> bool:
        expert, _, inner = name.partition(".")
        return self.networks()[expert].is_stored(inner)

    def undecayed(self) -> set[str]:
        networks = self.networks().items()
        return {f"{expert}.{name}" for expert, network in networks for name in network.undecayed()}

    def matrices(self) -> set[str]:
        networks = self.networks().items()
        return {f"{expert}.{name}" for expert, network in networks for name in network.matrices()}

    def draw_keep(self, rows: int, columns: int, seed: int, step: int) -> Tensor | None:
        return self.high.draw_keep(rows, columns, seed, step)

    def sampling_inputs(self, grid: str) -> dict[str, Any]:
        return self.high.sampling_inputs(grid)

    def check_trainable(self, run: Any) -> None:
        for network in self.networks().values():
            network.check_trainable(run)

    def number_frames(self, seed: int) -> None:
        for network in self.networks().values():
            network.number_frames(seed)

    def train_flops(
        self, grid: tuple[int, int, int], text_tokens: int, kept: int | None = None
    ) -> int:
        return self.high.train_flops(grid, text_tokens, kept)


def _store_shared_once(
    module: Experts, state: dict[str, Tensor], prefix: str, local_metadata: object
) -> None:
    """Drop from `state` the tensors that `low` shares with `high`. Parameters keep their identity
    when they are moved, so shared ones are recognised by it; if there are any, the buffers count as
    shared, too."""
    of_high = {id(parameter) for parameter in module.high.parameters()}
    shares = False
    for name, parameter in module.low.named_parameters(remove_duplicate=False):
        if id(parameter) in of_high:
            shares = True
            state.pop(f"{prefix}low.{name}", None)
    if shares:
        for name, _ in module.low.named_buffers(remove_duplicate=False):
            state.pop(f"{prefix}low.{name}", None)
