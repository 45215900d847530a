"""Train as a configuration says, from the first step or from the newest checkpoint of a run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdit import config as config_io
from mmdit.adapters import coverage, lora_state
from mmdit.adapters.strength import alphas
from mmdit.config import ConfigError
from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.batches.latent_batches import contents
from mmdit.data.batches.mixture import MixedPlan
from mmdit.data.dataset.buckets import target_sizes
from mmdit.diagnostics.clip_score import PreviewScore
from mmdit.experiment.build import (
    build_encoder,
    build_learner,
    build_network,
    start_from,
    starts_in_shards,
)
from mmdit.experiment.data_sources import open_batches, sources_of, with_known_names
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.experiment.idle_keys import idle_keys
from mmdit.experiment.turns import check_turns
from mmdit.interfaces import Tokenizer
from mmdit.interop.wan_pictures import Pictures
from mmdit.tokenizers import build_tokenizer
from mmdit.training import checkpoint
from mmdit.training.continuing import (
    check_same_latents,
    check_weights,
    drawn_frames,
    facts,
    go_on,
    number_shards,
    write_config,
)
from mmdit.training.distributed import World, process_group
from mmdit.training.expert_choice import expert_notes, resolved
from mmdit.training.learner import Learner, beyond_graphs
from mmdit.training.memory.lean import to_bfloat16
from mmdit.training.memory.offload import move_to_device
from mmdit.training.memory.shards import whole
from mmdit.training.origin import check_origin, frozen_elsewhere, sum_of
from mmdit.training.parallel import shard
from mmdit.training.pipeline import Pipeline
from mmdit.training.previews import Previews
from mmdit.training.run_start import continues, record_start
from mmdit.training.runs import hold
from mmdit.training.saving import BackgroundSaves, snapshots
from mmdit.training.step_report import bfloat16_slowdown
from mmdit.training.trackers import Tracker, require_library, tracking
from mmdit.training.train_state import TrainState
from mmdit.training.trainer import Trainer
from mmdit.training.validation import Validation
from mmdit.weights import parameter_count


def run_training(
    config: ExperimentConfig,
    cache_dir: str | Path | None,
    device: str = "auto",
    resume: bool = False,
    command: str = "",
) -> bool:
    """Train as configured. Return True when max_steps was reached, False when the training was
    asked to stop (continue with `resume`). `cache_dir`: the cache to train on if `data.sources` is
    empty; `command`: the command line, for the record."""
    config, sources = resolved(config), sources_of(config, cache_dir)
    train = config.train
    with (
        process_group(device, train.timeout_minutes, config.parallel.context_parallel) as world,
        hold(config.run_dir, world),
    ):
        world.share(lambda: require_library(config.track))
        start = agree_on_start(config, resume, world)
        config = with_known_names(config, start)
        sources = config.data.sources or sources
        tokenizer = build_tokenizer(config.tokenizer, device=world.device)
        batches = open_batches(config, tokenizer, sources, world)
        data = [contents(one.cache, one.plan.name) for one in batches.sources if world.is_main]
        run = Run(config, world, tokenizer.plain, batches.plan, start, data)
        check_turns(run.learner.experts, batches.plan, train.max_steps)
        run.continue_from_start()
        check_weights(run.learner)
        if world.is_main:
            done = run.state.step >= train.max_steps
            write_config(config.run_dir, config_io.to_yaml(config), done)
            describe(config, run.learner, run.plan, world.device)
            record_start(config.run_dir, world, run.state.step, run.plan.report(), command)
        with tracking(
            config.track, config.run_dir, run.state.step, config_io.encode(config), world.is_main
        ) as tracker:
            return Trainer(
                train,
                config.seed,
                run.state,
                batches.iterate,
                world,
                config.run_dir,
                run.save,
                run.previews(tracker),
                Validation(train, batches, world) if train.val_every_steps else None,
                config.parallel,
                tracker,
                run.background,
            ).run()


def find_start(
    config: ExperimentConfig, resume: bool, world: World, prunes: bool = True
) -> Path | None:
    """Return the checkpoint to continue from, after checking all of its bytes, or None for a new
    run. ValueError unless a folder with a run is to be continued: it is never overwritten. A
    restart by torchrun continues as with `resume`, or begins anew if nothing was saved yet.
    `prunes`: finish the removal of old checkpoints that a kill interrupted."""
    run_dir = config.run_dir
    again = continues(run_dir, world)
    newest = checkpoint.latest(run_dir, None if resume or again else ())
    if resume and newest is None and not again:
        raise ValueError(
            f"--resume: no whole checkpoint in {run_dir / 'checkpoints'}; start without --resume"
        )
    if newest is not None and not (resume or again):
        raise ValueError(
            f"{run_dir} already holds a run (step {int(newest.name[5:])}): continue it with"
            " --resume, choose another experiment_name, or remove the folder"
        )
    if newest is not None and prunes:
        # Checkpoints that only a changed config would remove stay until the next save; the change
        # has been reported by then.
        stored = config_io.completed(ExperimentConfig, checkpoint.Meta.read(newest).config)
        kept = stored.get("train") or {}
        keep = (kept.get("keep_last", 0), kept.get("keep_every_steps", 0))
        checkpoint.prune(run_dir, checkpoint.step_of(newest), *keep)
    return newest


def agree_on_start(
    config: ExperimentConfig, resume: bool, world: World, prunes: bool = True
) -> Path | None:
    """Return the main process's result of `find_start`; every process must call. ValueError if a
    process does not find that checkpoint on its disk."""
    start = world.share(lambda: find_start(config, resume, world, prunes))
    there = world.gather(start is None or (start / checkpoint.META).is_file())
    if not all(there):
        raise ValueError(
            f"rank {there.index(False)} does not find {start}, from which rank 0 goes on: give all"
            " machines one output_dir on a disk that they share, or copy the checkpoint to the same"
            " place on each"
        )
    return start


@dataclass
class Run:
    """The learner and the state of a training run, and the files written for it. `start`: the
    checkpoint that it continues from, None for a new run."""

    config: ExperimentConfig
    world: World
    tokenizer: Tokenizer
    plan: BatchPlan | MixedPlan
    start: Path | None
    data: list[dict[str, Any]] = field(default_factory=list)  # `contents` of its sources
    learner: Learner = field(init=False)
    state: TrainState = field(init=False)
    origin: dict[str, Any] = field(init=False)  # check sum of what a resume reads from elsewhere
    facts: dict[str, Any] = field(init=False)  # about batches and data; stored in each checkpoint
    drawn: dict[str, Tensor] = field(init=False, default_factory=dict)  # frame numbers for shards
    background: BackgroundSaves | None = field(init=False)  # None: training waits for saves

    def __post_init__(self):
        config = self.config
        cuts = config.parallel.type == "fsdp" and self.world.size > 1
        network = partial(build_network, in_file=cuts)
        encoder = partial(build_encoder, in_file=cuts)
        self.learner = build_learner(config, self.tokenizer.spec, network, encoder)
        self._check_networks()
        late = cuts and self.start is None and starts_in_shards(self.learner, config)
        if cuts and config.video.num_frames > 1:  # shards cannot draw them
            self.drawn = drawn_frames(self.learner.model, config.seed)
        self._initialise(late)
        # Weights that no checkpoint holds are summed before they are moved, sharded or rounded.
        frozen = frozen_elsewhere(self.learner)
        self.origin = {"crc32": sum_of([frozen])} if frozen else {}
        pure_bf16 = config.train.precision == "pure_bf16"
        self.learner.model.share_clips(self.world.context)
        if cuts:
            shard(self.learner, self.world, config.parallel, pure_bf16)
        if late:
            self._start_from()
            number_shards(self.learner, None, self.drawn, self.world)
        if pure_bf16:
            to_bfloat16(self.learner)
        move_to_device(self.learner, config.train.offload_blocks, self.world.device)
        self.state = TrainState.create(
            self.learner, config.train, config.ema, config.alpha_schedule
        )
        self.facts = facts(self.plan.global_batch, self.world.data_size, self.data)
        self.background = BackgroundSaves(self.world) if config.train.save_in_background else None

    def _check_networks(self) -> None:
        """Raise ConfigError for networks that cannot be trained as configured; connect networks
        that continue pictures with these pictures."""
        for network in self.learner.parts().values():
            network.check_trainable(self.config)
            if network.picture != "none":
                self.learner.conditions = Pictures(network, self.tokenizer).of_latents

    def _initialise(self, late: bool) -> None:
        """Set the weights of a new run for step 0. If those of `train.init_from` come `late`, after
        sharding, nothing is set here."""
        config = self.config
        if self.start is not None or late:
            return
        if config.train.init_from:
            self._start_from()
        if config.video.num_frames > 1:
            self.learner.model.number_frames(config.seed)

    def _start_from(self) -> None:
        """Load the weights of `train.init_from`, and print what it reports."""
        spec, fingerprint = self.tokenizer.spec, self.tokenizer.fingerprint
        for line in start_from(self.learner, self.config, spec, fingerprint, self.data):
            self.world.print(line)

    def continue_from_start(self) -> None:
        """Take over the state of the checkpoint `start`, if there is one."""
        if self.start is None:
            return
        meta = checkpoint.Meta.read(self.start)
        check_same_latents(meta, self.tokenizer.spec, self.tokenizer.fingerprint, self.start)
        check_origin(meta, self.origin, self.start)
        before = config_io.completed(ExperimentConfig, meta.config)
        now = config_io.encode(self.config)
        for line in go_on(self.state, self.start, before, now, self.facts):
            self.world.print(line)
        if (before.get("video") or {}).get("num_frames") == 1:
            number_shards(self.learner, self.state.ema, self.drawn, self.world)
        max_steps = self.config.train.max_steps
        if self.state.step >= max_steps:
            self.world.print(
                f"  nothing left to do: train.max_steps is {max_steps}; raise it to train further"
            )

    def save(self, state: TrainState) -> None:
        """Write a checkpoint of `state`; with adapters, also files to share, for all adapters
        together and for each expert."""
        config, model = self.config, self.learner.model
        meta = checkpoint.Meta(
            state.step,
            config_io.encode(config),
            self.tokenizer.spec,
            self.tokenizer.fingerprint,
            alphas(model),
            self.origin,
        )
        files = state.files()
        if config.lora.enabled:
            for name, part in ({"": model} | self.learner.parts()).items():
                files[f"lora_{name}" if name else "lora"] = {
                    key: whole(tensor) for key, tensor in lora_state(part).items()
                }
        notes = state.notes() | self.facts
        keep = (config.train.keep_last, config.train.keep_every_steps)
        if self.background is None:
            checkpoint.save(config.run_dir, meta, files, *keep, self.world, notes)
            return
        files = {name: snapshots(tensors) for name, tensors in files.items()}
        notes = copy.deepcopy(notes)
        self.background.start(
            lambda world: checkpoint.save(config.run_dir, meta, files, *keep, world, notes)
        )

    def previews(self, tracker: Tracker | None = None) -> Previews | None:
        """Return the previews of this training, after drawing a preview that a kill left out
        between a checkpoint and its pictures. None in a process that takes no part in them."""
        config, learner, main = self.config, self.learner, self.world.is_main
        # If processes compute together, all of them draw, and the main one writes.
        together = learner.sharded or self.world.context is not None
        if not config.train.sample_every_steps or not (main or together):
            return None
        pipeline = Pipeline(learner, self.tokenizer, config.train.precision, config.captions)
        pipeline.tile = config.video.latent_tile(learner.spec)
        score = None
        if config.train.sample_clip and main:
            try:
                score = PreviewScore(config.train.sample_clip, self.world.device)
            except ValueError as error:
                raise ConfigError("train.sample_clip", f"cannot score previews: {error}") from None
        width, height = target_sizes(config.video, config.bucketing, learner.spec.spatial)[0]
        previews = Previews(
            pipeline,
            config.train,
            config.run_dir,
            width,
            height,
            config.video.num_frames,
            config.video.sample_fps,
            config.ema.use_for_sampling,
            writes=main,
            tracker=tracker,
            score=score,
        )
        if self.start is not None:
            is_missing = partial(previews.is_missing, self.state.step)
            if self.world.share(is_missing) if together else is_missing():
                previews(self.state)
        return previews


def describe(
    config: ExperimentConfig,
    learner: Learner,
    plan: BatchPlan | MixedPlan,
    device: torch.device,
) -> None:
    """Print what is about to happen."""

    def millions(module: nn.Module) -> str:
        return f"{parameter_count(module) / 1e6:.1f} M"

    print(f"run folder {config.run_dir}")
    print(
        f"model {millions(learner.model)} parameters, text encoder {millions(learner.text_encoder)}"
    )
    if config.lora.enabled:
        print(coverage(learner.model))
    if config.experts.enabled:
        assert learner.experts is not None
        print(learner.experts.describe())
    for line in [*expert_notes(config), *idle_keys(config), *slow_products(config, device)]:
        print(line)
    if config.alpha_schedule.enabled:
        print(config.alpha_schedule.describe())
    if config.video.tile is not None:
        print("training on tiles of {}x{} pixels at drawn places".format(*config.video.tile))
    print(plan.report() + beyond_graphs(plan.table(), config.train.compile), flush=True)


def slow_products(config: ExperimentConfig, device: torch.device) -> Iterator[str]:
    """Yield a line if float32 would be much faster than the bfloat16 that the config asks for."""
    precision = config.train.precision
    if device.type != "cpu" or precision == "fp32":
        return
    times = bfloat16_slowdown()
    if times >= 2:
        yield (
            f"train.precision is {precision}, and products of bfloat16 take {times:.0f} times as"
            " long as those of float32 on this CPU: train.precision=fp32 is faster here"
        )
