"""Decide which of two experts a command means, and where the boundary between them lies. Every
command that takes `--expert` resolves it here, and prints which expert it took. `config` is an
experiment's."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mmdit.config import ConfigError
from mmdit.interfaces import Denoiser
from mmdit.interop.wan_release import published_boundary
from mmdit.interop.wan_weights import expert_in_name
from mmdit.training.pipeline import Pipeline

USUAL_BOUNDARY = 0.875  # between two experts of a model without a published one


def resolved(config):
    """Return `config` with a number as the boundary between two experts; where it names none, that
    of the release is taken. ConfigError if the release cannot be read."""
    model, experts = config.model, config.experts
    if not (experts.enabled or model.expert):
        return config
    boundary = experts.boundary if experts.enabled else None
    if boundary is None:
        boundary = model.boundary
    if boundary is None:
        boundary = _published_boundary(config) if model.released else USUAL_BOUNDARY
    if model.released:
        config = replace(config, model=replace(model, boundary=boundary))
    if experts.enabled:
        config = replace(config, experts=replace(experts, boundary=boundary))
    return config


def _published_boundary(config) -> float:
    try:
        return published_boundary(config.model, config.experts.enabled)
    except ValueError as error:
        raise ConfigError("model.name_or_path", str(error)) from None


def expert_notes(config) -> list[str]:
    """Return the lines about a release's experts to print before a run of a resolved `config`:
    which expert is trained, and a boundary that differs from the published one."""
    model = config.model
    if not model.released:
        return []
    if not (config.experts.enabled or model.expert):
        name = expert_in_name(model.name_or_path)
        said = f"the name of {model.name_or_path} says that it is the {name}-noise expert of two"
        remedy = f"it is used at all noise levels: model.expert={name} keeps it to its own"
        return [f"{said}, but {remedy}"] if name else []
    published, notes = _published_boundary(config), []
    if model.expert:
        side = "t ≥" if model.expert == "high" else "t <"
        notes.append(f"the {model.expert}-noise expert is trained, on {side} {model.boundary:g}")
    if model.boundary != published:
        notes.append(
            f"model.boundary is {model.boundary:g}; this model was published with {published:g}"
        )
    return notes


@dataclass(frozen=True)
class Choice:
    """`name`: of the expert, None for a model that is not a pair. `said`: a line to print, empty if
    there was no choice."""

    name: str | None
    network: Denoiser
    said: str = ""


def trained_experts(config) -> tuple[str, ...]:
    """Return the names of the experts that a run of the experiment's `config` trains; an empty
    tuple if it has one network."""
    if config.experts.enabled:
        return config.experts.trained
    return (config.model.expert,) if config.model.expert else ()


def experts_of(pipeline: Pipeline) -> dict[str, Denoiser]:
    """Return both experts of a pair by name; an empty dict for a model that is not a pair."""
    return {name: network for name, network in pipeline.model.networks().items() if name}


def choose_expert(pipeline: Pipeline, config, asked: str | None, source: object) -> Choice:
    """Return the expert that `asked` names; without it the one that was trained, and the high-noise
    one if that does not decide. ValueError if an expert is asked of a model that is not a pair."""
    experts = experts_of(pipeline)
    if not experts and config.model.expert and asked in (None, config.model.expert):
        experts = {config.model.expert: pipeline.model}  # the other was not loaded
    if not experts:
        if asked:
            raise ValueError(
                f"--expert is {asked}, but {source} is no pair of experts; leave it out"
            )
        return Choice(None, pipeline.model)
    trained = trained_experts(config)
    name = asked or (trained[0] if trained else "high")
    other = "low" if name == "high" else "high"
    if asked:
        reason = "as --expert says"
    elif len(trained) == 1:
        reason = f"the one that its config names; --expert {other} takes the other"
    else:
        reason = f"both were trained; --expert {other} takes the other"
    return Choice(name, experts[name], f"of two experts the {name}-noise one ({reason})")


def joint_choice(pipeline: Pipeline, config, asked: str | None, source: object) -> Choice:
    """Return what `choose_expert` does, except that a pair on one base is returned as a whole if no
    expert is `asked` for. (A release has a file for each expert; such a pair has one for both.)"""
    if asked or config.model.released:
        return choose_expert(pipeline, config, asked, source)
    return Choice(None, pipeline.model)


def describe_pair(pipeline: Pipeline, config) -> str:
    """Return a description of the pair that draws; empty for a model that is not a pair."""
    if not experts_of(pipeline):
        return ""
    boundary = config.experts.boundary if config.experts.enabled else config.model.boundary
    trained = f"; trained: {' and '.join(trained_experts(config))}" if config.lora.enabled else ""
    return f"two experts: the high-noise one for t ≥ {boundary:g}, the low-noise one below{trained}"
