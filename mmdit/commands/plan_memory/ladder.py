"""The memory that a config's training step will take, and which of the options that save memory
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

# Of CLIP's ViT-H/14: the places of a picture, and the blocks that are run.
CLIP_STATES, CLIP_BLOCKS = 257, 31
ONE_SAMPLE = "train.batch_size=1"


def released_sizes(
    config: WanModelConfig, expert: Literal["high", "low"] | None = None
) -> WanConfig:
    """Return the sizes of the release that `config` names, or of one of its experts, from the
    headers of its files. ConfigError: it cannot be read."""
    try:
        place = locate(config.name_or_path, expert or config.expert)
        sizes = stored_sizes(Checkpoint(place), place)
        return read_config(place, sizes) if place.is_dir() else sizes
    except ValueError as error:
        remedy = f"Before it is there, --variant {' or '.join(SIZES)} plans for it"
        raise ConfigError("model.name_or_path", f"{error}. {remedy}") from None


def variant_sizes(config: ExperimentConfig, variant: str | None) -> WanConfig | None:
    """Return the sizes of a public `variant`; None where there is none. 14B is what `config` makes
    of it: with a picture (`tokenizer.picture`) an I2V model, of Wan 2.2 if an expert is named, and
    FLF2V with two."""
    picture = config.tokenizer.picture
    if variant == "14B" and picture == "first_last":
        return SIZES["FLF2V-14B"]
    if variant == "14B" and picture == "first":
        pair = config.experts.enabled or config.model.expert
        return SIZES["I2V-A14B" if pair else "I2V-14B"]
    return SIZES.get(variant)


def with_pictures(learner: Learner, sizes: WanConfig) -> Learner:
    """Give the model of `learner` empty pictures, if it continues them, in place of those that
    training has (`interop.wan_pictures`); in place."""
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
    """Return the bytes of the picture encoder that an I2V or FLF2V model of Wan 2.1 has beside it,
    in half precision as on a GPU."""
    width = sizes.image_dim
    if not width:
        return 0
    with torch.device("meta"):
        encoder = ClipVision(
            ClipVisionSizes(width, 4 * width, CLIP_BLOCKS, max(1, width // 80), 14, CLIP_STATES)
        )
    return 2 * parameter_count(encoder)


def latent_spec(config: ExperimentConfig, channels: int | None = None) -> LatentSpec:
    """Return the latents of the tokenizer as its config says, or with other `channels`."""
    tokenizer = config.tokenizer
    return LatentSpec(
        channels or tokenizer.latent_d, tokenizer.latent_f, temporal=tokenizer.temporal
    )


def latent_shape(config: ExperimentConfig, channels: int | None = None) -> tuple[int, ...]:
    """Return `(b, f, r, c, d)` of the largest micro-batch as it is cached, its size being the
    bucket with the most cells, or a tile."""
    spec = latent_spec(config, channels)
    sizes = target_sizes(config.video, config.bucketing, spec.spatial)
    grid = max((spec.grid(*size) for size in sizes), key=math.prod)
    if config.video.tile is not None:
        rows, columns = spec.grid(*config.video.tile)
        grid = min(rows, grid[0]), min(columns, grid[1])
    frames = spec.frames(config.video.num_frames)
    cached = 1 if config.tokenizer.low_resolution is None else 2  # the small clip beside the clip
    return config.train.batch_size, frames, *grid, cached * spec.channels


def plan_training(
    config: ExperimentConfig, sizes: WanConfig | None = None, words: int | None = None
) -> MemoryPlan:
    """Return the plan of training as `config` says, in one process. `sizes`: of the Wan transformer
    (None: of its release); `words`: of each caption (None: as many as are read). Frozen encoders
    count with what their files hold, or nothing where embeddings are cached. ConfigError: files
    that are needed cannot be read, or the encoder is a foreign one that is trained.
    """
    pair, beside = config.experts.enabled, 0
    if pair:
        config = _one_expert(config)
    if config.model.released:
        sizes = sizes or released_sizes(config.model)
        beside += clip_bytes(sizes)
        if config.model.boundary is None:  # of no account here
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
    """Return the config of one network of a pair: one of them computes at a time."""
    model = config.model
    return replace(
        config,
        experts=replace(config.experts, enabled=False),
        alpha_schedule=replace(config.alpha_schedule, enabled=False),
        model=replace(model, expert="high") if model.released else model,
    )


def _both_experts(plan: MemoryPlan, config: ExperimentConfig) -> MemoryPlan:
    """Return the plan of a pair, given that of one of its networks: two bases of a release, one
    that is shared of other models, and the adapters of each expert that is trained."""
    both = config.lora.enabled and len(config.experts.trained) == 2
    further = plan.gradients if both else 0
    if config.model.released:
        further += plan.weights - plan.gradients
    count = 2 if both else 1
    return replace(
        plan,
        weights=plan.weights + further,
        host=2 * plan.host - plan.host_activations,  # one network computes at a time
        optimizer=count * plan.optimizer,
        ema=count * plan.ema,
    )


def _stand_in_encoder(config: ExperimentConfig, sizes: WanConfig | None) -> ExperimentConfig:
    """Return the config with an encoder without weights that gives tokens as wide."""
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
    """Return the bytes of a frozen encoder, from the headers of its weight file, or of those in its
    folder. ConfigError: they cannot be read."""
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
    """Yield overrides of `config`, each list saving more memory, and costing more time, than the
    one before; the first is empty. What the rest of the config does not go with is left out."""
    train, steps = config.train, []
    shared = config.experts.enabled and not config.model.released  # the blocks of both experts
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
    chosen: dict[str, str] = {}  # by key: a later step may set the same one
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
    """Return `config` with overrides. ConfigError: they do not go with it."""
    raw = config_io.apply_overrides(config_io.encode(config), list(words))
    return config_io.decode(ExperimentConfig, raw)


def plans_until_fit(
    config: ExperimentConfig,
    gpu_gb: float = math.inf,
    sizes: WanConfig | None = None,
    words: int | None = None,
) -> Iterator[tuple[tuple[str, ...], MemoryPlan]]:
    """Yield the overrides of `memory_options` with their plans, up to the first that `fits`, which
    comes with the largest micro-batch that does; `sizes` and `words` as `plan_training` takes
    them."""
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
    """Return `changes`, which begin with a micro-batch of one sample, with the largest divisor of
    the batch of `train` that `fits` in its place, and their plan. `plan`: that of one sample."""
    batch, best = train.batch_size, (changes, plan)
    sizes = [size for size in range(2, batch + 1) if batch % size == 0]
    while sizes:  # a larger one takes more
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
    """Return whether it leaves a twentieth of `gpu_gb` (1e9 bytes) for what a plan does not see."""
    return plan.total < 0.95e9 * gpu_gb
