"""Extract the difference of two models as a LoRA: see `mmdit.scripts.extract_lora`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmdit.adapters.layers import LoRALinear, is_adapter
from mmdit.adapters.lora import (
    LoRAConfig,
    Make,
    adapters,
    add_differences,
    insert,
    kind_of,
    select,
)
from mmdit.commands.inspect_adapter import is_ours
from mmdit.diagnostics.adapter_norms import EXACT
from mmdit.experiment.load import load_pipeline
from mmdit.interfaces import Denoiser
from mmdit.interop.wan_weights import load_dit
from mmdit.nn.encodings import ENCODINGS
from mmdit.nn.float8 import LEAST
from mmdit.nn.stored_weights import StoredWeight
from mmdit.training.expert_choice import choose_expert

# The singular vectors of larger matrices come from a random basis with MORE_VECTORS vectors more
# than the rank, after PRODUCTS products with the matrix (Halko et al. 2011, algorithm 4.4).
MORE_VECTORS, PRODUCTS = 16, 4


@dataclass(frozen=True)
class Extraction:
    """The norms of one layer's weight, of its change, and of the part of the change that the LoRA
    lacks."""

    layer: str
    weight: float
    change: float
    rest: float


@dataclass
class Extracted:
    """The result: `layers` are those that the LoRA holds; `others` are the names of further
    parameters that changed."""

    layers: list[Extraction] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Side:
    """One of the two models: its network; for a pair of ours, the expert and a line about the
    choice; and the weights of its text encoder that are stored with it, by name."""

    network: Denoiser
    expert: str | None = None
    said: str = ""
    encoder: dict[str, Tensor] = field(default_factory=dict)


def side_of(path: str, expert: str | None, merged_like: Side | None = None) -> Side:
    """Return the model at `path`: a run, checkpoint or export of ours, or Wan weights of any
    layout, which stay in their files. `merged_like` is given for the base, and is the tuned model:
    the base's adapters are merged, and it has the same expert; the tuned model's adapters stay
    beside its weights. If a run keeps its base quantised, it is read without that: quantisation
    errors are no change."""
    if not is_ours(path):
        return Side(load_dit(path, expert=expert, in_file=True))
    lora = None
    if merged_like is not None:
        lora, expert = True, expert or merged_like.expert
    load = partial(load_pipeline, path, "cpu", lora=lora, wanted=expert)
    pipeline, config = load()
    if config.model.dtype in ENCODINGS:
        pipeline, config = load(overrides=["model.dtype=bfloat16"])
    is_pair = config.model.expert or config.experts.enabled
    if merged_like is not None and not is_pair:
        expert = None  # both experts may have been tuned from it
    choice = choose_expert(pipeline, config, expert, path)
    stored = pipeline.learner.stored_state().items()
    encoder = {name: value for name, value in stored if name.startswith("text_encoder.")}
    return Side(choice.network, choice.name, choice.said, encoder)


def encoder_changes(base: Side, tuned: Side) -> list[str]:
    """Return the names of the text encoder's weights that `tuned` has and that are missing or
    different in `base`."""
    result = []
    for name, value in tuned.encoder.items():
        before, after = base.encoder.get(name), value.float()
        if before is None or not torch.equal(rounded_as(value, after, before.float()), after):
            result.append(name)
    return result


@torch.no_grad()
def extract(
    base: Denoiser,
    tuned: Denoiser,
    targets: tuple[str, ...],
    rank: int,
    device: torch.device,
    whole: bool = False,
) -> Extracted:
    """Give `base` a LoRA in each linear layer that `targets` choose (none: all layers of the
    blocks) and whose weight differs in `tuned`. Each has at most rank `rank`, and is as near to the
    change as possible in the Frobenius norm. `whole`: add the changes of all other parameters as
    whole differences. ValueError if the networks differ in structure, or no chosen layer
    differs."""
    if not targets:
        targets = ("blocks.*", *(f"blocks.*{name}*" for name in base.lora_only_if_named))
    parameters = {name: value for name, value in tuned.named_parameters() if not is_adapter(name)}
    # a weight merged in bfloat16 would keep only a part of a small update
    adapted = {f"{name}.weight": layer for name, layer in adapters(tuned).items()}
    _check_alike(dict(base.named_parameters()), parameters)
    chosen = {f"{name}.weight": name for name in select(base, LoRAConfig(target_modules=targets))}
    result, makers, differences = Extracted(), {}, {}
    rows = tqdm(base.named_parameters(), total=len(parameters), desc="layers", delay=2)
    for name, parameter in rows:
        after = plain(parameters[name])
        before = rounded_as(parameters[name], after, plain(parameter))
        layer = adapted.get(name)
        change = (after if layer is None else layer.merged_weight().float()) - before
        if not change.any():
            continue
        if name not in chosen:
            result.others.append(name)
            if whole:
                differences[name] = change
            continue
        place, moved = chosen[name], change.to(device)
        factors = nearest(moved, rank)
        makers[place] = _maker({part: factor.cpu() for part, factor in factors.items()})
        rest = (moved - factors["lora_B"] @ factors["lora_A"]).norm().item()
        norms = before.norm().item(), moved.norm().item()
        result.layers.append(Extraction(place, *norms, rest))
    if not makers:
        raise ValueError(
            f"the two models do not differ in a linear layer that {', '.join(targets)} chooses, but"
            f" in {len(result.others)} other parameters: there is nothing for a LoRA to hold"
        )
    insert(base, makers)
    add_differences(base, differences)
    return result


def plain(parameter: nn.Parameter) -> Tensor:
    """Return a parameter as float32; it is read from its file if it lies there."""
    value = parameter.detach()
    return (value.whole() if isinstance(value, StoredWeight) else value).float()


def rounded_as(stored: Tensor, after: Tensor, value: Tensor) -> Tensor:
    """Return `value`, rounded to the float8 in which the weight `stored` is kept, or to bfloat16 or
    float16 if its numbers `after` fit into that: rounding is not a change that training made.
    `after` and `value` are float32, whatever their files hold."""
    if isinstance(stored, StoredWeight) and stored.codes.dtype.itemsize == 1:
        dtype, scale = stored.codes.dtype, stored.scale
        scale = torch.ones(()) if scale is None else scale.float().clamp(min=LEAST)
        largest = torch.finfo(dtype).max
        return (value / scale).clamp(-largest, largest).to(dtype).float() * scale
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(after, after.to(dtype).float()):
            return value.to(dtype).float()
    return value


def _check_alike(before: dict[str, nn.Parameter], after: dict[str, nn.Parameter]) -> None:
    for name in (*before, *after):
        shapes = [tuple(part[name].shape) if name in part else None for part in (before, after)]
        if shapes[0] != shapes[1]:
            said = ["is not there" if shape is None else f"is {shape}" for shape in shapes]
            raise ValueError(
                f"the two models are not of one kind: {name} {said[0]} in --base and {said[1]} in"
                " --tuned; name the model that was tuned, and what became of it"
            )


def nearest(matrix: Tensor, rank: int) -> dict[str, Tensor]:
    """Return `lora_A (r, in)` and `lora_B (out, r)`, float32, whose product is the matrix of rank r
    nearest to `matrix (out, in)`, where r is `rank` or, if less, the smaller side. Both factors
    have the same singular values. For large matrices the result is approximate."""
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= max(EXACT, rank + MORE_VECTORS):
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        right = right.mT
    else:
        with torch.random.fork_rng([matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, rank + MORE_VECTORS, PRODUCTS)
    roots = values[:rank].sqrt()
    return {
        "lora_A": (right[:, :rank] * roots).mT.float().contiguous(),
        "lora_B": (left[:, :rank] * roots).float().contiguous(),
    }


def _maker(factors: dict[str, Tensor]) -> Make:
    rank = len(factors["lora_A"])
    return lambda base, _generator: LoRALinear.of(base, factors, alpha=float(rank))


def table(extracted: Extracted) -> Iterator[str]:
    """Yield lines that say, for each type of layer, how far it moved, and which share of the
    squared change the LoRA holds."""
    sorts: dict[str, list[Extraction]] = {}
    for row in extracted.layers:
        sorts.setdefault(kind_of(row.layer), []).append(row)
    yield f"{'':34}  layers  ‖ΔW‖/‖W‖     held    least"
    for name, rows in {**sorts, "all": extracted.layers}.items():
        weight = math.hypot(*(row.weight for row in rows))
        change = math.hypot(*(row.change for row in rows))
        rest = math.hypot(*(row.rest for row in rows))
        least = min(1 - (row.rest / row.change) ** 2 for row in rows)
        held = 1 - (rest / change) ** 2
        ratio = change / max(weight, 1e-30)
        yield f"{name:34}  {len(rows):>6}  {ratio:>9.4f} {held:>8.1%} {least:>8.1%}"


def place_of(out: Path) -> str:
    """Return `wrote OUT (… MB)` for a file or a folder."""
    files = out.rglob("*") if out.is_dir() else [out]
    size = sum(file.stat().st_size for file in files if file.is_file())
    return f"wrote {out} ({size / 1e6:.1f} MB)"
