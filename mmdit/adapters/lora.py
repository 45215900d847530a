"""Choose the layers that get an adapter, and put the adapters there."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from mmdit import rng
from mmdit.adapters.layers import Adapter, DoRALinear, LoKrLinear, LoRALinear, is_adapter
from mmdit.config import ConfigError, Section, least
from mmdit.interfaces import Denoiser
from mmdit.nn.stored_weights import StoredWeight
from mmdit.weights import parameter_count

Make = Callable[[nn.Linear, torch.Generator], Adapter]


@dataclass(frozen=True)
class ModuleRank:
    """An entry of `lora.per_module`."""

    # Which layers, as in `lora.target_modules`.
    modules: tuple[str, ...]
    # Their rank.
    rank: int
    # Their alpha.
    alpha: float

    def __post_init__(self):
        least(self, 1, "rank")
        least(self, 0, "alpha", above=True)


@dataclass(frozen=True)
class LoRAConfig(Section):
    """The section `lora:`. A target is the end of a module's dotted name, whole words (`q`,
    `cross.k`), or a pattern with `*`, `?` or `[ ]` for the full dotted name (`blocks.*.cross.[kv]`;
    `*` also spans dots)."""

    # Whether layers get adapters.
    enabled: bool = False
    # LoRA; DoRA, which also learns the length of each row; or LoKr, a Kronecker product.
    type: Literal["lora", "dora", "lokr"] = "lora"
    # The rank of an update; 8 to 64 is usual.
    rank: int = 16
    # The update is scaled by alpha / rank.
    alpha: float = 16.0
    # Scale by alpha / sqrt(rank) instead.
    rslora: bool = False
    # Dropout on the input of an adapter: the probability with which an element is set to zero.
    dropout: float = 0.0
    # The probability of leaving out a rank of the update (lokr: an output row).
    rank_dropout: float = 0.0
    # Freeze every other weight.
    train_lora_only: bool = True
    # Which linear layers get an adapter; null is the model's usual choice: q, k, v and proj, or
    # Wan's own.
    target_modules: tuple[str, ...] | None = None
    # Which of these layers get none after all.
    exclude_modules: tuple[str, ...] = ()
    # Only layers of these blocks, as numbers and ranges: ["0-9", "20"]; empty is all.
    blocks: tuple[str, ...] = ()
    # Rank and alpha for some of the layers; if several entries name a layer, the first counts.
    per_module: tuple[ModuleRank, ...] = ()
    # lokr: how large the first factor may be along each axis; -1 makes both about equally large.
    factor: int = 8
    # lokr: keep the second factor whole, whatever the rank.
    full_second: bool = False
    # lokr: make the first factor a product of rank `rank`, too, if it is large enough for that.
    decompose_first: bool = False

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError("rank", f"is {self.rank}; must be at least 1; 8 to 64 is usual")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(
                "alpha",
                f"is {self.alpha}; must be positive and finite; the update is scaled by alpha/rank",
            )
        for name in ("dropout", "rank_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(name, f"is {getattr(self, name)}; must be in [0, 1)")
        if self.target_modules is not None and not (
            self.target_modules and all(word.strip() for word in self.target_modules)
        ):
            raise ConfigError(
                "target_modules",
                f"is {list(self.target_modules)}; must name linear layers, like [q, k]",
            )
        if self.rslora and self.type == "lokr":
            raise ConfigError(
                "rslora", "is true with type lokr, whose scale it does not define; use lora or dora"
            )
        of_lokr = {"factor": 8, "full_second": False, "decompose_first": False}
        for name, usual in of_lokr.items():
            if self.type != "lokr" and getattr(self, name) != usual:
                raise ConfigError(
                    name,
                    f"is {getattr(self, name)} with type {self.type}: it is of lokr; set that, or"
                    " leave it out",
                )
        if self.factor == 0 or self.factor < -1:
            raise ConfigError("factor", f"is {self.factor}; must be positive, or -1")
        for word in self.blocks:
            if not re.fullmatch(r"\d+(-\d+)?", word):
                raise ConfigError(
                    "blocks", f"has {word!r}; must be a number or a range such as '0-9'"
                )

    def check(self, run: Any) -> None:
        """Refuse adapters on random frozen weights, and sections that concern adapters if there are
        none."""
        if self.enabled:
            frozen = self.train_lora_only and not run.model.released
            if frozen and not run.train.init_from:
                raise ConfigError(
                    "train.init_from",
                    "is empty but lora.train_lora_only is true: adapters would train on random"
                    " frozen weights; name the run, checkpoint or export to adapt",
                )
            return
        for name, section in {"alpha_schedule": run.alpha_schedule, "experts": run.experts}.items():
            if section.enabled:
                raise ConfigError(
                    f"{name}.enabled",
                    "is true, but lora.enabled is false: it is about adapters; set both or none",
                )

    def entry_of(self, name: str) -> ModuleRank | None:
        """Return the entry of `per_module` that holds for the layer `name`, which is the first that
        names it; None if none does."""
        for entry in self.per_module:
            if any(_matches(name, word) for word in entry.modules):
                return entry
        return None

    def maker(self, name: str) -> Make:
        """Return the function that makes the adapter of the layer `name`."""
        entry = self.entry_of(name)
        rank, alpha = (self.rank, self.alpha) if entry is None else (entry.rank, entry.alpha)
        layer_type: type[Adapter] = LoRALinear
        options: dict[str, Any] = {"rslora": self.rslora}
        if self.type == "dora":
            layer_type = DoRALinear
        elif self.type == "lokr":
            layer_type = LoKrLinear
            names = ("factor", "full_second", "decompose_first")
            options = {name: getattr(self, name) for name in names}
        options |= {"dropout": self.dropout, "rank_dropout": self.rank_dropout}
        return lambda base, generator: layer_type(base, rank, alpha, generator=generator, **options)


# ── choosing and injecting ────────────────────────────────────────────────────────────────────────
def select(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Return the names of the `nn.Linear` layers that `config` chooses, in model order. A word that
    matches no layer raises a ValueError that says what it does match, or which names are near. A
    layer whose name contains one of the model's `lora_only_if_named` is chosen only by targets that
    contain that word, too."""
    modules = dict(model.named_modules(remove_duplicate=False))
    # a subclass may be used without calling its forward
    linears = [name for name, module in modules.items() if type(module) is nn.Linear]
    contract = model if isinstance(model, Denoiser) else Denoiser
    reserved = contract.lora_only_if_named

    def matching(key: str, word: str) -> list[str]:
        names = [name for name in linears if _matches(name, word)]
        if not names:
            raise ValueError(
                f"lora.{key}: {word!r} matches no linear layer{_hint(word, modules, linears)}"
            )
        return names

    chosen: set[str] = set()
    for word in config.target_modules or contract.lora_targets:
        unnamed = [part for part in reserved if part not in word]
        for name in matching("target_modules", word):
            if not any(part in name for part in unnamed):
                chosen.add(name)
    for word in config.exclude_modules:
        chosen -= set(matching("exclude_modules", word))
    for entry in config.per_module:
        for word in entry.modules:
            matching("per_module", word)
    if config.blocks:
        chosen = _within_blocks(chosen, config.blocks, linears)
    if not chosen:
        note = ""
        if reserved:
            note = f"; layers of {', '.join(reserved)} are chosen only by a target that names them"
        raise ValueError(
            "lora: target_modules without exclude_modules, within lora.blocks, leave no"
            f" layer{note}"
        )
    counted = [config.entry_of(name) for name in chosen]
    for i, entry in enumerate(config.per_module):
        if not any(one is entry for one in counted):
            raise ValueError(
                f"lora.per_module[{i}]: {', '.join(entry.modules)} are layers that get no adapter,"
                " or an entry before it counts for them: choose them in lora.target_modules, or"
                " remove it"
            )
    return [name for name in linears if name in chosen]


def _within_blocks(chosen: set[str], words: tuple[str, ...], linears: list[str]) -> set[str]:
    """Return the chosen layers that lie in the blocks that `words` list, as numbers and ranges.
    ValueError if there is no such block."""
    numbers: set[int] = set()
    for word in words:
        first, _, last = word.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    present = sorted({_block(name) for name in linears} - {-1})
    absent = numbers - set(present)
    if absent and not present:
        raise ValueError("lora.blocks: this model has no numbered blocks")
    if absent:
        raise ValueError(
            f"lora.blocks: there is no block {min(absent)}; this model has {present[0]} to"
            f" {present[-1]}"
        )
    return {name for name in chosen if _block(name) in numbers}


def _block(name: str) -> int:
    """Return the number of the block in which a layer lies; -1 outside all blocks."""
    number = re.search(r"(?:^|\.)blocks\.(\d+)\.", name)
    return int(number[1]) if number else -1


def _matches(name: str, pattern: str) -> bool:
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def _hint(pattern: str, modules: dict[str, nn.Module], linears: list[str]) -> str:
    """Return, for a message, what else a word without a layer does match, or which names are near
    it."""
    others = [name for name in modules if name and _matches(name, pattern)]
    if any(isinstance(modules[name], Adapter) for name in others):
        return f"; {others[0]!r} has an adapter already: merge it first"
    if not others:
        return near(pattern, linears) + f"; linear layers here: {summary(linears)}"
    match = f"; {others[0]!r} is a {type(modules[others[0]]).__name__}"
    prefixes = tuple(f"{name}." for name in others)
    inside = {name.rpartition(".")[2] for name in linears if name.startswith(prefixes)}
    if inside:
        return f"{match} that holds {', '.join(sorted(inside))}: name those"
    return match


def near(word: str, names: list[str]) -> str:
    """Return ` (near names: …)` for a message, searched among the names and their last parts; "" if
    none is near."""
    ends = {".".join(name.split(".")[-count:]) for name in names for count in (1, 2, 3)}
    close = difflib.get_close_matches(word, sorted(ends | set(names)), n=3, cutoff=0.5)
    return f" (near names: {', '.join(close)})" if close else ""


def summary(names: list[str]) -> str:
    """Return `blocks.*.q ×12, head ×1`, for messages."""
    counts = Counter(map(kind_of, names))
    words = [f"{name} ×{count}" for name, count in counts.items()]
    if len(words) > 20:
        words[20:] = ["…"]
    return ", ".join(words) or "none"


def kind_of(name: str) -> str:
    """Return a layer's name with `*` for each number: `blocks.*.cross.k` for `blocks.3.cross.k`."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def inject(model: nn.Module, config: LoRAConfig, seed: int = 0) -> list[str]:
    """Adapt the chosen layers of `model` in place and return their names; none if not `enabled`.

    Each adapter is a function of (seed, layer name): it is the same on every rank and device, in
    any order of injection. The model's output is unchanged, bit for bit, as one factor starts at
    zero. With `train_lora_only` every other parameter of `model` is frozen.
    """
    if not config.enabled:
        return []
    names = select(model, config)
    insert(model, {name: config.maker(name) for name in names}, seed)
    if config.train_lora_only:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_adapter(name))
    return names


def insert(model: nn.Module, makers: dict[str, Make], seed: int = 0) -> None:
    """Put adapters into the layers with these names, each made by its function; `inject` chooses
    layers by pattern."""
    adapted = {}
    for name, make in makers.items():
        base = model.get_submodule(name)
        if base not in adapted:  # one layer may have several names
            adapted[base] = make(base, rng.generator(seed, "lora", name))
    _replace(model, adapted)


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        # named_children would skip a layer's second name
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapted layers of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def merge(model: nn.Module, strength: float = 1.0) -> nn.Module:
    """Merge every adapter into its weight, in place: the layers are plain linear ones again, and
    the outputs the same up to rounding. Whole differences stay in the weights for good. `strength`:
    the share of the change that is kept, which for every type is the share of the way from the
    base's weight to the merged one.

    The sum is computed in float32 and rounded once. bfloat16 then loses part of a small update: it
    keeps 99 % where ‖ΔW‖/‖W‖ is 0.5 %, 81 % at 0.2 %, 29 % at 0.05 %, and a warning says so. An
    adapter beside its weight loses as much when bfloat16 outputs are added; stochastic rounding
    would keep the mean, at 1.4 times the error.
    """
    if strength != 1:
        whole = model.__dict__.pop(DIFFERENCES, {})
        for difference in whole.values():
            _put(model, difference.after, difference.before)
        add_differences(model, {name: strength * one.change for name, one in whole.items()})
    wanted, kept, size, replacements = 0.0, 0.0, 0.0, {}
    for module in adapters(model).values():
        exact = module.merged_weight().detach()
        if strength != 1:
            exact = torch.lerp(module.weight.detach().to(exact.dtype), exact, strength)
        linear = replacements[module] = module.merged(exact)
        if linear.weight.dtype.itemsize < 4 and not linear.weight.is_meta:
            rows = slice(None, None, max(1, len(exact) // SAMPLED))
            before = module.weight.detach()[rows].to(module.precise)
            change = exact[rows] - before
            wanted += change.square().sum().item()
            kept += (change * (linear.weight.detach()[rows] - before)).sum().item()
            size += before.square().sum().item()
    if wanted and kept < KEPT * wanted:
        warnings.warn(
            f"the adapters move the weights by {math.sqrt(wanted / size):.2%}, and their type keeps"
            f" {kept / wanted:.0%} of that; merge into float32 (model.dtype=float32) for all of it",
            stacklevel=2,
        )
    _replace(model, replacements)
    model.__dict__.pop(DIFFERENCES, None)
    return model


KEPT = 0.9  # `merge` warns if less than this share of the update is kept
SAMPLED = 256  # about so many rows of each layer are compared for this


def remove(model: nn.Module) -> nn.Module:
    """Remove every adapter and take whole differences off again, in place, which restores the
    base."""
    for difference in model.__dict__.pop(DIFFERENCES, {}).values():
        _put(model, difference.after, difference.before)
    _replace(model, {module: module.plain() for module in adapters(model).values()})
    return model


# ── whole differences ─────────────────────────────────────────────────────────────────────────────
DIFFERENCES = "whole_differences"  # the attribute in which a model remembers them


@dataclass(frozen=True)
class Difference:
    """A change of a whole parameter, kept beside the adapters: distilled models change norms and
    biases in this way."""

    change: torch.Tensor
    before: nn.Parameter
    after: nn.Parameter


@torch.no_grad()
def add_differences(model: nn.Module, changes: dict[str, torch.Tensor]) -> None:
    """Add `changes` to the parameters with these names. The parameters are replaced, not written
    to: another model that shares them (the second expert of a pair) keeps its own, and `remove`
    restores them bit for bit."""
    parameters, added = dict(model.named_parameters()), {}
    for name, change in changes.items():
        before = parameters[name]
        exact = torch.promote_types(before.dtype, torch.float32)
        value = (before.detach().to(exact) + change.to(before.device, exact)).to(before.dtype)
        if isinstance(before, StoredWeight) and before.encoding is not None:
            value = StoredWeight.encoded(value, before.encoding)
        after = nn.Parameter(value, requires_grad=before.requires_grad)
        _put(model, before, after)
        added[name] = Difference(change, before, after)
    if added:
        model.__dict__[DIFFERENCES] = added


def differences(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the changes that `add_differences` added, by parameter name."""
    return {
        name: difference.change for name, difference in model.__dict__.get(DIFFERENCES, {}).items()
    }


def before_differences(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters of `differences` as they were before, by name."""
    return {
        name: difference.before.detach()
        for name, difference in model.__dict__.get(DIFFERENCES, {}).items()
    }


def _put(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is old:
                setattr(module, name, new)


def coverage(model: nn.Module) -> str:
    """Return a table to print before training: the adapted layers by name, their number, and their
    weights with and without the adapters."""
    rows: dict[str, list[int]] = {}
    shapes = {}
    for name, layer in adapters(model).items():
        title = kind_of(name)
        added = sum(parameter.numel() for parameter in layer.adapter_parameters().values())
        before = rows.get(title, [0, 0, 0])
        rows[title] = [before[0] + 1, before[1] + layer.weight.numel(), before[2] + added]
        shapes[title] = f"{layer.in_features}→{layer.out_features} rank {layer.rank}"
    rows["total"] = [sum(column) for column in zip(*rows.values())] or [0, 0, 0]
    width, shape_width = max(map(len, rows)), max(map(len, shapes.values()), default=0)
    lines = [
        f"{'layer':{width}}  {'shape':{shape_width}}  {'count':>5}  {'weights':>13} "
        f" {'adapter':>11}"
    ]
    for title, (number, base, added) in rows.items():
        lines.append(
            f"{title:{width}}  {shapes.get(title, ''):{shape_width}}  {number:>5}  {base:>13,} "
            f" {added:>11,}"
        )
    for part in model.lora_only_if_named if isinstance(model, Denoiser) else ():
        if any(part in title for title in rows):
            lines.append(
                f"warning: {part} is adapted, which moves every picture, whatever its caption;"
                " cross-attention alone changes words"
            )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    whole = parameter_count(model)
    share = trained / max(whole, 1)
    return "\n".join([*lines, f"trainable: {trained:,} of {whole:,} parameters ({share:.2%})"])
