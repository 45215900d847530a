"""CUDA graphs for the calls of a network in one sampling run: weights and captions stay the same,
and only latents and times change."""

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
    """Call the network on the stream that will capture it, so that everything that is created only
    once (tables, kernels, workspaces, cast weights) exists before the capture."""
    main, side = torch.cuda.current_stream(x.device), side_stream(x.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        result = call(x, t)
    main.wait_stream(side)
    return result


class Replay:
    """`call(x, t)` as one CUDA graph, which costs the CPU a single launch; for arguments with the
    shapes of the given ones. RuntimeError if something in it cannot be captured, such as an
    operation that waits for the GPU (`.item()`).
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
    """Return a `Replay` of the call. If the capture fails, return the call itself, with a warning,
    and try no further captures."""
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
    """`calls(model, x, t, text)` is `model(x, t, text)`. For a network that can be captured,
    whatever depends on the text alone is computed in the first call with this `text` object; on
    CUDA the second call is captured, and from then on calls are replayed, with results that are the
    same bit for bit. Leaving the context, which must lie outside autocast's, frees all that. Any
    other network is called directly."""

    def __enter__(self) -> Calls:
        # Holding the text keeps its id from being used for another object.
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
        # Sharded weights are gathered by hooks, which a replay would not run.
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
