"""Assemble reward post-training: a trained model, prompts, rewards and one of the loops of
`mmdit.posttrain`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmdit import config as config_io
from mmdit.adapters import lora_state
from mmdit.adapters.strength import alphas
from mmdit.config import ConfigError
from mmdit.data.batches.latent_batches import contents
from mmdit.data.dataset.buckets import VideoConfig, target_sizes
from mmdit.experiment.build import (
    build_learner,
    build_network,
    start_from,
    starts_in_shards,
    with_sibling,
)
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.experiment.idle_keys import idle_keys
from mmdit.experiment.run import agree_on_start
from mmdit.files import Sum, with_tilde
from mmdit.interfaces import Denoiser
from mmdit.posttrain.dpo_offline import stored_pairs
from mmdit.posttrain.loop import post_train
from mmdit.posttrain.posttrain_config import PosttrainConfig
from mmdit.posttrain.session import Session
from mmdit.posttrain.setup import Files
from mmdit.posttrain.srpo import check_pace, real_latents
from mmdit.tokenizers import build_tokenizer
from mmdit.training import checkpoint
from mmdit.training.continuing import (
    changes,
    check_same_latents,
    kept_no_longer,
    other_data,
    other_rate,
    write_config,
)
from mmdit.training.distributed import World, process_group
from mmdit.training.expert_choice import expert_notes, resolved
from mmdit.training.learner import Learner
from mmdit.training.memory.offload import move_to_device
from mmdit.training.memory.shards import whole
from mmdit.training.origin import check_origin, sum_of
from mmdit.training.parallel import shard
from mmdit.training.run_start import record_start
from mmdit.training.runs import hold
from mmdit.training.trackers import require_library, tracking
from mmdit.training.train_state import TrainState

OF_PAIRS = ("seed:", "posttrain.prompts_per_epoch:", "posttrain.group_size:", "posttrain.rollout.")
OF_PAIRS += ("posttrain.rewards", "posttrain.reward_frames:", "posttrain.dpo.collect:")


def _check(config: ExperimentConfig) -> None:
    """Raise ConfigError for settings that post-training does not support, before anything is
    loaded."""
    settings = config.posttrain
    if settings is None:
        raise ConfigError(
            "posttrain", "is missing; write the section, for example posttrain: {algorithm: grpo}"
        )
    settings.check_idle()
    if config.parallel.context_parallel > 1:
        raise ConfigError(
            "parallel.context_parallel",
            f"is {config.parallel.context_parallel}, but in post-training each process draws and"
            " scores whole clips of its own; set it to 1",
        )
    if config.parallel.type == "ddp" and config.parallel.reduce != "float32":
        raise ConfigError(
            "parallel.reduce",
            f"is {config.parallel.reduce}, but copies add their gradients up in float32 in"
            " post-training; leave it out, or use parallel.type fsdp",
        )
    if config.train.save_in_background:
        raise ConfigError(
            "train.save_in_background",
            "is true, but post-training writes its checkpoints between two updates; set it to"
            " false",
        )
    if config.train.precision == "pure_bf16":
        raise ConfigError(
            "train.precision",
            "is pure_bf16, but post-training keeps the weights that it trains in float32: use bf16,"
            " and adapters (lora.enabled) where memory is short",
        )
    for name in ("sample_every_steps", "val_every_steps"):
        if steps := getattr(config.train, name):
            raise ConfigError(
                f"train.{name}",
                f"is {steps}, but post-training draws no previews and holds no items out: it"
                " evaluates every posttrain.eval_every_epochs; set it to 0",
            )
    updates = 1 if settings.in_single_updates else settings.updates_per_epoch
    if config.train.keep_every_steps % updates:
        raise ConfigError(
            "train.keep_every_steps",
            f"is {config.train.keep_every_steps}, but checkpoints are written between epochs of"
            f" {updates} updates, so that some of these would be missing; must be a multiple of"
            f" posttrain.updates_per_epoch ({updates})",
        )
    width, height, _, _ = config.sample_size
    tile = config.video.tile
    if tile is not None and (width > tile[0] or height > tile[1]):
        raise ConfigError(
            "video.tile",
            f"is {list(tile)}, but post-training draws clips of {width}x{height} whole, as the"
            " model has seen none; set the size to the tile's, or less",
        )
    video, real = config.video, settings.algorithm == "srpo" and settings.srpo.latents
    usual = {"frame_stride": 1, "shrink_video_to_frames": False}
    for name in usual if real and video.num_frames > 1 and config.tokenizer.temporal == 1 else ():
        value = getattr(video, name)
        if value != usual[name]:
            raise ConfigError(
                f"video.{name}",
                f"is {str(value).lower()}, but of the clips in posttrain.srpo.latents the first"
                " frames are taken one after the other, which move more slowly than the model's;"
                " leave srpo.latents out, or take a model of stride 1",
            )
    if settings.algorithm == "awm" and settings.awm.ema_kl and not config.ema.enabled:
        raise ConfigError(
            "ema.enabled",
            "is false, but posttrain.awm.ema_kl holds the policy near its average; enable it, or "
            "set that to 0",
        )
    if config.tokenizer.picture != "none":
        raise ConfigError(
            "tokenizer.picture",
            f"is {config.tokenizer.picture}, but post-training gives no pictures to continue; "
            "post-train a T2V or TI2V model",
        )
    if config.model.conditioning != "none":
        raise ConfigError(
            "model.conditioning",
            f"is {config.model.conditioning}, but post-training gives no small clips to redraw; "
            "post-train the model that draws them",
        )


def _changed(settings: PosttrainConfig, stored: dict, now: dict) -> Iterator[str]:
    """Yield a line for each setting of a resumed run that differs from `stored`. It says where a
    change comes too late: offline DPO makes its pairs once."""
    makes_pairs = settings.compares_samples and settings.algorithm == "dpo"
    late = OF_PAIRS if makes_pairs and settings.in_single_updates else ()
    for line in changes(stored, now):
        note = " (the pairs of this run are made already)" if line.startswith(late) else ""
        yield f"  config changed: {line}{note}"


def _with_first_model(
    config: ExperimentConfig, meta: checkpoint.Meta | None, world: World
) -> ExperimentConfig:
    """Return `config` with `train.init_from` set to a checkpoint: the one to which it points, or to
    which it pointed when the run that wrote `meta` began, because the reference stays the same."""
    if config.train.init_from is None:
        return config
    first = Path(config.train.init_from)
    if meta and Path(meta.origin.get("source") or first).exists():
        first = Path(meta.origin.get("source") or first)
    source = world.share(lambda: checkpoint.newest(first))
    return replace(
        config, train=replace(config.train, init_from=str(source or config.train.init_from))
    )


def _lay_out(
    learner: Learner, frozen: list[Denoiser], config: ExperimentConfig, world: World, cuts: bool
) -> None:
    """Move the networks to the device, or shard them over the processes."""
    if cuts:
        shard(learner, world, config.parallel, further=frozen)
    move_to_device(learner, config.train.offload_blocks, world.device)
    for network in frozen:
        network.to(world.device)


def posttrain(
    config: ExperimentConfig,
    device: str = "auto",
    resume: bool = False,
    dry_run: bool = False,
    command: str = "",
) -> bool:
    """Post-train as configured. Return True when the run ended, False when it was asked to stop
    (continue with `resume`). `command`: the command as typed, for the record."""
    config = resolved(config)
    _check(config)
    settings, train = config.posttrain, config.train
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(process_group(device, train.timeout_minutes))
        if not dry_run:
            stack.enter_context(hold(config.run_dir, world))
        world.share(lambda: require_library(config.track))
        resumed = agree_on_start(config, resume, world, prunes=not dry_run)
        tokenizer = build_tokenizer(config.tokenizer, device=world.device)
        cuts = config.parallel.type == "fsdp" and world.size > 1
        network = partial(build_network, in_file=cuts)
        learner = build_learner(config, tokenizer.spec, network)
        if learner.model.picture != "none":
            raise ConfigError(
                "model.name_or_path",
                f"is {learner.model.variant}, which continues a picture; post-training gives"
                " none: post-train a T2V or TI2V model",
            )
        learner.model.check_trainable(config)
        lines = [f"starting from {config.model.name_or_path}"] if config.model.released else []
        model = with_sibling(learner, config, network)
        frozen = [part for part in model.networks().values() if part is not learner.model]
        meta = checkpoint.Meta.read(resumed) if resumed else None
        learner.text_encoder.requires_grad_(False)
        start = _with_first_model(config, meta, world)
        late = cuts and starts_in_shards(learner, start)
        if late:
            _lay_out(learner, frozen, config, world, cuts)
        if train.init_from:
            lines = start_from(learner, start, tokenizer.spec, tokenizer.fingerprint)
        width, height = target_sizes(config.video, config.bucketing, tokenizer.spec.spatial)[0]
        frames = config.video.num_frames
        prompts, evaluated = settings.load_prompts(config.seed, frames > 1, width, height)
        states = [part.state_dict() for part in (learner, *frozen)]
        origin = {"source": start.train.init_from, "crc32": sum_of(states, prompts.captions)}
        if meta:
            check_origin(meta, origin, resumed)
        if not late:  # the sum must not depend on the number of processes
            _lay_out(learner, frozen, config, world, cuts)
        state = TrainState.create(learner, train, config.ema)

        def save(files: Files, best: bool) -> None:
            meta = checkpoint.Meta(
                state.step,
                config_io.encode(config),
                tokenizer.spec,
                tokenizer.fingerprint,
                alphas(learner.model),
                origin,
            )
            folder, keep = config.run_dir, (train.keep_last, train.keep_every_steps)
            if config.lora.enabled:
                adapted = lora_state(learner.model)
                files = {**files, "lora": {key: whole(value) for key, value in adapted.items()}}
            if best:  # the weights that were scored, which are not averaged
                folder, keep = config.run_dir / "best", (1, 0)
                files = {name: files[name] for name in ("model", "lora") if name in files}
            checkpoint.save(folder, meta, files, *keep, world)

        session = Session(
            config=settings,
            train=train,
            seed=config.seed,
            state=state,
            tokenizer=tokenizer,
            prompts=prompts,
            evaluated=evaluated,
            width=width,
            height=height,
            frames=frames,
            run_dir=config.run_dir,
            save=save,
            world=world,
            model=model,
            captions=config.captions,
            start=origin["crc32"],
        )
        origin["data"] = data = data_of(session, config.video)
        if meta:
            check_same_latents(meta, tokenizer.spec, tokenizer.fingerprint, resumed)
            stored = config_io.completed(ExperimentConfig, meta.config)
            now = config_io.encode(config)
            notes = session.restore(resumed) + kept_no_longer(stored, now)
            lines = [
                f"resuming {resumed} at update {state.step}; the reference: {lines[0]}",
                *_changed(settings, stored, now),
                *(f"  {line}" for line in notes + other_rate(stored, now, state.step)),
                *(f"  {line}" for line in other_data(meta.origin.get("data") or [], data)),
            ]
        about = describe_session(session)
        world.print("\n".join([*lines, *expert_notes(config), *idle_keys(config), *about]))
        if dry_run:
            return True
        if world.is_main:
            write_config(
                config.run_dir,
                config_io.to_yaml(config),
                done=state.step >= config.train.max_steps,
            )
            record_start(config.run_dir, world, state.step, "\n".join(about), command)
        session.tracker = stack.enter_context(
            tracking(
                config.track,
                config.run_dir,
                state.step or -1,
                config_io.encode(config),
                world.is_main,
            )
        )
        return post_train(session)


def data_of(session: Session, video: VideoConfig) -> list[dict[str, Any]]:
    """Return what identifies the samples of others that a run learns from, besides its own.
    ConfigError if they do not fit `video`."""
    config = session.config
    if config.algorithm == "srpo" and config.srpo.latents:
        cache = real_latents(session)
        check_pace(cache, video)
        return [contents(cache)]
    if config.algorithm == "dpo" and config.dpo.pairs:
        pairs = stored_pairs(session)
        assert pairs is not None, "the config names them"
        path = Path(config.dpo.pairs)
        row = {"path": with_tilde(str(path.resolve())), "items": len(pairs)}
        return [{"source": "", **row, "crc32": Sum.of_file(path).crc}]
    return []


def describe_session(session: Session) -> list[str]:
    """Return lines on what is about to happen: counts, memory of the stored trajectories, the
    trained noise levels and, with two experts, the one that is trained."""
    config, world = session.config, session.world
    samples = config.prompts_per_epoch * config.group_size
    rows = [
        f"{config.algorithm}: {sum(p.numel() for p in session.policy.reference.values()):,} trained"
        f" parameters on {world.device}, {len(session.prompts)} prompts, updates"
        f" {session.state.step} … {session.train.max_steps}"
    ]
    if session.learner.sharded:
        rows.append(f"weights and their copies are cut over {world.size} processes")
    levels = [round(t, 3) for t in session.times]
    rows += [
        f"noise levels of a rollout: {levels}",
        f"a sample: {session.width} × {session.height}, {session.frames} frames (rewards see "
        f"{list(config.reward_frames) or 'all'}), latents {list(session.shape)}",
    ]
    dimensions = torch.Size(session.shape).numel()
    if config.algorithm == "srpo":
        noisy, clean = config.srpo.sigma_window
        source = (
            f"of {len(real_latents(session))} real samples" if config.srpo.latents else "prompts"
        )
        rows += [
            f"an update: {config.prompts_per_epoch} {source}; stored: {4 * dimensions:,} bytes a"
            " sample, its clean end",
            f"trained noise levels: sigma_window {noisy} … {clean}, entered {config.srpo.step}"
            " beside them",
        ]
    elif not config.compares_samples:
        clean, noisy = session.levels.between
        pairs = stored_pairs(session)
        assert pairs is not None, "the config names them"
        rows.append(f"pairs: {len(pairs)} of {config.dpo.pairs}; {config.dpo.batch} an update")
        if pairs.held_out:
            rows.append(
                f"  {pairs.held_out} more are of prompts that are held out for evaluation, and are"
                " not learned from: posttrain.eval_prompts=0 holds none out"
            )
        rows.append(f"trained noise levels: {noisy:.3f} → {clean:.3f}")
    else:
        noisy = session.rollouts.noisy_steps(0)
        stored = session.rollouts.storage(noisy).bytes(dimensions)
        rows.append(
            f"an epoch: {config.prompts_per_epoch} prompts × {config.group_size} = {samples}"
            f" samples, on each of {world.size} processes {session.micro_batches} micro-batches of"
            f" {config.micro_batch}, {config.updates_per_epoch} updates"
        )
        if config.algorithm == "dpo" and config.dpo.source == "offline":
            pairs = stored_pairs(session)
            made = f"best and worst of {config.dpo.collect} prompts, made once in such epochs"
            if pairs is not None:
                made = f"the {len(pairs)} that this run has made"
            rows.append(f"pairs: {made}; {config.dpo.batch} an update")
        where = "the CPU" if config.storage.offload else str(world.device)
        rows.append(
            f"stored: {stored:,} bytes a sample, {stored * samples / world.size / 1e6:.1f} MB a"
            f" process on {where}"
        )
        touched = [session.times[i : i + 2] for i in noisy] or [session.levels.between[::-1]]
        rows.append("trained noise levels: " + ", ".join(f"{a:.3f} → {b:.3f}" for a, b in touched))
    if trained := session.levels.expert:
        frozen = "low" if trained == "high" else "high"
        rows.append(
            f"experts (boundary {session.levels.boundary}): {trained} is trained; {frozen} is"
            " frozen, for its own levels"
        )
    return rows
