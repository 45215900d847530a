"""Train as a configuration says, from the first step or from the newest checkpoint of a run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch.distributed.fsdp import FSDPModule

from mmdit import config as config_io
from mmdit.adapters import (
    coverage,
    lora_state,
)
from mmdit.adapters.strength import alphas
from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.batches.latent_batches import LatentBatches
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.dataset.buckets import target_sizes
from mmdit.experiment.build import build_learner, build_plan, start_from
from mmdit.experiment.config import ExperimentConfig
from mmdit.interop.wan_pictures import Pictures, check_trainable, picture_of
from mmdit.models import WanModelConfig
from mmdit.tokenizers import build_tokenizer
from mmdit.training import checkpoint
from mmdit.training.continuing import (
    check_same_latents,
    check_weights,
    facts,
    go_on,
    write_config,
)
from mmdit.training.distributed import process_group
from mmdit.training.expert_choice import expert_notes, resolved
from mmdit.training.learner import Learner, beyond_graphs
from mmdit.training.memory.lean import to_bfloat16
from mmdit.training.memory.offload import settle
from mmdit.training.memory.shards import whole
from mmdit.training.origin import check_origin, frozen_elsewhere, sum_of
from mmdit.training.parallel import shard
from mmdit.training.pipeline import Pipeline
from mmdit.training.previews import Previews
from mmdit.training.runs import hold
from mmdit.training.train_state import TrainState
from mmdit.training.trainer import Trainer
from mmdit.training.validation import Validation


def find_start(config: ExperimentConfig, resume: bool, prunes: bool = True) -> Path | None:
    """Return the checkpoint to continue from, every byte of it looked at, or None for a new run. A
    folder that holds a run is never written over. `prunes`: remove what a kill left of older
    checkpoints."""
    run_dir, train = config.run_dir, config.train
    found = checkpoint.latest(run_dir, None if resume else ())
    if resume and found is None:
        raise ValueError(
            f"--resume: no whole checkpoint in {run_dir / 'checkpoints'}; start without --resume"
        )
    if found is not None and not resume:
        raise ValueError(
            f"{run_dir} already holds a run (step {int(found.name[5:])}): continue it with"
            " --resume, choose another experiment_name, or remove the folder"
        )
    if found is not None and prunes:
        checkpoint.prune(
            run_dir, checkpoint.step_of(found), train.keep_last, train.keep_every_steps
        )
    return found


def run_training(
    config: ExperimentConfig, cache_dir: str | Path, device: str = "auto", resume: bool = False
) -> bool:
    """Train as configured; True when max_steps was reached (False: stopped on request, continue
    with resume)."""
    config = resolved(config)
    run_dir = config.run_dir
    with process_group(device, config.train.timeout_minutes) as world, hold(run_dir, world):
        found = world.share(lambda: find_start(config, resume))
        tokenizer = build_tokenizer(config.tokenizer, device=world.device)
        wanted = CacheManifest.of(tokenizer, config.video, config.bucketing, config.preprocess)
        tokenizer = getattr(tokenizer, "plain", tokenizer)
        spec = tokenizer.spec
        cache = open_cache(cache_dir, wanted)
        settings = config.train
        plan = build_plan(config, cache, world.size)
        batches = LatentBatches(
            cache,
            plan,
            rank=world.rank,
            world=world.size,
            accum=settings.grad_accum_steps,
            in_memory=config.data.in_memory,
            num_workers=config.num_workers,
            captions=config.captions,
            crops=getattr(config.model, "crop", False),
        )
        learner = build_learner(config, spec)
        if isinstance(config.model, WanModelConfig):
            for part in learner.parts().values():
                check_trainable(part, config)
                if picture_of(part) != "none":
                    learner.conditions = Pictures(part, tokenizer).of_latents
        if config.train.init_from and found is None:
            for line in start_from(learner, config, spec, tokenizer.fingerprint):
                world.print(line)
        if config.video.num_frames > 1 and found is None:
            learner.model.number_frames(config.seed)
        frozen = frozen_elsewhere(learner)
        origin = {"crc32": sum_of([frozen])} if frozen else {}
        if settings.precision == "pure_bf16":
            to_bfloat16(learner)
        if config.parallel.type == "fsdp" and world.size > 1:
            shard(learner, world, config.parallel)
        settle(learner, settings.offload_blocks, world.device)
        state = TrainState.create(learner, config.train, config.ema, config.alpha_schedule)
        seen = facts(plan.global_batch, world.size)
        if found is not None:
            meta = checkpoint.Meta.read(found)
            check_same_latents(meta, spec, tokenizer.fingerprint, found)
            check_origin(meta, origin, found)
            before = config_io.completed(ExperimentConfig, meta.config)
            for line in go_on(state, found, before, config_io.encode(config), seen):
                world.print(line)
            if state.step >= settings.max_steps:
                world.print(
                    f"  nothing left to do: train.max_steps is {settings.max_steps}; raise it to"
                    " train further"
                )
        check_weights(learner)
        if world.is_main:
            describe(config, learner, plan, run_dir)

        def save(state: TrainState) -> None:
            meta = checkpoint.Meta(
                state.step,
                config_io.encode(config),
                spec,
                tokenizer.fingerprint,
                alphas(learner.model),
                origin,
            )
            files = state.files()
            if config.lora.enabled:  # to hand on: all, and each expert alone
                for name, part in ({"": learner.model} | learner.parts()).items():
                    files["lora_" + name if name else "lora"] = {
                        key: whole(tensor) for key, tensor in lora_state(part).items()
                    }
            checkpoint.save(
                run_dir,
                meta,
                files,
                settings.keep_last,
                settings.keep_every_steps,
                world,
                state.notes() | seen,
            )

        preview = None
        sharded = isinstance(
            learner.model, FSDPModule
        )  # then every process draws, and the main one writes
        if config.train.sample_every_steps and (world.is_main or sharded):
            pipeline = Pipeline(learner, tokenizer, config.train.precision, config.captions)
            width, height = target_sizes(config.video, config.bucketing, spec.spatial)[0]
            preview = Previews(
                pipeline,
                config.train,
                run_dir,
                width,
                height,
                config.video.num_frames,
                config.video.sample_fps,
                config.ema.use_for_sampling,
                writes=world.is_main,
            )
        if preview and found is not None:
            missing = partial(
                preview.is_missing, state.step
            )  # where a kill came between the checkpoint and it
            if world.share(missing) if sharded else missing():
                preview(state)
        validate = Validation(settings, batches, world) if settings.val_every_steps else None
        return Trainer(
            settings,
            config.seed,
            state,
            batches.iterate,
            world,
            run_dir,
            save,
            preview,
            validate,
            config.parallel,
        ).run()


def describe(config: ExperimentConfig, learner: Learner, plan: BatchPlan, run_dir: Path) -> None:
    """Write config.yaml and say what is about to happen."""
    write_config(run_dir, config_io.to_yaml(config))
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    print(f"run folder {run_dir}")
    print(
        f"model {count(learner.model) / 1e6:.1f} M parameters, text encoder"
        f" {count(learner.text_encoder) / 1e6:.1f} M"
    )
    if config.lora.enabled:
        print(coverage(learner.model))
    if config.experts.enabled:
        print(learner.experts.describe())
    for line in expert_notes(config):
        print(line)
    if config.alpha_schedule.enabled:
        print(config.alpha_schedule.describe())
    print(plan.report() + beyond_graphs(plan.table(), config.train.compile), flush=True)
