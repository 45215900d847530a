"""Plan the memory that the training step of a config takes, and find which memory-saving options
make it fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from mmdit import config as config_io
from mmdit.commands.plan_memory.memory_plan import SIZES, MemoryPlan, plan_memory, random_denoiser
from mmdit.config import ConfigError
from mmdit.data.dataset.buckets import target_sizes
from mmdit.experiment.build import build_learner
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.files import expanded
from mmdit.interfaces import LatentSpec
from mmdit.interop.wan_weights import locate, read_config, stored_sizes
from mmdit.models import WanModelConfig
from mmdit.models.wan import WanConfig
from mmdit.rng import Draws
from mmdit.text_encoders import HashConfig
from mmdit.text_encoders.clip_vision import ClipVision, ClipVisionSizes
from mmdit.text_encoders.huggingface import HuggingFaceConfig
from mmdit.training.learner import Learner
from mmdit.training.train_config import TrainConfig
from mmdit.weights import Checkpoint, parameter_count

# For CLIP's ViT-H/14: the tokens of a picture, and the blocks that are run.
CLIP_STATES, CLIP_BLOCKS = 257, 31
ONE_SAMPLE = "train.batch_size=1"


def released_sizes(
    config: WanModelConfig, expert: Literal["high", "low"] | None = None
) -> WanConfig:
    """Return the sizes of the release that `config` names, or of one of its experts, from the
    headers of its files. ConfigError if these cannot be read."""
    try:
        place = locate(config.name_or_path, expert or config.expert)
        sizes = stored_sizes(Checkpoint(place), place)
        return read_config(place, sizes) if place.is_dir() else sizes
    except ValueError as error:
        remedy = f"Before it is there, --variant {' or '.join(SIZES)} plans for it"
        raise ConfigError("model.name_or_path", f"{error}. {remedy}") from None


def variant_sizes(config: ExperimentConfig, variant: str | None) -> WanConfig | None:
    """Return the sizes of a public `variant`; None if there is no such variant. For 14B they depend
    on `config`: with a first picture (`tokenizer.picture`) it is an I2V model, of Wan 2.2 if an
    expert is named or two are trained; with two pictures it is FLF2V."""
    picture = config.tokenizer.picture
    if variant == "14B" and picture == "first_last":
        return SIZES["FLF2V-14B"]
    if variant == "14B" and picture == "first":
        pair = config.experts.enabled or config.model.expert
        return SIZES["I2V-A14B" if pair else "I2V-14B"]
    return SIZES.get(variant)


def with_pictures(learner: Learner, sizes: WanConfig) -> Learner:
    """Replace, in place, the pictures that a model continues by empty ones: training would make
    these with `interop.wan_pictures`. Return `learner`."""
    further = sizes.in_dim - sizes.out_dim
    if not further:
        return learner

    def conditions(latents: Tensor, draws: Draws) -> tuple[Tensor, dict]:
        inputs = {"y": latents.new_zeros(*latents.shape[:-1], further, dtype=torch.float32)}
        if sizes.image_dim:
            states = sizes.image_positions or CLIP_STATES
            shape = (len(latents), states, sizes.image_dim)
            inputs["clip"] = latents.new_zeros(shape, dtype=torch.float32)
        return latents, inputs

    learner.conditions = conditions
    return learner


def clip_bytes(sizes: WanConfig) -> int:
    """Return the size in bytes of the picture encoder of a Wan 2.1 I2V or FLF2V model, in half
    precision as on a GPU; 0 for other models."""
    width = sizes.image_dim
    if not width:
        return 0
    with torch.device("meta"):
        encoder = ClipVision(
            ClipVisionSizes(width, 4 * width, CLIP_BLOCKS, max(1, width // 80), 14, CLIP_STATES)
        )
    return 2 * parameter_count(encoder)


def latent_spec(config: ExperimentConfig, channels: int | None = None) -> LatentSpec:
    """Return the spec of the tokenizer's latents from its config alone, or with other
    `channels`."""
    tokenizer = config.tokenizer
    return LatentSpec(
        channels or tokenizer.latent_d, tokenizer.latent_f, temporal=tokenizer.temporal
    )


def latent_shape(config: ExperimentConfig, channels: int | None = None) -> tuple[int, ...]:
    """Return the shape `(b, f, r, c, d)` of the largest micro-batch of cached latents: of the
    bucket with the most cells, or of a tile."""
    spec = latent_spec(config, channels)
    sizes = target_sizes(config.video, config.bucketing, spec.spatial)
    grid = max((spec.grid(*size) for size in sizes), key=math.prod)
    if config.video.tile is not None:
        rows, columns = spec.grid(*config.video.tile)
        grid = min(rows, grid[0]), min(columns, grid[1])
    frames = spec.frames(config.video.num_frames)
    cached = 1 if config.tokenizer.low_resolution is None else 2  # the small clip is beside it
    return config.train.batch_size, frames, *grid, cached * spec.channels


def plan_training(
    config: ExperimentConfig, sizes: WanConfig | None = None, words: int | None = None
) -> MemoryPlan:
    """Return the plan for training as `config` says, in one process. `sizes`: those of the Wan
    transformer (None: of its release); `words`: the length of each caption (None: as long as can be
    read). A frozen encoder counts with the size of its files, or with nothing if embeddings are
    cached. ConfigError if files that are needed cannot be read, or an encoder of other programs is
    to be trained."""
    pair, beside = config.experts.enabled, 0
    if pair:
        config = _one_expert(config)
    if config.model.released:
        sizes = sizes or released_sizes(config.model)
        beside += clip_bytes(sizes)
        if config.model.boundary is None:  # any value: it changes no size
            config = replace(config, model=replace(config.model, boundary=0.875))
    if config.text_encoder.released:
        if not config.text_encoder.cache_dir:
            beside += encoder_bytes(config.text_encoder)
        config = _stand_in_encoder(config, sizes)
    spec = latent_spec(config, sizes.out_dim if sizes else None)
    shape = latent_shape(config, spec.channels)
    caption = " ".join(f"w{i}" for i in range(words or config.text_encoder.max_length))

    def build() -> Learner:
        if sizes is None:
            return build_learner(config, spec)
        network = lambda run, *_: random_denoiser(sizes, run.model)  # noqa: E731
        return with_pictures(build_learner(config, spec, network), sizes)

    result = plan_memory(build, config.train, config.ema, shape, [caption] * shape[0])
    if pair:
        result = _both_experts(result, config)
    return replace(result, weights=result.weights + beside)


def _one_expert(config: ExperimentConfig) -> ExperimentConfig:
    """Return the config for one network of a pair: only one computes at a time."""
    model = config.model
    return replace(
        config,
        experts=replace(config.experts, enabled=False),
        alpha_schedule=replace(config.alpha_schedule, enabled=False),
        model=replace(model, expert="high") if model.released else model,
    )


def _both_experts(plan: MemoryPlan, config: ExperimentConfig) -> MemoryPlan:
    """Return the plan for a pair, given the plan for one of its networks. A release has two bases,
    other models share one; the adapters of every trained expert are added."""
    both = config.lora.enabled and len(config.experts.trained) == 2
    further = plan.gradients if both else 0
    if config.model.released:
        further += plan.weights - plan.gradients
    count = 2 if both else 1
    return replace(
        plan,
        weights=plan.weights + further,
        host=2 * plan.host - plan.host_activations,  # only one network computes at a time
        optimizer=count * plan.optimizer,
        ema=count * plan.ema,
    )


def _stand_in_encoder(config: ExperimentConfig, sizes: WanConfig | None) -> ExperimentConfig:
    """Return the config with an encoder that has no weights and gives tokens of the same width."""
    text = config.text_encoder
    if not text.freeze:
        raise ConfigError(
            "text_encoder.freeze",
            "is false: the plan knows frozen encoders of other programs only",
        )
    width = sizes.text_dim if sizes else text.dim
    if width is None:
        raise ConfigError(
            "text_encoder.dim", "is not given; to plan, write the width of the encoder's tokens"
        )
    return replace(config, text_encoder=HashConfig(dim=width, max_length=text.max_length))


def encoder_bytes(config: HuggingFaceConfig) -> int:
    """Return the size in bytes of a frozen encoder, from the headers of its weight file or of those
    in its folder. ConfigError if they cannot be read."""
    path = expanded(config.name_or_path)
    files = [*sorted(path.glob("*t5*enc*.pth")), *sorted(path.glob("text_encoder")), path]
    place = path if path.is_file() else files[0]
    try:
        count = sum(math.prod(entry.shape) for entry in Checkpoint(place).entries.values())
    except ValueError as error:
        message = f"{error}. With cache_dir set the encoder is not loaded, nor counted"
        raise ConfigError("text_encoder.name_or_path", message) from None
    return count * getattr(torch, config.dtype).itemsize


def memory_options(config: ExperimentConfig, blocks: int) -> Iterator[tuple[str, ...]]:
    """Yield lists of overrides of `config`, the first empty, each of which saves more memory and
    costs more time than the one before. Overrides that contradict the rest of the config are left
    out."""
    train, steps = config.train, []
    shared = config.experts.enabled and not config.model.released  # blocks belong to both
    frozen = config.model.freeze or (config.lora.enabled and config.lora.train_lora_only)
    if train.batch_size > 1:
        accumulated = train.batch_size * train.grad_accum_steps
        steps.append((ONE_SAMPLE, f"train.grad_accum_steps={accumulated}"))
    steps += [(option,) for option in config.model.memory_options(frozen)]
    if frozen and not shared and train.offload_blocks < blocks:
        steps.append((f"train.offload_blocks={blocks}",))
    if not frozen and train.precision != "pure_bf16":
        steps.append(("train.precision=pure_bf16",))
    if not frozen and not train.offload_optimizer:
        steps.append(("train.offload_optimizer=true",))
    chosen: dict[str, str] = {}  # by key: a later step may set the same key again
    yield ()
    for step in steps:
        wanted = chosen | {word.partition("=")[0]: word for word in step}
        try:
            changed(config, wanted.values())
        except ConfigError:
            continue
        chosen = wanted
        yield tuple(chosen.values())


def changed(config: ExperimentConfig, words: Iterable[str]) -> ExperimentConfig:
    """Return `config` with overrides. ConfigError if they contradict it."""
    raw = config_io.apply_overrides(config_io.encode(config), list(words))
    return config_io.decode(ExperimentConfig, raw)


def plans_until_fit(
    config: ExperimentConfig,
    gpu_gb: float = math.inf,
    sizes: WanConfig | None = None,
    words: int | None = None,
) -> Iterator[tuple[tuple[str, ...], MemoryPlan]]:
    """Yield the lists of overrides of `memory_options` with their plans, up to the first that
    `fits`, for which the largest micro-batch that fits is chosen. `sizes` and `words`: see
    `plan_training`."""
    if config.model.released and sizes is None:
        sizes = released_sizes(config.model, "high" if config.experts.enabled else None)
    blocks = sizes.num_layers if sizes else config.model.depth

    def planned(changes: tuple[str, ...]) -> MemoryPlan:
        return plan_training(changed(config, changes), sizes, words)

    for changes in memory_options(config, blocks):
        plan = planned(changes)
        if ONE_SAMPLE in changes and fits(plan, gpu_gb):
            changes, plan = _largest_micro_batch(config.train, changes, plan, planned, gpu_gb)
        yield changes, plan
        if fits(plan, gpu_gb):
            return


def _largest_micro_batch(
    train: TrainConfig,
    changes: tuple[str, ...],
    plan: MemoryPlan,
    planned: Callable[[tuple[str, ...]], MemoryPlan],
    gpu_gb: float,
) -> tuple[tuple[str, ...], MemoryPlan]:
    """Return `changes`, which begin with a micro-batch of one sample, with the largest micro-batch
    that `fits` instead, and the plan for that. The candidates are the divisors of
    `train.batch_size`. `plan`: the plan for one sample."""
    batch, best = train.batch_size, (changes, plan)
    sizes = [size for size in range(2, batch + 1) if batch % size == 0]
    while sizes:  # a larger micro-batch needs more memory
        middle = len(sizes) // 2
        steps = batch // sizes[middle] * train.grad_accum_steps
        shape = (f"train.batch_size={sizes[middle]}", f"train.grad_accum_steps={steps}")
        larger = (*shape, *changes[2:])
        plan = planned(larger)
        if fits(plan, gpu_gb):
            best, sizes = (larger, plan), sizes[middle + 1 :]
        else:
            sizes = sizes[:middle]
    return best


def fits(plan: MemoryPlan, gpu_gb: float) -> bool:
    """Return whether a plan leaves 5 % of `gpu_gb` (1e9 bytes) free for what it does not count."""
    return plan.total < 0.95e9 * gpu_gb
