"""Load a trained model with its tokenizer, ready to sample, from a run, an export or a release of
Wan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mmdit import config as config_io
from mmdit.adapters import (
    merge,
    remove,
)
from mmdit.adapters.strength import load_alphas
from mmdit.config import ConfigError
from mmdit.experiment.build import build_learner
from mmdit.experiment.config import ExperimentConfig
from mmdit.interop.wan import load_denoiser
from mmdit.interop.wan_release import release_config
from mmdit.models import WanModelConfig
from mmdit.nn.experts import Experts
from mmdit.tokenizers import build_tokenizer
from mmdit.training import checkpoint
from mmdit.training.continuing import (
    check_same_latents,
)
from mmdit.training.distributed import choose_device
from mmdit.training.expert_choice import resolved
from mmdit.training.memory.sampling_offload import Offload
from mmdit.training.pipeline import Pipeline
from mmdit.training.trust import check_sizes, refuse_foreign_code, stay_offline


def load_pipeline(
    path: str | Path,
    device: str = "auto",
    use_ema: bool = True,
    lora: bool | None = True,
    overrides: Sequence[str] = (),
    offload: Offload = "none",
) -> tuple[Pipeline, ExperimentConfig]:
    """A trained model with its tokenizer, ready to sample: `path` is a run folder, a checkpoint
    folder, an export, or a release of Wan. If it is one of Wan's two experts, the other is loaded
    from the release that it came from. `lora`: merge its adapters, leave them out, or (None) keep
    them. `offload`: other than none, the networks stay on the CPU for `offload_pipeline`.
    """
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
    if getattr(
        config.text_encoder, "cache_dir", ""
    ):  # a config that came with weights names no folder to write into
        config = replace(config, text_encoder=replace(config.text_encoder, cache_dir=""))
    tokenizer = build_tokenizer(config.tokenizer, device=where)
    tokenizer = getattr(tokenizer, "plain", tokenizer)
    if weights:
        check_same_latents(weights.meta, tokenizer.spec, tokenizer.fingerprint, source)
    if weights:
        check_sizes(config, weights)
    learner = build_learner(config, tokenizer.spec)
    if weights:
        checkpoint.assign(
            learner.state_dict(),
            weights.tensors,
            str(source),
            fresh=lambda name: not learner.is_stored(name),
        )
        load_alphas(learner.model, weights.meta.alphas)
    if lora is not None:
        (merge if lora else remove)(learner.model)
    precision = config.train.precision if where.type == "cuda" else "fp32"
    home = where if offload == "none" else torch.device("cpu")
    pipeline = Pipeline(learner.to(home).eval(), tokenizer, precision, config.captions)
    if offload != "none":
        pipeline.execution_device = where
    if isinstance(learner.model, Experts) and isinstance(config.model, WanModelConfig):
        pipeline.low, pipeline.boundary, learner.model = (
            learner.model.low,
            config.experts.boundary,
            learner.model.high,
        )
    elif isinstance(config.model, WanModelConfig) and config.model.expert:
        sibling = "low" if config.model.expert == "high" else "high"
        other = load_denoiser(config.model, tokenizer.spec, learner.text_encoder.dim, sibling).to(
            home
        )
        pipeline.low, pipeline.boundary = other, config.model.boundary
        if sibling == "high":
            learner.model, pipeline.low = other, learner.model
    return pipeline, config
