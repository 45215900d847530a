"""The losses of tokenizer pre-training and their gradients, replayed as CUDA graphs: launching the
kernels of a step one by one takes the CPU several times as long as a GPU needs to compute them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from mmdit import rng
from mmdit.training.graphs.training_graphs import ReplayedCalls, casting_anew
from mmdit.vtp_training.pretrain_learner import StepLosses, TokenizerLearner


class StepKeys(dict[str, int]):
    """The keys of a step's draws, by purpose; each is computed when it is first asked for."""

    def __init__(self, seed: int, step: int):
        self.seed, self.step = seed, step

    def __missing__(self, purpose: str) -> int:
        self[purpose] = rng.key(self.seed, purpose, self.step)
        return self[purpose]


@dataclass
class Known:
    """What the first call with pictures of a size revealed: the purposes of its draws, and the
    names of the losses."""

    purposes: tuple[str, ...]
    parts: tuple[str, ...]


class ReplayedLosses:
    """`losses(target, tokens, facts, step)` returns the losses of `learner`, without a
    discriminator. On CUDA, calls are replayed from the third one with pictures of a size on; the
    backward pass of each must run before the next call."""

    def __init__(self, learner: TokenizerLearner):
        weights = learner.generator_parts().named_parameters()
        self.learner, self.seed = learner, learner.config.seed
        self.calls = ReplayedCalls({name: p for name, p in weights if p.requires_grad})
        self.known: dict[torch.Size, Known] = {}

    def __call__(
        self, target: Tensor, tokens: Tensor | None, facts: Tensor, step: int
    ) -> StepLosses:
        keys, known = StepKeys(self.seed, step), self.known.get(target.shape)
        if known is None or not self.calls.replays(self.learner, target):
            losses = self.learner(target, tokens, facts, self._draws(target, keys))
            self.known[target.shape] = Known(tuple(keys), tuple(losses.parts))
            return losses
        numbers = torch.tensor([keys[purpose] for purpose in known.purposes])
        given = {"target": target, "facts": facts, "keys": numbers.to(target.device)}
        if tokens is not None:
            given["tokens"] = tokens
        total, *parts = self.calls.take(self._call(tuple(given), known), given)
        return StepLosses(total, {n: p.detach() for n, p in zip(known.parts, parts, strict=True)})

    def _draws(self, target: Tensor, keys: Mapping[str, int | Tensor]) -> rng.Draws:
        places = torch.arange(len(target), device=target.device)
        return rng.Draws(self.seed, 0, places, keys=keys)  # the keys say the step

    def _call(self, names: tuple[str, ...], known: Known) -> Callable[..., Tensor]:
        def call(weights: dict[str, Tensor], *values: Tensor) -> Tensor:
            given = dict(zip(names, values, strict=True))
            keys = dict(zip(known.purposes, given["keys"].unbind(), strict=True))
            target, facts = given["target"], given["facts"]
            inputs = (target, given.get("tokens"), facts, self._draws(target, keys))
            with casting_anew(target.device.type):
                losses = functional_call(self.learner, weights, inputs)
            return torch.stack([losses.total, *losses.parts.values()])

        return call
