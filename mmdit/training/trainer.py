"""The training loop. It receives built parts and advances `state`; everything else only reads
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

from mmdit.interfaces import Batch
from mmdit.rng import Draws, key
from mmdit.signals import handling, hang_ups
from mmdit.training import checkpoint
from mmdit.training.distributed import World
from mmdit.training.errors import RunError, StepsSkipped, record_failure
from mmdit.training.graphs import update_graph
from mmdit.training.metrics import Timer
from mmdit.training.optim import clip_and_guard
from mmdit.training.parallel import ParallelConfig, accumulating, wrap
from mmdit.training.saving import BackgroundSaves
from mmdit.training.step_report import Reporter, ReportWindow, TakenStep
from mmdit.training.trackers import Tracker
from mmdit.training.train_config import TrainConfig
from mmdit.training.train_state import TrainState
from mmdit.training.watch import Watch


class StopRequest:
    """SIGTERM, SIGHUP (the terminal was closed) and SIGINT ask for a stop after the current step; a
    second SIGINT interrupts at once. `heard`: how many signals trainings of this process
    received."""

    heard = 0

    def __init__(self):
        self.asked, self.interrupted = False, False

    def _ask(self, signum, frame):
        StopRequest.heard += 1
        if signum == signal.SIGINT:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
        self.asked = True

    @contextlib.contextmanager
    def listening(self):
        with handling(self._ask, signal.SIGTERM, signal.SIGINT, *hang_ups()):
            yield self


@dataclass
class Trainer:
    """`batches(step, max_steps)` yields, for each step from `step` on, the list of this rank's
    micro-batches."""

    config: TrainConfig
    seed: int
    state: TrainState
    batches: Callable
    world: World
    run_dir: Path
    save: Callable[[TrainState], None]
    preview: Callable[[TrainState], None] | None = None
    validate: Callable[[TrainState], dict[str, float | None]] | None = None
    parallel: ParallelConfig = ParallelConfig()
    tracker: Tracker | None = None
    background: BackgroundSaves | None = None  # in which `save` writes; None: at once
    saved: int = field(default=0, init=False)  # the step of the newest checkpoint
    moving: bool = field(default=False, init=False)  # within an optimizer step
    updates: update_graph.ReplayedUpdates | None = field(default=None, init=False)

    def run(self) -> bool:
        """Train to `max_steps`, and save at the end. Return True if it got there, False if it was
        asked to stop."""
        config, state, world = self.config, self.state, self.world
        compiles, on_gpu = config.compiles(world.device.type), world.device.type == "cuda"
        if compiles:
            state.learner.compile_model()
        if config.replays and (compiles or on_gpu):
            state.learner.replay_model()
            if update_graph.suits(state.optimizer) and not state.signs:
                self.updates = update_graph.ReplayedUpdates(state.optimizer, config.grad_clip)
        wrapped = wrap(state.learner, world, self.parallel)
        reporter = Reporter(
            config, self.seed, world, self.run_dir, state.step, state.monitor, self.tracker
        )
        window = ReportWindow(world.device)
        watch = Watch(world, config.timeout_minutes, self.run_dir)
        state.learner.train()
        self.saved = state.step
        with (
            StopRequest().listening() as stop,
            watch.running(),
            self._rescuing(lambda: reporter.observe(window)),
            self.background.running() if self.background else contextlib.nullcontext(),
        ):
            watch.at(state.step + 1, "waiting for data")
            for micro_batches in reporter.timer.waiting(self.batches(state.step, config.max_steps)):
                watch.at(state.step + 1, "computing")
                try:
                    rate = reporter.rate.at(state.step + 1)
                    self.optimizer_step(wrapped, micro_batches, rate, window)
                except torch.OutOfMemoryError as error:
                    raise self._memory_full(micro_batches, error) from error
                self._advance(reporter, window)
                if self.background:
                    self.background.check()
                stopping = world.any(stop.asked)
                last = stopping or state.step == config.max_steps
                reports = (config.log_every_steps, config.save_every_steps, config.val_every_steps)
                if any(self._is_due(every, last) for every in reports):
                    values = reporter.read(state, window)
                    if self._is_due(config.val_every_steps, last):
                        watch.at(state.step, "validation")
                        values |= self._untimed(reporter.timer, self.validate)
                    reporter.write(values, window)
                    window = ReportWindow(world.device)
                if self._is_due(config.save_every_steps, last):
                    watch.at(state.step, "saving")
                    if self.background:
                        self.background.wait()  # raise its error before this step counts as saved
                    self.saved = state.step
                    self.save(state)
                if self._is_due(config.sample_every_steps, last):
                    watch.at(state.step, "previews")
                    self._untimed(reporter.timer, self.preview)  # on rank 0; the others wait
                watch.at(state.step + 1, "waiting for data")
                if stopping:
                    break
        reporter.close()
        if state.step < config.max_steps:
            world.print(f"stopped on request at step {state.step}; continue with --resume")
        return state.step >= config.max_steps

    def _advance(self, reporter: Reporter, window: ReportWindow) -> None:
        """Count the step that was taken, and update what depends on the weights: averages and
        alphas."""
        state = self.state
        state.step += 1
        if state.ema:
            followed, last = state.ema.steps_of(state.step), window.taken[-1].expert
            state.ema.update(state.step, state.learner.resting(state.step, followed, last))
        if state.schedule and state.schedule.due(state.step):
            reporter.observe(window)
            for line in state.schedule.look(state.step, state.monitor.histories):
                self.world.print(line)
        self.moving = False

    def _is_due(self, every: int, last: bool) -> bool:
        """Return whether an action that is due every `every` steps (0: never) is due now."""
        return every > 0 and (last or self.state.step % every == 0)

    @contextlib.contextmanager
    def _rescuing(self, observe: Callable[[], None]):
        """Save the steps since the last checkpoint when an error ends the training, provided that
        the state is consistent: a missing cache item or a report that cannot be written does not
        spoil the weights. With several processes nothing is saved, because one cannot know whether
        the others have got as far."""
        try:
            yield
        except StepsSkipped as error:
            self._record_end(error)
            raise
        except Exception as error:
            self._record_end(error)
            if self.world.size == 1 and not self.moving and self.state.step > self.saved:
                try:
                    observe()
                    self.save(self.state)
                    if self.background:
                        self.background.wait()
                    line = f"saved at step {self.state.step} before it ends; continue with --resume"
                except Exception as second:
                    line = f"the steps since {self.saved} could not be saved: {second}"
                print(f"the training meets an error ({type(error).__name__}): {line}", flush=True)
            raise

    def _record_end(self, error: Exception) -> None:
        """Record why the training ends, for readers of its folder. (When memory is full,
        `_memory_full` has recorded it, with the items of the step.)"""
        if not isinstance(error.__cause__, torch.OutOfMemoryError):
            record_failure(self.run_dir, "training", self.state.step, self.world.rank, error)

    def _untimed(self, timer: Timer, look: Callable[[TrainState], dict | None] | None) -> dict:
        """Return what `look` returns for the state; its time does not count as training."""
        begin = time.perf_counter()
        values = look(self.state) if look else None
        self.state.learner.train()
        self.world.barrier()
        timer.last += time.perf_counter() - begin
        return values or {}

    def optimizer_step(
        self, wrapped: nn.Module, micro_batches: list[Batch], lr: float, window: ReportWindow
    ) -> None:
        """Take one optimizer step over this rank's micro-batches. Gradients are means over the
        global batch."""
        config, state, device = self.config, self.state, self.world.device
        state.optimizer.set_lr(lr)
        # nn.Dropout uses torch's global generator.
        torch.manual_seed(key(self.seed, "dropout", state.step, self.world.rank) & (2**63 - 1))
        plan, frames = state.learner.experts, micro_batches[0].latents.shape[1]
        expert = plan.active(state.step, frames) if plan else None
        done: list[tuple[Tensor, Tensor, Tensor]] = []
        for i, batch in enumerate(micro_batches):
            with accumulating(wrapped, last=i + 1 == len(micro_batches)):
                latents = batch.latents.to(device, non_blocking=True)
                draws = Draws(self.seed, state.step, batch.indices, device=device)
                crops, places = (
                    None if values is None else values.to(device, non_blocking=True)
                    for values in (batch.crops, batch.places)
                )
                frames, rows, columns = latents.shape[1:4]
                keep = state.learner.model.draw_keep(rows, columns, self.seed, state.step)
                autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.autocast)
                with autocast, window.forward.running():
                    losses, t = wrapped(latents, batch.captions, draws, keep, crops, places, expert)
                (losses.mean() / len(micro_batches)).backward()
            done.append((losses.detach(), t.detach(), latents.isfinite().flatten(1).all(1)))
            flops = state.learner.train_flops((frames, rows, columns), keep)
            window.flops += len(latents) * flops // self.world.context_size
        self.moving = True
        if self.updates:
            norm, skipped, signs = *self.updates(), None
        else:
            norm, skipped = clip_and_guard(state.optimizer, config.grad_clip)
            signs = state.signs.compare(expert or "", skipped) if state.signs else None
            state.optimizer.step()
        state.optimizer.zero_grad()
        ids = [id for batch in micro_batches for id in batch.ids]
        losses, t, sound = map(torch.cat, zip(*done))
        step = TakenStep(losses, t, norm, skipped, expert or "", signs, ids, sound)
        window.taken.append(step)

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
        graphs = ""
        if replays and any(replays.made.values()):
            graphs = " or train.replays: false (graphs of other micro-batches keep memory)"
        advice = checkpoint.how_to_go_on(self.run_dir)
        if self.world.size == 1 and self.state.step:  # it is saved before this is printed
            advice = "Checkpoints are whole: continue with --resume"
        return RunError(
            f"the memory is full in step {self.state.step + 1} on rank {self.world.rank} with"
            f" micro-batches of {shape}{peak} ({str(error).splitlines()[0]}). Reduce {smaller}, set"
            f" model.checkpointing: true or model.residual: autocast{graphs}. The step's items are"
            f" in {path}. {advice}"
        )
