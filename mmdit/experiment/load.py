"""Load a trained model with its tokenizer, ready to sample, from a run, an export or a release of
Wan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mmdit import config as config_io
from mmdit.adapters import merge, remove
from mmdit.adapters.strength import load_alphas
from mmdit.config import ConfigError
from mmdit.experiment.build import build_learner, with_sibling
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.interop.wan_release import release_config
from mmdit.tokenizers import build_tokenizer
from mmdit.training import checkpoint
from mmdit.training.continuing import check_same_latents
from mmdit.training.distributed import choose_device
from mmdit.training.expert_choice import resolved
from mmdit.training.learner import Learner
from mmdit.training.memory.assigning import assign
from mmdit.training.memory.sampling_offload import Offload
from mmdit.training.pipeline import Pipeline
from mmdit.training.trust import asks_for, check_sizes, refuse_foreign_code, stay_offline


class Loader:
    """Loads checkpoints one after the other, as `load_pipeline` does with the same arguments.
    Checkpoints of one run with equal configs share a pipeline, of which only the weights are
    replaced."""

    def __init__(
        self,
        device: str = "auto",
        use_ema: bool = True,
        overrides: Sequence[str] = (),
        offload: Offload = "none",
    ):
        self.device, self.use_ema = device, use_ema
        self.overrides, self.offload = overrides, offload
        self._last: tuple[Pipeline, ExperimentConfig, checkpoint.Meta] | None = None

    def load(self, path: str | Path) -> tuple[Pipeline, ExperimentConfig, bool]:
        """Return the pipeline of a checkpoint, its config, and whether it is the pipeline of the
        last call with new weights in it."""
        weights = self._other_weights(path)
        if weights is None:
            self._last = None  # free it first: there may not be room for two
            words = (self.device, self.use_ema, True, self.overrides, self.offload)
            pipeline, config = load_pipeline(path, *words)
            if pipeline.checkpoint is not None and pipeline.checkpoint.is_dir():
                self._last = pipeline, config, checkpoint.Meta.read(pipeline.checkpoint)
            return pipeline, config, False
        assert self._last is not None, "there is a pipeline that they fit"
        pipeline, config, _ = self._last
        _put(weights, pipeline.learner)
        pipeline.checkpoint, pipeline.step = weights.source, weights.meta.step
        return pipeline, config, True

    def _other_weights(self, path: str | Path) -> checkpoint.Weights | None:
        """Return the weights of a checkpoint if they can replace those in the last pipeline, or
        None if it needs a new one. They cannot if adapters were merged, since these have no
        separate weights any more, or if networks are offloaded."""
        if self._last is None or self.offload != "none":
            return None
        _, config, last = self._last
        if (
            config.lora.enabled
            or config.model.expert
            or not (Path(path) / checkpoint.META).is_file()
        ):
            return None
        meta = checkpoint.Meta.read(Path(path))
        alike = replace(meta, step=last.step) == last
        return checkpoint.load_weights(path, self.use_ema) if alike else None


def _put(weights: checkpoint.Weights, learner: Learner) -> None:
    """Copy the weights of a checkpoint into a learner. ValueError if they do not fit."""
    assign(
        learner.state_dict(),
        weights.tensors,
        str(weights.source),
        fresh=lambda name: not learner.is_stored(name),
    )


def load_pipeline(
    path: str | Path,
    device: str = "auto",
    use_ema: bool = True,
    lora: bool | None = True,
    overrides: Sequence[str] = (),
    offload: Offload = "none",
    wanted: str | None = "both",
) -> tuple[Pipeline, ExperimentConfig]:
    """Return a trained model with its tokenizer, ready to sample, and its config. `path` is a run
    folder, a checkpoint folder, an export, or a release of Wan. If it holds one of a release's two
    experts, the other is loaded from the release, unless `wanted` names the one that it holds, or
    is None: whichever that is. `lora`: merge the adapters (True), leave them out
    (False), or keep them (None). With `offload` other than none, the networks stay on the CPU for
    `offload_pipeline`.
    """
    where, release = choose_device(device), release_config(path)
    if release and not use_ema:
        raise ValueError(
            f"{path} is a release, which holds one set of weights, not the last ones beside their"
            " average: leave --raw_weights out"
        )
    weights = None if release else checkpoint.load_weights(path, use_ema)
    source = weights.source if weights else Path(path)
    if release and where.type == "cpu":
        release["model"]["dtype"] = release["text_encoder"]["dtype"] = "float32"
    stored = weights.meta.config if weights else release
    assert stored is not None, "what has no weights of ours is a release"
    raw = config_io.apply_overrides(stored, list(overrides))
    try:
        config = config_io.decode(ExperimentConfig, raw)
    except ConfigError as error:
        raise ConfigError("", f"config stored in {source}: {error}") from None
    config = resolved(config)
    refuse_foreign_code(config, list(overrides), source)
    config = stay_offline(config, list(overrides))
    # A config that came with weights must not name a folder to write into; the command may.
    if config.text_encoder.cache_dir and not asks_for("text_encoder.cache_dir", list(overrides)):
        config = replace(config, text_encoder=replace(config.text_encoder, cache_dir=""))
    tokenizer = build_tokenizer(config.tokenizer, device=where).plain
    if weights:
        check_same_latents(weights.meta, tokenizer.spec, tokenizer.fingerprint, source)
        check_sizes(config, weights)
    learner = build_learner(config, tokenizer.spec)
    if weights:
        _put(weights, learner)
        load_alphas(learner.model, weights.meta.alphas)
    if lora is not None:
        (merge if lora else remove)(learner.model)
    if wanted not in (None, config.model.expert):
        learner.model = with_sibling(learner, config)
    asked = asks_for("train.precision", list(overrides))
    precision = config.train.precision if where.type == "cuda" or asked else "fp32"
    home = where if offload == "none" else torch.device("cpu")
    pipeline = Pipeline(learner.to(home).eval(), tokenizer, precision, config.captions)
    pipeline.tile = config.video.latent_tile(tokenizer.spec)
    if weights:
        pipeline.checkpoint, pipeline.step = weights.source, weights.meta.step
    if offload != "none":
        pipeline.execution_device = where
    return pipeline, config
