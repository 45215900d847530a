"""Optimizers that need less memory: AdamW for weights in bfloat16, and moments in the memory of the
CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor, nn

from mmdit.adapters import is_adapter
from mmdit.nn.page_locked import PageLocked, laid_out
from mmdit.training.memory.shards import local

CHUNK = 2**26  # parameters whose moments are on the GPU at a time


def to_bfloat16(module: nn.Module) -> None:
    """Cast all weights to bfloat16 except those of adapters, which are few and learn by small
    steps."""
    for name, weight in module.named_parameters():
        if weight.dtype != torch.bfloat16 and not is_adapter(name):
            weight.data = weight.data.bfloat16()


class SplitAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) for weights in bfloat16. A second bfloat16 (`rest`) keeps
    what rounding takes from a weight (Kahan's summation, as in Zamirai et al. 2020, 2010.06192), so
    that small updates add up as with 16 significant bits. Moments are bfloat16, the arithmetic is
    float32. It takes 10 bytes a parameter with its gradient; float32 takes 16.
    """

    def __init__(self, groups: list[dict], betas: tuple[float, float]):
        super().__init__(groups, {"betas": betas, "eps": 1e-8})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state.update(
                        {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq", "rest")}
                    )
                state["step"] += 1
                step = state["step"].item()
                beta1, beta2 = group["betas"]
                numbers = torch.tensor(  # as a tensor: numbers would be compiled in
                    (
                        group["lr"],
                        group["lr"] * group["weight_decay"],
                        1 - beta1**step,
                        1 - beta2**step,
                        group["eps"],
                    )
                ).to(p.device, non_blocking=True)
                tensors = (p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["rest"])
                flat = [local(tensor).view(-1) for tensor in tensors]
                update: Callable[..., None] = _compiled_update() if p.is_cuda else _update
                update(*flat, numbers, beta1, beta2)


def _update(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rest: Tensor,
    numbers: Tensor,
    beta1: float,
    beta2: float,
) -> None:
    lr, decay, correction1, correction2, eps = numbers.unbind()
    grad, value = grad.float(), p.float() + rest.float()
    first = exp_avg.float().lerp(grad, 1 - beta1)
    second = exp_avg_sq.float().lerp(grad.square(), 1 - beta2)
    change = lr * (first / correction1) / ((second / correction2).sqrt() + eps)
    value = value - decay * value - change
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)
    p.copy_(value)
    rest.copy_(value - value.to(p.dtype).float())


@cache
def _compiled_update() -> Callable[..., None]:
    """Return `_update` compiled for a GPU, at the first call. Even calling torch.compile imports
    the compiler, which takes as long as all other imports of a command."""
    return torch.compile(_update, dynamic=True)


def in_chunks(groups: list[dict]) -> Iterator[list[dict]]:
    """Yield lists of parameter groups, cut so that each list has at most CHUNK elements (or a
    single parameter)."""
    chunk: list[dict] = []
    size = 0
    for group in groups:
        for p in group["params"]:
            if chunk and size + p.numel() > CHUNK:
                yield chunk
                chunk, size = [], 0
            if not chunk or any(chunk[-1][key] != group[key] for key in group if key != "params"):
                chunk.append({**group, "params": []})
            chunk[-1]["params"].append(p)
            size += p.numel()
    yield chunk


class Parking:
    """Keeps moments in the memory of the CPU, page-locked if `pinned`, and brings them to the
    device of their parameters for a step."""

    def __init__(self, pinned: bool):
        self.memory = PageLocked(pinned)
        # By the id of a parameter and the name of a moment.
        self.parked: dict[tuple[int, str], Tensor] = {}

    def fetch(self, optimizer: torch.optim.Optimizer) -> None:
        for p, state in optimizer.state.items():
            for name in state.keys() - {"step"}:
                state[name] = state[name].to(p.device, non_blocking=True)

    def put_back(self, optimizer: torch.optim.Optimizer) -> None:
        for p, state in optimizer.state.items():
            for name in state.keys() - {"step"}:
                value = state[name]
                parked = self.parked.get((id(p), name))
                if parked is None:
                    parked = laid_out(self.memory.take(value.nbytes), value)
                    self.parked[id(p), name] = parked
                parked.copy_(value, non_blocking=True)
                state[name] = parked
