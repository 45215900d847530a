"""DPO on stored pairs: a file of winners and losers, or best and worst of the first model's own
groups, collected once."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmdit.config import ConfigError
from mmdit.files import clean, write_atomically
from mmdit.posttrain.online import extremes, pair_terms
from mmdit.posttrain.session import Session
from mmdit.rng import generator
from mmdit.weights import tensor_pieces


def dpo_offline(session: Session) -> bool:
    """`train.max_steps` updates of `dpo.batch` pairs each. Resuming reads the pairs that were
    collected."""
    config = session.config.dpo
    pairs, size = check_pairs(session), session.world.size
    if pairs is None:
        path = pairs_file(session)
        save_pairs(path, collect_pairs(session), session.world.is_main)
        session.world.barrier()
        pairs = read_pairs(path, session)
    count = len(pairs["prompts"])
    _check_batch(session, count)

    def update() -> dict[str, float]:
        step = session.state.step
        order = torch.randperm(count, generator=generator(session.seed, "pairs", step))[
            : config.batch
        ]
        own = order[session.world.rank :: size]
        win, lose = (pairs[name][own].to(session.device) for name in ("win", "lose"))
        reports: dict[str, list[Tensor]] = {}
        for loss, numbers in pair_terms(session, win, lose, pairs["prompts"][own], own):
            loss.backward()
            for name, value in numbers.items():
                reports.setdefault(name, []).append(value.detach())
        return session.apply() | {
            name: torch.stack(values).mean().item() for name, values in reports.items()
        }

    return session.run(update, 1)


def pairs_file(session: Session) -> Path:
    """The file of the pairs: the one that was named, or that of the run."""
    given = session.config.dpo.pairs
    return Path(given) if given else session.run_dir / "pairs.safetensors"


def check_pairs(session: Session) -> dict[str, Tensor] | None:
    """Return the pairs, None if they are still to be made. ConfigError: they do not serve, or
    cannot fill a batch."""
    config, path = session.config.dpo, pairs_file(session)
    if config.pairs or path.is_file():
        pairs = read_pairs(path, session)
        _check_batch(session, len(pairs["prompts"]))
        return pairs
    epochs = -(-config.collect // session.config.prompts_per_epoch)
    _check_batch(session, epochs * session.config.prompts_per_epoch)
    return None


def _check_batch(session: Session, count: int) -> None:
    """ConfigError unless a batch of the configured size can be taken from `count` pairs, or at most
    so many."""
    batch, size = session.config.dpo.batch, session.world.size
    if batch < 1 or batch % size or batch > count:
        raise ConfigError(
            "posttrain.dpo.batch",
            f"is {batch}; must be a multiple of the {size} processes and at most the {count} pairs",
        )


def collect_pairs(session: Session) -> dict[str, Tensor]:
    """Whole epochs of rollouts with the first model for `dpo.collect` prompts; those with equal
    rewards give no pair."""
    found: dict[str, list[Tensor]] = {"win": [], "lose": [], "prompts": [], "place": []}
    samples = session.config.prompts_per_epoch * session.config.group_size
    for epoch in range(-(-session.config.dpo.collect // session.config.prompts_per_epoch)):
        rollouts, futures = session.collect(epoch, session.reference)
        for rollout, future in zip(rollouts, futures, strict=True):
            total = sum(
                session.pool.weights[name] * value for name, value in future.result().items()
            )
            best, worst = extremes(total, rollout.groups)
            rows = {
                "win": rollout.clean[best],
                "lose": rollout.clean[worst],
                "prompts": rollout.prompts[best],
                "place": epoch * samples + rollout.indices[best],
            }
            for name, values in rows.items():
                found[name].append(values.cpu())
    pairs = {name: torch.cat(parts) for name, parts in found.items()}
    if session.world.size > 1:
        parts: list = [None] * session.world.size
        torch.distributed.all_gather_object(parts, pairs)
        pairs = {name: torch.cat([part[name] for part in parts]) for name in pairs}
    order = pairs.pop("place").argsort()  # as one process would have made them
    pairs = {name: value[order] for name, value in pairs.items()}
    if not len(order):
        raise ValueError(
            "no group had samples of different reward, so there is no pair to learn from; take a"
            " larger posttrain.group_size or another reward"
        )
    return pairs


def save_pairs(path: Path, pairs: dict[str, Tensor], writes: bool) -> None:
    if writes:
        path.parent.mkdir(parents=True, exist_ok=True)
        clean(path.parent)
        write_atomically(path, tensor_pieces(pairs))


def read_pairs(path: Path, session: Session) -> dict[str, Tensor]:
    try:
        pairs = load_file(path)
        assert pairs.keys() == {"win", "lose", "prompts"}, f"it holds {sorted(pairs)}"
        places, wanted = pairs["prompts"], (len(pairs["prompts"]), *session.shape)
        assert all(pairs[name].shape == wanted for name in ("win", "lose")), (
            f"it holds {tuple(pairs['win'].shape)}"
        )
        assert ((places >= 0) & (places < len(session.prompts))).all(), (
            "a prompt is not in the list"
        )
    except Exception as error:  # noqa: BLE001  (safetensors has its own kinds)
        raise ConfigError(
            "posttrain.dpo.pairs",
            f"is {str(path)!r}, which does not serve: {error}; it must hold win and lose (pairs,"
            f" {', '.join(map(str, session.shape))}) and prompts (pairs,): places in the list",
        ) from None
    return pairs
