"""AdamW and Muon with weight decay on matrices only, and a learning rate that is a pure function of
the step."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmdit.config import ConfigError
from mmdit.interfaces import Network
from mmdit.training.memory.lean import Parking, SplitAdamW, in_chunks
from mmdit.training.memory.shards import is_sharded, local, place
from mmdit.training.muon import GatheredMuon, StackedMuon

# adamw8bit can no longer be trained with, but old runs, which can still be sampled, name it.
OptimizerName = Literal["adamw", "muon", "adamw8bit"]


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up, then constant or a half cosine down to `lr * final` at `max_steps`."""

    lr: float
    warmup_steps: int
    schedule: Literal["constant", "cosine"]
    final: float
    max_steps: int

    def at(self, step: int) -> float:
        """Return the rate of the update that completes step `step` (counted from 1)."""
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        done = min(1.0, (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps))
        return self.lr * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done)))


class Optimizer:
    """AdamW for all parameters, or Muon for the matrices and AdamW for the rest, used as one
    optimizer.

    `found_inf` (1 or 0, on the device) leaves parameters and moments unchanged in a step; `scale`
    multiplies its gradients. With `offload`, the moments are kept in the memory of the CPU.
    """

    def __init__(self, *parts: torch.optim.Optimizer, offload: bool = False):
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]
        self.part_of = {
            parameter: part
            for part in parts
            for group in part.param_groups
            for parameter in group["params"]
        }
        self.parking = Parking(next(iter(self.part_of)).is_cuda) if offload else None
        self.found_inf: Tensor | None = None
        self.scale: Tensor | None = None

    @property
    def state(self) -> dict[Any, dict[str, Tensor]]:
        if self.parking and torch.cuda.is_available():
            torch.cuda.synchronize()  # moments may still be on their way to the CPU
        return {parameter: state for part in self.parts for parameter, state in part.state.items()}

    def set_lr(self, lr: float) -> None:
        """Set the learning rates, rounded to float32, so that a rate held on the device is the
        same."""
        for group in self.param_groups:
            rate = struct.unpack("f", struct.pack("f", lr * group["lr_scale"]))[0]
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate

    def hold_rates(self) -> None:
        """Hold the learning rates on the device of the weights, where graphs can read them."""
        for group in self.param_groups:
            group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)

    def step(self) -> None:
        for part in self.parts:
            if isinstance(part, (torch.optim.AdamW, StackedMuon)):
                # These look at found_inf and divide by grad_scale on the device, in their single
                # pass.
                guarded: Any = part
                guarded.found_inf = self.found_inf
                guarded.grad_scale = None if self.scale is None else 1 / self.scale
            elif self.found_inf is not None and self.found_inf.item():
                continue
            elif self.scale is not None:
                gradients = [local(gradient) for gradient in _gradients(part.param_groups)]
                torch._foreach_mul_(gradients, self.scale)
            if self.parking:
                self.parking.fetch(part)
            part.step()
            if self.parking:
                self.parking.put_back(part)

    def zero_grad(self) -> None:
        for parameter in self.part_of:
            parameter.grad = None

    @torch.no_grad()
    def rescale(self, parameter: nn.Parameter, ratio: float) -> None:
        """Adapt the state of a parameter that was multiplied by `ratio`: gradients, and so first
        moments, are multiplied by the inverse, second moments by its square, and the rounding
        remainder (`rest`) by `ratio` itself."""
        factors = {
            "exp_avg": ratio**-1,
            "momentum_buffer": ratio**-1,
            "exp_avg_sq": ratio**-2,
            "rest": ratio,
        }
        for name, value in self.state.get(parameter, {}).items():
            if name in factors:
                value.mul_(factors[name])

    def restore(self, parameter: nn.Parameter, stored: dict[str, Tensor]) -> None:
        """Take over the state of a parameter, by the names of `optimizer_tensors`. ValueError if it
        belongs to another optimizer, precision or shape."""
        part = self.part_of[parameter]
        shapes = _state_shapes(part, parameter)
        if stored.keys() != shapes.keys():
            raise ValueError(
                f"holds {', '.join(sorted(stored))}, where this optimizer keeps"
                f" {', '.join(sorted(shapes))}"
            )
        state = {}
        for name, value in stored.items():
            is_step = name == "step"
            if value.shape != shapes[name] and not (is_step and value.numel() == 1):
                raise ValueError(
                    f"holds {name} of the shape {tuple(value.shape)}, where it is"
                    f" {tuple(shapes[name])}"
                )
            if is_step:  # fused AdamW counts on the device
                device = parameter.device if isinstance(part, torch.optim.AdamW) else "cpu"
                state[name] = value.reshape(()).float().to(device)
            else:
                state[name] = place(value, parameter)
        part.state[parameter] = state
        if self.parking:
            self.parking.put_back(part)


def _gradients(groups: list[dict]) -> list[Tensor]:
    parameters = (parameter for group in groups for parameter in group["params"])
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _state_shapes(part: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Size]:
    """Return the shapes of the state that an optimizer has for a parameter after a step."""
    if isinstance(part, torch.optim.Muon):
        return {"momentum_buffer": parameter.shape}
    names = ["exp_avg", "exp_avg_sq"]
    if isinstance(part, SplitAdamW):
        names.append("rest")
    return dict.fromkeys(names, parameter.shape) | {"step": torch.Size([])}


def build_optimizer(
    module: nn.Module,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    name: OptimizerName = "adamw",
    offload: bool = False,
) -> Optimizer:
    """Build the optimizer of the trainable parameters of `module`.

    Vectors (biases, norm gains) and the parameters in `undecayed()` of a submodule get no weight
    decay: they are offsets, and shrinking them does not regularise. Muon (Jordan et al. 2024) gets
    the parameters in `matrices()`. Its updates are as large as AdamW's (Liu et al. 2025,
    2502.16982, eq. 4), so that one learning rate suits both. The rate of a group is the run's times
    the `lr_scale` of its submodule. Weights in bfloat16 get `SplitAdamW`. ConfigError if there is
    nothing to train, or nothing for Muon.
    """
    if name == "adamw8bit":
        raise ConfigError(
            "train.optimizer",
            "is adamw8bit, which is no longer there (it was never measured); use adamw, with"
            " train.precision: pure_bf16 or train.offload_optimizer: true where memory is short",
        )
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise ConfigError(
            "train", "no parameter is trainable (everything frozen, no adapter enabled?)"
        )
    networks = {
        prefix: part for prefix, part in module.named_children() if isinstance(part, Network)
    }
    undecayed = {name for name, p in trainable.items() if p.ndim < 2}
    for prefix, network in networks.items():
        undecayed |= {f"{prefix}.{name}" for name in network.undecayed()}
    matrices: set[str] = set()
    if name == "muon":
        for prefix, network in networks.items():
            matrices |= {f"{prefix}.{name}" for name in network.matrices()}
        matrices &= trainable.keys()
        if not matrices:
            raise ConfigError(
                "train.optimizer",
                "is muon, but no matrix of the denoiser is trained; use adamw",
            )
    scales = {prefix: network.lr_scale for prefix, network in networks.items()}
    muon_groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    adamw_groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter_name, parameter in trainable.items():
        decay = 0.0 if parameter_name in undecayed else weight_decay
        scale = scales.get(parameter_name.partition(".")[0], 1.0)
        groups = muon_groups if parameter_name in matrices else adamw_groups
        groups.setdefault((decay, scale), []).append(parameter)

    parts: list[torch.optim.Optimizer] = []
    if muon_groups:
        cut = any(is_sharded(p) for group in muon_groups.values() for p in group)
        muon = GatheredMuon if cut else StackedMuon
        parts.append(muon(_settings(muon_groups, lr)))
    if adamw_groups:
        rest = _settings(adamw_groups, lr)
        parts += [_adamw(part, betas) for part in (in_chunks(rest) if offload else [rest])]
    return Optimizer(*parts, offload=offload)


def _settings(groups: dict[tuple[float, float], list[nn.Parameter]], lr: float) -> list[dict]:
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale, "lr": lr * scale}
        for (decay, scale), parameters in groups.items()
    ]


def _adamw(groups: list[dict], betas: tuple[float, float]) -> torch.optim.Optimizer:
    if any(p.dtype == torch.bfloat16 for group in groups for p in group["params"]):
        return SplitAdamW(groups, betas)
    return torch.optim.AdamW(groups, betas=betas, eps=1e-8, fused=True)


def clip_and_guard(optimizer: Optimizer, max_norm: float) -> tuple[Tensor, Tensor]:
    """Make the next step clip the global gradient norm (0 = no clipping); return `(norm, skipped)`
    on the device, without waiting for it.

    If the norm is not finite, the optimizer leaves parameters and moments unchanged in this step
    (`found_inf`, the mechanism of gradient scaling), so that a bad batch costs one step and nothing
    else.
    """
    gradients = _gradients(optimizer.param_groups)
    norm = torch.nn.utils.get_total_norm([local(gradient) for gradient in gradients])
    first = next(iter(gradients), None)
    if first is not None and is_sharded(first):
        # All gradients are sharded then. Their elements are distributed over the last dimension of
        # the mesh; the other one, if any, holds copies.
        square, mesh = norm.square(), first.device_mesh
        torch.distributed.all_reduce(square, group=mesh.get_group(mesh.ndim - 1))
        norm = square.sqrt()
    skipped = (~torch.isfinite(norm)).float()
    optimizer.scale = None
    if max_norm > 0:
        optimizer.scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0).reshape(())
    optimizer.found_inf = skipped.reshape(())
    return norm, skipped


def optimizer_tensors(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors named `<parameter name>::<state name>`."""
    names = {id(p): name for name, p in module.named_parameters()}
    return {
        f"{names[id(p)]}::{part}": value
        for p, state in optimizer.state.items()
        for part, value in state.items()
    }


def load_optimizer_tensors(
    module: nn.Module,
    optimizer: Optimizer,
    tensors: Mapping[str, Tensor],
    groups: tuple[str, ...] = (),
) -> None:
    """Take over what `optimizer_tensors` returned. Every stored name must belong to a trainable
    parameter, and every trainable parameter must have a stored state. The exceptions are groups of
    parameters, given by the prefixes `groups` of their names, of which nothing is stored: experts
    that have not been trained yet.
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    stored: dict[str, list[str]] = {}
    for key in tensors:
        name, _, part = key.rpartition("::")
        stored.setdefault(name, []).append(part)
    begun = {prefix for prefix in groups for name in stored if name.startswith(prefix)}
    new = tuple(set(groups) - begun)
    odd = sorted(name for name in stored.keys() ^ parameters.keys() if not name.startswith(new))
    if stored and odd:
        raise ValueError(
            f"the checkpoint's optimizer state and the trainable parameters differ in {len(odd)}"
            f" names, first {odd[0]!r}: resume with the config that wrote it, or start a new run"
            " with train.init_from"
        )
    for name, parts in stored.items():  # one parameter at a time, since they may be many gigabytes
        state = {part: tensors[f"{name}::{part}"] for part in parts}
        try:
            optimizer.restore(parameters[name], state)
        except ValueError as error:
            raise ValueError(
                f"the checkpoint's optimizer state of {name!r} {error}: resume with the"
                " train.optimizer and train.precision that wrote it, or start a new run with"
                " train.init_from"
            ) from None
