"""What CUDA graphs of sampling and of training have in common: when a call may be replayed, the
stream of captures, and cleaning up after a failed capture. See torch's notes on CUDA graphs."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache

import torch
from torch import Tensor, nn

from mmdit.nn import attention

_able = True  # until a capture for sampling fails, see `give_up`


def can_replay(model: nn.Module, x: Tensor) -> bool:
    """Return whether calls of `model` may be replayed. They may not while hooks or observers watch
    each call, because a replay would not run them."""
    watched = attention.observers or any(
        part._forward_hooks or part._forward_pre_hooks for part in model.modules()
    )
    return _able and x.is_cuda and not watched


def give_up() -> None:
    """Turn replays off for all later calls."""
    global _able
    _able = False


def try_again() -> None:
    """Turn replays on again, for another network than the one whose capture failed."""
    global _able
    _able = True


@lru_cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream on which everything is captured: cuBLAS keeps a workspace for every
    stream that it has seen."""
    return torch.cuda.Stream(device)


def capture_options(pool: object, stream: torch.cuda.Stream) -> dict:
    """Return the options of `torch.cuda.graph`. With `thread_local`, other threads (loaders, NCCL)
    may use the device meanwhile. A failed capture leaves its stream current, so callers must set
    the current stream again around it."""
    return {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}


def reason_of(error: RuntimeError) -> str:
    """Return one line that says why a capture failed."""
    return str(error.__context__ or error).partition("\n")[0]


def free_pool(pool: object, device: torch.device) -> None:
    """Free the memory of a failed capture, which torch 2.11 keeps (pytorch#180395, #190348)."""
    for finish in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        with suppress(Exception):  # done already, in later versions
            getattr(torch._C, finish)(device.index, pool)
        torch.cuda.empty_cache()
