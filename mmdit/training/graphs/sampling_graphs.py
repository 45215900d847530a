"""The network's calls in one sampling run, where weights and captions stay as they are: only
latents and times change."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mmdit.interfaces import TextTokens
from mmdit.models import VideoMMDiT
from mmdit.nn import attention
from mmdit.nn.experts import Experts

Call = Callable[[Tensor, Tensor], Tensor]  # latents, times → prediction
_able = True  # until a capture fails


def can_replay(model: nn.Module, x: Tensor) -> bool:
    """False also where somebody looks at each call, of which a replay would show nothing."""
    watched = attention.observers or any(
        part._forward_hooks or part._forward_pre_hooks for part in model.modules()
    )
    return _able and x.is_cuda and not watched


@lru_cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all runs, as cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


def first_call(call: Call, x: Tensor, t: Tensor) -> Tensor:
    """On the stream of the capture to come: what is made once (tables, kernels, workspaces, cast
    weights) is made here."""
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
        # thread_local: other threads (loaders, NCCL's) may use the device meanwhile; a failed
        # capture leaves its stream current
        capture = torch.cuda.graph(
            self.graph, pool=pool, stream=side_stream(x.device), capture_error_mode="thread_local"
        )
        with torch.cuda.stream(torch.cuda.current_stream(x.device)), capture:
            self.result = call(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.result.clone()


def captured(call: Call, x: Tensor, t: Tensor) -> Call:
    """A `Replay`, or where that fails the call itself; this is told, and not tried again."""
    global _able
    pool = torch.cuda.graph_pool_handle()
    try:
        return Replay(call, x, t, pool)
    except RuntimeError as error:
        reason = str(error.__context__ or error).partition("\n")[0]
    _able = False
    warnings.warn(
        f"sampling without CUDA graphs, the same but slower where batches are small: {reason}",
        stacklevel=2,
    )
    free_pool(pool, x.device)
    return call


def free_pool(pool: object, device: torch.device) -> None:
    """The memory of a capture that failed, which torch 2.11 keeps (pytorch#180395, #190348)."""
    for finish in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        with suppress(Exception):  # done already, in later versions
            getattr(torch._C, finish)(device.index, pool)
        torch.cuda.empty_cache()


class Calls:
    """`calls(model, x, t, text)` is `model(x, t, text)`. Of a Video MMDiT, alone or in a pair, what
    depends on the text alone is computed in the first call with this very `text`; on CUDA the
    second call is captured, and it and those that follow are replayed: bit for bit the same.
    Leaving the context, which belongs outside autocast's, frees all that. Any other network is
    called as it is."""

    def __enter__(self) -> Calls:
        self.made: dict[
            tuple, tuple[TextTokens, Call]
        ] = {}  # the text is held, so that no other has its id
        return self

    def __exit__(self, *_) -> None:
        graphs = any(isinstance(call, Replay) for _, call in self.made.values())
        self.made.clear()
        if graphs:
            torch.cuda.empty_cache()

    def __call__(self, model: nn.Module, x: Tensor, t: Tensor, text: TextTokens) -> Tensor:
        if isinstance(model, Experts) and not isinstance(model, FSDPModule):
            model = model.networks[int(model.route(t[:1]))]
        if not isinstance(model, VideoMMDiT) or isinstance(
            model, FSDPModule
        ):  # shards are gathered by whole calls alone
            return model(x, t, text)
        kind = (id(model), id(text), x.shape, x.dtype)
        if kind not in self.made:
            call = partial(model, text=model.prepare(text))
            self.made[kind] = text, call
            return first_call(call, x, t) if can_replay(model, x) else call(x, t)
        call = self.made[kind][1]
        if not isinstance(call, Replay) and can_replay(model, x):
            call = captured(call, x, t)
            self.made[kind] = text, call
        return call(x, t)
