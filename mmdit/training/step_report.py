"""Reports of a run: sums that stay on the device between two reports, and the records made of
them."""

from __future__ import annotations

import json
import statistics
import time
import uuid
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmdit.files import naming, refuse_link
from mmdit.training.alpha.schedule import AlphaSchedule
from mmdit.training.alpha.trend import BINS, SPANS, LossHistory, StepFacts
from mmdit.training.distributed import World
from mmdit.training.errors import StepsSkipped
from mmdit.training.metrics import ForwardTimer, MetricsLog, Timer, report_line, slow_rank
from mmdit.training.trackers import Tracker
from mmdit.training.train_config import TrainConfig

LEVELS = 4  # groups of noise levels for which the loss is reported
WIDE = BINS // LEVELS


class TakenStep(NamedTuple):
    """One step of this rank, on its device. `norm ()` of the gradient; `skipped ()`: 1 or 0."""

    # (n,): of its samples, at the times `t`.
    losses: Tensor
    t: Tensor
    norm: Tensor
    skipped: Tensor
    expert: str
    # (2,): elements of the gradient that agree in sign with the last, elements compared.
    signs: Tensor | None
    ids: list[str]
    sound: Tensor  # (n,): their cached latents are finite


class ReportWindow:
    """The steps since the last report: tensors on the device, so that no step waits for them.
    `flops`: operations of this rank."""

    def __init__(self, device: torch.device):
        self.device = device
        self.taken: list[TakenStep] = []
        self.flops = 0
        self.forward = ForwardTimer(device)
        self.steps: list[StepFacts] = []  # as far as they have been read

    def read(self, world: World) -> list[StepFacts]:
        """Return the steps since the last read, summed over all ranks, which must all call. This
        waits for the device."""
        taken = self.taken[len(self.steps) :]
        if not taken:
            return []
        tables = level_tables(taken)
        world.sum_(tables)
        tables /= world.context_size  # processes that share clips see the same samples
        new = []
        for step, (sums, counts, times) in zip(taken, tables.tolist(), strict=True):
            norm, bad = step.norm.item(), bool(step.skipped)
            signs = (0.0, 0.0) if step.signs is None else step.signs.tolist()
            new.append(StepFacts(sums, counts, sum(times), norm, bad, step.expert, *signs))
        self.steps += new
        return new


def level_tables(steps: list[TakenStep]) -> Tensor:
    """Return `(steps, 3, BINS)`: sums and counts of the finite losses by noise level, and sums of
    their times. Computed for many steps at once, this costs the single steps no launch."""
    losses = torch.cat([step.losses for step in steps])
    t = torch.cat([step.t for step in steps])
    sizes = torch.tensor([len(step.losses) for step in steps])
    place = torch.arange(len(steps)).repeat_interleave(sizes).to(t.device)
    level = place * BINS + (t * BINS).long().clamp(0, BINS - 1)
    finite = torch.isfinite(losses)
    table = torch.zeros(3, len(steps) * BINS, device=t.device)
    for row, values in enumerate((losses, torch.ones_like(losses), t)):
        table[row].index_add_(0, level, torch.where(finite, values, 0.0).float())
    return table.unflatten(1, (len(steps), BINS)).transpose(0, 1).contiguous()


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 16) -> float | None:
    """Measure the rate of a large matrix product on a CUDA `device`, in operations per second, in a
    fraction of a second; return None elsewhere."""
    if device.type != "cuda":
        return None
    size, generator = 8192, torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for i in range(2 * repeats):
        if i == repeats:  # the clock has risen by now
            begin.record()
        torch.mm(a, b)
    end.record()
    end.synchronize()
    return 2 * size**3 * repeats / (begin.elapsed_time(end) * 1e-3)


@cache
def bfloat16_slowdown() -> float:
    """Return how many times as long a matrix product takes in bfloat16 as in float32 on this CPU,
    measured in a tenth of a second: many CPUs have no instructions for bfloat16."""
    seconds = []
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.ones(128, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
        tries = []
        for _ in range(3):
            begin = time.perf_counter()
            torch.mm(a, b)
            tries.append(time.perf_counter() - begin)
        seconds.append(min(tries))
    return seconds[0] / seconds[1]


class Monitor:
    """The state behind the metrics and the alpha schedule, by expert ("" where there are none),
    stored as JSON in each checkpoint."""

    def __init__(self, experts: tuple[str, ...] = ("",)):
        self.histories = {name: LossHistory() for name in experts}
        self.run_id, self.images, self.wall = uuid.uuid4().hex[:12], 0, 0.0

    def add(self, facts: StepFacts) -> None:
        self.images += round(sum(facts.counts))
        self.histories[facts.expert].add(facts)

    def values(
        self,
        facts: list[StepFacts],
        schedule: AlphaSchedule | None,
        alphas: dict[str, float | None],
    ) -> dict:
        """Return the values of a report on these steps. The documented names belong to the expert
        of the last step; with several experts, each name also appears with `_<expert>` appended."""
        by_expert = {
            name: self._expert_values(name, facts, schedule, alphas[name])
            for name in self.histories
        }
        last = facts[-1].expert
        losses = {"loss_" + name: values.pop("loss") for name, values in by_expert.items()}
        count = sum(sum(f.counts) for f in facts)
        values = {
            "run_id": self.run_id,
            "timestamp": time.time(),
            "wall_s": self.wall,
            "images_seen": self.images,
            "expert": last or None,
            "sigma_mean": sum(f.times for f in facts) / count if count else None,
            "alpha_enabled": schedule is not None,
            "conv_alpha": None,
            **by_expert[last],
        }
        if len(by_expert) > 1:
            values |= losses
            for name, more in by_expert.items():
                values |= {f"{key}_{name}": value for key, value in more.items()}
        return values

    def _expert_values(
        self, name: str, facts: list[StepFacts], schedule: AlphaSchedule | None, alpha: float | None
    ) -> dict:
        history = self.histories[name]
        losses = [f.loss for f in facts if f.expert == name and f.loss is not None]
        return {
            "loss": sum(losses) / len(losses) if losses else None,
            **history.values(),
            "phase": schedule.phase(name).name if schedule else None,
            "phase_idx": schedule.progress[name].phase if schedule else None,
            "steps_in_phase": history.steps if schedule else None,
            "linear_alpha": alpha,
        }

    def state(self) -> dict:
        """Return the state for a checkpoint, as JSON."""
        return {
            "run_id": self.run_id,
            "images": self.images,
            "wall": self.wall,
            "courses": {name: asdict(history) for name, history in self.histories.items()},
        }

    def restore(self, state: dict) -> None:
        """Take over what `state` returned. ValueError if it has other experts."""
        stored = state["courses"]
        if stored.keys() != self.histories.keys():
            raise ValueError(
                f"the stored metrics are of experts {list(stored)}, the config has"
                f" {list(self.histories)}"
            )
        self.run_id, self.images, self.wall = state["run_id"], state["images"], state["wall"]
        self.histories = {name: LossHistory(**values) for name, values in stored.items()}


def _by_level(rows: list[list[float]]) -> list[float]:
    """Return the sums over `rows (steps, BINS)` for each of the `LEVELS` groups of noise levels."""
    table = torch.tensor(rows, dtype=torch.float64)
    return table.sum(0).reshape(LEVELS, WIDE).sum(-1).tolist()


class Reporter:
    """Reads windows, writes metrics.jsonl on the main rank, and stops a run that has gone bad."""

    def __init__(
        self,
        config: TrainConfig,
        seed: int,
        world: World,
        run_dir: Path,
        step: int,
        monitor: Monitor,
        tracker: Tracker | None = None,
    ):
        self.config, self.seed, self.world = config, seed, world
        self.run_dir, self.monitor = run_dir, monitor
        self.rate = config.learning_rate()
        self.metrics = MetricsLog(run_dir, step, tracker) if world.is_main else None
        dtype = torch.bfloat16 if config.autocast else torch.float32
        self.matmul_rate = matmul_rate(world.device, dtype)
        self.timer = Timer()
        self.bad_in_a_row, self.seen = 0, 0
        self.damaged: list[str] = []  # items of skipped steps whose cached latents are not finite
        self.not_finite = 0  # losses of this rank that were not finite
        self.slow: int | None = None  # the rank that was last reported as slow

    def observe(self, window: ReportWindow) -> None:
        """Add the steps of `window` that were not read yet to the monitor. This waits for the
        device, which steps do not; every rank must call."""
        for facts in window.read(self.world):
            self.monitor.add(facts)

    def read(self, state, window: ReportWindow) -> dict:
        """Return the record of metrics of the steps in `window`; every rank must call."""
        self.observe(window)
        facts, step = window.steps, state.step
        good = [f for f in facts if not f.bad]
        sums = _by_level([f.sums for f in facts])
        counts = _by_level([f.counts for f in facts])
        count = sum(counts)
        seconds, waited = self.timer.lap()
        self.monitor.wall += seconds
        self._tell_slow(waited * seconds, window.forward.read(), seconds, len(facts))
        values = {"step": step, "loss": sum(sums) / count if count else None}
        values |= self.monitor.values(facts, state.schedule, state.alphas())
        short, long = (values[f"loss_ema_{span}"] for span in (SPANS[0], SPANS[-1]))
        values["loss_trend"] = None if short is None else (short - long) / max(abs(long), 1e-12)
        for level, (total, n) in enumerate(zip(sums, counts, strict=True)):
            values[f"loss_level_{level}"] = total / n if n else None
        rates = [float(group["lr"]) for group in state.optimizer.param_groups[:2]]
        values |= {
            "lr": self.rate.at(step),
            "lr_0": rates[0],
            "lr_1": rates[1] if len(rates) > 1 else None,
            "grad_norm": sum(f.norm for f in good) / max(len(good), 1),
            "skipped": len(facts) - len(good),
            "samples_per_second": count / seconds,
            "data_wait": waited,
            "tflops": window.flops / seconds * 1e-12,  # of one process
        }
        if self.matmul_rate:
            values["tflops_share"] = window.flops / seconds / self.matmul_rate
        if self.world.device.type == "cuda":
            values["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return values | {"eta_seconds": seconds / len(facts) * (self.config.max_steps - step)}

    def _tell_slow(self, wait: float, forward: float, seconds: float, steps: int) -> None:
        """Report the rank that all others wait for, once. Every rank gives the seconds that it
        waited for data and those of its forward passes, out of `seconds` in all, for `steps` steps.
        Nothing is reported the first time, when blocks are compiled."""
        if self.world.size == 1 or self.seen == 0:
            return
        by_rank = self.world.gather((wait / steps, forward / steps))
        slow = slow_rank([sum(pair) for pair in by_rank], seconds / steps)
        if slow is not None and slow != self.slow:
            wait, forward = by_rank[slow]
            median = statistics.median([sum(pair) for pair in by_rank])
            self.world.print(
                f"rank {slow} is slow, and all others wait for it: in a step it waits {wait:.3f} s"
                f" for data, and its forward pass takes {forward:.3f} s; the median of all ranks is"
                f" {median:.3f} s for both"
            )
        self.slow = slow

    def write(self, values: dict, window: ReportWindow) -> None:
        """Write a record of metrics. StepsSkipped if too many steps had no finite loss or
        gradient."""
        step, skipped = values["step"], values["skipped"]
        if self.metrics:
            self.metrics.write(values)
            print(report_line(values, self.config.max_steps), flush=True)
        bad = [facts.bad for facts in window.steps]
        if skipped:
            self._record_skipped(step, window)
        for is_bad in bad:
            self.bad_in_a_row = self.bad_in_a_row + 1 if is_bad else 0
        self.seen += len(bad)
        too_many = max(skipped, self.bad_in_a_row) > self.config.max_skipped_steps
        none_good_lately = skipped == len(bad) > 1
        none_good = step >= self.config.max_steps and self.bad_in_a_row == self.seen > 1
        if too_many or none_good_lately or none_good:
            raise StepsSkipped(
                f"{skipped} of the last {len(bad)} steps up to step {step} had a non-finite loss or"
                " gradient and were skipped (limit train.max_skipped_steps ="
                f" {self.config.max_skipped_steps}); their items are in"
                f" {self.run_dir}/skipped*.jsonl. The weights are those before them. Lower train.lr"
                f" (now {values['lr']:.2e}), use train.precision: fp32, or look at the latents of"
                f" these items{self._damaged_items()}{self._only_rank()}"
            )

    def _damaged_items(self) -> str:
        """Return a text that names the items of skipped steps on this rank whose cached latents are
        not finite."""
        if not self.damaged:
            return ""
        more = " …" if len(self.damaged) > 5 else ""
        return (
            f": those of {', '.join(self.damaged[:5])}{more} are not finite in the cache;"
            " verify_cache finds all, then cache them again"
        )

    def _only_rank(self) -> str:
        """Return a text that names the rank if only one rank had losses that are not finite; every
        rank must call."""
        counts = self.world.gather(self.not_finite)
        ranks = [rank for rank, count in enumerate(counts) if count]
        if len(counts) == 1 or len(ranks) != 1:
            return ""
        return (
            f". Only rank {ranks[0]} met losses that are not finite: where its latents are sound,"
            " its GPU may be at fault; leave that one out"
        )

    def _record_skipped(self, last_step: int, window: ReportWindow) -> None:
        """Write a line for each skipped step, into a file for each rank, because ranks have
        different items. If no rank has an id in `non_finite_loss`, the gradient alone overflowed.
        `step` counts the steps finished before it."""
        name = f"skipped-{self.world.rank}.jsonl" if self.world.rank else "skipped.jsonl"
        path = self.run_dir / name
        with naming(path), refuse_link(path).open("a", encoding="utf-8") as file:
            first = last_step - len(window.steps)
            for number, step in enumerate(window.taken):
                if not step.skipped:
                    continue
                ids, finite, sound = step.ids, step.losses.isfinite().tolist(), step.sound.tolist()
                self.not_finite += finite.count(False)
                damaged = [id for id, good in zip(ids, sound, strict=True) if not good]
                self.damaged += [id for id in damaged if id not in self.damaged]
                row = {
                    "step": first + number,
                    "seed": self.seed,
                    "config": str(self.run_dir / "config.yaml"),
                    "ids": ids,
                    "non_finite_loss": [
                        id for id, good in zip(ids, finite, strict=True) if not good
                    ],
                    "non_finite_latents": damaged,
                }
                file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        if self.metrics:
            self.metrics.close()
