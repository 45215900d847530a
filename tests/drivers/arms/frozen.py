"""Calls of a network that no gradient passes, as a teacher's, replayed as CUDA graphs. (Training
replays networks that learn; sampling replays calls that keep their captions.)"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mmdit.interfaces import TextTokens
from mmdit.models import VideoMMDiT
from mmdit.training.graphs.common import can_replay
from mmdit.training.graphs.sampling_graphs import captured, first_call


class Frozen:
    """`frozen(x, t, text)` is `network(x, t, text)` without gradients. On CUDA the first call for a
    length of captions makes a graph, which reads the weights where they lie: they may be changed in
    place, but not replaced. One that gives other numbers than its call is not used."""

    def __init__(self, network: VideoMMDiT):
        self.network = network
        self.made: dict[tuple, tuple[TextTokens, Callable[[Tensor, Tensor], Tensor]]] = {}

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, text: TextTokens) -> Tensor:
        if not can_replay(self.network, x):
            return self.network(x, t, text)
        signature = (x.shape, text.embeddings.shape, text.embeddings.dtype)
        if signature not in self.made:
            held = TextTokens(text.embeddings.clone(), text.valid.clone())
            plain = partial(self.network, text=held)
            expected = first_call(plain, x, t)
            call = captured(plain, x, t)
            self.made[signature] = held, call if torch.equal(call(x, t), expected) else plain
            return expected
        held, call = self.made[signature]
        held.embeddings.copy_(text.embeddings)
        held.valid.copy_(text.valid)
        return call(x, t)
