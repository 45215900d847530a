"""Build the parts of a run from its configuration: the learner, the batch plan, and the weights to
start from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from mmdit import config as config_io
from mmdit.adapters import adapters, check_adapters, inject, is_adapter
from mmdit.adapters.layers import DoRALinear
from mmdit.adapters.strength import carry_over, same_strength
from mmdit.config import ConfigError
from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.cache.latent_cache import LatentCache
from mmdit.diffusion import build_objective
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.interfaces import Boundary, Denoiser, LatentSpec, TextEncoder
from mmdit.interop.wan_weights import load_denoiser
from mmdit.interop.weights_in_files import left_in_file, unpack_weights
from mmdit.models import WanModelConfig, build_model
from mmdit.nn.experts import Experts, shared_copy
from mmdit.rng import key
from mmdit.text_encoders import build_text_encoder
from mmdit.training import checkpoint
from mmdit.training.continuing import check_same_latents, same_draws, trained_before
from mmdit.training.expert_choice import resolved
from mmdit.training.learner import Learner
from mmdit.training.low_resolution import SmallClips
from mmdit.training.memory.assigning import assign
from mmdit.training.memory.shards import local, renamed
from mmdit.training.starting import is_lora, one_expert, start_from_lora

SHAPES_WEIGHTS = (
    "text_encoder",
    "model",
    "diffusion",
    "flow_matching",
    "tread",
    "lora",
    "experts",
)  # sections whose differences `start_from` reports


def build_network(
    config: ExperimentConfig,
    spec: LatentSpec,
    text_dim: int,
    expert: Any = None,
    in_file: bool = False,
) -> Denoiser:
    """Return the denoiser of `config.model` for latents of `spec` and text tokens of width
    `text_dim`: with the weights of its release (those of `expert`, if it has two), or else with
    fresh ones from torch's generator. `in_file`: leave the weights of a release in their files
    until they are sharded."""
    if config.model.released:
        return load_denoiser(cast(WanModelConfig, config.model), spec, text_dim, expert, in_file)
    return build_model(config.model, spec.channels, text_dim, config.tread)


def build_encoder(config: ExperimentConfig, in_file: bool = False) -> TextEncoder:
    """Return the text encoder. `in_file`: leave the weights of a trained UMT5 in their files until
    they are sharded; a frozen encoder is never sharded."""
    lora = config.lora
    trained = not config.text_encoder.freeze and not (lora.enabled and lora.train_lora_only)
    if in_file and trained:
        return build_text_encoder(config.text_encoder, lambda _, *tensor: left_in_file(*tensor))
    return build_text_encoder(config.text_encoder)


def build_learner(
    config: ExperimentConfig,
    spec: LatentSpec,
    network: Callable[..., Denoiser] = build_network,
    encoder: Callable[[ExperimentConfig], TextEncoder] = build_encoder,
) -> Learner:
    """Return denoiser, text encoder and objective as one learner. Fresh weights are a function of
    `config.seed` alone. `network` and `encoder` build the denoiser and the text encoder."""
    config = resolved(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(config.seed, "weights") & (2**63 - 1))
        text_encoder = encoder(config)
        flow_matching = config.flow_matching
        if config.model.expert:
            flow_matching = replace(flow_matching, between=config.model.between)
        objective = build_objective(config.train.objective, config.diffusion, flow_matching)
        if config.experts.enabled:
            schedule = config.experts.schedule(objective, config.seed)
            high = network(config, spec, text_encoder.dim, "high")
            if config.model.released:
                low = network(config, spec, text_encoder.dim, "low")
            else:
                low = shared_copy(high)
            model: Denoiser = Experts(high, low, schedule.boundary).requires_grad_(False)
        else:
            schedule = None
            model = network(config, spec, text_encoder.dim, config.model.expert)
        learner = Learner(
            model, text_encoder, objective, spec, config.train.cfg_dropout_prob, schedule
        )
        if config.tokenizer.low_resolution is not None:
            conditioned = config.model.conditioning == "low_resolution"
            small = SmallClips(spec, config.model.augmentation if conditioned else None)
            learner.conditions = small.of_latents
        for name, part in learner.parts().items():
            inject(part, config.lora, key(config.seed, name) if name else config.seed)
        if config.lora.enabled and config.lora.train_lora_only:
            text_encoder.requires_grad_(False)
        if config.model.freeze:
            model.requires_grad_(False)
    return learner


def with_sibling(
    learner: Learner, config: ExperimentConfig, network: Callable[..., Denoiser] = build_network
) -> Denoiser:
    """Return the network that draws. That is the learner's; or, if it is one of a release's two
    experts, both experts together, the other one as released, frozen and in evaluation mode.
    `config` must be `resolved`; `network` builds the other expert."""
    if config.model.expert is None:
        return learner.model
    other = "low" if config.model.expert == "high" else "high"
    try:
        sibling = network(config, learner.spec, learner.text_encoder.dim, other)
    except ConfigError as error:
        raise ConfigError(
            error.path,
            f"{error.message}; samples are drawn by both experts: name the folder of the release"
            " that holds both by model.name_or_path=FOLDER",
        ) from None
    networks = {config.model.expert: learner.model, other: sibling.requires_grad_(False).eval()}
    assert config.model.boundary is not None, "the config is resolved"
    boundary = Boundary(config.model.boundary, learner.objective.time_scale)
    return Experts(networks["high"], networks["low"], boundary)


def build_plan(
    config: ExperimentConfig, cache: LatentCache, processes: int = 1, name: str = ""
) -> BatchPlan:
    """Return the plan of what each training step sees of `cache`. `name`: of the source, if there
    are several."""
    train = config.train
    size = train.batch_size * train.grad_accum_steps * processes
    held_out = train.val_share if train.val_every_steps else 0.0
    return BatchPlan(cache, config.video, size, config.seed, held_out, name)


def check_kept(learner: Learner, tensors: Mapping[str, Tensor], source: object) -> None:
    """Raise ConfigError if trained weights would replace foreign ones that `learner` leaves frozen:
    its checkpoints would lack them, and a reader would load the release's weights instead."""
    known = learner.state_dict().keys()
    lost = [name for name in tensors if name in known and not learner.is_stored(name)]
    if lost:
        raise ConfigError(
            "train.init_from",
            f"{source} holds trained weights ({len(lost)} tensors, first {lost[0]}) of what this"
            " run leaves frozen, and its checkpoints would lack them: train them here, too, or"
            " export that run and name the export as name_or_path",
        )


@torch.no_grad()
def measure_new_lengths(learner: Learner, loaded: Iterable[str]) -> None:
    """Give new DoRA adapters the row lengths of the weights that they adapt, where those were among
    the `loaded` ones: until now they have the lengths of the earlier weights."""
    named = dict(learner.named_parameters(remove_duplicate=False))  # experts may share a base
    changed = {id(named[name]) for name in loaded if name in named}
    for layer in adapters(learner.model).values():
        if not isinstance(layer, DoRALinear) or id(layer.weight) not in changed:
            continue
        if id(layer.lora_magnitude) not in changed:
            rows = local(layer.weight.detach()).to(layer.precise)
            lengths = rows.square().sum(1).clamp(min=1e-30).sqrt()
            local(layer.lora_magnitude).copy_(lengths)


def starts_in_shards(learner: Learner, config: ExperimentConfig) -> bool:
    """Return whether `train.init_from` is read after the learner was sharded, by each process its
    own rows. It is not if it is a LoRA, or if the model has encoded weights, whose names change
    when they are sharded."""
    source = config.train.init_from
    return bool(source) and not is_lora(source or "") and not learner.model.encoding


def start_from(
    learner: Learner,
    config: ExperimentConfig,
    spec: LatentSpec,
    fingerprint: str,
    data: Sequence[dict[str, Any]] = (),
) -> list[str]:
    """Start from `train.init_from`, the (averaged) weights of another run, under this config's
    names. New adapters, and parts that are new with `model.crop`, `joint_position` or
    `conditioning`, keep their initial values. Return lines to report: the source, in what its model
    or objective was configured differently (it fits, but may not be intended), and whether it saw
    `data` (`contents` of sources) in the order of this run.
    """
    source = config.train.init_from
    assert source is not None, "the caller looks whether there is one"
    if is_lora(source):
        return start_from_lora(learner, config)
    try:
        weights = checkpoint.load_weights(source, in_file=learner.sharded)
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
        assert isinstance(learner.model, Experts)
        tensors = renamed(tensors, learner.model.spread(tensors, "model."))
        stored = {
            f"{name}.{layer}": alpha for name in learner.parts() for layer, alpha in stored.items()
        }
    check_adapters(learner.state_dict(), tensors, weights.source)
    check_kept(learner, tensors, weights.source)
    whole = not learner.sharded
    if config.parallel.type == "fsdp" and whole:  # else float32 would be rounded to a file's type
        unpack_weights(learner, tensors)
    assign(
        learner.state_dict(),
        tensors,
        str(weights.source),
        fresh=lambda name: (
            is_adapter(name)
            or ".crop." in name
            or ".joint_position." in name
            or ".low_resolution." in name
            or not learner.is_stored(name)
        ),
    )
    measure_new_lengths(learner, tensors)
    carry_over(
        learner.model,
        same_strength(learner.model, stored, bool((old.get("lora") or {}).get("rslora"))),
    )
    changed = [
        line
        for name in SHAPES_WEIGHTS
        for line in config_io.differences(old.get(name), new[name], name)
    ]
    for section, name in (("train", "objective"), ("captions", "trigger")):
        before = (old.get(section) or {}).get(name)
        changed += config_io.differences(before, new[section][name], f"{section}.{name}")
    changed = [f"configured otherwise there: {line}" for line in changed] + trained_before(old, new)
    changed += same_draws(weights.source, new["seed"], data)
    return [
        f"starting from {weights.source}, step {weights.meta.step}",
        *(f"  {line}" for line in changed),
    ]
