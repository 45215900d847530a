"""Training steps of small networks as CUDA graphs: the forward and the backward pass cost the CPU
one launch each.

Launching the kernels of a block takes three to ten milliseconds, depending on the CPU but not on
the size of the block; a GPU that needs less than that is idle. A replay runs the same kernels as a
call of the network. Whether it also gives the same numbers is checked when a graph is made: bit for
bit, or, where a kernel adds in another order at every call (as torch's attention may), as closely
as two calls of the network agree with each other. This is not
`torch.cuda.make_graphed_callables`, which hands out gradients that the next micro-batch overwrites,
and forbids what other threads do meanwhile."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from mmdit.adapters import adapters
from mmdit.interfaces import Denoiser, TextTokens
from mmdit.training.graphs.common import (
    can_replay,
    capture_options,
    free_pool,
    reason_of,
    side_stream,
)
from mmdit.training.memory.shards import gathers_weights

# Operations of a block's forward and backward pass. An H200 takes longer for more than these than a
# slow CPU takes to launch them.
SMALL = 5e12
SIGNATURES = 8  # with graphs, at most: buckets, pictures or clips, text lengths
# How far a replay may be from a call: at most SPREADS times the distance of two calls, and at most
# UNLIKE of the size of a tensor.
SPREADS, UNLIKE = 4, 0.01
ROOM = 0.05  # of the GPU's memory, for the gradients that all graphs keep


def suits(model: Denoiser) -> bool:
    """Return whether steps of `model` can be replayed. They cannot if they depend on more than
    inputs and weights (dropout, an adapter's alpha), or if they need hooks (shards, offloaded
    activations)."""
    if gathers_weights(model) or adapters(model):
        return False
    return model.can_be_captured(training=True)


def operations(
    model: Denoiser, shape: torch.Size | tuple[int, ...], text_tokens: int, keep: Tensor | None
) -> float:
    """Return the number of operations of a block, forward and backward, on latents of the `shape`
    `(b, f, r, c, d)`."""
    kept = None if keep is None else len(keep)
    samples, *grid = shape[:4]
    frames, rows, columns = grid
    flops = model.train_flops((frames, rows, columns), text_tokens, kept)
    return samples * flops / len(model.blocks)


def memory(device: torch.device) -> int:
    """Return the size of a GPU's memory in bytes."""
    return torch.cuda.get_device_properties(device).total_memory


class Recorded:
    """`call(weights, *inputs)` and its gradients with respect to the weights and to those inputs
    that require one, as two graphs, for inputs with the shapes of the given ones. The graphs'
    memory is private: any replay of any graph may write to it. `faithful`: whether the graphs
    reproduce the numbers of the call. RuntimeError if something cannot be captured.
    """

    def __init__(
        self,
        call: Callable[..., Tensor],
        inputs: list[Tensor],
        weights: dict[str, nn.Parameter],
        pool: object,
    ):
        self.inputs = [
            given.detach().clone().requires_grad_(given.requires_grad) for given in inputs
        ]
        self.weights, device = list(weights.values()), inputs[0].device
        # These parameters share the weights' memory, but are other leaves: the weights belong to
        # the stream of training, where DDP keeps them.
        shared = {name: nn.Parameter(weight.detach()) for name, weight in weights.items()}
        leaves = [leaf for leaf in (*self.inputs, *shared.values()) if leaf.requires_grad]

        def gradients(output: Tensor) -> list[Tensor | None]:
            # Autocast ends before the backward pass, as in training.
            with torch.autocast(device.type, enabled=False):
                grads = torch.autograd.grad(output, leaves, self.gradient, allow_unused=True)
            return [laid_out_like(leaf, gradient) for leaf, gradient in zip(leaves, grads)]

        def results() -> list[Tensor | None]:
            output = call(shared, *self.inputs)
            self.gradient = torch.ones_like(output)
            return [output.detach(), *gradients(output)]

        main, side = torch.cuda.current_stream(device), side_stream(device)
        side.wait_stream(main)
        # Run twice on the capturing stream: whatever is created once for a stream is then created,
        # also by the thread of the backward pass.
        with torch.cuda.stream(side):
            expected, again = results(), results()
        main.wait_stream(side)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        options = capture_options(pool, side)
        with torch.cuda.stream(main):
            with torch.cuda.graph(self.forward, **options):
                output = call(shared, *self.inputs)
            with torch.cuda.graph(self.backward, **options):
                self.gradients = gradients(output)
        self.output = output.detach()
        self.faithful = repeats(expected, again, [self.run(), *self.run_back()])
        self.waiting = False  # whether a backward pass is outstanding
        # An input that requires a gradient, in case no other does.
        self.anchor = torch.zeros((), device=device, requires_grad=True)

    def run(self) -> Tensor:
        self.forward.replay()
        return self.output.clone()

    def run_back(self) -> list[Tensor | None]:
        self.backward.replay()
        copies = [None if grad is None else torch.empty_like(grad) for grad in self.gradients]
        there = [copy for copy in copies if copy is not None]
        gradients = [grad for grad in self.gradients if grad is not None]
        torch._foreach_copy_(there, gradients)
        return copies

    def __call__(self, direct: bool, *inputs: Tensor) -> Tensor:
        """Replay the forward pass. With `direct`, this object adds the gradients of the weights in
        the backward pass; otherwise autograd does, so that hooks on the weights run."""
        visible = [self.anchor] if direct else self.weights
        wanted = [leaf for leaf in inputs if leaf.requires_grad]
        return _Step.apply(self, direct, inputs, *wanted, *visible)

    def put(self, gradients: list[Tensor | None]) -> None:
        """Add gradients to those of the weights as autograd does, but without its 8 µs a weight."""
        sums, terms = [], []
        for weight, gradient in zip(self.weights, gradients):
            if gradient is None:
                continue
            if weight.grad is None:
                weight.grad = gradient
            else:
                sums.append(weight.grad)
                terms.append(gradient)
        if sums:
            torch._foreach_add_(sums, terms)


def laid_out_like(leaf: Tensor, gradient: Tensor | None) -> Tensor | None:
    """Return a gradient laid out in memory like `leaf`, on which optimizers rely."""
    if gradient is None or gradient.stride() == leaf.stride():
        return gradient
    return torch.empty_like(leaf).copy_(gradient)


def repeats(
    expected: list[Tensor | None], again: list[Tensor | None], replayed: list[Tensor | None]
) -> bool:
    """Return whether a replay is about as close to a call as another call is. Where calls repeat
    bit for bit, the replay must, too."""
    spread = max(map(distance, expected, again))
    return max(map(distance, expected, replayed)) <= min(SPREADS * spread, UNLIKE)


def distance(a: Tensor | None, b: Tensor | None) -> float:
    """Return the distance of two tensors relative to the size of the first: 0 if they are equal bit
    for bit (any nan equals any other), infinite if only one is given, or only the first is zero."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    a, b = a.nan_to_num().double(), b.nan_to_num().double()
    apart = torch.linalg.vector_norm(a - b)
    return float(apart / torch.linalg.vector_norm(a)) if apart else 0.0


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, recorded: Recorded, direct: bool, inputs: tuple[Tensor, ...], *leaves: Tensor
    ) -> Tensor:
        ctx.recorded, ctx.direct, recorded.waiting = recorded, direct, True
        for recorded_input, given in zip(recorded.inputs, inputs, strict=True):
            recorded_input.detach().copy_(given)
        return recorded.run()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        recorded = ctx.recorded
        recorded.gradient.copy_(gradient)
        recorded.waiting, gradients = False, recorded.run_back()
        if not ctx.direct:
            return None, None, None, *gradients
        first = len(gradients) - len(recorded.weights)
        recorded.put(gradients[first:])
        return None, None, None, *gradients[:first], None


def casting_anew(device: str) -> torch.autocast:
    """Return the autocast that is in force on a type of device, but without its cache: a cached
    cast would belong to one graph and be missing in another."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype, enabled, cache_enabled=False)


class ReplayedCalls:
    """Calls of functions of `weights` as graphs. The first call with a signature (shapes and types
    of the inputs) runs directly. Later ones are replayed, provided that the backward pass of each
    runs before the next call."""

    def __init__(self, weights: dict[str, nn.Parameter]):
        self.weights = weights
        self.made: dict[tuple, Recorded | None] = {}
        self.direct = True  # no one else, such as DDP, waits for the gradients
        self.pool: Any = None  # one for all graphs: a step is over before the next one begins
        self.able = True

    def replays(self, model: nn.Module, x: Tensor) -> bool:
        """Return whether a call of `model` with `x` may be replayed now."""
        return self.able and torch.is_grad_enabled() and can_replay(model, x)

    def take(
        self,
        call: Callable[..., Tensor],
        given: dict[str, Tensor],
        pays: Callable[[], bool] = lambda: True,
    ) -> Tensor:
        """Return `call(weights, *given.values())`, which is called with no weights to use those
        that are there. `pays`: whether to replay the calls of a new signature."""
        values = list(given.values())
        inputs = [(n, v.shape, v.dtype, v.requires_grad) for n, v in given.items()]
        signature = (*inputs, *(weight.data_ptr() for weight in self.weights.values()))
        plain = partial(call, {}, *values)
        if signature not in self.made:
            if pays() and len(self.made) < self._signatures(values[0].device):
                self.made[signature] = None
            return plain()
        if any(other is not None and other.waiting for other in self.made.values()):
            return plain()
        if self.made[signature] is None:
            self.made[signature] = self._record(call, values)
        recorded = self.made[signature]
        if recorded is None:
            return plain()
        hooked = any(
            weight._backward_hooks or weight._post_accumulate_grad_hooks
            for weight in self.weights.values()
        )
        return recorded(self.direct and not hooked, *values)

    def _signatures(self, device: torch.device) -> int:
        gradients = sum(weight.nbytes for weight in self.weights.values())
        return min(SIGNATURES, int(ROOM * memory(device) / max(gradients, 1)))

    def _record(self, call: Callable[..., Tensor], inputs: list[Tensor]) -> Recorded | None:
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            recorded = Recorded(call, inputs, self.weights, self.pool)
            if recorded.faithful:
                return recorded
            reason, failed = "replays give other numbers than the network itself", False
        except RuntimeError as error:
            reason, failed = reason_of(error), True
        self.able = False
        self.made.clear()
        warnings.warn(
            f"training without CUDA graphs, the same but slower where batches are small: {reason}",
            stacklevel=2,
        )
        if failed:
            free_pool(self.pool, inputs[0].device)
        return None


class Replays(ReplayedCalls):
    """`replays(x, t, text, …)` is `model(x, t, text, …)`, replayed on CUDA where the network is
    small."""

    def __init__(self, model: Denoiser):
        super().__init__({name: p for name, p in model.named_parameters() if p.requires_grad})
        self.model = model

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        text: TextTokens,
        keep: Tensor | None = None,
        **further: Tensor,
    ) -> Tensor:
        if not self.replays(self.model, x):
            return self.model(x, t, text, **(further if keep is None else further | {"keep": keep}))
        keep = None if keep is None else keep.to(x.device, non_blocking=True)
        named = {
            "x": x,
            "t": t,
            "embeddings": text.embeddings,
            "valid": text.valid,
            "keep": keep,
        } | further
        given = {name: value for name, value in named.items() if value is not None}

        def pays() -> bool:
            return operations(self.model, x.shape, text.valid.shape[1], keep) <= SMALL

        return self.take(self._call(tuple(given)), given, pays)

    def _call(self, names: tuple[str, ...]) -> Callable[..., Tensor]:
        def call(weights: dict[str, Tensor], *values: Tensor) -> Tensor:
            rest = dict(zip(names, values, strict=True))
            text = TextTokens(rest.pop("embeddings"), rest.pop("valid"))
            with casting_anew(values[0].device.type):
                inputs = (rest.pop("x"), rest.pop("t"), text)
                return functional_call(self.model, weights, inputs, rest)

        return call
