"""AdamW and Muon with decay on matrices only, and a learning rate that is a pure function of the
step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmdit.config import ConfigError
from mmdit.training.memory.lean import (
    Parking,
    SplitAdamW,
    adamw_8bit,
    fresh_8bit,
    in_chunks,
    inner_tensors,
)
from mmdit.training.memory.shards import local, place

OptimizerKind = Literal["adamw", "muon", "adamw8bit"]


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up, then constant or a half cosine down to `lr * final` at `max_steps`."""

    lr: float
    warmup_steps: int
    schedule: Literal["constant", "cosine"]
    final: float
    max_steps: int

    def at(self, step: int) -> float:
        """The rate for the update that makes step `step` (counted from 1)."""
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        done = min(1.0, (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps))
        return self.lr * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done)))


class Optimizer:
    """AdamW for all parameters, or Muon for the matrices and AdamW for the rest, stepped as one.
    `found_inf` (1 or 0, on the device) leaves parameters and moments alone for a step, `scale`
    multiplies its gradients. `offload`: the parts' moments wait in the memory of the CPU."""

    def __init__(self, *parts: torch.optim.Optimizer, offload: bool = False):
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]
        self.parking = Parking() if offload else None
        self.found_inf: Tensor | None = None
        self.scale: Tensor | None = None

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        if self.parking and torch.cuda.is_available():
            torch.cuda.synchronize()  # moments may still be on their way
        return {parameter: state for part in self.parts for parameter, state in part.state.items()}

    def restore(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """`state`: tensors by the names of `optimizer_tensors`. ValueError: they are of another
        optimizer, precision or shape."""
        groups = ((part, group["params"]) for part in self.parts for group in part.param_groups)
        part = next(part for part, own in groups if any(parameter is p for p in own))
        shapes = _kept(part, parameter)
        if state.keys() != shapes.keys():
            raise ValueError(
                f"holds {', '.join(sorted(state))}, where this optimizer keeps"
                f" {', '.join(sorted(shapes))}"
            )
        own = fresh_8bit(part, parameter) if any("." in name for name in state) else {}
        for name, value in state.items():
            if value.numel() != shapes[name].numel() or (
                name != "step" and value.shape != shapes[name]
            ):
                raise ValueError(
                    f"holds {name} of the shape {tuple(value.shape)}, where it is"
                    f" {tuple(shapes[name])}"
                )
            outer, _, inner = name.partition(".")
            if inner:
                getattr(own[outer], inner).copy_(value)
            elif name == "step":  # fused AdamW counts on the device
                own[name] = (
                    value.reshape(())
                    .float()
                    .to(parameter.device if isinstance(part, torch.optim.AdamW) else "cpu")
                )
            else:
                own[name] = place(value, parameter)
        part.state[parameter] = own
        if self.parking:
            self.parking.put_back(part)

    def set_lr(self, lr: float) -> None:
        for group in self.param_groups:
            rate = lr * group["lr_scale"]
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate

    def step(self) -> None:
        for part in self.parts:
            if isinstance(
                part, torch.optim.AdamW
            ):  # fused: it looks and divides on the device, in its one pass
                part.found_inf, part.grad_scale = (
                    self.found_inf,
                    None if self.scale is None else 1 / self.scale,
                )
            elif self.found_inf is not None and self.found_inf.item():
                continue
            elif self.scale is not None:
                own = [
                    p.grad
                    for group in part.param_groups
                    for p in group["params"]
                    if p.grad is not None
                ]
                torch._foreach_mul_([local(gradient) for gradient in own], self.scale)
            if self.parking:
                self.parking.fetch(part)
            part.step()
            if self.parking:
                self.parking.put_back(part)

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)


def _kept(part: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Size]:
    """Return the shapes of what an optimizer keeps of a parameter that it has stepped, by the names
    of `optimizer_tensors`."""
    if isinstance(part, torch.optim.Muon):
        return {"momentum_buffer": parameter.shape}
    if isinstance(part, torch.optim.AdamW | SplitAdamW):
        names = (
            ("exp_avg", "exp_avg_sq", "rest")
            if isinstance(part, SplitAdamW)
            else ("exp_avg", "exp_avg_sq")
        )
        kept = dict.fromkeys(names, parameter.shape)
    else:
        fresh = fresh_8bit(part, parameter)
        kept = {
            name: tensor.shape
            for key, value in fresh.items()
            for name, tensor in inner_tensors(key, value).items()
        }
    return kept | {"step": torch.Size([])}


def build_optimizer(
    module: nn.Module,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    kind: OptimizerKind = "adamw",
    offload: bool = False,
) -> Optimizer:
    """Over the trainable parameters; `training.lean` has what weights in bfloat16, 8-bit moments
    and `offload` are. Vectors (biases, norm gains) and what a submodule's `undecayed()` names are
    not decayed: they are offsets, and shrinking them is no regularisation. Muon (Jordan et al.
    2024) gets what `matrices()` names, its updates as large as AdamW's (Liu et al. 2025,
    2502.16982, eq. 4), so that one learning rate serves both. ConfigError if it gets none. A
    group's rate is the run's times its `lr_scale`, which a submodule may have as an attribute (else
    1).
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise ConfigError(
            "train", "no parameter is trainable (everything frozen, no adapter enabled?)"
        )

    def named(method: str) -> set[str]:
        return {
            f"{prefix}.{name}"
            for prefix, part in module.named_children()
            for name in getattr(part, method, set)()
        }

    plain = {name for name, p in trainable.items() if p.ndim < 2} | named("undecayed")
    matrices = named("matrices") & trainable.keys() if kind == "muon" else set()
    if kind == "muon" and not matrices:
        raise ConfigError(
            "train.optimizer",
            "is muon, but no matrix of the denoiser is trained (lora.train_lora_only); use adamw",
        )
    scales = {prefix: getattr(part, "lr_scale", 1.0) for prefix, part in module.named_children()}
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, p in trainable.items():
        kind_of = (
            name in matrices,
            0.0 if name in plain else weight_decay,
            scales.get(name.partition(".")[0], 1.0),
        )
        groups.setdefault(kind_of, []).append(p)

    def taken(by_muon: bool) -> list[dict]:
        return [
            {"params": own, "weight_decay": decay, "lr_scale": scale, "lr": lr * scale}
            for (matrix, decay, scale), own in groups.items()
            if matrix == by_muon
        ]

    def adamw(groups: list[dict]) -> torch.optim.Optimizer:
        if kind == "adamw8bit":
            return adamw_8bit(groups, betas)
        if any(p.dtype == torch.bfloat16 for group in groups for p in group["params"]):
            return SplitAdamW(groups, betas)
        return torch.optim.AdamW(groups, betas=betas, eps=1e-8, fused=True)

    muon = [torch.optim.Muon(taken(True), adjust_lr_fn="match_rms_adamw")] if matrices else []
    rest = taken(False)
    parts = (in_chunks(rest) if offload else [rest]) if rest else []
    return Optimizer(*muon, *map(adamw, parts), offload=offload)


def clip_and_guard(optimizer: Optimizer, max_norm: float) -> tuple[Tensor, Tensor]:
    """Have the next step clip the global gradient norm (0 = no clipping); returns `(norm, skipped)`
    on the device, without waiting for it.

    When the norm is not finite the optimizer leaves parameters and moments alone for this step
    (`found_inf`, the mechanism of gradient scaling), so that one bad batch costs one step and
    nothing else.
    """
    own = [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    gradients = [local(gradient) for gradient in own]
    norm = torch.nn.utils.get_total_norm(gradients)
    if any(
        isinstance(gradient, DTensor) for gradient in own
    ):  # all of them are, and each element is in one process
        square = norm.square()
        torch.distributed.all_reduce(square)
        norm = square.sqrt()
    skipped = (~torch.isfinite(norm)).float()
    optimizer.scale = (
        torch.clamp(max_norm / (norm + 1e-6), max=1.0).reshape(()) if max_norm > 0 else None
    )
    optimizer.found_inf = skipped.reshape(())
    return norm, skipped


def optimizer_tensors(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors named `<parameter name>::<state name>`."""
    names = {id(p): name for name, p in module.named_parameters()}
    return {
        f"{names[id(p)]}::{part}": tensor
        for p, state in optimizer.state.items()
        for key, value in state.items()
        for part, tensor in inner_tensors(key, value).items()
    }


def load_optimizer_tensors(
    module: nn.Module,
    optimizer: Optimizer,
    tensors: Mapping[str, Tensor],
    groups: tuple[str, ...] = (),
) -> None:
    """Inverse of `optimizer_tensors`; every stored name must belong to a trainable parameter and
    the other way round, except that all parameters whose names begin with one of `groups` (an
    expert that has not trained yet) may have nothing stored.
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    stored: dict[str, list[str]] = {}
    for key in tensors:
        name, _, part = key.rpartition("::")
        stored.setdefault(name, []).append(part)
    new = tuple(prefix for prefix in groups if not any(name.startswith(prefix) for name in stored))
    odd = sorted(name for name in stored.keys() ^ parameters.keys() if not name.startswith(new))
    if stored and odd:
        raise ValueError(
            f"the checkpoint's optimizer state and the trainable parameters differ in {len(odd)}"
            f" names, first {odd[0]!r}: resume with the config that wrote it, or start a new run"
            " with train.init_from"
        )
    for name, parts in stored.items():
        try:
            optimizer.restore(
                parameters[name], {part: tensors[f"{name}::{part}"] for part in parts}
            )
        except ValueError as error:
            raise ValueError(
                f"the checkpoint's optimizer state of {name!r} {error}: resume with the"
                " train.optimizer and train.precision that wrote it, or start a new run with"
                " train.init_from"
            ) from None
