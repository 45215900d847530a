"""DPO on stored pairs: a file of winners and losers, or the best and the worst sample of each group
that the initial model draws, collected once."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
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
from mmdit.posttrain.prompt_lists import Prompts
from mmdit.posttrain.session import Session
from mmdit.rng import generator
from mmdit.training.origin import sum_of
from mmdit.weights import is_finite, tensor_pieces

MADE_OF = "mmdit_made_of"  # key in the header of a run's own pairs: see `made_of`
WHOLE_NUMBERS = (torch.int64, torch.int32, torch.int16)  # dtypes of places in a list of prompts
SUMS = "caption_crc32"  # in a run's own pairs: check sums of their prompts, int64 (pairs,)


@dataclass(frozen=True)
class Pairs:
    """Pairs to learn from. `win`, `lose`: latents `(pairs, F, h, w, C)`. `prompts (pairs,)`: the
    places of their prompts in the list that is trained on. `held_out`: how many further pairs of
    the file were left out, because their prompts are held out for evaluation."""

    win: Tensor
    lose: Tensor
    prompts: Tensor
    held_out: int = 0

    def __len__(self) -> int:
        return len(self.prompts)


def offline_updates(session: Session) -> Callable[[], dict[str, float]]:
    """Return a function that makes one update with `dpo.batch` pairs. The pairs are collected now,
    unless the config names a file of them or an earlier part of the run has collected them."""
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
    _check_batch(session, len(pairs))

    def update() -> dict[str, float]:
        order = torch.randperm(
            len(pairs), generator=generator(session.seed, "pairs", session.state.step)
        )
        drawn = order[:batch][world.rank :: world.size]
        means = Means()
        for rows in drawn.split(max(1, session.config.micro_batch // 2)):  # both of each pair
            win, lose = (side[rows].to(session.device).float() for side in (pairs.win, pairs.lose))
            share = len(rows) / len(drawn)
            for loss, more in pair_terms(session, win, lose, pairs.prompts[rows], rows):
                (loss * share).backward()
                means.add(more, share)
        return session.update() | means.over(world)

    return update


def pairs_file(session: Session) -> Path:
    """Return the path of the pairs: the one that the config names, or the run's own."""
    return Path(session.config.dpo.pairs or session.run_dir / "pairs.safetensors")


def stored_pairs(session: Session) -> Pairs | None:
    """Return the stored pairs; None if they are still to be made. A new run takes the pairs of an
    earlier run in its folder, which ended before its first checkpoint, only if it would make the
    same ones. ConfigError if they do not fit the run, or cannot fill a batch."""
    path = pairs_file(session)
    made = path.is_file() and (session.state.step > 0 or _stored_sum(path) == made_of(session))
    if session.config.dpo.pairs or made:
        pairs = read_pairs(path, session)
        _check_batch(session, len(pairs))
        return pairs
    epoch = session.config.prompts_per_epoch
    _check_batch(session, math.ceil(session.config.dpo.collect / epoch) * epoch)
    return None


def made_of(session: Session) -> int:
    """Return a check sum of all that determines the pairs that a run makes itself."""
    config = session.config
    names = ("prompts_per_epoch", "group_size", "rollout", "rewards", "reward_frames")
    decides = {name: encode(getattr(config, name)) for name in names}
    size = (session.width, session.height, session.frames)
    words = (config.dpo.collect, session.captions.trigger, session.tokenizer.fingerprint)
    return sum_of([], session.start, session.seed, size, *words, decides)


def _stored_sum(path: Path) -> int | None:
    """Return the value of `made_of` that is stored in a file of pairs; None if it holds none."""
    try:
        with safe_open(path, "pt") as handle:
            return int((handle.metadata() or {})[MADE_OF])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def _check_batch(session: Session, count: int) -> None:
    """Raise ConfigError unless `dpo.batch` divides among the processes and is at most `count`,
    which is the number of pairs or the most there can be."""
    batch, size = session.config.dpo.batch, session.world.size
    if batch % size or batch > count:
        raise ConfigError(
            "posttrain.dpo.batch",
            f"is {batch}; must be a multiple of the {size} processes and at most the {count} pairs",
        )


def collect_pairs(session: Session) -> dict[str, Tensor]:
    """Return the tensors of pairs from whole epochs of rollouts with the initial model, for at
    least `dpo.collect` prompts; a group with equal rewards gives no pair."""
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
    order = pairs.pop("place").argsort()  # the order in which one process would have made them
    if not len(order):
        raise ValueError(
            "no group had samples of different reward, so there is no pair to learn from; take a"
            " larger posttrain.group_size or another reward"
        )
    pairs = {name: value[order] for name, value in pairs.items()}
    captions = session.prompts.captions
    sums = [sum_of_text(captions[place]) for place in pairs["prompts"].tolist()]
    return pairs | {SUMS: torch.tensor(sums)}


def read_pairs(path: Path, session: Session) -> Pairs:
    """Return the pairs of a file. Their places refer to the whole list of prompts, some of which
    may be held out; for pairs that a run made itself, check sums identify the prompts. ConfigError
    if the file cannot be read, or belongs to another run."""
    shape = session.shape
    try:
        with explain_errors(path, "file of pairs"):
            pairs = load_file(path)
            count = len(pairs["prompts"])
            for name in ("prompts", SUMS):
                numbers = pairs.get(name, pairs["prompts"])
                if numbers.shape != (count,) or numbers.dtype not in WHOLE_NUMBERS:
                    raise ValueError(f"its {name} is {form_of(numbers)}")
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
            places = _trained_places(path, pairs, session.prompts)
    except ValueError as error:
        raise ConfigError(
            "posttrain.dpo.pairs",
            f"is {str(path)!r}: {error}; it must hold win and lose (pairs,"
            f" {', '.join(map(str, shape))}), floats, and prompts (pairs,), int64: places in the"
            " list of posttrain.prompts, from 0",
        ) from None
    kept = places >= 0
    held_out = count - int(kept.sum())
    return Pairs(pairs["win"][kept], pairs["lose"][kept], places[kept], held_out)


def _trained_places(path: Path, pairs: dict[str, Tensor], prompts: Prompts) -> Tensor:
    """Return the place of each pair's prompt in the list that is trained on, -1 for a prompt that
    is held out. ValueError if a place lies outside the whole list."""
    written = prompts.captions if prompts.written is None else prompts.written
    if SUMS in pairs:
        written = list(dict.fromkeys(written))
        known = {sum_of_text(caption): place for place, caption in enumerate(written)}
        places = [known.get(number, -1) for number in pairs[SUMS].tolist()]
    else:
        if _stored_sum(path) is not None:  # made by an earlier version
            written = prompts.captions
        places = pairs["prompts"].tolist()
    if not all(0 <= place < len(written) for place in places):
        raise ValueError("a prompt is not in the list")
    trained = {caption: place for place, caption in reversed([*enumerate(prompts.captions)])}
    return torch.tensor([trained.get(written[place], -1) for place in places])


def sum_of_text(text: str) -> int:
    """Return the check sum that identifies a prompt."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def form_of(tensor: Tensor) -> str:
    """Return the dtype and the shape of a tensor, for a message."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
