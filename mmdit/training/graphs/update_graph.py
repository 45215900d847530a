"""The update of a small network's weights (clipping, Muon, AdamW) as one CUDA graph.

Clipping, Muon and AdamW launch some six hundred kernels whatever the size of the matrices. This
takes the CPU about ten milliseconds, and the GPU two if the network is small. A replay runs the
very kernels that ran before. When a graph is made, it is checked that it leaves the same weights
and moments, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.training.graphs.common import capture_options, free_pool, reason_of, side_stream
from mmdit.training.memory.shards import is_sharded
from mmdit.training.muon import StackedMuon
from mmdit.training.optim import Optimizer, clip_and_guard

MOST_WEIGHTS = 2**27  # trained elements; for more, the GPU takes longer than the launches
SIGNATURES = 4  # sets of weights that are trained together, as by pictures and by clips


def suits(optimizer: Optimizer) -> bool:
    """Return whether the updates of `optimizer` can be replayed: its network is small, and weights
    and moments lie on a GPU, unsharded."""
    whole = all(type(part) in (torch.optim.AdamW, StackedMuon) for part in optimizer.parts)
    parameters = list(optimizer.part_of)
    return (
        whole
        and optimizer.parking is None
        and all(p.is_cuda and not is_sharded(p) for p in parameters)
        and sum(p.numel() for p in parameters) <= MOST_WEIGHTS
    )


class RecordedUpdate:
    """`take()` as a graph, for gradients of `parameters`; the capture itself updates nothing.
    RuntimeError if something in it cannot be captured."""

    def __init__(
        self, take: Callable[[], tuple[Tensor, ...]], parameters: list[nn.Parameter], pool: object
    ):
        given = _gradients(parameters)
        self.gradients = [gradient.clone() for gradient in given]
        self.graph, device = torch.cuda.CUDAGraph(), parameters[0].device
        capture = torch.cuda.graph(self.graph, **capture_options(pool, side_stream(device)))
        try:
            _set_gradients(parameters, self.gradients)
            with torch.cuda.stream(torch.cuda.current_stream(device)), capture:
                self.results = take()
        finally:
            _set_gradients(parameters, given)

    def __call__(self, gradients: list[Tensor]) -> tuple[Tensor, ...]:
        torch._foreach_copy_(self.gradients, gradients)
        self.graph.replay()
        return tuple(result.clone() for result in self.results)


class ReplayedUpdates:
    """`updates()` runs `clip_and_guard(optimizer, max_norm)` and the optimizer's step. The first
    update of a set of weights runs directly; later ones are replayed."""

    def __init__(self, optimizer: Optimizer, max_norm: float):
        self.optimizer, self.max_norm = optimizer, max_norm
        self.made: dict[tuple, RecordedUpdate | None] = {}
        self.pool: Any = None
        self.able = True
        optimizer.hold_rates()

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Update the weights; return `(norm, skipped)` of `clip_and_guard`."""
        parameters = [p for p in self.optimizer.part_of if p.grad is not None]
        if not (self.able and parameters):
            return self._take()
        signature = self._signature(parameters)
        if signature not in self.made:
            result = self._take()  # the first step creates the moments
            if len(self.made) < SIGNATURES:
                self.made[self._signature(parameters)] = None
            return result
        recorded = self.made[signature]
        if recorded is None:
            return self._record(signature, parameters)
        norm, skipped = recorded(_gradients(parameters))
        return norm, skipped

    def _take(self) -> tuple[Tensor, Tensor]:
        norm, skipped = clip_and_guard(self.optimizer, self.max_norm)
        self.optimizer.step()
        return norm, skipped

    def _changing(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Return the tensors that an update changes: the weights and their states in the
        optimizer."""
        kept = [self.optimizer.part_of[p].state[p].values() for p in parameters]
        return [*parameters, *(value for values in kept for value in values)]

    def _signature(self, parameters: list[nn.Parameter]) -> tuple[int, ...]:
        """Return the addresses of the memory to which a graph of this update writes."""
        return tuple(tensor.data_ptr() for tensor in self._changing(parameters))

    @contextmanager
    def _capturable(self) -> Iterator[None]:
        """Within this context, declare torch's AdamW capturable, which its fused kernels are. If
        that were declared for good, steps that are not captured would warn."""
        groups = [
            g for part in self.optimizer.parts for g in part.param_groups if "capturable" in g
        ]
        for group in groups:
            group["capturable"] = True
        try:
            yield
        finally:
            for group in groups:
                group["capturable"] = False

    @torch.no_grad()
    def _record(
        self, signature: tuple[int, ...], parameters: list[nn.Parameter]
    ) -> tuple[Tensor, Tensor]:
        """Take the step directly and then as a graph, and keep the graph if both have the same
        result."""
        changing, device = self._changing(parameters), parameters[0].device
        gradients = _gradients(parameters)  # AdamW clips them in place
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        before: list[Tensor] | None = None
        after: list[Tensor] | None = None
        try:
            before = _copies([*changing, *gradients])
            main, side = torch.cuda.current_stream(device), side_stream(device)
            side.wait_stream(main)
            with torch.cuda.stream(side):  # creates what exists once for a stream
                results = self._take()
            main.wait_stream(side)
            norm, skipped = (result.clone() for result in results)
            after = _copies(changing)
            with self._capturable():
                recorded = RecordedUpdate(self._take, parameters, self.pool)
            _write([*changing, *gradients], before)
            recorded(gradients)
            if all(map(torch.equal, changing, after)):
                self.made[signature] = recorded
                return norm, skipped
            reason = "a replay leaves other numbers than the update itself"
        except RuntimeError as error:
            reason = reason_of(error)
        self._give_up(reason, device)
        if after is not None:
            _write(changing, after)
            return norm, skipped
        if before is not None:
            _write([*changing, *gradients], before)
        return self._take()

    def _give_up(self, reason: str, device: torch.device) -> None:
        self.able = False
        self.made.clear()
        warnings.warn(
            "updating the weights without a CUDA graph, the same but slower where the network is"
            f" small: {reason}",
            stacklevel=4,
        )
        free_pool(self.pool, device)


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad.detach() for p in parameters if p.grad is not None]


def _set_gradients(parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _write(tensors: list[Tensor], values: list[Tensor]) -> None:
    torch._foreach_copy_([tensor.detach() for tensor in tensors], values)
