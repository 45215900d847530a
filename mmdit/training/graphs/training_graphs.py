"""Training steps of small networks as CUDA graphs: forward and backward pass cost the CPU one
launch each.

A block asks the CPU for three milliseconds whatever its size; a GPU that needs less waits. What is
replayed are the very kernels that ran before; that the numbers are the same, bit for bit, is looked
at when a graph is made. See torch's notes on CUDA graphs, and `torch.cuda.make_graphed_callables`,
which hands out gradients that the next micro-batch overwrites, and forbids what other threads do
meanwhile."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call

from mmdit.adapters import adapters
from mmdit.interfaces import TextTokens
from mmdit.models import VideoMMDiT
from mmdit.training.graphs.sampling_graphs import can_replay, free_pool, side_stream

# operations of a block's forward and backward pass: more take an H200 about as long as the CPU, or
# longer
SMALL = 1e12
KINDS = 8  # of calls with graphs: buckets, pictures or clips, text lengths
ROOM = 0.05  # of the GPU's memory for the gradients that each kind keeps


def suits(model: nn.Module) -> bool:
    """Not where a step depends on more than its inputs and weights (dropout, an adapter's alpha),
    nor where hooks belong to it (shards, checkpointing)."""
    if not isinstance(model, VideoMMDiT) or isinstance(model, FSDPModule) or adapters(model):
        return False
    return not (model.config.checkpointing or model.config.dropout)


def operations(
    model: VideoMMDiT, shape: torch.Size | tuple[int, ...], text_tokens: int, keep: Tensor | None
) -> float:
    """Of a block, forward and backward, on latents of `shape (b, f, r, c, d)`."""
    kept = None if keep is None else len(keep)
    return shape[0] * model.train_flops(tuple(shape[1:4]), text_tokens, kept) / len(model.blocks)


def memory(device: torch.device) -> int:
    """Bytes of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory


class Recorded:
    """`call(weights, *inputs)` and its gradients with respect to the weights and those inputs that
    want one, as two graphs; for inputs shaped like the given ones. Nothing outside refers to the
    graphs' memory, where any replay of any kind may write. `faithful`: whether they give the
    numbers of the call itself. RuntimeError where something cannot be captured.
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
        # The same memory, but not the same leaves: those belong to the stream of training, as DDP
        # keeps them.
        own = {name: nn.Parameter(weight.detach()) for name, weight in weights.items()}
        leaves = [leaf for leaf in (*self.inputs, *own.values()) if leaf.requires_grad]

        def gradients(output: Tensor) -> list[Tensor | None]:
            with torch.autocast(
                device.type, enabled=False
            ):  # as in training, where it ends before the backward pass
                found = torch.autograd.grad(output, leaves, self.gradient, allow_unused=True)
            return [laid_like(leaf, gradient) for leaf, gradient in zip(leaves, found)]

        main, side = torch.cuda.current_stream(device), side_stream(device)
        side.wait_stream(main)
        with torch.cuda.stream(
            side
        ):  # what is made once for a stream is made here, also by the thread of backward passes
            output = call(own, *self.inputs)
            self.gradient = torch.ones_like(output)
            expected = [output.detach(), *gradients(output)]
            del output
        main.wait_stream(side)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # thread_local: loaders and NCCL may use the device meanwhile; a failed capture leaves its
        # stream current
        options = {"pool": pool, "stream": side, "capture_error_mode": "thread_local"}
        with torch.cuda.stream(main):
            with torch.cuda.graph(self.forward, **options):
                output = call(own, *self.inputs)
            with torch.cuda.graph(self.backward, **options):
                self.gradients = gradients(output)
        self.output = output.detach()
        self.faithful = all(map(same, expected, [self.run(), *self.run_back()]))
        self.waiting = False  # for the backward pass
        self.anchor = torch.zeros(
            (), device=device, requires_grad=True
        )  # so that there is one, whatever the inputs want

    def run(self) -> Tensor:
        self.forward.replay()
        return self.output.clone()

    def run_back(self) -> list[Tensor | None]:
        self.backward.replay()
        copies = [None if own is None else torch.empty_like(own) for own in self.gradients]
        there = [pair for pair in zip(copies, self.gradients) if pair[0] is not None]
        torch._foreach_copy_(*map(list, zip(*there)))
        return copies

    def __call__(self, direct: bool, *inputs: Tensor) -> Tensor:
        """`direct`: the weights' gradients are put where they belong by this; else autograd does
        it, for those who wait there."""
        seen = [self.anchor] if direct else self.weights
        return _Step.apply(
            self, direct, inputs, *(leaf for leaf in inputs if leaf.requires_grad), *seen
        )

    def put(self, gradients: list[Tensor | None]) -> None:
        """As autograd does, without its 8 µs a weight."""
        there = [(weight, own) for weight, own in zip(self.weights, gradients) if own is not None]
        before = [(weight.grad, own) for weight, own in there if weight.grad is not None]
        for weight, own in there:
            weight.grad = own if weight.grad is None else weight.grad
        if before:
            torch._foreach_add_(*map(list, zip(*before)))


def laid_like(leaf: Tensor, gradient: Tensor | None) -> Tensor | None:
    """What optimizers rely on: the elements in the same order."""
    return (
        gradient
        if gradient is None or gradient.stride() == leaf.stride()
        else torch.empty_like(leaf).copy_(gradient)
    )


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Bit for bit, but for the kind of what is no number."""
    return a is b if a is None or b is None else torch.equal(a.nan_to_num(), b.nan_to_num())


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, recorded: Recorded, direct: bool, inputs: tuple[Tensor, ...], *leaves: Tensor
    ) -> Tensor:
        ctx.recorded, ctx.direct, recorded.waiting = recorded, direct, True
        for own, given in zip(recorded.inputs, inputs, strict=True):
            own.detach().copy_(given)
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


class Replays:
    """`replays(x, t, text, …)` is `model(x, t, text, …)`. On CUDA a small network's first call of a
    kind is made as it is, those that follow are replayed, each with its backward pass before the
    next."""

    def __init__(self, model: VideoMMDiT):
        self.model, self.weights = (
            model,
            {name: weight for name, weight in model.named_parameters() if weight.requires_grad},
        )
        self.made: dict[tuple, Recorded | None] = {}
        self.direct = True  # nobody else waits for the gradients, as DDP does
        self.pool, self.able = (
            None,
            True,
        )  # one pool: a step is over before the next, of whatever kind, begins

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        text: TextTokens,
        keep: Tensor | None = None,
        crop: Tensor | None = None,
    ) -> Tensor:
        if not (self.able and torch.is_grad_enabled() and can_replay(self.model, x)):
            return self.model(x, t, text, keep, crop)
        keep = None if keep is None else keep.to(x.device, non_blocking=True)
        named = {
            "x": x,
            "t": t,
            "embeddings": text.embeddings,
            "valid": text.valid,
            "keep": keep,
            "crop": crop,
        }
        given = {name: value for name, value in named.items() if value is not None}
        kind = (
            *(
                (name, value.shape, value.dtype, value.requires_grad)
                for name, value in given.items()
            ),
            *(weight.data_ptr() for weight in self.weights.values()),
        )
        call = self._call(tuple(given))
        plain = partial(call, {}, *given.values())
        if kind not in self.made:
            small = operations(self.model, x.shape, text.valid.shape[1], keep) <= SMALL
            if small and len(self.made) < self._kinds(x.device):
                self.made[kind] = None
            return plain()
        if any(other is not None and other.waiting for other in self.made.values()):
            return plain()
        if self.made[kind] is None:
            self.made[kind] = self._recorded(call, list(given.values()))
        recorded = self.made[kind]
        hooked = any(
            weight._backward_hooks or weight._post_accumulate_grad_hooks
            for weight in self.weights.values()
        )
        return (
            plain() if recorded is None else recorded(self.direct and not hooked, *given.values())
        )

    def _call(self, names: tuple[str, ...]) -> Callable[..., Tensor]:
        def call(weights: dict[str, Tensor], *values: Tensor) -> Tensor:
            rest = dict(zip(names, values, strict=True))
            text = TextTokens(rest.pop("embeddings"), rest.pop("valid"))
            kind = values[
                0
            ].device.type  # a cast kept by autocast would belong to a graph, or be missing in it
            with torch.autocast(
                kind,
                torch.get_autocast_dtype(kind),
                torch.is_autocast_enabled(kind),
                cache_enabled=False,
            ):
                return functional_call(
                    self.model, weights, (rest.pop("x"), rest.pop("t"), text), rest
                )

        return call

    def _kinds(self, device: torch.device) -> int:
        gradients = sum(weight.nbytes for weight in self.weights.values())
        return min(KINDS, int(ROOM * memory(device) / max(gradients, 1)))

    def _recorded(self, call: Callable[..., Tensor], inputs: list[Tensor]) -> Recorded | None:
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            recorded = Recorded(call, inputs, self.weights, self.pool)
            if recorded.faithful:
                return recorded
            reason, failed = "replays give other numbers than the network itself", False
        except RuntimeError as error:
            reason, failed = str(error.__context__ or error).partition("\n")[0], True
        self.able = False
        self.made.clear()
        warnings.warn(
            f"training without CUDA graphs, the same but slower where batches are small: {reason}",
            stacklevel=2,
        )
        if failed:
            free_pool(self.pool, inputs[0].device)
        return None
