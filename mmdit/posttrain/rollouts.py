"""Rollouts: samples that the policy draws for the prompts of an epoch, decoded and handed to the
rewards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmdit.posttrain import dynamics
from mmdit.posttrain.policy import Policy, Velocity
from mmdit.posttrain.rewards import RewardPool, Samples
from mmdit.posttrain.setup import Setup
from mmdit.posttrain.trajectory import Rollout, Storage, Trajectory
from mmdit.rng import Draws, generator


class Rollouts:
    """Draws samples for the prompts of an epoch. Everything random is a function of the seed, the
    epoch and a sample's place in the epoch, so that each rank draws only its part."""

    def __init__(self, setup: Setup, policy: Policy):
        self.setup, self.policy, self.config = setup, policy, setup.config
        self.pool = RewardPool(self.config.rewards, workers=int(self.config.async_rewards))

    def epoch_prompts(self, epoch: int) -> Tensor:
        """Return `(samples,)`: the prompt of every sample of the epoch, as its place in the list,
        over all ranks."""
        order = torch.randperm(
            len(self.setup.prompts), generator=generator(self.setup.seed, "epoch prompts", epoch)
        )
        return order[: self.config.prompts_per_epoch].repeat_interleave(self.config.group_size)

    def rank_indices(self) -> Iterator[Tensor]:
        """Yield this rank's places in the epoch, one micro-batch at a time. Each update uses the
        same samples for any number of ranks."""
        config, world = self.config, self.setup.world
        samples = config.prompts_per_epoch * config.group_size // config.updates_per_epoch
        places = torch.arange(samples).tensor_split(world.size)[world.rank]
        for update in range(config.updates_per_epoch):
            yield from (update * samples + places).split(config.micro_batch)

    def noisy_steps(self, epoch: int) -> tuple[int, ...]:
        """Return the steps that are stochastic, stored and trained in this epoch."""
        rollout = self.config.rollout
        if not self.config.trains_steps:
            return ()
        order = torch.randperm(
            len(rollout.candidates), generator=generator(self.setup.seed, "sde window", epoch)
        )
        return tuple(sorted(rollout.candidates[i] for i in order[: rollout.sde_pick or None]))

    def storage(self, noisy: tuple[int, ...]) -> Storage:
        """Return the rule for what is kept of a rollout whose steps `noisy` are trained."""
        storage, steps = self.config.storage, self.config.rollout.steps
        dtype = torch.bfloat16 if storage.dtype == "bf16" else torch.float32
        return Storage(steps, noisy, dtype, everything=storage.positions == "all")

    @torch.no_grad()
    def sample(
        self,
        velocity: Velocity,
        draws: Draws,
        noisy: Sequence[int] = (),
        storage: Storage | None = None,
        first: Draws | None = None,
    ) -> Trajectory:
        """Return a trajectory sampled along `times`: the steps `noisy` follow the configured
        dynamics, the others the ODE. Each state is rounded to the stored dtype before anything is
        computed from it; the means of trained steps are kept as well. `first` keys the noise at the
        first time; without it `draws` does."""
        rollout, times, shape = self.config.rollout, self.setup.times, self.setup.shape
        trajectory = Trajectory(storage or Storage(rollout.steps))
        noise = (first or draws).normal("rollout", *shape)
        # scaled to the size of a state at the first time if that is not 1: see `diffusion.sample`
        x = trajectory.put(0, noise * math.hypot(1 - times[0], times[0]))
        for index, t in enumerate(times[:-1]):
            method = rollout.dynamics if index in noisy else "ode"
            step = dynamics.step(method, rollout.noise_level, times, index)
            mean = step.mean(x, velocity(x, t))
            trajectory.put_mean(index, mean)
            if index in noisy:
                mean = mean + step.std * draws.normal(f"sde {index}", *shape)
            x = trajectory.put(index + 1, mean)
        return trajectory

    @torch.no_grad()
    def collect(self, epoch: int, weights: dict[str, Tensor] | None = None) -> list[Rollout]:
        """Return this rank's rollouts of an epoch; their rewards are still being computed.
        `weights`: those of a copy that samples in place of the policy."""
        setup, config = self.setup, self.config
        prompts, noisy = self.epoch_prompts(epoch), self.noisy_steps(epoch)
        storage = self.storage(noisy)
        if config.rollout.policy == "old":
            weights = self.policy.old
        rollouts = []
        for indices in self.rank_indices():
            places = prompts[indices]
            draws = Draws(setup.seed, epoch, indices.to(setup.device))
            first = draws
            if config.rollout.shared_noise:
                first = Draws(setup.seed, epoch, draws.indices // config.group_size)
            velocity = self.policy.velocity(setup.text[places.to(setup.device)], weights)
            trajectory = self.sample(velocity, draws, noisy, storage, first)
            asked = setup.prompts.at(places.tolist())
            clean = trajectory.clean
            samples = Samples(
                captions=asked.captions,
                latents=clean,
                groups=places,
                draws=draws,
                pixels=self.decode(clean) if self.pool.needs_pixels else None,
                facts=asked.facts,
            )
            rollout = Rollout(trajectory, places, indices, self.pool.submit(samples))
            rollouts.append(rollout.to("cpu") if config.storage.offload else rollout)
        return rollouts

    def decode(self, clean: Tensor) -> Tensor:
        """Return the pixels of `reward_frames`, or of all frames if that is empty. Only what they
        need is decoded: these frames alone if the tokenizer encodes single frames, else all latent
        frames up to the last one needed."""
        setup, spec = self.setup, self.setup.learner.spec
        places = [place % setup.frames for place in self.config.reward_frames]
        if places and spec.temporal == 1:
            clean, places = clean[:, places], []
        elif places:
            clean = clean[:, : 1 + -(-max(places) // spec.temporal)]
        pixels = setup.tokenizer.decode(spec.denormalize(clean))
        return (pixels[:, places] if places else pixels).float()

    def gather_rewards(self, rollouts: list[Rollout]) -> dict[str, Tensor]:
        """Return, on every rank, the rewards of the whole epoch, `(samples,)` float64 by name."""
        total, device = self.config.prompts_per_epoch * self.config.group_size, self.setup.device
        whole = {
            name: torch.zeros(total, dtype=torch.float64, device=device)
            for name in self.pool.weights
        }
        for rollout in rollouts:
            for name, value in rollout.rewards.result().items():
                whole[name][rollout.indices.to(device)] = value.double().to(device)
        self.setup.world.sum_(*whole.values())
        return {name: value.cpu() for name, value in whole.items()}
