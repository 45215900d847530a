"""The network's calls in one sampling run, where weights and captions stay as they are: only
latents and times change."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmdit.interfaces import Denoiser, TextTokens
from mmdit.training.graphs.common import (
    can_replay,
    capture_options,
    free_pool,
    give_up,
    reason_of,
    side_stream,
)
from mmdit.training.memory.shards import gathers_weights

Call = Callable[[Tensor, Tensor], Tensor]  # latents, times → prediction


def first_call(call: Call, x: Tensor, t: Tensor) -> Tensor:
    """Call on the stream of the capture to come: what is made once (tables, kernels, workspaces,
    cast weights) is made here."""
    main, side = torch.cuda.current_stream(x.device), side_stream(x.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        result = call(x, t)
    main.wait_stream(side)
    return result


class Replay:
    """`call(x, t)` as one CUDA graph, which costs the CPU one launch; for arguments shaped like the
    given ones. RuntimeError where something in it cannot be captured (what waits for the GPU, as
    `.item()` does). See torch's notes, CUDA graphs.
    """

    def __init__(self, call: Call, x: Tensor, t: Tensor, pool: object):
        self.inputs, self.graph = (x.clone(), t.clone()), torch.cuda.CUDAGraph()
        self.call = call  # the graph reads the text's memory, but does not hold it
        capture = torch.cuda.graph(self.graph, **capture_options(pool, side_stream(x.device)))
        with torch.cuda.stream(torch.cuda.current_stream(x.device)), capture:
            self.result = call(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for captured_input, given in zip(self.inputs, inputs, strict=True):
            captured_input.copy_(given)
        self.graph.replay()
        return self.result.clone()


def captured(call: Call, x: Tensor, t: Tensor) -> Call:
    """Return a `Replay`, or where that fails the call itself; a warning says so, and no other
    capture is tried."""
    pool = torch.cuda.graph_pool_handle()
    try:
        return Replay(call, x, t, pool)
    except RuntimeError as error:
        reason = reason_of(error)
    give_up()
    warnings.warn(
        f"sampling without CUDA graphs, the same but slower where batches are small: {reason}",
        stacklevel=2,
    )
    free_pool(pool, x.device)
    return call


class Calls:
    """`calls(model, x, t, text)` is `model(x, t, text)`. Of a network that can be captured, what
    depends on the text alone is computed in the first call with this very `text`; on CUDA the
    second call is captured, and it and those that follow are replayed: bit for bit the same.
    Leaving the context, which belongs outside autocast's, frees all that. Any other network is
    called as it is."""

    def __enter__(self) -> Calls:
        # The text is held, so that no other object has its id.
        self.made: dict[tuple, tuple[TextTokens, Call]] = {}
        return self

    def __exit__(self, *_) -> None:
        graphs = any(isinstance(call, Replay) for _, call in self.made.values())
        self.made.clear()
        if graphs:
            torch.cuda.empty_cache()

    def __call__(
        self, model: Denoiser, x: Tensor, t: Tensor, text: TextTokens, **inputs: Any
    ) -> Tensor:
        # shards are gathered by whole calls alone
        if inputs or gathers_weights(model) or not model.can_be_captured(training=False):
            return model(x, t, text, **inputs)
        signature = (id(model), id(text), x.shape, x.dtype)
        if signature not in self.made:
            call: Callable[[Tensor, Tensor], Tensor] = partial(model, text=model.prepare(text))
            self.made[signature] = text, call
            return first_call(call, x, t) if can_replay(model, x) else call(x, t)
        call = self.made[signature][1]
        if not isinstance(call, Replay) and can_replay(model, x):
            call = captured(call, x, t)
            self.made[signature] = text, call
        return call(x, t)
