"""What the loops share: policy and frozen copies as velocity fields, rollouts, rewards, one update,
evaluation, drift."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

from mmdit.config import ConfigError
from mmdit.diffusion import LinearPath, guided, sampling_times
from mmdit.interfaces import TextTokens, Tokenizer
from mmdit.posttrain import dynamics, evaluation
from mmdit.posttrain.advantages import check_geometry
from mmdit.posttrain.experts import Pair
from mmdit.posttrain.losses import wide
from mmdit.posttrain.posttrain_config import PosttrainConfig
from mmdit.posttrain.prompts import GENERATED, Prompts
from mmdit.posttrain.rewards import Reward, RewardPool, Samples
from mmdit.posttrain.trajectory import Rollout, StoragePlan, Trajectory, group_id
from mmdit.rng import Draws, generator
from mmdit.text_encoders import put_away
from mmdit.training import checkpoint
from mmdit.training.distributed import World
from mmdit.training.errors import RunError
from mmdit.training.memory.shards import Stored
from mmdit.training.metrics import MetricsLog
from mmdit.training.optim import clip_and_guard
from mmdit.training.train_config import TrainConfig
from mmdit.training.trainer import StopRequest, TrainState

Field = Callable[[Tensor, float | Tensor], Tensor]  # x (B, ...) and sigma to the velocity, float32
PROBES = 32  # samples on which the drift is measured
PROBE_LEVELS = (0.9, 0.6, 0.3)


@dataclass
class Session:
    """A built run. The text encoder is frozen and the network stays in evaluation mode, so that
    scoring a rollout again gives exactly what was sampled. Of two experts (`pair`) the learner has
    the one that is trained; rollouts use both.
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
    save: Callable[[Session, bool], None]  # with True: weights alone, as the best so far
    world: World = World()
    pair: Pair | None = None
    log: MetricsLog | None = field(default=None, init=False)

    def __post_init__(self):
        learner, config = self.state.learner, self.config
        if not isinstance(learner.objective.path, LinearPath):
            raise ConfigError(
                "train.objective",
                "is not flow matching on the linear path, which post-training is made for",
            )
        self.learner, self.device = learner.eval(), self.world.device
        self.micro_batches = check_geometry(
            config.prompts_per_epoch,
            config.group_size,
            self.world.size,
            config.micro_batch,
            config.updates_per_epoch,
        )
        if self.train.max_steps % config.updates_per_epoch:
            raise ConfigError(
                "train.max_steps",
                f"is {self.train.max_steps}, must be a multiple of posttrain."
                f"updates_per_epoch, {config.updates_per_epoch}",
            )
        if config.prompts_per_epoch > len(self.prompts):
            raise ConfigError(
                "posttrain.prompts_per_epoch",
                f"is {config.prompts_per_epoch}, must be at most the {len(self.prompts)} prompts",
            )
        if config.micro_batch % config.group_size and (
            any(r.groupwise for r in config.rewards)
            or config.algorithm == "dpo"
            and not config.dpo.given
        ):
            raise ConfigError(
                "posttrain.micro_batch",
                f"is {config.micro_batch}, must be a multiple of group_size "
                f"{config.group_size}: a groupwise reward or dpo compares whole groups",
            )
        self._prepare_rewards()
        self.pool = RewardPool(config.rewards, workers=int(config.async_rewards))
        self.judge = RewardPool(config.judges, workers=0)
        latent_frames = learner.spec.frames(self.frames)
        self.shape = (
            latent_frames,
            *learner.spec.grid(self.width, self.height),
            learner.spec.channels,
        )
        shift = config.rollout.shift * learner.objective.clip_shift(latent_frames)
        self.times = sampling_times(learner.objective, config.rollout.steps, shift)
        if any(not -self.frames <= place < self.frames for place in config.reward_frames):
            raise ConfigError(
                "posttrain.reward_frames",
                f"is {list(config.reward_frames)}; must be frames of a clip of "
                f"{self.frames}, from 0, or -1 for the last",
            )
        if self.pair:
            self.pair.check(config, self.times)
        elif config.rollout.guidance_low is not None:
            raise ConfigError(
                "posttrain.rollout.guidance_low",
                f"is {config.rollout.guidance_low}, but this model is no pair of "
                "experts; leave it out",
            )
        with torch.no_grad():  # once
            self.text = learner.text_encoder(self.prompts.captions).to(self.device)
            evaluation.encode(self)
        if self.evaluated:
            evaluation.check(self)
        put_away(learner.text_encoder)
        self.reference, self.old = self.snapshot(), self.snapshot()
        self.marks: dict[str, Tensor] = {}  # scalars that tell where the run began
        self._probes: tuple[TextTokens, list[tuple[float, Tensor, Tensor]]] | None = None

    def _prepare_rewards(self) -> None:
        """Let the rewards that will be asked load what they need. ConfigError: one of them needs
        what these prompts have not."""
        config = self.config
        asked: dict[str, tuple[Reward, ...]] = {"rewards": config.trained_rewards}
        if self.evaluated:
            asked["eval_rewards"] = config.judges
        for key, rewards in asked.items():
            for i, reward in enumerate(rewards):
                if "facts" in reward.needs and self.prompts.facts is None:
                    raise ConfigError(
                        f"posttrain.{key}[{i}]",
                        f"is {reward.type}, which needs the facts of its prompts; those of"
                        f" {config.prompts} have none: take another reward, or posttrain.prompts:"
                        f" {GENERATED}",
                    )
                reward.prepare(torch.device(reward.device or self.device))
        if config.algorithm == "srpo":
            config.srpo.scorer.prepare(self.device)

    def files(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds besides the state, for an exact resume."""
        slow = {"old": self.old} if self.config.algorithm in ("nft", "awm") else {}
        return slow | ({"marks": self.marks} if self.marks else {})

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint; `reference` stays the model that the first run began from."""
        self.state.restore(folder)
        if self.config.algorithm in ("nft", "awm"):
            checkpoint.assign(self.old, Stored(folder / "old.safetensors"), str(folder))
        self.marks = (
            checkpoint.read_tensors(folder / "marks.safetensors")
            if (folder / "marks.safetensors").is_file()
            else {}
        )

    # ── policies ──────────────────────────────────────────────────────────────────────────────────
    def snapshot(self) -> dict[str, Tensor]:
        """A copy of what is trained, by the network's own names."""
        return {
            name: p.detach().clone()
            for name, p in self.learner.model.named_parameters()
            if p.requires_grad
        }

    def averaged(self) -> dict[str, Tensor]:
        return {name.removeprefix("model."): value for name, value in self.state.ema.shadow.items()}

    def velocity(self, text: TextTokens, weights: dict[str, Tensor] | None = None) -> Field:
        """Of the policy, or of a copy of its trained weights; with the guidance that rollouts have,
        here as there."""
        model, objective, rollout = self.learner.model, self.learner.objective, self.config.rollout
        own = model if weights is None else lambda *inputs: functional_call(model, weights, inputs)
        if self.pair:
            low = rollout.guidance if rollout.guidance_low is None else rollout.guidance_low
            mine, others = (
                (rollout.guidance, low) if self.pair.trains_high else (low, rollout.guidance)
            )
            sibling = guided(objective, self.pair.sibling, text, others)
            denoise = self.pair.routed(guided(objective, own, text, mine), sibling)
        else:
            denoise = guided(objective, own, text, rollout.guidance)

        def field_of(x: Tensor, t: float | Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.train.autocast):
                clean = denoise(x, t).float()
            return (x - clean) / (wide(t, x) if isinstance(t, Tensor) else t)

        return field_of

    # ── rollouts ──────────────────────────────────────────────────────────────────────────────────
    @torch.no_grad()
    def roll_out(
        self,
        field_of: Field,
        draws: Draws,
        stochastic: Sequence[int] = (),
        plan: StoragePlan | None = None,
        first: Draws | None = None,
    ) -> Trajectory:
        """Sample along `times`: the given steps by the configured dynamics, the others by the ODE.
        Each state is rounded as it is stored before anything is computed from it; means of
        stochastic steps are kept as `mean`. `first` keys the noise at t = 1."""
        rollout, times = self.config.rollout, self.times
        trajectory = Trajectory(plan or StoragePlan.for_steps((), rollout.steps))
        x = trajectory.put(0, (first or draws).normal("rollout", *self.shape))
        for index, t in enumerate(times[:-1]):
            noisy = index in stochastic
            step = dynamics.step(
                rollout.dynamics if noisy else "ode", rollout.noise_level, times, index
            )
            mean = step.mean(x, field_of(x, t))
            x = trajectory.put(
                index + 1,
                mean + step.std * draws.normal(f"sde {index}", *self.shape) if noisy else mean,
            )
            trajectory.put_value("mean", index, mean)
        return trajectory

    def stochastic(self, epoch: int) -> tuple[int, ...]:
        """The steps that are noisy, stored and trained in this epoch."""
        rollout = self.config.rollout
        if not self.config.trains_steps:
            return ()
        order = torch.randperm(
            len(rollout.candidates), generator=generator(self.seed, "sde window", epoch)
        )
        return tuple(sorted(rollout.candidates[i] for i in order[: rollout.sde_pick or None]))

    def plan(self, stochastic: tuple[int, ...]) -> StoragePlan:
        storage = self.config.storage
        dtype = torch.bfloat16 if storage.dtype == "bf16" else torch.float32
        return StoragePlan.for_steps(
            stochastic, self.config.rollout.steps, ("mean",), dtype, storage.positions == "all"
        )

    def epoch_prompts(self, epoch: int) -> Tensor:
        """`(samples,)`: the prompt of every sample of the epoch, over all processes."""
        order = torch.randperm(
            len(self.prompts), generator=generator(self.seed, "epoch prompts", epoch)
        )
        return order[: self.config.prompts_per_epoch].repeat_interleave(self.config.group_size)

    def own_indices(self) -> Iterator[Tensor]:
        """Of this process, micro-batch by micro-batch: each update takes the same samples however
        many processes share it."""
        config = self.config
        part = config.prompts_per_epoch * config.group_size // config.updates_per_epoch
        for update in range(config.updates_per_epoch):
            own = torch.arange(part).tensor_split(self.world.size)[self.world.rank]
            yield from (update * part + own).split(config.micro_batch)

    def collect(
        self, epoch: int, weights: dict[str, Tensor] | None = None
    ) -> tuple[list[Rollout], list[Future]]:
        """This process's rollouts of an epoch, and their rewards to come. `weights`: of a copy that
        samples instead."""
        prompts, stochastic = self.epoch_prompts(epoch), self.stochastic(epoch)
        plan = self.plan(stochastic)
        if self.config.rollout.policy == "old":
            weights = self.old
        rollouts, futures = [], []
        for indices in self.own_indices():
            places = prompts[indices]
            draws = Draws(self.seed, epoch, indices.to(self.device))
            field_of = self.velocity(self.text[places.to(self.device)], weights)
            groups = torch.tensor([group_id(self.prompts.captions[i]) for i in places.tolist()])
            shared = self.config.rollout.shared_noise
            first = (
                Draws(self.seed, epoch, draws.indices // self.config.group_size) if shared else None
            )
            rollout = Rollout(
                self.roll_out(field_of, draws, stochastic, plan, first), places, groups, indices
            )
            samples = self.samples(
                rollout.clean, self.prompts.at(places.tolist()), groups, draws, self.pool
            )
            rollouts.append(rollout.to("cpu") if self.config.storage.offload else rollout)
            futures.append(self.pool.submit(samples))
        return rollouts, futures

    @torch.no_grad()
    def samples(
        self, clean: Tensor, prompts: Prompts, groups: Tensor, draws: Draws, pool: RewardPool
    ) -> Samples:
        decoded = any({"pixels", "images"} & set(reward.needs) for reward in pool.rewards)
        pixels = self.decode(clean) if decoded else None
        return Samples(
            captions=prompts.captions,
            latents=clean,
            groups=groups,
            draws=draws,
            pixels=pixels,
            facts=prompts.facts,
        )

    def decode(self, clean: Tensor) -> Tensor:
        """Pixels of `reward_frames`, or of all. No more is decoded than they need: of a tokenizer
        of single frames those, of one along time what comes before the last of them."""
        spec, places = (
            self.learner.spec,
            [place % self.frames for place in self.config.reward_frames],
        )
        if not places:
            return self.tokenizer.decode(spec.denormalize(clean)).float()
        if spec.temporal == 1:
            return self.tokenizer.decode(spec.denormalize(clean[:, places])).float()
        latents = clean[:, : 1 + -(-max(places) // spec.temporal)]
        return self.tokenizer.decode(spec.denormalize(latents))[:, places].float()

    def gather(self, futures: list[Future], rollouts: list[Rollout]) -> dict[str, Tensor]:
        """Rewards of the whole epoch `(samples,)` by name, on every process."""
        total = self.config.prompts_per_epoch * self.config.group_size
        whole = {
            name: torch.zeros(total, dtype=torch.float64, device=self.device)
            for name in self.pool.weights
        }
        for future, rollout in zip(futures, rollouts, strict=True):
            for name, value in future.result().items():
                whole[name][rollout.indices.to(self.device)] = value.double().to(self.device)
        self.world.sum_(*whole.values())
        return {name: value.cpu() for name, value in whole.items()}

    # ── one update ────────────────────────────────────────────────────────────────────────────────
    def apply(self) -> dict[str, float]:
        """An optimizer step from the gradients there are (summed over micro-batches; their mean
        over processes)."""
        optimizer, state = self.state.optimizer, self.state
        gradients = [
            p.grad
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        self.world.sum_(*gradients)
        if self.world.size > 1:
            torch._foreach_div_(gradients, self.world.size)
        optimizer.set_lr(self.train.learning_rate().at(state.step + 1))
        norm, skipped = clip_and_guard(optimizer, self.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        if state.ema:
            state.ema.update(state.step)
        return {"grad_norm": norm.item(), "skipped": skipped.item()}

    # ── looking ───────────────────────────────────────────────────────────────────────────────────
    @torch.no_grad()
    def drift(self) -> float:
        """Mean squared change of the velocity since the start, on fixed samples of the first model
        at fixed noise levels."""
        if self._probes is None:
            text = self.text[torch.arange(min(PROBES, len(self.prompts)), device=self.device)]
            draws = Draws.of(self.seed, -1, len(text), self.device)
            first = self.velocity(text, self.reference)
            clean, noise = self.roll_out(first, draws).get(-1), draws.normal("probe", *self.shape)
            states = [
                (t, (1 - t) * clean + t * noise)
                for t in PROBE_LEVELS
                if not self.pair or self.pair.owns(t)
            ]
            self._probes = text, [(t, x, first(x, t)) for t, x in states]
        text, probes = self._probes
        now = self.velocity(text)
        return sum((now(x, t) - v).square().mean().item() for t, x, v in probes) / len(probes)

    def evaluate(self) -> dict[str, float]:
        """`seen_…` and `held_out_…` means of the evaluation rewards."""
        return evaluation.evaluate(self)

    def judged(self) -> dict[str, float]:
        """`evaluate`, and the weights saved apart when their rewards on held-out prompts (on seen
        ones, without these) are the highest so far and above those of the start: rewards rise on
        training prompts long after pictures get worse.
        """
        values, step = self.evaluate(), self.state.step
        if self.evaluated:
            title = "held_out" if "held_out" in self.evaluated else "seen"
            score = sum(
                weight * values[f"{title}_{name}"] for name, weight in self.judge.weights.items()
            )
            first = "best" not in self.marks
            if self.world.any(first or score > self.marks["best"][0].item()):
                self.marks["best"] = torch.tensor([score, step], dtype=torch.float64)
                if not first:
                    self.save(self, True)
        return values

    def beyond(self, drift: float) -> str | None:
        """Return why training must not go on, None if it may. It is asked of what checkpoints hold,
        so that a run which a stop rule ended has ended after a resume, too."""
        limit, growth = self.config.max_drift, self.config.srpo.max_std_growth
        if limit and drift > limit:
            return f"the drift {drift:.3g} is above posttrain.max_drift, {limit:g}"
        if "latent_std" in self.marks:
            first, last = self.marks["std"].item(), self.marks["latent_std"].item()
            if last > growth * first:
                return (
                    f"the latents' deviation grew to {last:.3g} from {first:.3g}, above"
                    " posttrain.srpo.max_std_growth"
                )
        return None

    def run(self, body: Callable[[], dict[str, float]], updates: int) -> bool:
        """Call `body` (one epoch of `updates` updates, giving numbers to report) to
        `train.max_steps`, with evaluation, drift, checkpoints and stop rules between. True when it
        came to its end or a stop rule ended it; False: asked to stop.
        """
        state, train, config = self.state, self.train, self.config
        self.log = MetricsLog(self.run_dir, state.step or -1) if self.world.is_main else None
        if state.step == 0:
            self._report({"step": 0, "drift": 0.0, **self.judged()})
        ended = state.step >= train.max_steps
        if ended:
            self.world.print(
                f"nothing left to do: train.max_steps is {train.max_steps}; raise it to train"
                " further"
            )
        else:
            ended = self._ended_before()
        with StopRequest().listening() as stop:
            while not ended:
                begin = time.perf_counter()
                values = body()
                values |= {
                    "step": state.step,
                    "seconds": time.perf_counter() - begin,
                    "drift": self.drift(),
                }
                reason = self.beyond(values["drift"])
                finite = all(math.isfinite(value) for value in values.values())
                broken = self.world.any(not finite or bool(values.get("skipped")))
                if broken:
                    reason = "a loss or gradient is not finite"
                if self.world.any(reason is not None):
                    reason = reason or "another process found a reason to"
                asked = self.world.any(stop.asked)
                ended = state.step >= train.max_steps or reason is not None
                epoch = state.step // updates
                if (
                    epoch % config.eval_every_epochs == 0 or ended
                ):  # not when asked to stop: a resume would know of it
                    values |= self.judged()
                self._report(values)
                if state.step % train.save_every_steps < updates or ended or asked:
                    self.save(self, False)
                if reason:
                    self.world.print(f"stopped at update {state.step}: {reason}")
                if asked and not ended:
                    self.world.print(
                        f"stopped on request at update {state.step}; continue with --resume"
                    )
                    return False
                if broken:
                    raise RunError(
                        f"stopped at update {state.step}: {reason}; what was saved before is "
                        "whole. Look at the rewards and at train.lr, and start again from there"
                    )
        if self.log:
            self.log.close()
            if (self.run_dir / "best").is_dir():
                print(
                    f"the best on evaluation prompts, of update {int(self.marks['best'][1])}:"
                    f" {self.run_dir / 'best'}"
                )
        return True

    def _ended_before(self) -> bool:
        """Whether a stop rule holds for a run that is resumed; then it says so."""
        drift = self.drift() if self.state.step and self.config.max_drift else 0.0
        reason = self.beyond(drift)
        over = self.world.any(reason is not None)
        if over:
            self.world.print(
                f"nothing is trained, for a stop rule ended this run at update {self.state.step}: "
                f"{reason or 'that of another process'}; raise the limit to train further"
            )
        return over

    def _report(self, values: dict[str, float]) -> None:
        if self.log:
            self.log.write(values)
            shown = [f"{name} {value:.4g}" for name, value in values.items() if name != "step"]
            print(
                f"update {values['step']}/{self.train.max_steps}  " + "  ".join(shown), flush=True
            )
