"""The memory that a config's training step will take, and which of the options that save memory
make it fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mmdit import config as config_io
from mmdit.commands.plan_memory.memory_plan import SIZES, MemoryPlan, plan_memory, random_denoiser
from mmdit.config import ConfigError
from mmdit.data.dataset.buckets import target_sizes
from mmdit.experiment.build import build_learner
from mmdit.experiment.config import ExperimentConfig
from mmdit.interfaces import LatentSpec
from mmdit.interop.wan import infer_config, locate, official_names, read_config
from mmdit.models import WanModelConfig
from mmdit.models.wan import WanConfig
from mmdit.text_encoders import HashConfig
from mmdit.text_encoders.clip_vision import ClipVision, ClipVisionSizes
from mmdit.text_encoders.huggingface import HuggingFaceConfig
from mmdit.training.learner import Learner
from mmdit.weights import Checkpoint

CLIP_STATES, CLIP_BLOCKS = (
    257,
    31,
)  # of CLIP's ViT-H/14: places of a picture, and the blocks that are run


def released_sizes(
    config: WanModelConfig, expert: Literal["high", "low"] | None = None
) -> WanConfig:
    """Of the release that `config` names, or of one of its experts, from the headers of its files.
    ConfigError: it cannot be read."""
    try:
        place = locate(config.name_or_path, expert or config.expert)
        stored = Checkpoint(place)
        names = official_names(list(stored.entries))[0]
        sizes = infer_config(
            {names[name]: entry.shape for name, entry in stored.entries.items()}, place
        )
        return read_config(place, sizes) if place.is_dir() else sizes
    except ValueError as error:
        remedy = f"Before it is there, --variant {' or '.join(SIZES)} plans for it"
        raise ConfigError("model.name_or_path", f"{error}. {remedy}") from None


def variant_sizes(config: ExperimentConfig, variant: str | None) -> WanConfig | None:
    """Return the sizes of a public `variant`; None where there is none. 14B is what `config` makes
    of it: with a picture (`tokenizer.picture`) an I2V model, of Wan 2.2 if an expert is named, and
    FLF2V with two."""
    picture = getattr(config.tokenizer, "picture", "none")
    if variant == "14B" and picture != "none":
        expert = config.experts.enabled or getattr(config.model, "expert", None)
        variant = "FLF2V-14B" if picture == "first_last" else "I2V-A14B" if expert else "I2V-14B"
    return SIZES.get(variant)


def with_pictures(learner: Learner, sizes: WanConfig) -> Learner:
    """`learner` with random pictures for a model that continues them: what training tells it
    (`interop.wan_pictures`)."""
    further = sizes.in_dim - sizes.out_dim
    if not further:
        return learner

    def conditions(latents: Tensor) -> tuple[Tensor, dict]:
        inputs = {"y": torch.zeros(*latents.shape[:-1], further, device=latents.device)}
        if sizes.image_dim:
            inputs["clip"] = torch.zeros(
                len(latents),
                sizes.image_positions or CLIP_STATES,
                sizes.image_dim,
                device=latents.device,
            )
        return latents, inputs

    learner.conditions = conditions
    return learner


def clip_bytes(sizes: WanConfig) -> int:
    """Of the picture encoder that an I2V or FLF2V model of Wan 2.1 has beside it, in half precision
    as on a GPU."""
    if not sizes.image_dim:
        return 0
    with torch.device("meta"):
        encoder = ClipVision(
            ClipVisionSizes(
                sizes.image_dim,
                4 * sizes.image_dim,
                CLIP_BLOCKS,
                max(1, sizes.image_dim // 80),
                14,
                CLIP_STATES,
            )
        )
    return 2 * sum(p.numel() for p in encoder.parameters())


def latent_shape(config: ExperimentConfig, channels: int | None = None) -> tuple[int, ...]:
    """`(b, f, r, c, d)` of the largest micro-batch, its size being the bucket with the most
    cells."""
    tokenizer = config.tokenizer
    spec = LatentSpec(
        channels or tokenizer.latent_d,
        tokenizer.latent_f,
        temporal=getattr(tokenizer, "temporal", 1),
    )
    grids = [
        spec.grid(*size)
        for size in target_sizes(config.video, config.bucketing, tokenizer.latent_f)
    ]
    return (
        config.train.batch_size,
        spec.frames(config.video.num_frames),
        *max(grids, key=math.prod),
        spec.channels,
    )


def plan(
    config: ExperimentConfig, sizes: WanConfig | None = None, words: int | None = None
) -> MemoryPlan:
    """Of training as `config` says, in one process; `sizes`: of the Wan transformer (None: of its
    release), `words`: of each caption (None: as many as are read). Frozen encoders count with what
    their files hold, or nothing where embeddings are cached. ConfigError: files that are needed
    cannot be read, or the encoder is a foreign one that is trained.
    """
    wan, text = isinstance(config.model, WanModelConfig), config.text_encoder
    pair, further = config.experts.enabled, 0
    if pair:  # one of them computes at a time
        off = {
            name: replace(getattr(config, name), enabled=False)
            for name in ("experts", "alpha_schedule")
        }
        config = replace(
            config, **off, model=replace(config.model, expert="high") if wan else config.model
        )
    if wan:
        sizes = sizes or released_sizes(config.model)
        further += clip_bytes(sizes)
        config = replace(
            config, model=replace(config.model, boundary=config.model.boundary or 0.875)
        )  # of no account here
    if isinstance(text, HuggingFaceConfig):
        if not text.freeze:
            raise ConfigError(
                "text_encoder.freeze",
                "is false: the plan knows frozen encoders of other programs only",
            )
        width = sizes.text_dim if wan else text.dim
        if width is None:
            raise ConfigError(
                "text_encoder.dim", "is not given; to plan, write the width of the encoder's tokens"
            )
        if not text.cache_dir:
            further += encoder_bytes(text)
        config = replace(config, text_encoder=HashConfig(dim=width, max_length=text.max_length))
    shape = latent_shape(config, sizes.out_dim if wan else None)
    spec = LatentSpec(
        shape[-1], config.tokenizer.latent_f, temporal=getattr(config.tokenizer, "temporal", 1)
    )
    captions = [" ".join(f"w{i}" for i in range(words or config.text_encoder.max_length))] * shape[
        0
    ]

    def load(settings: WanModelConfig, *_) -> nn.Module:
        return random_denoiser(sizes, settings)

    def build() -> Learner:
        learner = build_learner(config, spec, load)
        return with_pictures(learner, sizes) if wan else learner

    result = plan_memory(build, config.train, config.ema, shape, captions)
    if pair:
        adapters = result.gradients * (config.lora.enabled and len(config.experts.trained) - 1)
        base, count = result.weights - result.gradients if wan else 0, 2 if adapters else 1
        result = replace(
            result,
            weights=result.weights + base + adapters,
            host=2 * result.host,
            optimizer=count * result.optimizer,
            ema=count * result.ema,
        )
    return replace(result, weights=result.weights + further)


def encoder_bytes(config: HuggingFaceConfig) -> int:
    """Of a frozen encoder, from the headers of its weight file, or of those in its folder.
    ConfigError: they cannot be read."""
    path = Path(config.name_or_path).expanduser()
    found = (
        [path]
        if path.is_file()
        else [*sorted(path.glob("*t5*enc*.pth")), *sorted(path.glob("text_encoder")), path]
    )
    try:
        count = sum(math.prod(entry.shape) for entry in Checkpoint(found[0]).entries.values())
    except ValueError as error:
        message = f"{error}. With cache_dir set the encoder is not loaded, nor counted"
        raise ConfigError("text_encoder.name_or_path", message) from None
    return count * getattr(torch, config.dtype).itemsize


def rungs(config: ExperimentConfig, blocks: int) -> Iterator[tuple[str, ...]]:
    """Overrides of `config`, each list saving more memory, and costing more time, than the one
    before; first none."""
    train, steps = config.train, []
    frozen = config.lora.enabled and config.lora.train_lora_only or config.model.freeze
    stored = getattr(config.model, "dtype", None) if frozen else None
    if train.batch_size > 1:
        steps.append(
            (
                "train.batch_size=1",
                f"train.grad_accum_steps={train.batch_size * train.grad_accum_steps}",
            )
        )
    steps += [("model.dtype=bfloat16",)] * (stored == "float32")
    steps += [("model.checkpointing=true",)] * (not config.model.checkpointing)
    steps += [("model.dtype=float8",)] * (stored in ("float32", "bfloat16"))
    if frozen:
        steps += [(f"train.offload_blocks={blocks}",)] * (train.offload_blocks < blocks)
    else:
        steps += [("train.precision=pure_bf16",)] * (train.precision != "pure_bf16")
        steps += [("train.offload_optimizer=true",)] * (not train.offload_optimizer)
    for count in range(len(steps) + 1):
        chosen: dict[str, str] = {
            word.partition("=")[0]: word for step in steps[:count] for word in step
        }
        yield tuple(chosen.values())


def climb(
    config: ExperimentConfig,
    gpu_gb: float = math.inf,
    sizes: WanConfig | None = None,
    words: int | None = None,
) -> Iterator[tuple[tuple[str, ...], MemoryPlan]]:
    """Rungs and their plans, up to the first that `fits`; of `sizes` and `words` as `plan` takes
    them."""
    wan = isinstance(config.model, WanModelConfig)
    if wan and sizes is None:
        sizes = released_sizes(config.model, "high" if config.experts.enabled else None)
    for changes in rungs(config, sizes.num_layers if wan else config.model.depth):
        raw = config_io.apply_overrides(config_io.encode(config), list(changes))
        found = plan(config_io.decode(ExperimentConfig, raw), sizes, words)
        yield changes, found
        if fits(found, gpu_gb):
            return


def fits(found: MemoryPlan, gpu_gb: float) -> bool:
    """Whether it leaves a twentieth of `gpu_gb` (1e9 bytes) for what a plan does not see."""
    return found.total < 0.95e9 * gpu_gb
