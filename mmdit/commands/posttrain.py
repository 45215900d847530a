"""Reward post-training assembled: a trained model, prompts, rewards and one of the loops of
`mmdit.posttrain`."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import torch

from mmdit import config as config_io
from mmdit.adapters import lora_state
from mmdit.adapters.strength import alphas
from mmdit.config import ConfigError
from mmdit.data.dataset.buckets import target_sizes
from mmdit.experiment.build import build_learner, start_from
from mmdit.experiment.config import ExperimentConfig
from mmdit.experiment.run import find_start
from mmdit.files import write_atomically
from mmdit.interop.wan import load_denoiser
from mmdit.interop.wan_pictures import check_trainable, picture_of
from mmdit.models.wan_denoiser import WanDenoiser, WanModelConfig
from mmdit.posttrain.dpo_offline import check_pairs, dpo_offline
from mmdit.posttrain.experts import Pair
from mmdit.posttrain.online import online
from mmdit.posttrain.prompts import load_prompts
from mmdit.posttrain.session import Session
from mmdit.posttrain.srpo import real_latents, srpo
from mmdit.tokenizers import build_tokenizer
from mmdit.training import checkpoint
from mmdit.training.continuing import check_same_latents
from mmdit.training.distributed import process_group
from mmdit.training.expert_choice import expert_notes, resolved
from mmdit.training.memory.offload import settle
from mmdit.training.origin import check_origin, sum_of
from mmdit.training.parallel import ParallelConfig
from mmdit.training.runs import hold
from mmdit.training.trainer import TrainState


def _check(config: ExperimentConfig) -> None:
    """ConfigError for what post-training cannot do, before anything is loaded."""
    settings = config.posttrain
    if settings is None:
        raise ConfigError(
            "posttrain", "is missing; write the section, for example posttrain: {algorithm: grpo}"
        )
    if config.parallel != ParallelConfig():
        raise ConfigError(
            "parallel",
            f"is {config_io.encode(config.parallel)}; every process has the whole model here, and "
            "gradients are added up in float32: remove the section",
        )
    if settings.algorithm == "awm" and settings.awm.ema_kl and not config.ema.enabled:
        raise ConfigError(
            "ema.enabled",
            "is false, but posttrain.awm.ema_kl holds the policy near its average; enable it, or "
            "set that to 0",
        )
    if getattr(config.tokenizer, "picture", "none") != "none":
        raise ConfigError(
            "tokenizer.picture",
            f"is {config.tokenizer.picture}, but post-training gives no pictures to continue; "
            "post-train a T2V or TI2V model",
        )


def posttrain(
    config: ExperimentConfig, device: str = "auto", resume: bool = False, dry_run: bool = False
) -> bool:
    """Post-train as configured; True when it ended, False when it was asked to stop (continue with
    resume)."""
    config = resolved(config)
    _check(config)
    settings, train = config.posttrain, config.train
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(process_group(device, train.timeout_minutes))
        if not dry_run:
            stack.enter_context(hold(config.run_dir, world))
        found = world.share(lambda: find_start(config, resume, prunes=not dry_run))
        tokenizer = build_tokenizer(config.tokenizer, device=world.device)
        learner = build_learner(config, tokenizer.spec)
        if isinstance(learner.model, WanDenoiser) and picture_of(learner.model) != "none":
            raise ConfigError(
                "model.name_or_path",
                f"is {learner.model.config.variant}, which continues a picture; post-training gives"
                " none: post-train a T2V or TI2V model",
            )
        told, pair, expert = [], None, getattr(config.model, "expert", None)
        if isinstance(config.model, WanModelConfig):
            check_trainable(learner.model, config)
            told = [f"starting from {config.model.name_or_path}"]
        if expert:
            other = load_denoiser(
                config.model,
                tokenizer.spec,
                learner.text_encoder.dim,
                "low" if expert == "high" else "high",
            )
            pair = Pair(other.requires_grad_(False).eval().to(world.device), config.model.between)
        meta = checkpoint.Meta.read(found) if found else None
        start = config
        if train.init_from:
            begun = (
                Path(meta.origin.get("source") or train.init_from)
                if meta
                else Path(train.init_from)
            )
            source = world.share(
                lambda: checkpoint.newest(begun if begun.exists() else Path(train.init_from))
            )
            start = replace(config, train=replace(train, init_from=str(source or train.init_from)))
            told = start_from(learner, start, tokenizer.spec, tokenizer.fingerprint)
        learner.text_encoder.requires_grad_(False)
        settle(learner, config.train.offload_blocks, world.device)
        width, height = target_sizes(config.video, config.bucketing, tokenizer.spec.spatial)[0]
        frames = config.video.num_frames
        prompts, evaluated = load_prompts(
            settings.prompts,
            settings.prompt_count,
            config.seed,
            frames > 1,
            width,
            height,
            settings.eval_prompts,
        )
        states = [learner.state_dict(), pair.sibling.state_dict() if pair else {}]
        origin = {"source": start.train.init_from, "crc32": sum_of(states, prompts.captions)}
        if meta:
            check_origin(meta, origin, found)

        def save(session: Session, best: bool) -> None:
            meta = checkpoint.Meta(
                session.state.step,
                config_io.encode(config),
                tokenizer.spec,
                tokenizer.fingerprint,
                alphas(learner.model),
                origin,
            )
            files = session.state.files() | session.files()
            if config.lora.enabled:
                files["lora"] = lora_state(learner.model)
            if best:
                weights = {
                    name: files[name] for name in ("model", "lora") if name in files
                }  # as scored: not averaged
                checkpoint.save(config.run_dir / "best", meta, weights, 1, world=world)
            else:
                checkpoint.save(
                    config.run_dir, meta, files, train.keep_last, train.keep_every_steps, world
                )

        state = TrainState.create(learner, train, config.ema)
        session = Session(
            settings,
            train,
            config.seed,
            state,
            tokenizer,
            prompts,
            evaluated,
            width,
            height,
            frames,
            config.run_dir,
            save,
            world,
            pair,
        )
        if meta:
            check_same_latents(meta, tokenizer.spec, tokenizer.fingerprint, found)
            session.restore(found)
            told = [f"resuming {found} at update {session.state.step}; the reference: {told[0]}"]
            changed = config_io.differences(
                config_io.completed(ExperimentConfig, meta.config), config
            )
            told += [f"  config changed: {line}" for line in changed]
        world.print("\n".join([*told, *expert_notes(config), *plan(session)]))
        if dry_run:
            return True
        if world.is_main:
            write_atomically(config.run_dir / "config.yaml", config_io.to_yaml(config))
        dpo = dpo_offline if settings.dpo.source == "offline" else online
        loop = {"srpo": srpo, "dpo": dpo}.get(settings.algorithm, online)
        return loop(session)


def plan(session: Session) -> list[str]:
    """What is about to happen: geometry, memory of the stored trajectories, windows as noise levels
    and, with two experts, the one that lies there."""
    config, world = session.config, session.world
    samples = config.prompts_per_epoch * config.group_size
    rows = [
        f"{config.algorithm}: {sum(p.numel() for p in session.reference.values()):,} trained"
        f" parameters on {world.device}, {len(session.prompts)} prompts, updates"
        f" {session.state.step} … {session.train.max_steps}"
    ]
    levels = [round(t, 3) for t in session.times]
    rows.append(f"noise levels of a rollout: {levels}")
    rows.append(
        f"a sample: {session.width} × {session.height}, {session.frames} frames (rewards see "
        f"{list(config.reward_frames) or 'all'}), latents {list(session.shape)}"
    )
    dimensions = torch.Size(session.shape).numel()
    if config.algorithm == "srpo":
        noisy, clean = config.srpo.sigma_window
        source = (
            f"of {len(real_latents(session))} real samples" if config.srpo.latents else "prompts"
        )
        rows.append(
            f"an update: {config.prompts_per_epoch} {source}; stored: {4 * dimensions:,} bytes a"
            " sample, its clean end"
        )
        rows.append(
            f"trained noise levels: sigma_window {noisy} … {clean}, entered {config.srpo.step}"
            " beside them"
        )
    else:
        stochastic = session.stochastic(0)
        stored = session.plan(stochastic).bytes(dimensions)
        rows.append(
            f"an epoch: {config.prompts_per_epoch} prompts × {config.group_size} = {samples}"
            f" samples, on each of {world.size} processes {session.micro_batches} micro-batches of"
            f" {config.micro_batch}, {config.updates_per_epoch} updates"
        )
        if config.algorithm == "dpo" and config.dpo.source == "offline":
            check_pairs(session)
            source = (
                config.dpo.pairs
                or f"best and worst of {config.dpo.collect} prompts, made once in such epochs"
            )
            rows.append(f"pairs: {source}; {config.dpo.batch} an update")
        where = "the CPU" if config.storage.offload else str(world.device)
        rows.append(
            f"stored: {stored:,} bytes a sample, {stored * samples / world.size / 1e6:.1f} MB a"
            f" process on {where}"
        )
        drawn = session.pair.between[::-1] if session.pair else (1.0, 0.0)
        touched = [(session.times[i], session.times[i + 1]) for i in stochastic] or [drawn]
        rows.append("trained noise levels: " + ", ".join(f"{a:.3f} → {b:.3f}" for a, b in touched))
    if session.pair:
        trained, frozen = ("high", "low") if session.pair.trains_high else ("low", "high")
        rows.append(
            f"experts (boundary {session.pair.boundary}): {trained} is trained; {frozen} is frozen,"
            " for its own levels"
        )
    return rows
