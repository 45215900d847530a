"""DPO on stored pairs: a file of winners and losers, or best and worst of the first model's own
groups, collected once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mmdit.config import ConfigError, encode
from mmdit.files import clean, write_atomically
from mmdit.foreign import explain_errors
from mmdit.posttrain.means import Means
from mmdit.posttrain.online import extremes, pair_terms
from mmdit.posttrain.session import Session
from mmdit.rng import generator
from mmdit.training.origin import sum_of
from mmdit.weights import is_finite, tensor_pieces

MADE_OF = "mmdit_made_of"  # in the header of a run's own pairs: see `made_of`
WHOLE_NUMBERS = (torch.int64, torch.int32, torch.int16)  # types of places in a list of prompts


def offline_updates(session: Session) -> Callable[[], dict[str, float]]:
    """Return a function that makes one update with `dpo.batch` pairs. The pairs are collected now,
    unless a file names them or an earlier part of the run has collected them."""
    batch, world = session.config.dpo.batch, session.world
    pairs = stored_pairs(session)
    if pairs is None:
        path = pairs_file(session)
        collected = collect_pairs(session)
        if world.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            clean(path.parent)
            header = {MADE_OF: str(made_of(session))}
            write_atomically(path, tensor_pieces(collected, header))
        world.barrier()
        pairs = read_pairs(path, session)
    prompts = pairs["prompts"]
    _check_batch(session, len(prompts))

    def update() -> dict[str, float]:
        order = torch.randperm(
            len(prompts), generator=generator(session.seed, "pairs", session.state.step)
        )
        drawn = order[:batch][world.rank :: world.size]
        means = Means()
        for rows in drawn.split(max(1, session.config.micro_batch // 2)):  # both of each pair
            win, lose = (pairs[name][rows].to(session.device).float() for name in ("win", "lose"))
            share = len(rows) / len(drawn)
            for loss, more in pair_terms(session, win, lose, prompts[rows], rows):
                (loss * share).backward()
                means.add(more, share)
        return session.update() | means.over(world)

    return update


def pairs_file(session: Session) -> Path:
    """Return the file of the pairs: the one that the config names, or that of the run."""
    return Path(session.config.dpo.pairs or session.run_dir / "pairs.safetensors")


def stored_pairs(session: Session) -> dict[str, Tensor] | None:
    """Return the pairs, None if they are still to be made: a new run takes those of an earlier one
    in its folder, which was ended before its first checkpoint, only if it would make the same.
    ConfigError: they do not fit the run, or cannot fill a batch."""
    path = pairs_file(session)
    made = path.is_file() and (session.state.step > 0 or _stored_sum(path) == made_of(session))
    if session.config.dpo.pairs or made:
        pairs = read_pairs(path, session)
        _check_batch(session, len(pairs["prompts"]))
        return pairs
    epoch = session.config.prompts_per_epoch
    _check_batch(session, math.ceil(session.config.dpo.collect / epoch) * epoch)
    return None


def made_of(session: Session) -> int:
    """Return a check sum of all that decides the pairs that a run makes itself."""
    config = session.config
    names = ("prompts_per_epoch", "group_size", "rollout", "rewards", "reward_frames")
    decides = {name: encode(getattr(config, name)) for name in names}
    size = (session.width, session.height, session.frames)
    words = (config.dpo.collect, session.captions.trigger, session.tokenizer.fingerprint)
    return sum_of([], session.start, session.seed, size, *words, decides)


def _stored_sum(path: Path) -> int | None:
    """Return what `made_of` was when a file of pairs was written; None: it does not say."""
    try:
        with safe_open(path, "pt") as handle:
            return int((handle.metadata() or {})[MADE_OF])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def _check_batch(session: Session, count: int) -> None:
    """Raise ConfigError unless a batch can be taken from `count` pairs, or at most so many."""
    batch, size = session.config.dpo.batch, session.world.size
    if batch % size or batch > count:
        raise ConfigError(
            "posttrain.dpo.batch",
            f"is {batch}; must be a multiple of the {size} processes and at most the {count} pairs",
        )


def collect_pairs(session: Session) -> dict[str, Tensor]:
    """Return pairs from whole epochs of rollouts with the first model, for `dpo.collect` prompts;
    groups with equal rewards give none."""
    config, rollouts = session.config, session.rollouts
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for epoch in range(math.ceil(config.dpo.collect / config.prompts_per_epoch)):
        for rollout in rollouts.collect(epoch, session.policy.reference):
            best, worst = extremes(rollouts.pool.total(rollout.rewards.result()), rollout.prompts)
            parts["win"].append(rollout.clean[best].cpu())
            parts["lose"].append(rollout.clean[worst].cpu())
            parts["prompts"].append(rollout.prompts[best])
            first = epoch * config.prompts_per_epoch * config.group_size
            parts["place"].append(first + rollout.indices[best])
    gather = session.world.gather
    pairs = {name: torch.cat(gather(torch.cat(some))) for name, some in parts.items()}
    order = pairs.pop("place").argsort()  # as one process would have made them
    if not len(order):
        raise ValueError(
            "no group had samples of different reward, so there is no pair to learn from; take a"
            " larger posttrain.group_size or another reward"
        )
    return {name: value[order] for name, value in pairs.items()}


def read_pairs(path: Path, session: Session) -> dict[str, Tensor]:
    """Return the pairs of a file. ConfigError: it cannot be read, or is of another run."""
    shape = session.shape
    try:
        with explain_errors(path, "file of pairs"):
            pairs = load_file(path)
            count = len(pairs["prompts"])
            if pairs["prompts"].ndim != 1 or pairs["prompts"].dtype not in WHOLE_NUMBERS:
                raise ValueError(f"its prompts is {form_of(pairs['prompts'])}")
            for name in ("win", "lose"):
                if pairs[name].shape != (count, *shape) or not pairs[name].is_floating_point():
                    raise ValueError(f"its {name} is {form_of(pairs[name])}")
                if not is_finite(pairs[name]):
                    raise ValueError(f"its {name} holds nan or infinity")
            same = (pairs["win"] == pairs["lose"]).flatten(1).all(1).nonzero()[:, 0].tolist()
            if same:
                raise ValueError(
                    f"win and lose are one sample in {len(same)} of its pairs, first in {same[0]}:"
                    " nothing but rounding would be learned from those"
                )
            pairs["prompts"] = pairs["prompts"].long()
            if not ((pairs["prompts"] >= 0) & (pairs["prompts"] < len(session.prompts))).all():
                raise ValueError("a prompt is not in the list")
    except ValueError as error:
        raise ConfigError(
            "posttrain.dpo.pairs",
            f"is {str(path)!r}: {error}; it must hold win and lose (pairs,"
            f" {', '.join(map(str, shape))}), floats, and prompts (pairs,), int64: places in the"
            " list",
        ) from None
    return pairs


def form_of(tensor: Tensor) -> str:
    """Return the type and the shape of a tensor, for a message."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
