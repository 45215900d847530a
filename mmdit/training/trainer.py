"""The training loop. It receives built parts and moves `state` forward; everything else looks at
`state`."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mmdit.adapters import adapters
from mmdit.adapters.strength import adapter_parameters, alphas, load_alphas
from mmdit.interfaces import Batch
from mmdit.rng import Draws, key
from mmdit.training import checkpoint
from mmdit.training.alpha.schedule import AlphaSchedule, AlphaScheduleConfig, keep_strength
from mmdit.training.alpha.signs import Signs
from mmdit.training.distributed import World
from mmdit.training.ema import EMA
from mmdit.training.errors import RunError, StepsSkipped, record_failure
from mmdit.training.learner import Learner
from mmdit.training.memory.shards import Stored
from mmdit.training.metrics import Timer
from mmdit.training.optim import (
    Optimizer,
    build_optimizer,
    clip_and_guard,
    load_optimizer_tensors,
    optimizer_tensors,
)
from mmdit.training.parallel import ParallelConfig, accumulating, wrap
from mmdit.training.step_report import Monitor, Reporter, Window
from mmdit.training.train_config import TrainConfig
from mmdit.training.watch import Watch


@dataclass
class TrainState:
    """All that moves. `step` counts finished optimizer steps and is the only position: data order,
    noise, dropout and the learning rate are functions of `(seed, step)`."""

    learner: Learner
    optimizer: Optimizer
    ema: EMA | None
    monitor: Monitor
    signs: Signs | None = None
    schedule: AlphaSchedule | None = None
    step: int = 0

    @staticmethod
    def create(
        learner: Learner,
        config: TrainConfig,
        ema_config,
        alpha_schedule: AlphaScheduleConfig | None = None,
    ) -> TrainState:
        optimizer = build_optimizer(
            learner,
            config.lr,
            config.weight_decay,
            config.betas,
            config.optimizer,
            config.offload_optimizer,
        )
        ema, parts, signs, schedule = (
            EMA(ema_config, learner) if ema_config.enabled else None,
            learner.parts(),
            None,
            None,
        )
        if adapters(learner.model) and not isinstance(
            learner.model, FSDPModule
        ):  # a shard's signs would be one rank's own
            own = {
                name: [p for p in adapter_parameters(part).values() if p.requires_grad]
                for name, part in parts.items()
            }
            signs = Signs(own) if all(own.values()) else None
        if alpha_schedule and alpha_schedule.enabled:
            shadow = {p: ema.shadow[name] for name, p in ema.parameters.items()} if ema else {}
            schedule = AlphaSchedule(alpha_schedule, parts, optimizer, shadow)
        return TrainState(learner, optimizer, ema, Monitor(tuple(parts)), signs, schedule)

    def files(self) -> dict[str, dict[str, Tensor]]:
        files = {
            "model": self.learner.stored_state(),
            "optimizer": optimizer_tensors(self.learner, self.optimizer),
        }
        files |= {"ema": self.ema.shadow} if self.ema else {}
        return files | ({"signs": self.signs.tensors()} if self.signs else {})

    def notes(self) -> dict:
        """What a checkpoint keeps beside its tensors."""
        return {"monitor": self.monitor.state()} | (
            {"alpha_schedule": self.schedule.state()} if self.schedule else {}
        )

    def alphas(self) -> dict[str, float | None]:
        """By expert the alpha in force, of the first adapter."""
        layers = {
            name: next(iter(adapters(part).values()), None)
            for name, part in self.learner.parts().items()
        }
        return {name: layer and float(layer.alpha) for name, layer in layers.items()}

    def restore(self, folder: Path) -> list[str]:
        """Take over the state of a checkpoint; returns what to tell."""
        configured = alphas(self.learner.model)
        foreign = lambda name: not self.learner.is_stored(name)  # noqa: E731
        meta = checkpoint.Meta.read(folder)
        checkpoint.assign(
            self.learner.state_dict(),
            Stored(folder / "model.safetensors"),
            str(folder),
            fresh=foreign,
        )
        load_alphas(self.learner.model, meta.alphas)
        experts = tuple(f"model.{name}." for name in self.learner.parts() if name)
        load_optimizer_tensors(
            self.learner, self.optimizer, Stored(folder / "optimizer.safetensors"), experts
        )
        if self.ema:
            if not any(folder.glob("ema*")):
                raise ValueError(
                    f"{folder} has no EMA weights but ema.enabled is true: set ema.enabled to false"
                    " as it was"
                )
            checkpoint.assign(self.ema.shadow, Stored(folder / "ema.safetensors"), str(folder))
        if self.signs and (folder / "signs.safetensors").is_file():
            self.signs.restore(checkpoint.read_tensors(folder / "signs.safetensors"))
        notes = checkpoint.read_notes(folder)
        try:
            if notes:
                self.monitor.restore(notes["monitor"])
            if self.schedule and notes and "alpha_schedule" in notes:
                self.schedule.restore(notes["alpha_schedule"])
            elif self.schedule:
                first = self.schedule.config.phases[0].name
                print(
                    f"{folder} holds no alpha schedule: it starts with phase {first!r}", flush=True
                )
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{folder / 'monitor.json'} is not of this project: {error!r}"[:1000]
            ) from None
        self.step = meta.step
        return [] if self.schedule else self._reach(configured)

    def _reach(self, configured: dict[str, float]) -> list[str]:
        """Have adapters the alphas of the config where a checkpoint had others, as
        `alpha_schedule.on_change: preserve` would."""
        layers = adapters(self.learner.model)
        changed = {name: alpha for name, alpha in configured.items() if layers[name].alpha != alpha}
        if not changed:
            return []
        shadow = (
            {p: self.ema.shadow[name] for name, p in self.ema.parameters.items()}
            if self.ema
            else {}
        )
        moments, (first, alpha) = self.optimizer.state, next(iter(changed.items()))
        told = (
            f"alpha of {len(changed)} adapters {layers[first].alpha:g} → {alpha:g}: they compute"
            " what they did and move at another pace"
        )
        for name, alpha in changed.items():
            keep_strength(layers[name], alpha, moments, shadow)
        return [f"{told}; alpha_schedule.on_change has other ways"]


class StopRequest:
    """SIGTERM, SIGHUP (the terminal was closed) and SIGINT ask for a stop after the current step; a
    second SIGINT interrupts at once."""

    def __init__(self):
        self.asked, self.interrupted = False, False

    def _ask(self, signum, frame):
        if signum == signal.SIGINT:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
        self.asked = True

    @contextlib.contextmanager
    def listening(self):
        wanted = [signal.SIGTERM, signal.SIGINT]
        hang_up = getattr(signal, "SIGHUP", None)  # not on Windows
        if hang_up and signal.getsignal(hang_up) is not signal.SIG_IGN:  # ignored: by nohup
            wanted.append(hang_up)
        try:
            previous = {s: signal.signal(s, self._ask) for s in wanted}
        except ValueError:  # not the main thread: no signals here
            yield self
            return
        try:
            yield self
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)


@dataclass
class Trainer:
    """`batches` yields, per step from `state.step` on, the list of this rank's micro-batches."""

    config: TrainConfig
    seed: int
    state: TrainState
    batches: Callable
    world: World
    run_dir: Path
    save: Callable[[TrainState], None]
    preview: Callable[[TrainState], None] | None = None
    validate: Callable[[TrainState], dict[str, float]] | None = None
    parallel: ParallelConfig = ParallelConfig()
    saved: int = field(default=0, init=False)  # the step of the newest checkpoint
    moving: bool = field(default=False, init=False)  # between the old state and the new one

    def run(self) -> bool:
        """Train to `max_steps`; True when it got there, False when it was asked to stop. Saves at
        the end either way."""
        config, state, world = self.config, self.state, self.world
        learner = state.learner
        if config.compiles(world.device.type):
            learner.compile_model(replays=config.replays)
        wrapped = wrap(learner, world, self.parallel)
        reporter = Reporter(config, self.seed, world, self.run_dir, state.step, state.monitor)
        timer, window = reporter.timer, Window(world.device)
        learner.train()
        self.saved = state.step
        watch = Watch(world, config.timeout_minutes, self.run_dir)
        with (
            StopRequest().listening() as stop,
            watch.running(),
            self._rescuing(lambda: reporter.observe(window)),
        ):
            watch.at(state.step + 1, "waiting for data")
            for micro_batches in timer.waiting(self.batches(state.step, config.max_steps)):
                watch.at(state.step + 1, "computing")
                try:
                    self.optimizer_step(
                        wrapped, micro_batches, reporter.rate.at(state.step + 1), window
                    )
                except torch.OutOfMemoryError as error:
                    raise self._memory_full(micro_batches, error) from error
                state.step += 1
                if state.ema:
                    state.ema.update(state.step, learner.resting(window.experts[-1]))
                if state.schedule and state.schedule.due(state.step):
                    reporter.observe(window)
                    for line in state.schedule.look(state.step, state.monitor.courses):
                        world.print(line)
                self.moving = False
                stopping = world.any(stop.asked)
                done = stopping or state.step == config.max_steps
                due = lambda every: every and (state.step % every == 0 or done)  # noqa: B023, E731
                if (
                    due(config.log_every_steps)
                    or due(config.save_every_steps)
                    or due(config.val_every_steps)
                ):
                    values = reporter.read(state, window)
                    if due(config.val_every_steps):
                        watch.at(state.step, "validation")
                        values |= self._aside(timer, self.validate)
                    reporter.write(values, window)
                    window = Window(world.device)
                if due(config.save_every_steps):
                    watch.at(state.step, "saving")
                    self.saved = state.step
                    self.save(state)
                if due(config.sample_every_steps):
                    watch.at(state.step, "previews")
                    self._aside(timer, self.preview)  # on the main rank; the others wait
                watch.at(state.step + 1, "waiting for data")
                if stopping:
                    break
        reporter.close()
        if state.step < config.max_steps:
            world.print(f"stopped on request at step {state.step}; continue with --resume")
        return state.step >= config.max_steps

    @contextlib.contextmanager
    def _rescuing(self, observe: Callable[[], None]):
        """Save the steps since the last checkpoint before an error ends the training, where the
        state is whole: an item of the cache that is gone or a report that cannot be written does
        not make the weights worse. One of several processes cannot know that the others are as
        far."""
        try:
            yield
        except StepsSkipped:
            raise
        except Exception as error:
            if self.world.size == 1 and not self.moving and self.state.step > self.saved:
                try:
                    observe()
                    self.save(self.state)
                    told = f"saved at step {self.state.step} before it ends; continue with --resume"
                except Exception as second:
                    told = f"the steps since {self.saved} could not be saved: {second}"
                print(f"the training meets an error ({type(error).__name__}): {told}", flush=True)
            raise

    def _aside(self, timer: Timer, look: Callable[[TrainState], dict | None] | None) -> dict:
        """What `look` makes of the state, in no time of the training."""
        begin = time.perf_counter()
        values = look(self.state) if look else None
        self.state.learner.train()
        self.world.barrier()
        timer.last += time.perf_counter() - begin
        return values or {}

    def optimizer_step(
        self, wrapped: nn.Module, micro_batches: list[Batch], lr: float, window: Window
    ) -> None:
        """One optimizer step over this rank's micro-batches. Gradients are means over the global
        batch."""
        config, state, device = self.config, self.state, self.world.device
        state.optimizer.set_lr(lr)
        torch.manual_seed(
            key(self.seed, "dropout", state.step, self.world.rank) & (2**63 - 1)
        )  # nn.Dropout's own generator
        plan, frames = state.learner.experts, micro_batches[0].latents.shape[1]
        expert = plan.active(state.step, frames) if plan else None
        done: list[tuple[Tensor, Tensor, Tensor]] = []
        for i, batch in enumerate(micro_batches):
            with accumulating(wrapped, last=i + 1 == len(micro_batches)):
                latents = batch.latents.to(device, non_blocking=True)
                draws = Draws(self.seed, state.step, batch.indices.to(device, non_blocking=True))
                crops = None if batch.crops is None else batch.crops.to(device, non_blocking=True)
                keep = state.learner.model.draw_keep(*latents.shape[2:4], self.seed, state.step)
                with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
                    losses, t = wrapped(latents, batch.captions, draws, keep, crops, expert)
                (losses.mean() / len(micro_batches)).backward()
            done.append((losses.detach(), t.detach(), latents.isfinite().flatten(1).all(1)))
            window.flops += len(latents) * state.learner.train_flops(
                tuple(latents.shape[1:4]), keep
            )
        self.moving = True
        norm, skipped = clip_and_guard(state.optimizer, config.grad_clip)
        signs = state.signs.compare(expert or "", skipped) if state.signs else None
        state.optimizer.step()
        state.optimizer.zero_grad()
        ids = [id for batch in micro_batches for id in batch.ids]
        losses, t, sound = map(torch.cat, zip(*done))
        window.add(losses, t, ids, norm, skipped, expert or "", signs, sound)

    def _memory_full(self, micro_batches: list[Batch], error: torch.OutOfMemoryError) -> RunError:
        batch, frames, *cells = micro_batches[0].latents.shape[:4]
        shape = f"{batch} x {frames} frames x {cells[0]}x{cells[1]} cells"
        cuda = self.world.device.type == "cuda"
        peak = f", peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if cuda else ""
        ids = [id for batch in micro_batches for id in batch.ids]
        path = record_failure(
            self.run_dir,
            "memory",
            self.state.step,
            self.world.rank,
            error,
            seed=self.seed,
            ids=ids,
            micro_batch=list(micro_batches[0].latents.shape),
            world=self.world.size,
        )
        smaller = "video.num_frames or the size"
        if batch > 1:
            smaller = "train.batch_size and raise train.grad_accum_steps (the step stays the same)"
        replays = self.state.learner.replays
        kept = replays and any(replays.made.values())
        advice = checkpoint.how_to_go_on(self.run_dir)
        if self.world.size == 1 and self.state.step:  # it is saved before this is told
            advice = "Checkpoints are whole: continue with --resume"
        graphs = (
            " or train.replays: false (graphs of other micro-batches keep memory)" if kept else ""
        )
        return RunError(
            f"the memory is full in step {self.state.step + 1} on rank {self.world.rank} with"
            f" micro-batches of {shape}{peak} ({str(error).splitlines()[0]}). Reduce {smaller}, set"
            f" model.checkpointing: true or model.residual: autocast{graphs}. The step's items are"
            f" in {path}. {advice}"
        )
