"""Distribute a learner over several processes: as copies (DDP), or in shards (FSDP2) when it does
not fit."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmdit.config import ConfigError, Section, least
from mmdit.interfaces import Denoiser, LatentSpec, TextTokens
from mmdit.interop.weights_in_files import unpack_weights
from mmdit.nn.experts import Experts
from mmdit.nn.stored_weights import take_apart
from mmdit.training.distributed import World
from mmdit.training.learner import Learner
from mmdit.training.memory.lean import to_bfloat16

# MB of gradients that are reduced at a time while the backward pass goes on. A reduction occupies
# GPU processors that the matrix products beside it expect to have, and each reduction has the same
# cost: so few large ones are better where they are fast (NVLink).
FEW_LARGE, MANY_SMALL = 400, 25
FAST = 60.0  # GB/s; an all-reduce over NVLink reaches 200, over PCIe 5 … 25


@dataclass(frozen=True)
class ParallelConfig(Section):
    """The section `parallel:`. Each type reads the checkpoints of the other."""

    # `ddp`: every process holds everything. `fsdp`: weights, gradients, averages and moments are
    # sharded over the processes, and a block is gathered while it computes.
    type: Literal["ddp", "fsdp"] = "ddp"
    # Under fsdp, the number of neighbouring processes, those of a machine, over which weights are
    # sharded; between such groups only gradients travel. 0: all processes are one group.
    shard_over: int = 0
    # The type in which gradients travel and are summed. bfloat16 halves the traffic, and rounds
    # each process's gradient and their mean to 8 bits.
    reduce: Literal["float32", "bfloat16"] = "float32"
    # The number of neighbouring processes that share each clip, for clips that do not fit on one:
    # each computes a part. A step then sees `batch_size` x `grad_accum_steps` x processes / this.
    context_parallel: int = 1

    def __post_init__(self):
        least(self, 0, "shard_over")
        least(self, 1, "context_parallel")

    def check(self, run: Any) -> None:
        """Refuse to shard what must be whole, and to share clips that are too short."""
        self._check_clips(run)
        if self.type != "fsdp":
            if self.shard_over:
                raise ConfigError(
                    "parallel.shard_over",
                    f"is {self.shard_over} with parallel.type {self.type}, which cuts nothing; use"
                    " fsdp, or leave it out",
                )
            return
        train = run.train
        refused = {
            "experts.enabled": (
                run.experts.enabled and not run.model.released,
                "these experts share a base, which cannot be cut for two networks",
            ),
            "train.offload_blocks": (
                train.offload_blocks,
                "a block is gathered from the other processes, not from the memory of the CPU; set"
                " it to 0",
            ),
            "train.offload_optimizer": (
                train.offload_optimizer,
                "moments are cut over the processes already; set it to false",
            ),
        }
        for key, (value, reason) in refused.items():
            if value:
                shown = str(value).lower() if isinstance(value, bool) else value
                raise ConfigError(key, f"is {shown} with parallel.type fsdp: {reason}, or use ddp")

    def _check_clips(self, run: Any) -> None:
        if self.context_parallel == 1:
            return
        frames = run.video.num_frames
        latent_frames = LatentSpec(1, temporal=run.tokenizer.temporal).frames(frames)
        if latent_frames < self.context_parallel:
            raise ConfigError(
                "parallel.context_parallel",
                f"is {self.context_parallel}, but clips have {latent_frames} latent frames"
                f" (video.num_frames {frames}), of which each process needs one; lower it, or train"
                " on longer clips",
            )


def shard(
    learner: Learner,
    world: World,
    config: ParallelConfig = ParallelConfig(),
    pure_bf16: bool = False,
    further: Iterable[Denoiser] = (),
) -> None:
    """Shard the denoiser, a trained text encoder and `further` networks over all processes, block
    by block, onto `world.device`; in place. Of weights that are still in files, a process reads a
    block at a time and keeps its part; with `pure_bf16` each block is cast before. A frozen text
    encoder stays whole: it encodes only captions that are new to its process, so processes call it
    a different number of times, and a process that gathers a shard alone would wait for the others
    for ever."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    with contextlib.suppress(ValueError):  # known from an earlier run in this process
        torch.export.register_dataclass(TextTokens)  # FSDP looks inside for what needs a gradient
    warnings.filterwarnings(
        "ignore", "FSDP2-wrapped module", UserWarning
    )  # of in-place changes of outputs: there are none
    group = config.shard_over or world.size
    if world.size % group:
        raise ConfigError(
            "parallel.shard_over",
            f"is {group}, but {world.size} processes do not split into groups of that many",
        )
    sizes = {"copies": world.size // group, "shards": group}
    if group == world.size:
        del sizes["copies"]
    mesh = init_device_mesh(world.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    policy = MixedPrecisionPolicy(reduce_dtype=getattr(torch, config.reduce))
    if isinstance(learner.model, Experts):
        learner.model.together = True
    trained = any(parameter.requires_grad for parameter in learner.text_encoder.parameters())
    networks: list[Any] = [learner.model, *further]
    for part in [learner.text_encoder, *networks] if trained else networks:
        encoding = part.encoding if isinstance(part, Denoiser) else None
        blocks = list(part.blocks) if encoding else []
        within: list[nn.Module] = []
        for module in part.modules():
            if isinstance(module, nn.ModuleList) and not any(
                module in outer.modules() for outer in within
            ):
                within.extend(module)
        for module in (
            *within,
            part,
        ):  # gathered again for the backward pass; kept, a part would miss what changes its weights
            if encoding and module in blocks:
                take_apart(module, encoding)
            unpack_weights(module)
            if pure_bf16:
                to_bfloat16(module)
            fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)


def wrap(learner: Learner, world: World, config: ParallelConfig = ParallelConfig()) -> nn.Module:
    """Return the module to call in training, with which gradients become means over all
    processes."""
    if world.size == 1 or learner.sharded:
        return learner
    ids = [world.device.index] if world.device.type == "cuda" else None
    # It would split compiled blocks where a bucket of gradients is full.
    torch._dynamo.config.optimize_ddp = False
    if learner.replays:
        learner.replays.direct = False  # gradients are exchanged as autograd brings them
    copied = DistributedDataParallel(
        learner,
        device_ids=ids,
        gradient_as_bucket_view=True,
        # An expert that does not train has no gradients to wait for.
        find_unused_parameters=learner.experts is not None,
        bucket_cap_mb=FEW_LARGE if exchange_rate(world) > FAST else MANY_SMALL,
    )
    if (
        config.reduce == "bfloat16"
    ):  # a hook of each bucket: gradients travel while the backward pass goes on, as without it
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        copied.register_comm_hook(None, bf16_compress_hook)
    return copied


def exchange_rate(world: World) -> float:
    """Measure the rate, in GB/s, at which 64 MB of each process are summed over all, in the best
    try of the slowest process; return 0 for processes on CPUs."""
    if world.device.type != "cuda":
        return 0.0
    probe = torch.zeros(2**24, device=world.device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
    events[0].record()
    for event in events[1:]:  # the first ones make the connections
        dist.all_reduce(probe)
        event.record()
    torch.cuda.synchronize()
    slowest = torch.tensor(
        min(begin.elapsed_time(end) for begin, end in pairwise(events)), device=world.device
    )
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)  # all must choose alike
    return probe.nbytes / 1e6 / slowest.item()


def accumulating(wrapped: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Return the context for one of several micro-batches. Copies reduce gradients in the `last`
    alone; shards in each one, because otherwise every process would hold the gradients of all."""
    if last or not isinstance(wrapped, DistributedDataParallel):
        return contextlib.nullcontext()
    return wrapped.no_sync()
