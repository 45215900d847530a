"""Find settings of a configuration that have no effect in its training because of other settings,
or that need others."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from mmdit.config import changed_keys
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.posttrain.posttrain_config import GENERATED


def idle_keys(config: ExperimentConfig) -> list[str]:
    """Return a line for each reason why settings that a person changed have no effect in this
    training, for each setting that it is too short for, and for guidance that it does not train.
    Configs that switch between two ways contain such settings, so they are no error; but whoever
    meant them should know."""
    lines = []
    for reason, section, names in _rows(config):
        changed = [f"{section}.{name}" for name in changed_keys(getattr(config, section), names)]
        if changed:
            lines.append(f"without a part in this training: {', '.join(changed)} ({reason})")
    lines += [*_unused_alphas(config), *_untrained_guidance(config)]
    short = f"too short: train.max_steps is {config.train.max_steps}"
    return lines + [f"{short}, and {line}" for line in _unreached(config)]


def _unused_alphas(config: ExperimentConfig) -> list[str]:
    """Return a line if phases of the alpha schedule have an alpha for an expert that is not
    trained."""
    schedule, experts = config.alpha_schedule, config.experts
    if not (schedule.enabled and experts.enabled and len(experts.trained) == 1):
        return []
    (other,) = {"high", "low"} - set(experts.trained)
    keys = [
        f"alpha_schedule.phases[{number}].{other}"
        for number, phase in enumerate(schedule.phases)
        if getattr(phase, other) is not None
    ]
    reason = f"experts.train is {experts.train}"
    return [f"without a part in this training: {', '.join(keys)} ({reason})"] if keys else []


def _untrained_guidance(config: ExperimentConfig) -> list[str]:
    """Return a line if guidance is on by default in sampling, and leads away from an empty prompt
    that nothing has trained."""
    train = config.train
    guided = train.sample_cfg_scale != 1 and not train.sample_negative_prompt
    if train.cfg_dropout_prob or not guided or train.init_from or config.model.released:
        return []
    return [
        "train.cfg_dropout_prob is 0, so no caption is dropped in training, but guidance"
        f" (train.sample_cfg_scale {train.sample_cfg_scale:g}) leads away from the empty prompt:"
        " set it to 0.1, or the guidance to 1"
    ]


def _unreached(config: ExperimentConfig) -> Iterator[str]:
    """Yield, for each setting whose effect begins after the last step, what that means."""
    train, experts, schedule = config.train, config.experts, config.alpha_schedule
    steps = train.max_steps
    if train.warmup_steps > steps:
        reached = train.lr * steps / train.warmup_steps
        yield (
            f"train.warmup_steps {train.warmup_steps}: the learning rate comes to {reached:.2g} of"
            f" {train.lr:g}"
        )
    if config.ema.enabled and config.ema.start_step >= steps:
        yield f"ema.start_step {config.ema.start_step}: nothing is averaged"
    both = experts.enabled and experts.routing == "block" and len(experts.trained) > 1
    if both and experts.switch_every >= steps:
        yield (
            f"experts.switch_every {experts.switch_every}: the expert {experts.trained[1]} has no"
            " turn, and is not trained"
        )
    if schedule.enabled:
        begins = accumulate(phase.min_steps for phase in schedule.phases)
        late = [phase.name for begin, phase in zip(begins, schedule.phases[1:]) if begin >= steps]
        if late:
            yield f"alpha_schedule.phases come to none of {', '.join(late)}"


def _rows(config: ExperimentConfig) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield for each reason the reason itself, the section, and its keys without effect (none: all
    of its keys)."""
    train, experts = config.train, config.experts
    for section in ("bucketing", "tread", "lora", "alpha_schedule", "experts", "ema"):
        if not getattr(config, section).enabled:
            yield f"{section}.enabled is false", section, ()
    other = {"ddpm": "flow_matching", "flow_matching": "diffusion"}[train.objective]
    yield f"train.objective is {train.objective}", other, ()
    if train.lr_schedule == "constant":
        yield "train.lr_schedule is constant", "train", ("lr_final",)
    if not train.val_every_steps:
        yield "train.val_every_steps is 0", "train", ("val_share", "val_samples")
    for reason, names in config.model.without_part().items():
        yield reason, "model", names
    if experts.enabled and len(experts.trained) == 1:
        yield f"experts.train is {experts.train}", "experts", ("routing", "switch_every")
    elif experts.enabled and experts.routing == "by_sigma":
        yield "experts.routing is by_sigma", "experts", ("switch_every",)
    if config.alpha_schedule.enabled and config.alpha_schedule.on_change != "ramp":
        reason = f"alpha_schedule.on_change is {config.alpha_schedule.on_change}"
        yield reason, "alpha_schedule", ("ramp_steps",)
    if config.posttrain:
        reason = "posttrain: what is scored again must be what was drawn, so nothing is dropped"
        yield reason, "model", ("dropout",)
        if config.lora.enabled:
            yield reason, "lora", ("dropout", "rank_dropout")
    if config.posttrain and not config.posttrain.eval_prompts:
        names = ("eval_rewards", "eval_every_epochs")
        yield "posttrain.eval_prompts is 0", "posttrain", names
    if config.posttrain and config.posttrain.prompts != GENERATED:
        yield f"posttrain.prompts is {config.posttrain.prompts}", "posttrain", ("prompt_count",)
