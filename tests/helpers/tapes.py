"""CUDA graphs without CUDA."""

import contextlib
import inspect
from types import ModuleType

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """What `torch.cuda.CUDAGraph` and `torch.cuda.graph` are to a GPU: replays the operations that
    a capture saw, without any Python, and refuses what would wait for a device."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.lift_fresh,
        ):  # .item(), torch.tensor(…)
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # which has cast already what is on the tape
    def replay(self):
        for func, args, kwargs, out in self.steps:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)


class Stream:
    def wait_stream(self, other) -> None:
        pass


def pretended_graphs(monkeypatch, module: ModuleType) -> list[Tape]:
    """From now on `module`, which asks for `side_stream`, captures tapes; returns those made so
    far."""
    made, known = [], inspect.signature(torch.cuda.graph)
    monkeypatch.setattr(module, "side_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(Tape()) or made[-1])
    monkeypatch.setattr(
        torch.cuda, "graph", lambda graph, **options: known.bind(graph, **options).args[0]
    )
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return made
