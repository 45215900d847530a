"""The section `posttrain:`. The number of updates, learning rate, precision and checkpoints are set
in `train:`; a step is one update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mmdit.config import ConfigError, FilePath, Section, changed_keys, in_one_line, least
from mmdit.posttrain.clip_like import HPS, ClipReward, PickScore
from mmdit.posttrain.direct_align import window_check
from mmdit.posttrain.dynamics import Dynamics, Norm
from mmdit.posttrain.feature_reward import FeatureSimilarity
from mmdit.posttrain.losses import Weighting
from mmdit.posttrain.prompt_lists import Prompts, written_prompts
from mmdit.posttrain.rewards import (
    Brightness,
    BrightnessRank,
    ColorMatch,
    LatentNorm,
    Motion,
    Noise,
    Reward,
    Sharpness,
)
from mmdit.posttrain.shapes import ColorWords, PromptAccuracy, generated_prompts

GENERATED = "moving_shapes"  # the source of prompts that come with facts

RewardConfig = (
    PromptAccuracy
    | Brightness
    | ColorMatch
    | Sharpness
    | Motion
    | LatentNorm
    | BrightnessRank
    | Noise
    | ClipReward
    | PickScore
    | HPS
    | FeatureSimilarity
)
ScorerConfig = ColorWords | ClipReward | PickScore | HPS


@dataclass(frozen=True)
class RolloutConfig:
    """The section `posttrain.rollout:`."""

    # Steps with which a sample is drawn.
    steps: int = 10
    # Shift of the sampling times; above 1, more steps are spent at high noise.
    shift: float = 1.0
    # Guidance scale; 1 is no guidance.
    guidance: float = 1.0
    # Guidance scale of the low-noise expert of a pair, if it differs.
    guidance_low: float | None = None
    # grpo, guard: how a stochastic step draws its noise; `ode` draws none. Other algorithms step by
    # the ODE.
    dynamics: Dynamics = "flow_sde"
    # grpo, guard: the size of that noise, above 0 and at most 1.
    noise_level: float = 0.7
    # grpo, guard: the steps that may be stochastic, and are then trained. Empty: all but the last,
    # which would leave noise in the sample.
    sde_steps: tuple[int, ...] = ()
    # How many of these steps are drawn for each epoch; 0 takes all. The other steps follow the ODE.
    sde_pick: int = 0
    # Let the samples of a group start from the same noise and differ only by their stochastic
    # steps, so that what is compared is what is trained.
    shared_noise: bool = False
    # The weights that sample: those of the `current` model, or nft's slow copy, `old`.
    policy: Literal["current", "old"] = "current"

    def __post_init__(self):
        least(self, 0, "shift", above=True)
        least(self, 0, "sde_pick")
        if self.steps < 1 or any(not 0 <= index < self.steps for index in self.sde_steps):
            raise ConfigError(
                "sde_steps",
                f"is {list(self.sde_steps)}; must be from 0 to steps - 1 = {self.steps - 1}",
            )
        if self.sde_pick > len(self.candidates):
            raise ConfigError(
                "sde_pick",
                f"is {self.sde_pick}, more than the {len(self.candidates)} candidates of sde_steps",
            )
        if not 0 < self.noise_level <= 1:
            raise ConfigError(
                "noise_level", f"is {self.noise_level}; must be above 0 and at most 1; 0.7 is usual"
            )

    @property
    def candidates(self) -> tuple[int, ...]:
        return self.sde_steps or tuple(range(self.steps - 1))


@dataclass(frozen=True)
class StorageConfig:
    """The section `posttrain.storage:`."""

    # Which latents of a trajectory are kept: `auto` keeps those that the algorithm reads.
    positions: Literal["auto", "all"] = "auto"
    # The dtype in which they are kept.
    dtype: Literal["fp32", "bf16"] = "fp32"
    # Keep them in CPU memory; one micro-batch at a time comes back to the device.
    offload: bool = True


@dataclass(frozen=True)
class AdvantageConfig:
    """The section `posttrain.advantage:`."""

    # `sum`: normalise the weighted sum of the rewards. `gdpo`: normalise each reward, then sum.
    mode: Literal["sum", "gdpo"] = "sum"
    # Divide by the standard deviation over all samples, or over each group.
    std: Literal["global", "group"] = "global"
    # Clip advantages to this absolute value.
    clip: float = 5.0

    def __post_init__(self):
        least(self, 0, "clip", above=True)


@dataclass(frozen=True)
class RatioConfig:
    """The section `posttrain.ratio:`, for grpo, guard and awm."""

    # grpo, guard: how log-ratios are summed over a latent; with `sqrt_dim` their spread does not
    # depend on its size.
    norm: Norm = "sqrt_dim"
    # Range of the ratio around 1 beyond which it is clipped: [below, above].
    clip: tuple[float, float] = (-3e-3, 3e-3)
    # How far from 1 a ratio may be before the first update of an epoch, where it should be exactly
    # 1.
    replay_tolerance: float = 1e-6

    def __post_init__(self):
        least(self, 0, "replay_tolerance")
        if not self.clip[0] < 0 < self.clip[1]:
            raise ConfigError(
                "clip",
                f"is {list(self.clip)}; must be [below 0, above 0], for example [-3e-3, 3e-3]",
            )


@dataclass(frozen=True)
class KLConfig:
    """The section `posttrain.kl:`."""

    # What is compared: velocities, the means of a step, or the step's Gaussians by their exact
    # divergence.
    space: Literal["v", "x", "exact"] = "v"
    # Weight of the distance; 0 switches it off.
    beta: float = 0.0

    def __post_init__(self):
        least(self, 0, "beta")


@dataclass(frozen=True)
class NFTConfig:
    """The section `posttrain.nft:`. After each epoch, the slow copy keeps the share `rate` ·
    (update - `flat`) of itself, at most `most`."""

    # How far the two policies that the loss implies lie from the slow copy.
    beta: float = 1.0
    # Divide each error by its own mean absolute value, so that all noise levels count alike.
    weighted: bool = True
    # Number of first updates during which the slow copy follows at once.
    flat: int = 0
    # How much the share that stays grows with each update.
    rate: float = 1e-3
    # The largest share that stays.
    most: float = 0.5

    def __post_init__(self):
        least(self, 0, "beta", above=True)
        least(self, 0, "flat", "rate", "most")
        if self.most > 1:
            raise ConfigError(
                "most", f"is {self.most}; must be from 0 to 1, the part of the slow copy that stays"
            )


@dataclass(frozen=True)
class AWMConfig:
    """The section `posttrain.awm:`."""

    # Weight of the error at noise level t: 1, t, t², or t with a (generalised) Huber loss.
    weighting: Weighting = "t"
    # Weight of the distance to the running average `ema:`; without it, negative advantages push
    # without bound.
    ema_kl: float = 1.0

    def __post_init__(self):
        least(self, 0, "ema_kl")


@dataclass(frozen=True)
class DPOConfig:
    """The section `posttrain.dpo:`."""

    # How strongly the model is held to its reference; larger is stronger.
    beta: float = 500.0
    # `online` takes the best and the worst sample of each group of an epoch; `offline` learns from
    # stored pairs.
    source: Literal["online", "offline"] = "offline"
    # offline: a file of pairs; null makes one with the initial model.
    pairs: FilePath | None = None
    # offline: for how many prompts pairs are made.
    collect: int = 512
    # offline: pairs in one update, over all processes.
    batch: int = 64

    def __post_init__(self):
        least(self, 0, "beta", above=True)
        least(self, 1, "collect", "batch")

    @property
    def given(self) -> bool:
        """Return whether pairs come from a file, so that none are made."""
        return self.source == "offline" and self.pairs is not None


@dataclass(frozen=True)
class SRPOConfig:
    """The section `posttrain.srpo:`. Windows are noise levels, [noisy, clean], never step numbers:
    under a time shift, the same steps have other noise levels."""

    # The noise levels at which the gradient is taken.
    sigma_window: tuple[float, float] = (0.96, 0.75)
    # The size of the step, in noise level, by which latents are recovered.
    step: float = 0.02
    # How much more the positive words count than the negative ones where latents are denoised: at
    # the clean and at the noisy end of the window.
    discount_denoise: tuple[float, float] = (0.10, 0.25)
    # The same where latents are inverted, and the words swapped.
    discount_invert: tuple[float, float] = (0.30, 0.01)
    # A cache of real pictures or clips and their captions, used in place of sampled ones; null
    # draws samples.
    latents: FilePath | None = None
    # Words put before a caption: the score with these words is raised relative to that with
    # `negative`.
    positive: tuple[str, ...] = ("red",)
    # The words for the comparison.
    negative: tuple[str, ...] = ("blue",)
    # The denoise branch does not train samples that score above this, the invert branch not those
    # that score by this much below where it began.
    hinge: float = 0.7
    # Which branches are trained.
    branches: tuple[Literal["denoise", "invert"], ...] = ("denoise", "invert")
    # Stop when the standard deviation of recovered latents has grown by more than this factor.
    max_std_growth: float = 1.5
    # The differentiable scorer of pictures and texts.
    scorer: ScorerConfig = field(default_factory=ColorWords)

    def __post_init__(self):
        least(self, 0, "step", "max_std_growth", above=True)
        least(self, 0, "hinge")
        window_check(self.sigma_window, self.step)
        if not self.positive or not self.negative or not self.branches:
            raise ConfigError("positive", "positive, negative and branches must not be empty")
        of_rewards = {field.name: field.default for field in fields(Reward)}
        if isinstance(self.scorer, ClipReward) and any(
            getattr(self.scorer, name) != value for name, value in of_rewards.items()
        ):
            raise ConfigError(
                "scorer",
                "has a weight, name, batch or device, which count for a reward of samples; remove"
                " them",
            )


@dataclass(frozen=True)
class PosttrainConfig(Section):
    """The section `posttrain:`. Learning rate, precision, number of updates and checkpoints are set
    in `train:`; a step is one update."""

    # How the model learns from rewards; docs/posttraining.md compares them.
    algorithm: Literal["grpo", "guard", "nft", "awm", "dpo", "srpo"] = "grpo"
    # `moving_shapes` generates prompts with facts by which they can be scored. Anything else is a
    # file: YAML with `prompts:`, or JSON with [{"caption": …}].
    prompts: FilePath = GENERATED
    # How many prompts are generated.
    prompt_count: int = 2048
    # Number of prompts for which samples are drawn before the model is updated, over all processes.
    prompts_per_epoch: int = 16
    # Samples of one prompt, which are compared with each other.
    group_size: int = 16
    # Samples that go through the network at a time.
    micro_batch: int = 64
    # Updates made from the samples of one epoch.
    updates_per_epoch: int = 1
    # nft, awm, dpo: at how many noise levels each sample is used in an update.
    draws_per_sample: int = 1
    # How samples are drawn.
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    # What is kept of a sampled trajectory, and where.
    storage: StorageConfig = field(default_factory=StorageConfig)
    # grpo, guard, nft, awm: how rewards become advantages.
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    # grpo, guard, awm: the ratio of the new policy to the old one.
    ratio: RatioConfig = field(default_factory=RatioConfig)
    # The distance to the model from which post-training began.
    kl: KLConfig = field(default_factory=KLConfig)
    # Settings of the algorithm nft.
    nft: NFTConfig = field(default_factory=NFTConfig)
    # Settings of the algorithm awm.
    awm: AWMConfig = field(default_factory=AWMConfig)
    # Settings of the algorithm dpo.
    dpo: DPOConfig = field(default_factory=DPOConfig)
    # Settings of the algorithm srpo.
    srpo: SRPOConfig = field(default_factory=SRPOConfig)
    # The rewards, with their weights.
    rewards: tuple[RewardConfig, ...] = (PromptAccuracy(),)
    # The rewards that evaluation measures; null: prompt_accuracy for generated prompts, else those
    # of `rewards` that score each sample by itself.
    eval_rewards: tuple[RewardConfig, ...] | None = None
    # Which frames of a clip rewards see in training (-1 is the last); only these are decoded.
    # Empty: all. In evaluation they see all frames.
    reward_frames: tuple[int, ...] = ()
    # How many prompts, of the seen and of the held-out ones each, evaluation draws; 0 evaluates
    # nothing.
    eval_prompts: int = 128
    # Epochs between two evaluations.
    eval_every_epochs: int = 10
    # Stop when the mean squared change of the velocity on fixed samples exceeds this; 0 never
    # stops.
    max_drift: float = 0.0
    # Compute rewards in a thread, while the next samples are drawn.
    async_rewards: bool = True

    def __post_init__(self):
        counts = ("prompt_count", "prompts_per_epoch", "micro_batch", "updates_per_epoch")
        least(self, 1, *counts, "draws_per_sample", "eval_every_epochs")
        least(self, 0, "max_drift", "eval_prompts")
        least(self, 2, "group_size")  # advantages compare samples of one prompt
        if not self.rewards:
            raise ConfigError(
                "rewards", "is empty; name at least one, for example [{type: prompt_accuracy}]"
            )
        for i, reward in enumerate(self.eval_rewards or ()):
            if reward.groupwise:
                raise ConfigError(
                    f"eval_rewards[{i}]",
                    f"is {reward.type}, which compares samples of one prompt; evaluation draws one"
                    " of each: take another reward",
                )
        self._check_rollout()

    def _check_rollout(self) -> None:
        """Raise ConfigError for rollout settings on which the algorithm cannot be trained."""
        rollout, algorithm = self.rollout, self.algorithm
        if self.trains_steps and rollout.dynamics == "ode":
            raise ConfigError(
                "rollout.dynamics",
                f"is ode, but {algorithm} needs noise in its steps; use flow_sde",
            )
        if self.trains_steps and not rollout.candidates:
            raise ConfigError(
                "rollout.steps",
                f"is {rollout.steps}, but {algorithm} trains the noisy steps, which are all but the"
                " last: nothing would be trained; take 2 or more",
            )
        if self.trains_steps and rollout.steps - 1 in rollout.sde_steps:
            raise ConfigError(
                "rollout.sde_steps",
                f"holds the last step, {rollout.steps - 1}: it must be the ODE's, for an SDE leaves"
                " noise in the picture and CPS has none there",
            )
        if algorithm == "guard" and rollout.dynamics == "cps":
            raise ConfigError(
                "rollout.dynamics", "is cps with guard, which is made for flow_sde and dance_sde"
            )
        if rollout.shared_noise and not self.trains_steps:
            raise ConfigError(
                "rollout.shared_noise",
                f"is true with {algorithm}, whose rollouts have no noise but the first; set it to"
                " false",
            )
        if rollout.policy == "old" and algorithm != "nft":
            raise ConfigError(
                "rollout.policy",
                f"is old, but only nft keeps a slow copy, not {algorithm}; use current",
            )

    def check_idle(self) -> None:
        """Raise ConfigError for a key that was changed but has no effect. Only post-training calls
        this: a model that an earlier version trained with such a key can still be sampled."""
        for where, section, names in self._idle():
            holder = getattr(self, section) if section else self
            for name, usual in changed_keys(holder, names).items():
                value, must = (in_one_line(one) for one in (getattr(holder, name), usual))
                key = ".".join(["posttrain", section, name] if section else ["posttrain", name])
                raise ConfigError(key, f"is {value}, which has no effect {where}; must be {must}")

    def _idle(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """Yield the keys without effect: words that say when, the section ("" for this one), and
        the names of its keys (none: all of them)."""
        algorithm, offline = f"in {self.algorithm}", self.dpo.source == "offline"
        for section in ("nft", "awm", "dpo", "srpo"):
            if section != self.algorithm:
                yield algorithm, section, ()
        if self.trains_steps or self.algorithm == "srpo":
            yield algorithm, "", ("draws_per_sample",)
        if not self.trains_steps:
            yield f"{algorithm}, which compares velocities", "kl", ("space",)
            where = f"{algorithm}, whose rollouts step by the ODE"
            yield where, "rollout", ("noise_level", "sde_steps", "sde_pick")
            if self.rollout.dynamics != "ode":
                yield where, "rollout", ("dynamics",)
            yield f"{algorithm}, which replays no steps", "ratio", ("replay_tolerance",)
        if self.algorithm == "awm":
            yield f"{algorithm}, which takes the mean", "ratio", ("norm",)
        if self.algorithm in ("nft", "dpo", "srpo"):
            yield algorithm, "ratio", ()
        if self.algorithm in ("dpo", "srpo"):
            yield algorithm, "advantage", ()
        if self.algorithm == "srpo":
            yield algorithm, "kl", ("beta",)
        if self.in_single_updates:
            yield f"{algorithm} without epochs", "", ("updates_per_epoch",)
        if self.algorithm == "dpo" and not offline:
            where = "in online dpo, which makes its pairs in each epoch"
            yield where, "dpo", ("pairs", "collect", "batch")
        if not self.compares_samples:
            where = f"{algorithm}, which compares no samples"
            if self.algorithm == "dpo":
                where = "in dpo with given pairs"
                yield where, "dpo", ("collect",)
                yield where, "", ("prompts_per_epoch", "reward_frames")
            yield where, "", ("group_size", "async_rewards")
            yield where, "storage", ()
            if self.prompts == GENERATED or self.eval_rewards is not None or not self.eval_prompts:
                yield where, "", ("rewards",)
        if self.advantage.mode == "gdpo":
            yield "in gdpo, which uses both", "advantage", ("std",)
        if not self.kl.beta:
            yield "where kl.beta is 0", "kl", ("space",)

    def check(self, run: Any) -> None:
        """Refuse sections that the loops of post-training do not support, and a model that was
        never trained."""
        for name, section in {"alpha_schedule": run.alpha_schedule, "experts": run.experts}.items():
            if section.enabled:
                raise ConfigError(
                    f"{name}.enabled",
                    "is true with a posttrain section, whose loops know nothing of it; remove one",
                )
        if not (run.model.released or run.train.init_from):
            raise ConfigError(
                "train.init_from",
                "is empty with a posttrain section, which improves a trained model; name its run",
            )

    @property
    def evaluation_rewards(self) -> tuple[RewardConfig, ...]:
        """Return the rewards of evaluation: `eval_rewards` if given, else prompt_accuracy for
        generated prompts, and for written ones those `rewards` that score each sample by itself and
        need no facts."""
        if self.eval_rewards is not None:
            return self.eval_rewards
        if self.prompts == GENERATED:
            return (PromptAccuracy(),)
        return tuple(
            reward
            for reward in self.rewards
            if not reward.groupwise and "facts" not in reward.needs
        )

    @property
    def trained_rewards(self) -> tuple[RewardConfig, ...]:
        """Return the rewards that training uses."""
        return self.rewards if self.compares_samples else ()

    @property
    def compares_samples(self) -> bool:
        """Return whether samples of one prompt are drawn, rewarded and compared. SRPO has a scorer
        instead, and the samples of given pairs have been compared already."""
        return self.algorithm != "srpo" and not (self.algorithm == "dpo" and self.dpo.given)

    @property
    def in_single_updates(self) -> bool:
        """Return whether updates stand alone instead of forming epochs."""
        return self.algorithm == "srpo" or (
            self.algorithm == "dpo" and self.dpo.source == "offline"
        )

    @property
    def trains_steps(self) -> bool:
        """Return whether the algorithm trains on steps of trajectories, and not on clean
        latents."""
        return self.algorithm in ("grpo", "guard")

    @property
    def keeps_old(self) -> bool:
        """Return whether checkpoints hold the copy of the weights that follows the policy."""
        return self.algorithm in ("nft", "awm")

    def load_prompts(
        self, seed: int, video: bool, width: int, height: int
    ) -> tuple[Prompts, dict[str, Prompts]]:
        """Return the prompts to train on, and by name the lists of prompts to evaluate on."""
        if self.prompts == GENERATED:
            return generated_prompts(
                self.prompt_count, seed, video, width, height, self.eval_prompts
            )
        return written_prompts(Path(self.prompts), self.eval_prompts)
