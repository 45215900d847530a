"""Low-rank adapters (Hu et al. 2021, "LoRA", eq. 3): `y = W x + b + (alpha / rank) B A x`; `A (rank, in)`, `B (out, rank)`.

An adapted layer is still a `Linear` under its old name: the base parameters keep their keys (`blocks.0.q.weight`) and two are
added beside them (`blocks.0.q.lora_A`, `blocks.0.q.lora_B`). So a base checkpoint loads strictly before or after `inject`, and
`base_state` of an injected model loads strictly into a plain one.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit import rng
from mmdit.config import ConfigError

PARTS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class LoRAConfig:
    """The `lora:` section. A target is the end of a module's dotted name, whole words (`q`, `cross.k`), or a pattern with
    `*`, `?` or `[ ]` for the full dotted name (`blocks.*.cross.[kv]`; `*` also spans dots)."""

    enabled: bool = False
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    train_lora_only: bool = True
    target_modules: tuple[str, ...] = ("q", "k", "v", "proj")

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError("rank", f"is {self.rank}; must be at least 1; 8 to 64 is usual")
        if not 0 < self.alpha < math.inf:
            raise ConfigError("alpha", f"is {self.alpha}; must be positive and finite; the update is scaled by alpha/rank")
        if not 0 <= self.dropout < 1:
            raise ConfigError("dropout", f"is {self.dropout}; must be in [0, 1)")
        if not self.target_modules or not all(pattern.strip() for pattern in self.target_modules):
            raise ConfigError("target_modules", f"is {list(self.target_modules)}; must name linear layers, like [q, k]")


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank update. Shares the base layer's parameters; nothing changes in Python per call, so it is
    safe under DDP and torch.compile. The adapter is float32 whatever the base is, and computes in the input's precision."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float, generator: torch.Generator | None = None):
        nn.Module.__init__(self)  # Linear's own would allocate a second weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.alpha = alpha
        self.dropout = dropout
        bound = 1 / math.sqrt(base.in_features)  # Kaiming-uniform with a = √5, as in the authors' code
        down = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(down.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        self.train(base.training)

    @property
    def rank(self) -> int:
        return len(self.lora_A)

    @property
    def scale(self) -> float:
        """The one place where the strength is decided: forward, merge and export use it."""
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """`x (…, in)` to `(…, out)`. B A is never formed: two thin products cost rank·(in + out) a token."""
        base = F.linear(x, self.weight, self.bias)
        h = F.dropout(x, self.dropout, self.training)
        h = F.linear(h, self.lora_A.to(x.dtype)) * self.scale
        return base + F.linear(h, self.lora_B.to(h.dtype)).to(base.dtype)

    def plain(self) -> nn.Linear:
        """The base layer: the same parameters, no adapter."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def merged(self) -> nn.Linear:
        """A plain layer with the update added, at least in float32, to a copy of the weight (it may be tied to another's)."""
        precise = torch.promote_types(self.weight.dtype, torch.float32)
        update = self.scale * (self.lora_B.detach().to(precise) @ self.lora_A.detach().to(precise))
        weight = self.weight.detach().to(precise) + update
        linear = self.plain()
        linear.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=self.weight.requires_grad)
        return linear

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *rest):
        """A checkpoint of the base alone is complete: its absent adapter is not missing. Half an adapter is."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        keys = {prefix + part for part in PARTS}
        if not keys & state_dict.keys():
            missing_keys[:] = [key for key in missing_keys if key not in keys]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}"


# ── choosing and injecting ───────────────────────────────────────────────────────────────────────────────────────────
def select(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Names of the `nn.Linear` layers that `patterns` choose, in model order. A pattern that chooses none is a ValueError
    that says what it did match and which names are near."""
    modules = dict(model.named_modules(remove_duplicate=False))
    linears = [name for name, module in modules.items() if type(module) is nn.Linear]  # a subclass may not call forward
    chosen: set[str] = set()
    for pattern in patterns:
        matched = [name for name in linears if _matches(name, pattern)]
        if not matched:
            raise ValueError(f"lora.target_modules: {pattern!r} matches no linear layer{_hint(pattern, modules, linears)}")
        chosen.update(matched)
    return [name for name in linears if name in chosen]


def _matches(name: str, pattern: str) -> bool:
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def _hint(pattern: str, modules: dict[str, nn.Module], linears: list[str]) -> str:
    others = [name for name in modules if name and _matches(name, pattern)]
    if any(isinstance(modules[name], LoRALinear) for name in others):
        return f"; {others[0]!r} has an adapter already: merge it first"
    inside = sorted({name.rpartition(".")[2] for other in others for name in linears if name.startswith(other + ".")})
    if inside:
        return f"; {others[0]!r} is a {type(modules[others[0]]).__name__} that holds {', '.join(inside)}: name those"
    if others:
        return f"; {others[0]!r} is a {type(modules[others[0]]).__name__}"
    return near(pattern, linears) + f"; linear layers here: {summary(linears)}"


def near(word: str, names: list[str]) -> str:
    """` (near names: …)`, from the names and their last parts, or nothing."""
    ends = {".".join(name.split(".")[-count:]) for name in names for count in (1, 2, 3)}
    close = difflib.get_close_matches(word, sorted(ends | set(names)), n=3, cutoff=0.5)
    return f" (near names: {', '.join(close)})" if close else ""


def summary(names: list[str]) -> str:
    """`blocks.*.q ×12, head ×1`, for messages."""
    counts = Counter(map(_kind, names))
    shown = [f"{kind} ×{count}" for kind, count in list(counts.items())[:20]]
    return ", ".join(shown + ["…"] * (len(counts) > 20)) or "none"


def _kind(name: str) -> str:
    """`blocks.3.cross.k` → `blocks.*.cross.k`."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def inject(model: nn.Module, config: LoRAConfig, seed: int = 0) -> list[str]:
    """Adapts the chosen layers of `model` in place and returns their names; nothing when not `enabled`.

    Each A is a function of (seed, layer name): every rank, order of injection and device gives the same. The model's output is
    unchanged, bit for bit, as B starts at zero. With `train_lora_only` every other parameter of `model` is frozen.
    """
    if not config.enabled:
        return []
    names = select(model, config.target_modules)
    insert(model, {name: (config.rank, config.alpha) for name in names}, config.dropout, seed)
    if config.train_lora_only:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(PARTS))
    return names


def insert(model: nn.Module, shapes: dict[str, tuple[int, float]], dropout: float, seed: int) -> None:
    """Adapts the named layers with their (rank, alpha); `inject` chooses them by pattern instead."""
    adapted = {}
    for name, (rank, alpha) in shapes.items():
        base = model.get_submodule(name)
        if base not in adapted:  # one layer may have several names
            adapted[base] = LoRALinear(base, rank, alpha, dropout, rng.generator(seed, "lora", name))
    _replace(model, adapted)


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children would skip a layer's second name
            if child in replacements:
                setattr(parent, name, replacements[child])


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge(model: nn.Module) -> nn.Module:
    """Folds every adapter into its weight, in place: plain linear layers again, the same outputs to rounding."""
    _replace(model, {module: module.merged() for module in adapters(model).values()})
    return model


def remove(model: nn.Module) -> nn.Module:
    """Drops every adapter, in place: the base as it was."""
    _replace(model, {module: module.plain() for module in adapters(model).values()})
    return model


def count(model: nn.Module) -> int:
    """Number of adapter parameters."""
    return sum(module.lora_A.numel() + module.lora_B.numel() for module in adapters(model).values())


def coverage(model: nn.Module) -> str:
    """A table to print before training: which kinds of layer are adapted, how many, how large."""
    rows: dict[str, list[int]] = {}
    shapes = {}
    for name, module in adapters(model).items():
        row = rows.setdefault(_kind(name), [0, 0, 0])
        for column, value in enumerate((1, module.weight.numel(), module.lora_A.numel() + module.lora_B.numel())):
            row[column] += value
        shapes[_kind(name)] = f"{module.in_features}→{module.out_features} rank {module.rank}"
    rows["total"] = [sum(row[column] for row in rows.values()) for column in range(3)]
    width, shape_width = max(map(len, rows)), max(map(len, shapes.values()), default=0)
    lines = [f"{'layer':{width}}  {'shape':{shape_width}}  {'count':>5}  {'weights':>13}  {'adapter':>11}"]
    for kind, (number, base, added) in rows.items():
        lines.append(f"{kind:{width}}  {shapes.get(kind, ''):{shape_width}}  {number:>5}  {base:>13,}  {added:>11,}")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in model.parameters())
    return "\n".join([*lines, f"trainable: {trained:,} of {whole:,} parameters ({trained / max(whole, 1):.2%})"])
