"""Which of two experts is meant, and where the boundary between them lies: one place that resolves
`--expert` for every command that can mean one, and says which it took. `config` is an
experiment's."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from mmdit.config import ConfigError
from mmdit.interop.wan_release import published_boundary
from mmdit.models.wan_denoiser import WanModelConfig
from mmdit.nn.experts import Experts
from mmdit.training.pipeline import Pipeline

OWN_BOUNDARY = 0.875  # between two experts of a model that no release gives one


def resolved(config):
    """`config` with a number for the boundary between two experts where it leaves that to the
    release. ConfigError: the release cannot be read."""
    model, experts, wan = config.model, config.experts, isinstance(config.model, WanModelConfig)
    if not (experts.enabled or wan and model.expert):
        return config
    boundary = experts.boundary if experts.enabled else None
    if boundary is None and wan:
        boundary = model.boundary
    if boundary is None:
        boundary = _published_boundary(config) if wan else OWN_BOUNDARY
    if wan:
        model = replace(model, boundary=boundary)
    return replace(
        config,
        model=model,
        experts=replace(experts, boundary=boundary) if experts.enabled else experts,
    )


def _published_boundary(config) -> float:
    try:
        return published_boundary(config.model, config.experts.enabled)
    except ValueError as error:
        raise ConfigError("model.name_or_path", str(error)) from None


def expert_notes(config) -> list[str]:
    """What to tell of the experts before a run of a resolved `config`: who is trained, and a
    boundary that is not the published one."""
    if not isinstance(config.model, WanModelConfig) or not (
        config.experts.enabled or config.model.expert
    ):
        return []
    boundary, published = config.model.boundary, _published_boundary(config)
    notes = []
    if config.model.expert:
        side = "t ≥" if config.model.expert == "high" else "t <"
        notes.append(f"the {config.model.expert}-noise expert is trained, on {side} {boundary:g}")
    if boundary != published:
        notes.append(f"model.boundary is {boundary:g}; this model was published with {published:g}")
    return notes


@dataclass(frozen=True)
class Choice:
    """`name`: of the expert, None for a model that is no pair. `said`: a line to print, empty
    without a choice."""

    name: str | None
    network: nn.Module
    said: str = ""


def trained_experts(config) -> tuple[str, ...]:
    """Return the names of the experts that a run of the experiment's `config` trains; none: it has
    one network."""
    if config.experts.enabled:
        return config.experts.trained
    expert = getattr(config.model, "expert", None)
    return (expert,) if expert else ()


def experts_of(pipeline: Pipeline) -> dict[str, nn.Module]:
    """Return both experts of a pair by name; empty for a model that is none."""
    model = pipeline.learner.model
    if pipeline.low is not None:
        return {"high": model, "low": pipeline.low}
    if isinstance(model, Experts):
        return {name: model.get_submodule(name) for name in model.names}
    return {}


def choose_expert(pipeline: Pipeline, config, asked: str | None, source: object) -> Choice:
    """Return the expert that `asked` names, else the one that was trained, else the high-noise one.
    ValueError: an expert is asked of what is no pair."""
    experts = experts_of(pipeline)
    if not experts:
        if asked:
            raise ValueError(
                f"--expert is {asked}, but {source} is no pair of experts; leave it out"
            )
        return Choice(None, pipeline.learner.model)
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


def describe_pair(pipeline: Pipeline, config) -> str:
    """Return what a pair draws with; empty for a model that is none."""
    if not experts_of(pipeline):
        return ""
    boundary = config.experts.boundary if config.experts.enabled else config.model.boundary
    trained = f"; trained: {' and '.join(trained_experts(config))}" if config.lora.enabled else ""
    return f"two experts: the high-noise one for t ≥ {boundary:g}, the low-noise one below{trained}"
