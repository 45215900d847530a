"""The root config, the rules between its sections, and the assembly of parts. Scripts turn arguments into calls of this file."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule

from mmdit import config as config_io
from mmdit.adapters import LoRAConfig, check_adapters, coverage, inject, is_adapter, lora_state, merge, remove
from mmdit.adapters.strength import alphas, carry_over, load_alphas, same_strength
from mmdit.config import ConfigError, FilePath
from mmdit.data.batches import BatchPlan, DataConfig, LatentBatches
from mmdit.data.buckets import BucketingConfig, VideoConfig, target_sizes
from mmdit.data.cache import LatentCache, open_cache
from mmdit.data.captions import CaptionsConfig
from mmdit.data.clips import clip_plan
from mmdit.data.frames import PreprocessConfig
from mmdit.data.manifest import CacheManifest
from mmdit.diffusion import DiffusionConfig, FlowMatchingConfig, build_objective
from mmdit.diffusion.experts import ExpertsConfig
from mmdit.interfaces import LatentSpec
from mmdit.interop.wan import load_denoiser
from mmdit.interop.wan_pictures import Pictures, check_trainable, picture_of
from mmdit.interop.wan_release import release_config
from mmdit.models import ModelConfig, TreadConfig, VideoMMDiTConfig, WanModelConfig, build_model
from mmdit.nn.experts import Experts, twin
from mmdit.posttrain.settings import PosttrainConfig
from mmdit.rng import key
from mmdit.text_encoders import ByteLevelConfig, TextEncoderConfig, build_text_encoder
from mmdit.tokenizers import TokenizerConfig, VTPTokenizerConfig, build_tokenizer
from mmdit.training import checkpoint
from mmdit.training.alpha_schedule import AlphaScheduleConfig
from mmdit.training.continuing import (
    check_same_latents,
    check_weights,
    facts,
    go_on,
    trained_before,
    write_config,
)
from mmdit.training.distributed import choose_device, process_group
from mmdit.training.ema import EMAConfig
from mmdit.training.expert_choice import expert_notes, resolved
from mmdit.training.lean import to_bfloat16
from mmdit.training.learner import Learner, beyond_graphs
from mmdit.training.offload import settle
from mmdit.training.origin import check_origin, frozen_elsewhere, sum_of
from mmdit.training.parallel import ParallelConfig, shard
from mmdit.training.pipeline import Pipeline, check_levels
from mmdit.training.previews import Previews
from mmdit.training.runs import hold
from mmdit.training.settings import TrainConfig
from mmdit.training.starting import is_lora, one_expert, start_from_lora
from mmdit.training.stored import whole
from mmdit.training.trainer import Trainer, TrainState
from mmdit.training.trust import check_sizes, refuse_foreign_code, stay_offline
from mmdit.training.validation import Validation


@dataclass(frozen=True)
class ExperimentConfig:
    """One YAML file. Every section is a dataclass beside the code it configures; README lists all keys."""

    experiment_name: str
    output_dir: FilePath = "runs"
    seed: int = 42
    num_workers: int = 4
    video: VideoConfig = field(default_factory=VideoConfig)
    tokenizer: TokenizerConfig = field(default_factory=VTPTokenizerConfig)
    text_encoder: TextEncoderConfig = field(default_factory=ByteLevelConfig)
    model: ModelConfig = field(default_factory=VideoMMDiTConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    flow_matching: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    bucketing: BucketingConfig = field(default_factory=BucketingConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tread: TreadConfig = field(default_factory=TreadConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    alpha_schedule: AlphaScheduleConfig = field(default_factory=AlphaScheduleConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    posttrain: PosttrainConfig | None = None  # for mmdit.scripts.posttrain alone

    def __post_init__(self):
        if Path(self.experiment_name).name != self.experiment_name or self.experiment_name in ("", "..") or "\0" in self.experiment_name:
            raise ConfigError("experiment_name", f"is {self.experiment_name!r}, must be a folder name without separators")
        wan = isinstance(self.model, WanModelConfig)
        target_sizes(self.video, self.bucketing, self.tokenizer.latent_f * (1 + wan))  # every size must suit the tokenizer, and patches
        clip_plan(self.video, LatentSpec(1, temporal=getattr(self.tokenizer, "temporal", 1)))  # ConfigError: what it cannot cut
        if wan:
            self._check_wan()
        elif getattr(self.tokenizer, "picture", "none") != "none":
            raise ConfigError("tokenizer.picture", f"is {self.tokenizer.picture}; only Wan's I2V models take one: set it to none")
        elif self.lora.enabled and self.lora.train_lora_only and not self.train.init_from:
            raise ConfigError("train.init_from", "is empty but lora.train_lora_only is true: adapters would train on random frozen weights; "
                              "name the run, checkpoint or export to adapt")
        if self.model.freeze and (self.lora.enabled or not (wan or self.train.init_from)):
            raise ConfigError("model.freeze", "is true " + ("with lora.enabled, which trains adapters in it; set one of them to false" if
                              self.lora.enabled else "without train.init_from: the text encoder would learn for random weights; name a run"))
        for name in (name for name in ("alpha_schedule", "experts") if getattr(self, name).enabled):
            if not self.lora.enabled:
                raise ConfigError(f"{name}.enabled", "is true, but lora.enabled is false: it is about adapters; set both or none")
            if self.parallel.type == "fsdp":
                raise ConfigError(f"{name}.enabled", "is true with parallel.type fsdp, which cuts what must be whole; use ddp")
            if self.posttrain is not None:
                raise ConfigError(f"{name}.enabled", "is true with a posttrain section, whose loops know nothing of it; remove one")
        if self.experts.enabled and wan and (self.model.expert or len({self.model.boundary, self.experts.boundary} - {None}) > 1):
            raise ConfigError("experts.boundary", f"is {self.experts.boundary}: a pair needs model.boundary alike, model.expert null")
        if self.experts.enabled and not self.lora.train_lora_only:
            raise ConfigError("experts.enabled", "is true with lora.train_lora_only false: both would train their common base")
        if self.alpha_schedule.enabled and self.alpha_schedule.on_change == "ramp" and self.train.compile is not False:
            raise ConfigError("alpha_schedule.on_change", "is ramp: blocks would be compiled anew; set train.compile: false")
        own, stored = self.train, getattr(self.model, "dtype", "float32")
        if getattr(self.model, "products", "") == "float8" and (own.precision == "fp32" or self.lora.enabled or self.posttrain is not None):
            raise ConfigError("model.products", "is float8, for whole models in bfloat16, not with train.precision fp32, lora or posttrain; leave it out")
        if self.parallel.type == "fsdp" and (own.optimizer != "adamw" or own.offload_optimizer or own.offload_blocks or stored == "float8"):
            raise ConfigError("parallel.type", "is fsdp, which cuts parameters, but train.optimizer other than adamw, train.offload_optimizer, "
                              "train.offload_blocks and model.dtype float8 need whole ones; use adamw without these, or ddp")
        if self.num_workers < 0:
            raise ConfigError("num_workers", f"is {self.num_workers}, must not be negative; 0 reads in the training process")
        if own.sample_every_steps:
            self._check_previews()
        if self.posttrain is not None and not (wan or self.train.init_from):
            raise ConfigError("train.init_from", "is empty with a posttrain section, which improves a trained model; name its run")

    def _check_previews(self) -> None:
        """That the sampler of previews has as many noise levels as it has steps."""
        objective = build_objective(self.train.objective, self.diffusion, self.flow_matching)
        frames = LatentSpec(1, temporal=getattr(self.tokenizer, "temporal", 1)).frames(self.video.num_frames)
        check_levels(self.train, objective, frames)

    def _check_wan(self) -> None:
        """What a Wan transformer was made for, and what its trainer can do."""
        flow, train = self.flow_matching, self.train
        if (train.objective, flow.path, flow.prediction, flow.time_scale) != ("flow_matching", "linear", "velocity", 1000.0):
            raise ConfigError("train.objective", "and flow_matching: Wan predicts the velocity on the linear path with time_scale 1000; "
                              "leave these keys at their defaults")
        if self.tread.enabled:
            raise ConfigError("tread.enabled", "is true, but a Wan transformer routes no tokens; remove the section")
        if self.model.expert and train.sample_every_steps:
            raise ConfigError("train.sample_every_steps", f"is {train.sample_every_steps}, but the {self.model.expert}-noise "
                              "expert alone draws no pictures; set it to 0 and use mmdit.scripts.sample, which loads both")

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.experiment_name


def load_experiment_config(path: str | Path, overrides: list[str] = ()) -> ExperimentConfig:
    """Read a YAML config with `section.key=value` overrides; ConfigError says file, line and dotted path."""
    return config_io.load(ExperimentConfig, path, overrides)


# ── parts ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def build_learner(config: ExperimentConfig, spec: LatentSpec, load=load_denoiser) -> Learner:
    """Denoiser, text encoder and objective; initial weights are a function of `config.seed` alone. `load`: gives Wan's."""
    config = resolved(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(config.seed, "weights") & (2**63 - 1))
        text_encoder = build_text_encoder(config.text_encoder)
        flow_matching, experts, wan = config.flow_matching, config.experts, isinstance(config.model, WanModelConfig)
        if wan:
            names = ("high", "low") if experts.enabled else (config.model.expert,)
            networks = {name: load(config.model, spec, text_encoder.dim, name) for name in names}
            model = networks[names[0]]
            if config.model.expert:
                flow_matching = replace(flow_matching, between=config.model.between)
        else:
            model = build_model(config.model, spec.channels, text_encoder.dim, config.tread)
        objective = build_objective(config.train.objective, config.diffusion, flow_matching)
        plan = experts.plan(objective, config.seed) if experts.enabled else None
        if plan:
            model = Experts(networks if wan else {"high": model, "low": twin(model)}, plan.stages.route).requires_grad_(False)
        learner = Learner(model, text_encoder, objective, spec, config.train.cfg_dropout_prob, plan)
        for name, part in learner.parts().items():
            inject(part, config.lora, key(config.seed, name) if name else config.seed)
        if config.lora.enabled and config.lora.train_lora_only:
            text_encoder.requires_grad_(False)
        if config.model.freeze:
            model.requires_grad_(False)
    return learner


def build_plan(config: ExperimentConfig, cache: LatentCache, processes: int = 1) -> BatchPlan:
    """What each step of the training sees of `cache`."""
    train = config.train
    size = train.batch_size * train.grad_accum_steps * processes
    return BatchPlan(cache, config.video, size, config.seed, train.val_share if train.val_every_steps else 0.0)


def find_start(config: ExperimentConfig, resume: bool, prunes: bool = True) -> Path | None:
    """Return the checkpoint to continue from, every byte of it looked at, or None for a new run. A folder that holds a run is
    never written over. `prunes`: remove what a kill left of older checkpoints."""
    run_dir, train = config.run_dir, config.train
    found = checkpoint.latest(run_dir, None if resume else ())
    if resume and found is None:
        raise ValueError(f"--resume: no whole checkpoint in {run_dir / 'checkpoints'}; start without --resume")
    if found is not None and not resume:
        raise ValueError(f"{run_dir} already holds a run (step {int(found.name[5:])}): continue it with --resume, choose another "
                         "experiment_name, or remove the folder")
    if found is not None and prunes:
        checkpoint.prune(run_dir, checkpoint.step_of(found), train.keep_last, train.keep_every_steps)
    return found


def train(config: ExperimentConfig, cache_dir: str | Path, device: str = "auto", resume: bool = False) -> bool:
    """Train as configured; True when max_steps was reached (False: stopped on request, continue with resume)."""
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
        batches = LatentBatches(cache, plan, rank=world.rank, world=world.size, accum=settings.grad_accum_steps,
                                in_memory=config.data.in_memory, num_workers=config.num_workers, captions=config.captions,
                                crops=getattr(config.model, "crop", False))
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
                world.print(f"  nothing left to do: train.max_steps is {settings.max_steps}; raise it to train further")
        check_weights(learner)
        if world.is_main:
            describe(config, learner, plan, run_dir)

        def save(state: TrainState) -> None:
            meta = checkpoint.Meta(state.step, config_io.encode(config), spec, tokenizer.fingerprint, alphas(learner.model), origin)
            files = state.files()
            if config.lora.enabled:  # to hand on: all, and each expert alone
                for name, part in ({"": learner.model} | learner.parts()).items():
                    files["lora_" + name if name else "lora"] = {key: whole(tensor) for key, tensor in lora_state(part).items()}
            checkpoint.save(run_dir, meta, files, settings.keep_last, settings.keep_every_steps, world, state.notes() | seen)

        preview = None
        sharded = isinstance(learner.model, FSDPModule)  # then every process draws, and the main one writes
        if config.train.sample_every_steps and (world.is_main or sharded):
            pipeline = Pipeline(learner, tokenizer, config.train.precision, config.captions)
            width, height = target_sizes(config.video, config.bucketing, spec.spatial)[0]
            preview = Previews(pipeline, config.train, run_dir, width, height, config.video.num_frames, config.video.sample_fps,
                               config.ema.use_for_sampling, writes=world.is_main)
        if preview and found is not None:
            missing = partial(preview.is_missing, state.step)  # where a kill came between the checkpoint and it
            if world.share(missing) if sharded else missing():
                preview(state)
        validate = Validation(settings, batches, world) if settings.val_every_steps else None
        return Trainer(settings, config.seed, state, batches.iterate, world, run_dir, save, preview, validate, config.parallel).run()


SHAPES_WEIGHTS = ("text_encoder", "model", "diffusion", "flow_matching", "tread", "lora", "experts")  # sections, for `start_from`


def start_from(learner: Learner, config: ExperimentConfig, spec: LatentSpec, fingerprint: str) -> list[str]:
    """`train.init_from`: the (averaged) weights of another run under this config's names; new adapters and a new `model.crop` stay as initialised.
    Returns what to tell: the source, and how its model or objective was configured otherwise (it fits, but may not be meant)."""
    if is_lora(config.train.init_from):
        return start_from_lora(learner, config)
    try:
        weights = checkpoint.load_weights(config.train.init_from)
    except ValueError as error:
        raise ConfigError("train.init_from", str(error)) from None
    check_same_latents(weights.meta, spec, fingerprint, weights.source)
    old, new = config_io.completed(ExperimentConfig, weights.meta.config), config_io.encode(config)
    old = {
        name: value
        for name, value in old.items()
        if value is None or isinstance(value, type(new.get(name)))
    }
    tensors, stored = weights.tensors, weights.meta.alphas
    pair = (old.get("experts") or {}).get("enabled")
    if pair and not config.experts.enabled:
        tensors, stored = one_expert(weights, config)
    elif config.experts.enabled and not pair:  # of one model: both experts start from it
        tensors = learner.model.spread(tensors, "model.")
        stored = {f"{name}.{layer}": alpha for name in learner.parts() for layer, alpha in stored.items()}
    check_adapters(learner.state_dict(), tensors, weights.source)
    checkpoint.assign(learner.state_dict(), tensors, str(weights.source),
                      fresh=lambda name: is_adapter(name) or ".crop." in name or not learner.is_stored(name))  # fmt: skip
    carry_over(
        learner.model,
        same_strength(learner.model, stored, bool((old.get("lora") or {}).get("rslora"))),
    )
    changed = [line for name in SHAPES_WEIGHTS for line in config_io.differences(old.get(name), new[name], name)]
    changed += config_io.differences(
        (old.get("train") or {}).get("objective"), config.train.objective, "train.objective"
    )
    changed = [f"configured otherwise there: {line}" for line in changed] + trained_before(old, new)
    return [f"starting from {weights.source}, step {weights.meta.step}", *(f"  {line}" for line in changed)]


def describe(config: ExperimentConfig, learner: Learner, plan: BatchPlan, run_dir: Path) -> None:
    """Write config.yaml and say what is about to happen."""
    write_config(run_dir, config_io.to_yaml(config))
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    print(f"run folder {run_dir}")
    print(f"model {count(learner.model) / 1e6:.1f} M parameters, text encoder {count(learner.text_encoder) / 1e6:.1f} M")
    if config.lora.enabled:
        print(coverage(learner.model))
    if config.experts.enabled:
        print(learner.experts.describe())
    for line in expert_notes(config):
        print(line)
    if config.alpha_schedule.enabled:
        print(config.alpha_schedule.describe())
    print(plan.report() + beyond_graphs(plan.table(), config.train.compile), flush=True)


# ── sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def load_pipeline(path: str | Path, device: str = "auto", use_ema: bool = True, lora: bool | None = True,
                  overrides: list[str] = ()) -> tuple[Pipeline, ExperimentConfig]:
    """A trained model with its tokenizer, ready to sample: `path` is a run folder, a checkpoint folder, an export, or a release of
    Wan. An expert gets its sibling from the release it came from. `lora`: merge its adapters, leave them out, or (None) keep them."""
    where, release = choose_device(device), release_config(path)
    weights = None if release else checkpoint.load_weights(path, use_ema)
    source = weights.source if weights else Path(path)
    raw = config_io.apply_overrides(weights.meta.config if weights else release, list(overrides))
    if release and where.type == "cpu":
        raw["model"]["dtype"] = raw["text_encoder"]["dtype"] = "float32"
    try:
        config = config_io.decode(ExperimentConfig, raw)
    except ConfigError as error:
        raise ConfigError("", f"config stored in {source}: {error}") from None
    config = resolved(config)
    refuse_foreign_code(config, list(overrides), source)
    config = stay_offline(config, list(overrides))
    if getattr(config.text_encoder, "cache_dir", ""):  # a config that came with weights names no folder to write into
        config = replace(config, text_encoder=replace(config.text_encoder, cache_dir=""))
    tokenizer = build_tokenizer(config.tokenizer, device=where)
    tokenizer = getattr(tokenizer, "plain", tokenizer)
    if weights:
        check_same_latents(weights.meta, tokenizer.spec, tokenizer.fingerprint, source)
    if weights:
        check_sizes(config, weights)
    learner = build_learner(config, tokenizer.spec)
    if weights:
        checkpoint.assign(learner.state_dict(), weights.tensors, str(source), fresh=lambda name: not learner.is_stored(name))
        load_alphas(learner.model, weights.meta.alphas)
    if lora is not None:
        (merge if lora else remove)(learner.model)
    precision = config.train.precision if where.type == "cuda" else "fp32"
    pipeline = Pipeline(learner.to(where).eval(), tokenizer, precision, config.captions)
    if isinstance(learner.model, Experts) and isinstance(config.model, WanModelConfig):
        pipeline.low, pipeline.boundary, learner.model = learner.model.low, config.experts.boundary, learner.model.high
    elif isinstance(config.model, WanModelConfig) and config.model.expert:
        sibling = "low" if config.model.expert == "high" else "high"
        other = load_denoiser(config.model, tokenizer.spec, learner.text_encoder.dim, sibling).to(where)
        pipeline.low, pipeline.boundary = other, config.model.boundary
        if sibling == "high":
            learner.model, pipeline.low = other, learner.model
    return pipeline, config
