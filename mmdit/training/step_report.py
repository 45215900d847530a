"""What a run tells: sums that stay on the device between reports, and the report made of them."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from mmdit.files import refuse_link
from mmdit.training.alpha.schedule import AlphaSchedule
from mmdit.training.alpha.trend import BINS, SPANS, Course, StepFacts
from mmdit.training.distributed import World
from mmdit.training.errors import StepsSkipped
from mmdit.training.metrics import MetricsLog, Timer, report_line
from mmdit.training.train_config import TrainConfig

LEVELS = 4  # noise levels of the reported loss
WIDE = BINS // LEVELS


class Window:
    """What happened since the last report: sums on the device, so that no step waits for them.
    `flops`: of this rank."""

    def __init__(self, device: torch.device):
        self.device = device
        self.tables: list[
            Tensor
            # (3, BINS) by step: sums and counts of the finite losses by noise level, sums of times
        ] = []
        self.norms: list[Tensor] = []
        self.skipped: list[Tensor] = []
        self.signs: list[
            Tensor
        ] = []  # (2,): elements of the gradient that agree in sign with the last, elements compared
        self.experts: list[str] = []
        self.ids: list[list[str]] = []  # of this rank, by step
        self.finite: list[Tensor] = []  # their losses
        self.sound: list[Tensor] = []  # their cached latents are finite
        self.flops = 0
        self.steps: list[StepFacts] = []  # once they were read

    def add(
        self,
        losses: Tensor,
        t: Tensor,
        ids: list[str],
        norm: Tensor,
        skipped: Tensor,
        expert: str = "",
        signs: Tensor | None = None,
        sound: Tensor | None = None,
    ) -> None:
        """One step of this rank: `losses (n,)` of its samples at the times `t (n,)`; `sound (n,)`:
        their latents are finite."""
        level = (t * BINS).long().clamp(0, BINS - 1)
        finite = torch.isfinite(losses)
        table = torch.zeros(3, BINS, device=self.device)
        for row, values in enumerate((losses, torch.ones_like(losses), t)):
            table[row].index_add_(0, level, torch.where(finite, values, 0.0).float())
        self.tables.append(table)
        self.norms.append(norm)
        self.skipped.append(skipped)
        self.signs.append(
            torch.zeros(2, device=self.device, dtype=torch.float64) if signs is None else signs
        )
        self.experts.append(expert)
        self.ids.append(ids)
        self.finite.append(finite)
        self.sound.append(torch.ones_like(finite) if sound is None else sound)

    def read(self, world: World) -> list[StepFacts]:
        """The steps since the last read, of all ranks (which must all ask); waits for the
        device."""
        first = len(self.steps)
        if first == len(self.tables):
            return []
        table = torch.stack(self.tables[first:])
        world.sum_(table)
        numbers = zip(
            table.tolist(),
            torch.stack(self.norms[first:]).tolist(),
            torch.stack(self.skipped[first:]).tolist(),
            torch.stack(self.signs[first:]).tolist(),
            self.experts[first:],
        )
        new = [
            StepFacts(sums, counts, sum(times), norm, bool(bad), expert, *signs)
            for (sums, counts, times), norm, bad, signs, expert in numbers
        ]
        self.steps += new
        return new


def matmul_rate(
    device: torch.device, dtype: torch.dtype, size: int = 8192, repeats: int = 16
) -> float | None:
    """Operations a second of a large matrix product on a CUDA `device`, measured in a fraction of a
    second; None elsewhere."""
    if device.type != "cuda":
        return None
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for i in range(2 * repeats):
        if i == repeats:  # the clock has risen by now
            begin.record()
        torch.mm(a, b)
    end.record()
    end.synchronize()
    return 2 * size**3 * repeats / (begin.elapsed_time(end) * 1e-3)


class Monitor:
    """What a run has been so far, by expert ("" where there are none): the state behind the metrics
    and the alpha schedule, kept beside each checkpoint as JSON."""

    def __init__(self, experts: tuple[str, ...] = ("",)):
        self.courses = {name: Course() for name in experts}
        self.run_id, self.images, self.wall = uuid.uuid4().hex[:12], 0, 0.0

    def add(self, facts: StepFacts) -> None:
        self.images += round(sum(facts.counts))
        self.courses[facts.expert].add(facts)

    def values(
        self,
        facts: list[StepFacts],
        schedule: AlphaSchedule | None,
        alphas: dict[str, float | None],
    ) -> dict:
        """For a report of these steps. The documented names are of the expert of the last one; with
        several experts, each name comes again with `_<expert>` behind it."""
        told = {name: self._told(name, facts, schedule, alphas[name]) for name in self.courses}
        last = facts[-1].expert
        losses = {"loss_" + name: own.pop("loss") for name, own in told.items()}
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
            **told[last],
        }
        if len(told) > 1:
            values |= losses | {
                f"{key}_{name}": value for name, own in told.items() for key, value in own.items()
            }
        return values

    def _told(
        self, name: str, facts: list[StepFacts], schedule: AlphaSchedule | None, alpha: float | None
    ) -> dict:
        course = self.courses[name]
        own = [f.loss for f in facts if f.expert == name and f.loss is not None]
        phase = schedule and {
            "phase": schedule.phase(name).name,
            "phase_idx": schedule.progress[name].phase,
        }
        phase = phase or {"phase": None, "phase_idx": None}
        return {
            "loss": sum(own) / len(own) if own else None,
            **course.values(),
            **phase,
            "steps_in_phase": course.steps if schedule else None,
            "linear_alpha": alpha,
        }

    def state(self) -> dict:
        return {
            "run_id": self.run_id,
            "images": self.images,
            "wall": self.wall,
            "courses": {name: asdict(course) for name, course in self.courses.items()},
        }

    def restore(self, state: dict) -> None:
        """ValueError if it is of other experts."""
        if state["courses"].keys() != self.courses.keys():
            raise ValueError(
                f"the stored metrics are of experts {list(state['courses'])}, the config has"
                f" {list(self.courses)}"
            )
        self.run_id, self.images, self.wall = state["run_id"], state["images"], state["wall"]
        self.courses = {name: Course(**course) for name, course in state["courses"].items()}


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
    ):
        self.config, self.seed, self.world, self.run_dir, self.monitor = (
            config,
            seed,
            world,
            run_dir,
            monitor,
        )
        self.rate = config.learning_rate()
        self.metrics = MetricsLog(run_dir, step) if world.is_main else None
        self.matmul_rate = matmul_rate(
            world.device, torch.bfloat16 if config.autocast else torch.float32
        )
        self.timer = Timer()
        self.bad_in_a_row, self.seen = 0, 0
        self.damaged: list[str] = []  # items of skipped steps whose cached latents are not finite

    def observe(self, window: Window) -> None:
        """Take in the steps of `window` that are not yet; waits for the device (no step does).
        Every rank must ask."""
        for facts in window.read(self.world):
            self.monitor.add(facts)

    def read(self, state, window: Window) -> dict:
        """The record of the steps of `window`. Every rank must ask."""
        self.observe(window)
        facts, step = window.steps, state.step
        good = [f for f in facts if not f.bad]
        levels = [
            [
                sum(getattr(f, part)[i * WIDE + j] for f in facts for j in range(WIDE))
                for i in range(LEVELS)
            ]
            for part in ("sums", "counts")
        ]
        count = sum(levels[1])
        seconds, waited = self.timer.lap()
        self.monitor.wall += seconds
        values = {"step": step, "loss": sum(levels[0]) / count if count else None}
        values |= self.monitor.values(facts, state.schedule, state.alphas())
        short, long = (values[f"loss_ema_{span}"] for span in (SPANS[0], SPANS[-1]))
        values["loss_trend"] = None if short is None else (short - long) / max(abs(long), 1e-12)
        values |= {
            f"loss_level_{i}": part / n if n else None for i, (part, n) in enumerate(zip(*levels))
        }
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

    def write(self, values: dict, window: Window) -> None:
        """Write a record; RunError after too many steps without a finite loss or gradient."""
        step, skipped = values["step"], values["skipped"]
        if self.metrics:
            self.metrics.write(values)
            print(report_line(values, self.config.max_steps), flush=True)
        bad = [facts.bad for facts in window.steps]
        if skipped:
            self._record_skipped(step, window)
        for b in bad:
            self.bad_in_a_row = self.bad_in_a_row + 1 if b else 0
        self.seen += len(bad)
        none_good = step >= self.config.max_steps and self.bad_in_a_row == self.seen > 1
        if (
            max(skipped, self.bad_in_a_row) > self.config.max_skipped_steps
            or skipped == len(bad) > 1
            or none_good
        ):
            raise StepsSkipped(
                f"{skipped} of the last {len(bad)} steps up to step {step} had a non-finite loss or"
                " gradient and were skipped (limit train.max_skipped_steps ="
                f" {self.config.max_skipped_steps}); their items are in"
                f" {self.run_dir}/skipped*.jsonl. The weights are those before them. Lower train.lr"
                f" (now {values['lr']:.2e}), use train.precision: fp32, or look at the latents of"
                f" these items{self._told_damaged()}"
            )

    def _told_damaged(self) -> str:
        """Which of the items that this process met in skipped steps are to blame."""
        if not self.damaged:
            return ""
        more = " …" if len(self.damaged) > 5 else ""
        return (
            f": those of {', '.join(self.damaged[:5])}{more} are not finite in the cache;"
            " verify_cache finds all, then cache them again"
        )

    def _record_skipped(self, last_step: int, window: Window) -> None:
        """A line per skipped step; each rank has its own items, and so its own file. No id in
        `non_finite_loss` on any rank: the gradient alone overflowed. `step` counts the steps
        finished before it."""
        name = f"skipped-{self.world.rank}.jsonl" if self.world.rank else "skipped.jsonl"
        with refuse_link(self.run_dir / name).open("a", encoding="utf-8") as file:
            bad = [facts.bad for facts in window.steps]
            steps = enumerate(
                zip(window.ids, window.finite, window.sound, bad), last_step - len(bad)
            )
            for step, (ids, finite, sound, b) in steps:
                if b:
                    named = [id for id, good in zip(ids, finite.tolist()) if not good]
                    damaged = [id for id, good in zip(ids, sound.tolist()) if not good]
                    self.damaged += [id for id in damaged if id not in self.damaged]
                    row = {
                        "step": step,
                        "seed": self.seed,
                        "config": str(self.run_dir / "config.yaml"),
                    }
                    file.write(
                        json.dumps(
                            row
                            | {
                                "ids": ids,
                                "non_finite_loss": named,
                                "non_finite_latents": damaged,
                            }
                        )
                        + "\n"
                    )

    def close(self) -> None:
        if self.metrics:
            self.metrics.close()
