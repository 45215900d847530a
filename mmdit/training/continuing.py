"""Continue a run, or begin one from the weights of another: with a changed config, another number
of processes, or from a checkpoint of an older version."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdit import config as config_io
from mmdit.data.batches.batch_plan import ORDER
from mmdit.files import read_bytes, write_atomically
from mmdit.interfaces import Denoiser, LatentSpec
from mmdit.nn.stored_weights import StoredWeight
from mmdit.training import checkpoint
from mmdit.training.distributed import World
from mmdit.training.ema import EMA
from mmdit.training.learner import Learner
from mmdit.training.memory.shards import local, own_rows
from mmdit.training.train_config import TrainConfig
from mmdit.training.train_state import TrainState
from mmdit.weights import check_numbers

SUMS = ("crc32", "files_crc32")  # in the `contents` of a source


def facts(global_batch: int, processes: int, data: list[dict]) -> dict:
    """Return what a checkpoint records of how its run saw the data. `data`: the `contents` of its
    sources."""
    return {"order": ORDER, "global_batch": global_batch, "processes": processes, "data": data}


def what_changes(old: dict, new: dict, stored: dict, now: dict) -> list[str]:
    """Return lines to print beside the changed keys. `old`, `new`: the configs (encoded); `stored`,
    `now`: the `facts` of the checkpoint and of this run. ValueError if the change would silently
    give the stored weights another meaning."""
    _check_same_scale(old, new)
    lines = []
    if stored.get("order") != ORDER:
        lines.append(
            "written by an older version: from here on items come in another order, each equally"
            " often"
        )
    before = stored.get("global_batch")
    if before not in (None, now["global_batch"]):
        lines.append(
            f"a step now sees {_product(new, now)}, before {_product(old, stored)}: the same"
            " learning rate means another thing, and the order of items is another one; keep the"
            " product to keep the result"
        )
    lines += other_data(stored.get("data") or [], now["data"])
    return lines + trained_before(old, new) + kept_no_longer(old, new)


def _check_same_scale(old: dict, new: dict) -> None:
    """Raise ValueError if adapters trained under the config `old` would be scaled differently under
    `new`."""
    scaled, root = (bool((config.get("lora") or {}).get("rslora")) for config in (old, new))
    if new["lora"]["enabled"] and scaled != root:
        raise ValueError(
            f"lora.rslora is {root}, the run was trained with {scaled}: its adapters would count "
            "by another scale; set it as it was, or start a new run with train.init_from"
        )


def changes(old: dict, new: dict) -> list[str]:
    """Return a line for each setting that differs between the configs `old` and `new`. ValueError
    if adapters would be scaled differently."""
    _check_same_scale(old, new)
    return [
        f"{line} (only a new run heeds it)" if line.startswith("train.init_from:") else line
        for line in config_io.differences(old, new)
    ]


def other_data(before: list[dict], now: list[dict]) -> list[str]:
    """Return a line for each source whose items have changed, wherever they are stored. Sources
    that were added or removed are reported as changed keys."""
    known, lines = {row["source"]: row for row in before}, []
    for row in now:
        old = known.get(row["source"])
        # older versions stored no sum of files
        sums = [name for name in SUMS if old is not None and name in old and name in row]
        if old is not None and any(old[name] != row[name] for name in sums):
            lines.append(
                f"other data: before {_contents(old)}, now {_contents(row)}. It goes on with these;"
                " if that is not meant, name the data that it began with, or start a new run with"
                " train.init_from"
            )
    return lines


def _contents(row: dict) -> str:
    sums = " ".join(f"{row[name]:08x}" for name in SUMS if name in row)
    return f"{row['items']} items in {row['path']} (check sum {sums})"


def _product(config: dict, seen: dict) -> str:
    train = config.get("train") or {}
    return (
        f"{seen['global_batch']} samples (batch_size {train.get('batch_size')} x grad_accum_steps"
        f" {train.get('grad_accum_steps')} x {seen.get('processes')} processes)"
    )


def trained_before(old: dict, new: dict) -> list[str]:
    """Return a line if `new` holds out items of the same cache that the run of `old` trained on."""
    trains = [config.get("train") or {} for config in (old, new)]
    (before, share), (after, other) = (
        (train.get("val_every_steps"), train.get("val_share")) for train in trains
    )
    same = before and old.get("seed") == new["seed"]
    if not after or (same and (other or 0) <= (share or 0)):
        return []
    return [
        "the held-out items are others than before (seed, train.val_share, train.val_every_steps):"
        " of the same cache some were trained on, and val_loss is too low by what was learned of"
        " them"
    ]


def same_draws(source: Path, seed: int, data: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line if the run with the checkpoint `source` had this `seed` and one of the sources
    whose `contents` are `data`, so that a new run repeats its draws. An export does not say what it
    was trained on."""
    if not source.is_dir() or checkpoint.Meta.read(source).config.get("seed") != seed:
        return []
    try:
        before = (checkpoint.read_notes(source) or {}).get("data") or []
    except ValueError:  # only a run that goes on needs them
        return []
    if not {row["crc32"] for row in before} & {row["crc32"] for row in data}:
        return []
    return [
        f"the same data with the same seed ({seed}) as there: what was drawn in its first steps"
        " (order, noise, times) is drawn again; set another seed to draw anew"
    ]


def kept_no_longer(old: dict, new: dict) -> list[str]:
    """Return a line if the run of `new` will remove checkpoints that the run of `old` kept."""
    before, after = (config.get("train") or {} for config in (old, new))
    last, fewer = before.get("keep_last"), after.get("keep_last")
    every, other = before.get("keep_every_steps"), after.get("keep_every_steps")
    milestones = every and (not other or every % other)
    if not fewer or not (milestones or last == 0 or (last or 0) > fewer):
        return []
    return [
        "fewer checkpoints are kept than before (train.keep_last, train.keep_every_steps), and the"
        " next save removes the others: to keep them, stop before it and set these as they were"
    ]


def other_rate(old: dict, new: dict, step: int) -> list[str]:
    """Return a line if the update after `step` has another learning rate than under the config
    `old`: for example, a finished cosine rises again when `max_steps` is raised."""
    try:
        trains = [config_io.decode(TrainConfig, config["train"]) for config in (old, new)]
    except (config_io.ConfigError, KeyError):  # of an older version
        return []
    before, after = (train.learning_rate().at(step + 1) for train in trains)
    if step >= trains[1].max_steps or abs(after - before) <= 0.01 * max(after, before):
        return []
    return [
        f"the learning rate goes on at {after:.3g}, where it would have been {before:.3g}:"
        " train.lr, lr_schedule, lr_final, warmup_steps and max_steps decide it"
    ]


def go_on(state: TrainState, folder: Path, old: dict, new: dict, now: dict) -> list[str]:
    """Restore the state from the checkpoint `folder`, whose config is `old`; return lines to
    print."""
    lines = what_changes(old, new, checkpoint.read_notes(folder) or {}, now)
    lines += state.restore(folder)
    lines += other_rate(old, new, state.step)
    pictures = (old.get("video") or {}).get("num_frames") == 1
    if new["video"]["num_frames"] > 1 and pictures and not state.learner.sharded:
        number_frames(state, new["seed"])
    changed = [f"config changed: {line}" for line in changes(old, new)]
    return [f"resuming {folder} at step {state.step}", *(f"  {line}" for line in changed + lines)]


def number_frames(state: TrainState, seed: int) -> None:
    """Draw the model's frame numbers, and set their average, at the first clips of a run that has
    only seen pictures."""
    state.learner.model.number_frames(seed)
    if state.ema:
        for name, parameter in state.ema.parameters.items():
            if not state.ema.shadow[name].any():
                state.ema.shadow[name].copy_(parameter.detach())


def drawn_frames(model: Denoiser, seed: int) -> dict[str, Tensor]:
    """Have a new model draw its frame numbers; return the drawn weights by name."""
    zero = {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and not isinstance(p, StoredWeight) and not p.any()
    }
    model.number_frames(seed)
    return {name: p.detach().clone() for name, p in zero.items() if p.any()}


@torch.no_grad()
def number_shards(
    learner: Learner, ema: EMA | None, drawn: dict[str, Tensor], world: World
) -> None:
    """Copy the frame numbers `drawn` into a sharded model, and into its average, where theirs are
    all zero."""
    for name, value in drawn.items():
        tensors = [learner.model.get_parameter(name).detach()]
        if ema:
            tensors.append(ema.shadow[f"model.{name}"])
        for tensor in tensors:
            if not world.any(bool(local(tensor).any())):
                first, count = own_rows(tensor)
                local(tensor).copy_(value[first : first + count])


def check_weights(learner: Learner) -> None:
    """Raise ValueError naming the first weight that holds nan or infinity: every step from such
    weights would be skipped."""
    for name, value in learner.state_dict().items():
        if value.is_floating_point() and not isinstance(value, StoredWeight):
            check_numbers(name, local(value), "before the first step")


def check_same_latents(
    meta: checkpoint.Meta, spec: LatentSpec, fingerprint: str, source: object
) -> None:
    """Raise ValueError if the weights of `source` were trained on other latents than the
    tokenizer's."""
    if meta.tokenizer != fingerprint:
        raise ValueError(
            f"{source} was trained on latents of the tokenizer {meta.tokenizer[:16]}, the config"
            f" names {fingerprint[:16]}: set the tokenizer: section to the one it was trained with"
        )
    if meta.spec != spec:
        raise ValueError(
            f"{source} was trained with other latent statistics:"
            f" {'; '.join(config_io.differences(meta.spec, spec))[:300]}"
        )


def write_config(run_dir: Path, text: str, done: bool = False) -> None:
    """Write config.yaml; a different earlier one is kept under another name. `done`: the run is
    finished and nothing will be run, so an existing config stays, since it says what was run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "config.yaml"
    if done and path.exists():
        return
    if path.exists():  # a resume with another config: keep the earlier one
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        before = read_bytes(path)
        if before != text.encode():
            write_atomically(run_dir / f"config.before-{stamp}.yaml", before)
    write_atomically(path, text)
