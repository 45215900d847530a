"""Hold everything from which a run of post-training is built, with the checks that need more than
its config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mmdit.config import ConfigError
from mmdit.data.dataset.captions import CaptionsConfig, with_trigger
from mmdit.diffusion import LinearPath, sampling_times
from mmdit.interfaces import Denoiser, TextTokens, Tokenizer
from mmdit.posttrain.advantages import check_geometry, check_shares
from mmdit.posttrain.posttrain_config import PosttrainConfig
from mmdit.posttrain.prompt_lists import Prompts
from mmdit.posttrain.trained_levels import TrainedLevels
from mmdit.training.distributed import World
from mmdit.training.trackers import Tracker
from mmdit.training.train_config import TrainConfig
from mmdit.training.train_state import TrainState

Files = dict[str, dict[str, Tensor]]  # contents of a checkpoint: name without suffix → tensors


@dataclass(kw_only=True)
class Setup:
    """Everything from which a run is built. The text encoder is frozen and the network stays in
    evaluation mode, so that scoring a rollout again reproduces exactly what was sampled. With two
    experts, the learner holds the trained one, and rollouts use `model`, which holds both (None:
    the learner's).

    `save(files, best)` writes a checkpoint, with `best` only the weights. `history` holds scalars
    that a resumed run must know: `best` (score and update of the best evaluation) and `measure` (a
    check sum of what that score measures); for SRPO also `std` and `latent_std` (the deviation of
    the latents at first and now) and `invert` (the first score of that branch). `start`: a check
    sum of the networks and prompts from which the run began.
    """

    config: PosttrainConfig
    train: TrainConfig
    seed: int
    state: TrainState
    tokenizer: Tokenizer
    prompts: Prompts
    evaluated: dict[str, Prompts]
    width: int
    height: int
    frames: int
    run_dir: Path
    save: Callable[[Files, bool], None]
    world: World = World()
    captions: CaptionsConfig = CaptionsConfig()
    model: Denoiser | None = None
    tracker: Tracker | None = None
    start: int | None = None
    history: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self):
        config, objective = self.config, self.state.learner.objective
        if not isinstance(objective.path, LinearPath):
            raise ConfigError(
                "train.objective",
                "is not flow matching on the linear path, which post-training is made for",
            )
        self.learner, self.device = self.state.learner.eval(), self.world.device
        self.whole = self.learner.model if self.model is None else self.model
        self.model = self.whole
        networks = self.whole.networks()
        trained = next(name for name, part in networks.items() if part is self.learner.model)
        self.levels = TrainedLevels(self.whole, trained, objective)
        self._check_sizes()
        self._prepare_rewards()
        spec = self.learner.spec
        latent_frames = spec.frames(self.frames)
        self.shape = (latent_frames, *spec.grid(self.width, self.height), spec.channels)
        shift = config.rollout.shift * objective.clip_shift(latent_frames)
        self.times = sampling_times(objective, config.rollout.steps, shift)
        self.levels.check(config, self.times)
        if len(networks) == 1 and config.rollout.guidance_low is not None:
            raise ConfigError(
                "posttrain.rollout.guidance_low",
                f"is {config.rollout.guidance_low}, but this model is no pair of experts; leave it"
                " out",
            )
        self.text = self.encode(self.prompts.captions)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> TextTokens:
        """Return the text tokens of prompts, with the trigger word, as captions had it in training.
        Rewards see the prompts as they were written."""
        texts = [with_trigger(caption, self.captions) for caption in captions]
        return self.learner.text_encoder(texts).to(self.device)

    def _check_sizes(self) -> None:
        """Raise ConfigError for counts and frames that do not fit together."""
        config, srpo = self.config, self.config.algorithm == "srpo"
        if srpo:
            check_shares(config.prompts_per_epoch, self.world.size)
        elif config.compares_samples:
            self._check_groups()
        if self.train.max_steps % config.updates_per_epoch:
            raise ConfigError(
                "train.max_steps",
                f"is {self.train.max_steps}, must be a multiple of posttrain.updates_per_epoch,"
                f" {config.updates_per_epoch}",
            )
        draws_samples = config.compares_samples or (srpo and not config.srpo.latents)
        if draws_samples and config.prompts_per_epoch > len(self.prompts):
            raise ConfigError(
                "posttrain.prompts_per_epoch",
                f"is {config.prompts_per_epoch}, must be at most the {len(self.prompts)} prompts",
            )
        if any(not -self.frames <= place < self.frames for place in config.reward_frames):
            raise ConfigError(
                "posttrain.reward_frames",
                f"is {list(config.reward_frames)}; must be frames of a clip of {self.frames}, from"
                " 0, or -1 for the last",
            )

    def _check_groups(self) -> None:
        """Raise ConfigError for counts that would keep samples from being compared in whole
        groups."""
        config = self.config
        self.micro_batches = check_geometry(
            config.prompts_per_epoch,
            config.group_size,
            self.world.size,
            config.micro_batch,
            config.updates_per_epoch,
        )
        groupwise = any(reward.groupwise for reward in config.rewards)
        if (groupwise or config.algorithm == "dpo") and config.micro_batch % config.group_size:
            raise ConfigError(
                "posttrain.micro_batch",
                f"is {config.micro_batch}, must be a multiple of group_size {config.group_size}: a"
                " groupwise reward or dpo compares whole groups",
            )

    def _prepare_rewards(self) -> None:
        """Prepare the rewards that this run will use. ConfigError if one of them needs facts that
        these prompts do not have."""
        config = self.config
        asked = {"rewards": config.trained_rewards}
        if self.evaluated:
            asked["eval_rewards"] = config.evaluation_rewards
        for key, rewards in asked.items():
            for i, reward in enumerate(rewards):
                if "facts" in reward.needs and self.prompts.facts is None:
                    raise ConfigError(
                        f"posttrain.{key}[{i}]",
                        f"is {reward.type}, which needs the facts of its prompts; those of"
                        f" {config.prompts} have none: take another reward, or posttrain.prompts:"
                        " moving_shapes",
                    )
                reward.prepare(torch.device(reward.device or self.device))
        if config.algorithm == "srpo":
            config.srpo.scorer.prepare(self.device)
