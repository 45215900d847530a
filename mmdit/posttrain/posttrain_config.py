"""The section `posttrain:`. Updates, learning rate, precision and checkpoints are those of
`train:`; a step is one update."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mmdit.config import ConfigError, FilePath, Section, least
from mmdit.posttrain.clip_like import HPS, ClipReward, PickScore
from mmdit.posttrain.direct_align import window_check
from mmdit.posttrain.dynamics import Dynamics, Norm
from mmdit.posttrain.losses import Weighting
from mmdit.posttrain.prompts import Prompts, written_prompts
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

GENERATED = "moving_shapes"  # the source of prompts that come with their facts

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
)
ScorerConfig = ColorWords | ClipReward | PickScore | HPS


@dataclass(frozen=True)
class RolloutConfig:
    """`sde_steps`: candidates for stochastic, trained steps (empty: all but the last, which an SDE
    would leave noisy); `sde_pick` of them are drawn for each epoch (0: all). Other steps are the
    ODE's. `shared_noise`: the samples of a group begin alike and part in their stochastic steps, so
    that what is compared is what is trained. `policy: old` samples NFT's slow copy. `guidance_low`:
    of the low-noise expert of a pair, if it has another."""

    steps: int = 10
    shift: float = 1.0
    guidance: float = 1.0
    guidance_low: float | None = None
    dynamics: Dynamics = "flow_sde"
    noise_level: float = 0.7
    sde_steps: tuple[int, ...] = ()
    sde_pick: int = 0
    shared_noise: bool = False
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
    positions: Literal["auto", "all"] = "auto"  # auto: what the algorithm reads
    dtype: Literal["fp32", "bf16"] = "fp32"
    offload: bool = True  # to the CPU; one micro-batch at a time comes back


@dataclass(frozen=True)
class AdvantageConfig:
    mode: Literal["sum", "gdpo"] = "sum"
    std: Literal["global", "group"] = "global"
    clip: float = 5.0

    def __post_init__(self):
        least(self, 0, "clip", above=True)


@dataclass(frozen=True)
class RatioConfig:
    """GRPO, Guard and AWM: `clip` is (low, high) about a ratio of 1."""

    norm: Norm = "sqrt_dim"
    clip: tuple[float, float] = (-3e-3, 3e-3)
    replay_tolerance: float = 1e-6  # how far from 1 a ratio may be before the first update

    def __post_init__(self):
        least(self, 0, "replay_tolerance")
        if not self.clip[0] < 0 < self.clip[1]:
            raise ConfigError(
                "clip",
                f"is {list(self.clip)}; must be [below 0, above 0], for example [-3e-3, 3e-3]",
            )


@dataclass(frozen=True)
class KLConfig:
    """To the model that post-training began from: `v`, `x` (the step's mean) or `exact` (of the
    step's Gaussian)."""

    space: Literal["v", "x", "exact"] = "v"
    beta: float = 0.0

    def __post_init__(self):
        least(self, 0, "beta")


@dataclass(frozen=True)
class NFTConfig:
    """The slow copy is `rate · (update - flat)`, at most `most`, of itself and the rest of the
    policy after each epoch."""

    beta: float = 1.0
    weighted: bool = True
    flat: int = 0
    rate: float = 1e-3
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
    weighting: Weighting = "t"
    ema_kl: float = 1.0  # against ema:, without which negative advantages push without bound

    def __post_init__(self):
        least(self, 0, "ema_kl")


@dataclass(frozen=True)
class DPOConfig:
    """`source: online` takes best and worst of each group; `offline` learns from `pairs`, a file,
    or makes one with the first model from `collect` prompts."""

    beta: float = 500.0
    source: Literal["online", "offline"] = "offline"
    pairs: FilePath | None = None
    collect: int = 512
    batch: int = 64  # pairs of one update, over all processes

    def __post_init__(self):
        least(self, 0, "beta", above=True)
        least(self, 1, "collect", "batch")

    @property
    def given(self) -> bool:
        """Return whether pairs come from a file, and none are made."""
        return self.source == "offline" and self.pairs is not None


@dataclass(frozen=True)
class SRPOConfig:
    """Windows are noise levels, [noisy, clean], never step numbers: with a time shift the same
    steps are other levels. `latents`: a cache of real pictures or clips and their captions, which
    stand in for rollouts and prompts.
    """

    sigma_window: tuple[float, float] = (0.96, 0.75)
    step: float = 0.02
    discount_denoise: tuple[float, float] = (0.10, 0.25)
    discount_invert: tuple[float, float] = (0.30, 0.01)
    latents: FilePath | None = None
    positive: tuple[str, ...] = ("red",)
    negative: tuple[str, ...] = ("blue",)
    hinge: float = 0.7
    branches: tuple[Literal["denoise", "invert"], ...] = ("denoise", "invert")
    max_std_growth: float = 1.5  # of the recovered latents, beyond which training stops
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
    algorithm: Literal["grpo", "guard", "nft", "awm", "dpo", "srpo"] = "grpo"
    prompts: FilePath = GENERATED  # or a file: YAML with `prompts:`, JSON with [{"caption": …}]
    prompt_count: int = 2048  # of the generated ones
    prompts_per_epoch: int = 16
    group_size: int = 16
    micro_batch: int = 64
    updates_per_epoch: int = 1
    draws_per_sample: int = 1  # nft, awm, dpo: noise levels of each sample in an update
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    ratio: RatioConfig = field(default_factory=RatioConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    nft: NFTConfig = field(default_factory=NFTConfig)
    awm: AWMConfig = field(default_factory=AWMConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    srpo: SRPOConfig = field(default_factory=SRPOConfig)
    rewards: tuple[RewardConfig, ...] = (PromptAccuracy(),)
    eval_rewards: tuple[RewardConfig, ...] | None = None  # None: see `evaluation_rewards`
    # of a clip, those that rewards see (-1: the last); only they are decoded. Empty: all
    reward_frames: tuple[int, ...] = ()
    eval_prompts: int = 128  # of the seen and of the held-out prompts
    eval_every_epochs: int = 10
    # mean squared change of the velocity on fixed probes, beyond which training stops; 0 = never
    max_drift: float = 0.0
    async_rewards: bool = True

    def __post_init__(self):
        counts = ("prompt_count", "prompts_per_epoch", "micro_batch", "updates_per_epoch")
        least(self, 1, *counts, "draws_per_sample", "eval_every_epochs")
        least(self, 0, "max_drift", "eval_prompts")
        least(self, 2, "group_size")  # samples of one prompt are compared
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
        self._check_idle()

    def _check_rollout(self) -> None:
        """Raise ConfigError for a rollout that the algorithm cannot train on."""
        rollout, algorithm = self.rollout, self.algorithm
        if self.trains_steps and rollout.dynamics == "ode":
            raise ConfigError(
                "rollout.dynamics",
                f"is ode, but {algorithm} needs noise in its steps; use flow_sde",
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

    def _check_idle(self) -> None:
        """Raise ConfigError for a key that was changed and has no effect."""
        algorithm = self.algorithm
        if algorithm == "srpo":
            self._refuse("kl.beta", self.kl.beta, 0.0, "srpo")
        if not self.trains_steps:
            where = f"{algorithm}, which compares velocities"
            self._refuse("kl.space", self.kl.space, "v", where)
        if self.trains_steps or algorithm == "srpo":
            self._refuse("draws_per_sample", self.draws_per_sample, 1, algorithm)
        if algorithm == "srpo" or (algorithm == "dpo" and self.dpo.source == "offline"):
            where = f"{algorithm} without epochs"
            self._refuse("updates_per_epoch", self.updates_per_epoch, 1, where)
        if self.advantage.mode == "gdpo":
            self._refuse("advantage.std", self.advantage.std, "global", "gdpo, which uses both")

    @staticmethod
    def _refuse(name: str, value: object, usual: object, where: str) -> None:
        if value != usual:
            raise ConfigError(name, f"is {value}, which has no effect in {where}; must be {usual}")

    def check(self, run: Any) -> None:
        """Refuse what the loops of post-training cannot do, and a model that was never trained."""
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
        """Return the rewards of evaluation: `eval_rewards`; without these prompt_accuracy for
        generated prompts, and for written ones the rewards themselves, as far as they judge a
        sample alone and need no facts."""
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
        """Return the rewards that training asks; SRPO has its scorer instead."""
        return () if self.algorithm == "srpo" else self.rewards

    @property
    def trains_steps(self) -> bool:
        """Return whether steps of trajectories are trained, and not clean latents."""
        return self.algorithm in ("grpo", "guard")

    @property
    def keeps_old(self) -> bool:
        """Return whether a checkpoint holds the copy of the weights that follows the policy."""
        return self.algorithm in ("nft", "awm")

    def load_prompts(
        self, seed: int, video: bool, width: int, height: int
    ) -> tuple[Prompts, dict[str, Prompts]]:
        """Return the prompts to train on, and by name those to evaluate on."""
        if self.prompts == GENERATED:
            return generated_prompts(
                self.prompt_count, seed, video, width, height, self.eval_prompts
            )
        return written_prompts(Path(self.prompts), self.eval_prompts)
