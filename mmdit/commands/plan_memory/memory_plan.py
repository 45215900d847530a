"""Compute how much GPU memory a training step will take, without a GPU, by running the step itself
on tensors without memory.

The learner is built, and runs forward and backward, on fake tensors (shapes, dtypes and lifetimes,
no numbers), while a meter adds up the storages that are alive. So checkpointing, autocast, adapters
and anything else that a network does are counted as they are. What this does not show is added by
formula: the optimizer's state, and the inner memory of fused attention's backward pass. Compiled
blocks (`train.compile`) keep what the compiler's partitioner decides, and recompute the rest; their
temporaries are counted as if no operations were fused.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.util
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from unittest import mock

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils import _triton
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_leaves

from mmdit.adapters import is_adapter
from mmdit.interop.wan_weights import prepare
from mmdit.models import video_mmdit, wan
from mmdit.models.wan import WanConfig
from mmdit.models.wan_denoiser import WanDenoiser, WanModelConfig
from mmdit.nn import activations, kernels, page_locked
from mmdit.nn.stored_weights import parts_of
from mmdit.rng import Draws
from mmdit.training.ema import EMAConfig
from mmdit.training.graphs.training_graphs import SMALL, operations, suits
from mmdit.training.graphs.update_graph import MOST_WEIGHTS
from mmdit.training.learner import Learner
from mmdit.training.memory.lean import CHUNK, to_bfloat16
from mmdit.training.memory.offload import slot_bytes
from mmdit.training.train_config import TrainConfig

MATRIX_LIBRARY = 2 * 2**25  # bytes that cuBLAS and cuBLASLt keep on an H100 or H200
SIZES = {  # of the released transformers, for plans before the files exist
    "1.3B": WanConfig(1536, 8960, 12, 30),
    "5B": WanConfig(3072, 14336, 24, 30, in_dim=48, out_dim=48),
    "14B": WanConfig(5120, 13824, 40, 40),
    "I2V-A14B": WanConfig(5120, 13824, 40, 40, in_dim=36),
    "I2V-14B": WanConfig(5120, 13824, 40, 40, in_dim=36, image_dim=1280),
    "FLF2V-14B": WanConfig(5120, 13824, 40, 40, in_dim=36, image_dim=1280, image_positions=514),
}
TABLES = (
    (video_mmdit, "place_tables"),
    (video_mmdit, "frame_tables"),
    (video_mmdit, "coordinates"),
    (wan, "rotary_tables"),
)


@dataclass(frozen=True)
class MemoryPlan:
    """Numbers of bytes. `activations`: what a forward pass keeps for the backward pass.
    `workspace`: the peak less the parts above; it is negative if the last gradients are allocated
    after most activations have been freed. `host`: page-locked memory on the CPU;
    `host_activations`: the part of it that activations take."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    workspace: int
    host: int = 0
    host_activations: int = 0

    @property
    def total(self) -> int:
        """Return the peak on the device, as `torch.cuda.max_memory_allocated` reports it."""
        away = ("host", "host_activations")
        return sum(value for name, value in asdict(self).items() if name not in away)

    def describe(self) -> str:
        rows = asdict(self) | {"total": self.total}
        host, _ = rows.pop("host"), rows.pop("host_activations")
        lines = [f"{name:12}{value / 1e9:10.3f} GB" for name, value in rows.items()]
        return "\n".join(lines + [f"{'on the CPU':12}{host / 1e9:10.3f} GB"] * bool(host))


class Meter(TorchDispatchMode):
    """Counts memory. `live`: bytes of the storages that operations have made and that are still
    referenced; `peak`: the largest value so far. Tensors on the meta device stand for those in CPU
    memory, whose bytes are added to `host` when they are allocated."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.host = 0
        self.sizes: dict[int, int] = {}

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Return True, so that blocks are compiled although this mode is on."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            plain = isinstance(value, Tensor) and not is_traceable_wrapper_subclass(value)
            if plain and value.device.type != "meta":
                self._add(value.untyped_storage())
        if func.__name__.startswith("_scaled_dot_product") and func.__name__.endswith(
            "backward.default"
        ):
            # FlashAttention-2 sums the gradient of queries in float32, in tiles, with one more
            # number a row.
            b, h, tokens, d = args[1].shape
            self.peak = max(
                self.peak,
                self.live + 4 * b * h * (-(-tokens // 128) * 128) * (-(-d // 32) * 32 + 1),
            )
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


class _FusedNorm(torch.autograd.Function):
    """`F.rms_norm` with the memory that it takes on a GPU: it keeps the input and one number a row.
    (On a CPU it consists of several operations.)"""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, x[..., :1].clone(), weight)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        *_, weight = ctx.saved_tensors
        return gradient.clone(), None if weight is None else torch.zeros_like(weight)


@contextlib.contextmanager
def without_memory():
    """Make all tensors inside the block fake, and yield the meter of what they would take on a GPU.
    Tables that are kept for the whole process stay real, and operations that need numbers are
    answered by shape: `unique` returns two values, for two distinct timesteps. No GPU is touched:
    another job may use it, and `checkpoint` refuses a GPU that is initialised inside, as compiling
    would do."""

    def real(function: Callable) -> Callable:
        def call(*arguments):
            with unset_fake_temporarily(), _disable_current_modes():
                return function(*arguments)

        return call

    def unique(values: Tensor, return_inverse: bool):
        return values.flatten()[:2], torch.zeros_like(values, dtype=torch.long)

    def rms_norm(
        x: Tensor, shape, weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        return _FusedNorm.apply(x, weight)

    def host_memory(size: int, pinned: bool) -> Tensor:
        meter.host += page_locked.rounded(size)
        return torch.empty(size, dtype=torch.uint8, device="meta")

    meter = Meter()
    with contextlib.ExitStack() as stack:

        def patch(place: object, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(place, name, value))

        # It is called while compiling, and would remember that there is no GPU.
        stack.callback(_triton.has_triton.cache_clear)
        patch(torch.cuda, "is_available", lambda: False)
        for module, name in TABLES:
            patch(module, name, real(getattr(module, name)))
        # As on a GPU: the fused kernels state what they allocate and keep, and operators stay
        # whole.
        if importlib.util.find_spec("triton"):
            stack.enter_context(torch._functorch.config.patch(decompose_custom_triton_ops=False))
            patch(kernels, "can_run", lambda x: x.dtype != torch.float64)
            patch(kernels, "can_encode", lambda x: x.dtype == torch.bfloat16)
            for name, path in kernels.MODULES.items():
                patch(kernels, name, importlib.import_module(path))
        patch(activations, "can_offload", lambda x: True)
        patch(page_locked, "host_memory", host_memory)
        patch(activations, "channel", functools.cache(activations.Channel))
        patch(torch, "unique", unique)
        patch(nn.functional, "rms_norm", rms_norm)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(meter)


def stored_bytes(parameter: Tensor) -> int:
    return sum(part.nbytes for part in parts_of(parameter))


def optimizer_bytes(learner: Learner, train: TrainConfig) -> tuple[int, int]:
    """Return the bytes of the state that stays on the device, and of the part that visits it during
    a step (`train.offload_optimizer`). AdamW has two moments in float32, `SplitAdamW` three 16-bit
    numbers for each weight, Muon one moment for each matrix."""
    trained = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    halves = is_split(trained.values())
    size = (6 if halves else 8) * sum(p.numel() for p in trained.values())
    if train.optimizer == "muon" and not halves:
        matrices = (trained.get(f"model.{name}") for name in learner.model.matrices())
        size -= 4 * sum(p.numel() for p in matrices if p is not None)
    if train.offload_optimizer:
        return 0, min(size, 8 * max([CHUNK, *(p.numel() for p in trained.values())]))
    return size, 0


def is_split(trained: Iterable[Tensor]) -> bool:
    """Return whether `SplitAdamW` would train these weights."""
    return any(p.dtype == torch.bfloat16 for p in trained)


def parked_moments(trained: Sequence[Tensor]) -> Iterator[int]:
    """Yield the bytes of each tensor that `train.offload_optimizer` keeps on the CPU."""
    count = 3 if is_split(trained) else 2
    for p in trained:
        yield from [p.nbytes] * count


def plan_memory(
    build: Callable[[], Learner],
    train: TrainConfig,
    ema: EMAConfig,
    latents: tuple[int, ...],
    captions: list[str],
) -> MemoryPlan:
    """Return the plan for training steps of the learner that `build` makes, on micro-batches of raw
    `latents (b, f, r, c, d)` and `captions`, in one process. With compiled blocks it is the smaller
    of the plans with and without compiling, as neither accounts for fused operations."""
    ways = (False, True) if train.compiles("cuda") else (False,)
    plans = [_plan(build, train, ema, latents, captions, compiled) for compiled in ways]
    return min(plans, key=lambda plan: plan.total)


def _plan(
    build: Callable[[], Learner],
    train: TrainConfig,
    ema: EMAConfig,
    latents: tuple[int, ...],
    captions: list[str],
    compiled: bool,
) -> MemoryPlan:
    with without_memory() as meter:
        learner = build()
        if train.precision == "pure_bf16":
            to_bfloat16(learner)
        learner.train()
        with unset_fake_temporarily(), _disable_current_modes():
            learner.spec.normalize(torch.zeros(latents[-1]))  # its tables outlast the step
            keep = learner.model.draw_keep(*latents[2:4], 0, 0)
        learner.objective.draw_time = lambda draws, frames=1: torch.rand(
            len(draws.indices), dtype=torch.float64
        )
        given = int(latents[1] > 1 and learner.model.first_frame > 0)
        learner.model.given_frames = lambda frames, draws: given
        trained = [p for p in learner.parameters() if p.requires_grad]
        weights = sum(map(stored_bytes, learner.parameters()))
        averaged = sum(4 * p.numel() for p in trained) if ema.enabled else 0
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=train.autocast):
            learner.text_encoder(captions)  # it learns its words on the CPU

        def micro_batch() -> int:
            start = meter.live
            raw, draws = torch.empty(latents, dtype=torch.float16), Draws.of(0, 0, latents[0])
            with torch.autocast("cpu", torch.bfloat16, enabled=train.autocast):
                losses, _ = learner(raw, captions, draws, keep)
            loss = losses.mean() / train.grad_accum_steps
            del losses, draws, raw
            kept = meter.live - start
            loss.backward()
            return kept

        if compiled:
            # graphs of an earlier plan would count towards the limit of one function
            torch._dynamo.reset()
            learner.compile_model("aot_eager_decomp_partition")
            micro_batch()
            learner.zero_grad(set_to_none=True)
        gc.collect()
        before = meter.peak = meter.live
        gradients = sum(p.nbytes for p in trained)
        activations = max(micro_batch() for _ in range(min(2, train.grad_accum_steps)))
        host_activations, parked = meter.host, page_locked.PageLocked(pinned=True)
        for size in parked_moments(trained) if train.offload_optimizer else ():
            parked.take(size)
    state, visiting = optimizer_bytes(learner, train)
    signs = (
        sum(p.numel() for p in trained)
        if any(is_adapter(name) for name, _ in learner.named_parameters())
        else 0
    )
    moved, slots, host = 0, 0, meter.host
    if train.offload_blocks:
        moved, slots, locked = slot_bytes(learner.model.blocks[: train.offload_blocks])
        host += locked
    narrow = [p.numel() for p in trained if p.dtype != torch.float32]
    changed = (
        4 * max(narrow, default=0) if ema.enabled else 0
    )  # the average takes one weight at a time in float32
    step = gradients + max(visiting, changed, 10 * signs)
    state += signs // 8  # of the last gradients
    constant = weights - moved + slots + state + averaged
    replayed = train.replays and suits(learner.model)
    replayed = replayed and operations(learner.model, latents, learner.text_tokens, keep) <= SMALL
    if (
        train.replays
        and not narrow
        and not visiting
        and sum(p.numel() for p in trained) <= MOST_WEIGHTS
    ):
        # The graph of the update keeps gradients, too; while it is captured, everything that it
        # changes exists three times.
        constant += gradients
        step = max(step, gradients + 2 * (sum(p.nbytes for p in trained) + state))
    backward = meter.peak - before
    if replayed:
        # Before a graph is accepted, it is compared with two calls of the network, whose gradients
        # exist while a third call is captured.
        backward += 2 * gradients
        step += gradients
    peak = constant + max(backward, step) + MATRIX_LIBRARY
    return MemoryPlan(
        weights - moved + slots,
        gradients,
        state,
        averaged,
        activations,
        peak - constant - gradients - activations,
        host,
        host_activations,
    )


def random_denoiser(
    sizes: WanConfig, settings: WanModelConfig, device: torch.device | str = "cpu"
) -> WanDenoiser:
    """Return a Wan transformer with random weights, in the form in which `settings` would load
    one."""
    with torch.device(device):
        model = WanDenoiser(sizes)
    dtype = torch.float32 if settings.dtype == "float32" else torch.bfloat16
    for name, weight in model.named_parameters():
        if name.endswith(("modulation", "emb_pos")):
            nn.init.normal_(weight, std=0.02)
        weight.data = weight.data.to(WanDenoiser.stored_dtype(name, dtype))
    return prepare(model, settings)
