"""The training loop. It receives built parts and moves `state` forward; everything else looks at `state`."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmdit.config import ConfigError
from mmdit.diffusion import Solver
from mmdit.interfaces import Batch
from mmdit.rng import Draws, key
from mmdit.training import checkpoint
from mmdit.training.distributed import World
from mmdit.training.ema import EMA
from mmdit.training.errors import RunError, record_failure
from mmdit.training.learner import Learner
from mmdit.training.metrics import MetricsLog, Timer, report_line
from mmdit.training.optim import LearningRate, build_optimizer, clip_and_guard, load_optimizer_tensors, optimizer_tensors
from mmdit.training.watch import Watch

LEVELS = 4  # noise-level bins of the reported loss


@dataclass(frozen=True)
class TrainConfig:
    """`train:` section. `batch_size` is per process and micro-step: a step sees batch_size × grad_accum_steps × processes."""

    objective: Literal["ddpm", "flow_matching"] = "flow_matching"
    precision: Literal["bf16", "fp32"] = "bf16"
    batch_size: int = 32
    grad_accum_steps: int = 1
    lr: float = 1e-4
    lr_schedule: Literal["constant", "cosine"] = "constant"
    lr_final: float = 0.0  # share of lr left at max_steps under cosine
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    grad_clip: float = 1.0  # global norm; 0 = off
    max_steps: int = 1000
    max_skipped_steps: int = 10  # more non-finite gradients between two reports, or in a row, stop the run
    timeout_minutes: float = 30.0  # one step, save or preview that takes longer ends the job and names who stands still
    compile: Literal["auto", True, False] = "auto"  # auto: with CUDA
    init_from: str | None = None  # weights of another run, checkpoint or export; the step starts at 0
    log_every_steps: int = 50
    save_every_steps: int = 1000
    keep_last: int = 3  # checkpoints kept; 0 keeps all
    keep_every_steps: int = 0  # besides, those of every n-th step are kept for good; 0 = none
    cfg_dropout_prob: float = 0.1
    sample_every_steps: int = 0  # 0 = no previews
    sample_num_images: int = 8
    sample_num_steps: int = 30
    sample_solver: Solver = "ab2"
    sample_cfg_scale: float = 3.0
    sample_cfg_interval: tuple[float, float] = (0.0, 1.0)  # guidance acts for t inside
    sample_eta: float = 0.0  # ddim only
    sample_shift: float = 1.0  # time shift of the sampling grid; > 1 spends more steps at high noise
    sample_seed: int = 0
    sample_prompts: tuple[str, ...] = field(default=())

    def __post_init__(self):
        for name in ("batch_size", "grad_accum_steps", "max_steps", "log_every_steps", "save_every_steps", "sample_num_images",
                     "sample_num_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"is {getattr(self, name)}, must be at least 1")
        for name in ("warmup_steps", "max_skipped_steps", "keep_last", "keep_every_steps", "sample_every_steps", "grad_clip",
                     "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(name, f"is {getattr(self, name)}, must not be negative")
        if not 0 < self.timeout_minutes < 1e6:
            raise ConfigError("timeout_minutes", f"is {self.timeout_minutes}, must be positive; give the longest step or "
                              "preview time enough")
        if not 0 < self.lr < 1:
            raise ConfigError("lr", f"is {self.lr}, must be between 0 and 1, for example 1e-4")
        if self.keep_every_steps % self.save_every_steps:
            raise ConfigError("keep_every_steps", f"is {self.keep_every_steps}, must be a multiple of save_every_steps "
                              f"({self.save_every_steps}), for only those steps are saved")
        if not 0 <= self.cfg_dropout_prob <= 1:
            raise ConfigError("cfg_dropout_prob", f"is {self.cfg_dropout_prob}, must be between 0 and 1")
        if self.sample_every_steps and not self.sample_prompts:
            raise ConfigError("sample_prompts", f"is empty but sample_every_steps is {self.sample_every_steps}; write a prompt or set it to 0")

    def learning_rate(self) -> LearningRate:
        return LearningRate(self.lr, self.warmup_steps, self.lr_schedule, self.lr_final, self.max_steps)


@dataclass
class TrainState:
    """All that moves. `step` counts finished optimizer steps and is the only position: data order, noise, dropout and the
    learning rate are functions of `(seed, step)`."""

    learner: Learner
    optimizer: torch.optim.AdamW
    ema: EMA | None
    step: int = 0

    @staticmethod
    def create(learner: Learner, config: TrainConfig, ema_config) -> TrainState:
        optimizer = build_optimizer(learner, config.lr, config.weight_decay, config.betas)
        return TrainState(learner, optimizer, EMA(ema_config, learner) if ema_config.enabled else None)

    def files(self) -> dict[str, dict[str, Tensor]]:
        files = {"model": self.learner.stored_state(), "optimizer": optimizer_tensors(self.learner, self.optimizer)}
        return files | ({"ema": self.ema.shadow} if self.ema else {})

    def restore(self, folder: Path) -> None:
        stored = checkpoint.read_tensors(folder / "model.safetensors")
        checkpoint.assign(self.learner, stored, str(folder), fresh=lambda name: not self.learner.is_stored(name))
        load_optimizer_tensors(self.learner, self.optimizer, checkpoint.read_tensors(folder / "optimizer.safetensors"))
        if self.ema:
            if not (folder / "ema.safetensors").is_file():
                raise ValueError(f"{folder} has no EMA weights but ema.enabled is true: set ema.enabled to false as it was")
            stored = checkpoint.read_tensors(folder / "ema.safetensors")
            for name, shadow in self.ema.shadow.items():
                shadow.copy_(stored[name])
        self.step = checkpoint.Meta.read(folder).step


class StopRequest:
    """SIGTERM and SIGINT ask for a stop after the current step (a second SIGINT interrupts at once)."""

    def __init__(self):
        self.asked = False

    def _ask(self, signum, frame):
        if self.asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    @contextlib.contextmanager
    def listening(self):
        try:
            previous = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: no signals here
            yield self
            return
        try:
            yield self
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)


class Window:
    """What happened since the last report: sums on the device, so that no step waits for them."""

    def __init__(self, device: torch.device):
        self.loss, self.count = torch.zeros(LEVELS, device=device), torch.zeros(LEVELS, device=device)
        self.norms: list[Tensor] = []
        self.skipped: list[Tensor] = []
        self.ids: list[list[str]] = []  # of this rank, by step
        self.finite: list[Tensor] = []  # their losses

    def add(self, losses: Tensor, t: Tensor) -> None:
        level = (t * LEVELS).long().clamp(0, LEVELS - 1)
        finite = torch.isfinite(losses)
        self.loss.index_add_(0, level, torch.where(finite, losses, 0.0).float())
        self.count.index_add_(0, level, finite.float())


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
    bad_in_a_row: int = 0

    def run(self) -> bool:
        """Train to `max_steps`; True when it got there, False when it was asked to stop. Saves at the end either way."""
        config, state, world = self.config, self.state, self.world
        learner = state.learner
        if config.compile is True or (config.compile == "auto" and world.device.type == "cuda"):
            learner.compile_model()
        wrapped = self._wrap(learner)
        rate = config.learning_rate()
        metrics = MetricsLog(self.run_dir, state.step) if world.is_main else None
        timer, window = Timer(), Window(world.device)
        learner.train()
        with StopRequest().listening() as stop, Watch(world, config.timeout_minutes).running() as watch:
            watch.at(state.step + 1, "waiting for data")
            for micro_batches in timer.waiting(self.batches(state.step, config.max_steps)):
                watch.at(state.step + 1, "computing")
                try:
                    self._step(wrapped, micro_batches, rate.at(state.step + 1), window)
                except torch.OutOfMemoryError as error:
                    raise self._memory_full(micro_batches, error) from error
                state.step += 1
                if state.ema:
                    state.ema.update(state.step)
                stopping = world.any(stop.asked)
                done = stopping or state.step == config.max_steps
                if state.step % config.log_every_steps == 0 or done:
                    self._report(metrics, timer, window, rate)
                    window = Window(world.device)
                if state.step % config.save_every_steps == 0 or done:
                    watch.at(state.step, "saving")
                    self.save(state)
                if config.sample_every_steps and (state.step % config.sample_every_steps == 0 or done):
                    begin = time.perf_counter()
                    watch.at(state.step, "previews")
                    if self.preview:  # on the main rank; the others wait
                        self.preview(state)
                        learner.train()
                    world.barrier()
                    timer.last += time.perf_counter() - begin  # no time of the training
                watch.at(state.step + 1, "waiting for data")
                if stopping:
                    break
        if metrics:
            metrics.close()
        if state.step < config.max_steps:
            world.print(f"stopped on request at step {state.step}; continue with --resume")
        return state.step >= config.max_steps

    def _wrap(self, learner: Learner) -> nn.Module:
        if self.world.size == 1:
            return learner
        ids = [self.world.device.index] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(learner, device_ids=ids, gradient_as_bucket_view=True)

    def _step(self, wrapped: nn.Module, micro_batches: list[Batch], lr: float, window: Window) -> None:
        """One optimizer step over this rank's micro-batches. Gradients are means over the global batch."""
        config, state, device = self.config, self.state, self.world.device
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(key(self.seed, "dropout", state.step, self.world.rank) & (2**63 - 1))  # nn.Dropout's own generator
        finite = []
        for i, batch in enumerate(micro_batches):
            last = i + 1 == len(micro_batches)
            local = contextlib.nullcontext() if last or self.world.size == 1 else wrapped.no_sync()
            with local:
                latents = batch.latents.to(device, non_blocking=True)
                draws = Draws(self.seed, state.step, batch.indices.to(device, non_blocking=True))
                keep = state.learner.model.draw_keep(*latents.shape[2:4], self.seed, state.step)
                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    losses, t = wrapped(latents, batch.captions, draws, keep)
                (losses.mean() / len(micro_batches)).backward()
            window.add(losses.detach(), t.detach())
            finite.append(torch.isfinite(losses.detach()))
        norm, skipped = clip_and_guard(state.optimizer, config.grad_clip)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        window.norms.append(norm)
        window.skipped.append(skipped)
        window.ids.append([id for batch in micro_batches for id in batch.ids])
        window.finite.append(torch.cat(finite))

    def _memory_full(self, micro_batches: list[Batch], error: torch.OutOfMemoryError) -> RunError:
        batch, frames, *cells = micro_batches[0].latents.shape[:4]
        shape = f"{batch} x {frames} frames x {cells[0]}x{cells[1]} cells"
        cuda = self.world.device.type == "cuda"
        peak = f", peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if cuda else ""
        ids = [id for batch in micro_batches for id in batch.ids]
        path = record_failure(self.run_dir, "memory", self.state.step, self.world.rank, error, seed=self.seed, ids=ids,
                              micro_batch=list(micro_batches[0].latents.shape), world=self.world.size)  # fmt: skip
        smaller = "video.num_frames or the size"
        if batch > 1:
            smaller = "train.batch_size and raise train.grad_accum_steps (the step stays the same)"
        return RunError(
            f"the memory is full in step {self.state.step + 1} on rank {self.world.rank} with micro-batches of {shape}{peak} "
            f"({str(error).splitlines()[0]}). Reduce {smaller}, set model.checkpointing: true or model.residual: autocast. The "
            f"step's items are in {path}. Checkpoints are whole: continue with --resume"
        )

    def _report(self, metrics: MetricsLog | None, timer: Timer, window: Window, rate: LearningRate) -> None:
        """Read the window from the device (the only wait of the loop), write it, and stop a run that has gone bad."""
        config, state, world = self.config, self.state, self.world
        world.sum_(window.loss, window.count)
        loss, count = window.loss.tolist(), window.count.tolist()
        norms, bad = torch.stack(window.norms).tolist(), torch.stack(window.skipped).tolist()
        steps, skipped = len(norms), int(sum(bad))
        seconds, waited = timer.lap()
        if metrics:
            values = {"step": state.step, "loss": sum(loss) / max(sum(count), 1.0)}
            values |= {f"loss_level_{i}": part / n for i, (part, n) in enumerate(zip(loss, count)) if n}
            values |= {
                "lr": rate.at(state.step),
                "grad_norm": sum(norm for norm, b in zip(norms, bad) if not b) / max(steps - skipped, 1),
                "skipped": skipped,
                "samples_per_second": sum(count) / seconds,
                "data_wait": waited,
                "eta_seconds": seconds / steps * (config.max_steps - state.step),
            }
            if world.device.type == "cuda":
                values["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            metrics.write(values)
            print(report_line(values, config.max_steps), flush=True)
        if skipped:
            self._record_skipped(window, bad)
        for b in bad:
            self.bad_in_a_row = self.bad_in_a_row + 1 if b else 0
        if max(skipped, self.bad_in_a_row) > config.max_skipped_steps or skipped == steps > 1:
            raise RunError(
                f"{skipped} of the last {steps} steps up to step {state.step} had a non-finite loss or gradient and were skipped "
                f"(limit train.max_skipped_steps = {config.max_skipped_steps}); their items are in {self.run_dir}/skipped*.jsonl. "
                f"The weights are those before them. Lower train.lr (now {rate.at(state.step):.2e}), use train.precision: fp32, or "
                "look at the latents of these items"
            )

    def _record_skipped(self, window: Window, bad: list[float]) -> None:
        """A line per skipped step; each rank has its own items, and so its own file. No id in `non_finite_loss` on any rank: the
        gradient alone overflowed. `step` counts the steps finished before it."""
        name = f"skipped-{self.world.rank}.jsonl" if self.world.rank else "skipped.jsonl"
        with (self.run_dir / name).open("a") as file:
            for step, (ids, finite, b) in enumerate(zip(window.ids, window.finite, bad), self.state.step - len(bad)):
                if b:
                    named = [id for id, good in zip(ids, finite.tolist()) if not good]
                    row = {"step": step, "seed": self.seed, "config": str(self.run_dir / "config.yaml")}
                    file.write(json.dumps(row | {"ids": ids, "non_finite_loss": named}) + "\n")
