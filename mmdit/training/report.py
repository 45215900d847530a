"""What a run tells: sums that stay on the device between reports, and the report made of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from mmdit.training.distributed import World
from mmdit.training.errors import RunError
from mmdit.training.metrics import MetricsLog, Timer, report_line
from mmdit.training.settings import TrainConfig

LEVELS = 4  # noise-level bins of the reported loss
SPANS = (10, 50, 100)  # steps that the running means of the loss look back


class Window:
    """What happened since the last report: sums on the device, so that no step waits for them. `flops`: of this rank."""

    def __init__(self, device: torch.device):
        self.device = device
        self.losses: list[Tensor] = []  # (2, LEVELS) by step: sums and counts of the finite losses by noise level
        self.norms: list[Tensor] = []
        self.skipped: list[Tensor] = []
        self.ids: list[list[str]] = []  # of this rank, by step
        self.finite: list[Tensor] = []  # their losses
        self.flops = 0
        self.bad: list[bool] = []  # by step, once it was read

    def add(self, losses: Tensor, t: Tensor, ids: list[str], norm: Tensor, skipped: Tensor) -> None:
        """One step of this rank: `losses (n,)` of its samples at the times `t (n,)`."""
        level = (t * LEVELS).long().clamp(0, LEVELS - 1)
        finite = torch.isfinite(losses)
        table = torch.zeros(2, LEVELS, device=self.device)
        table[0].index_add_(0, level, torch.where(finite, losses, 0.0).float())
        table[1].index_add_(0, level, finite.float())
        self.losses.append(table)
        self.norms.append(norm)
        self.skipped.append(skipped)
        self.ids.append(ids)
        self.finite.append(finite)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 8192, repeats: int = 16) -> float | None:
    """Operations a second of a large matrix product on a CUDA `device`, measured in a fraction of a second; None elsewhere."""
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


def running_means(last: dict, losses: list[float], step: int) -> dict[str, float]:
    """`loss_ema_<span>` and `loss_trend`. `last`: the previous record; `losses`: of the steps up to `step`. The mean of all
    steps until there are `span`, an exponential one after. The trend is how far the shortest mean lies above (+) or below (-)
    the longest, as a share of it."""
    means = {}
    for span in SPANS:
        name = f"loss_ema_{span}"
        means[name] = last.get(name)
        for number, loss in enumerate(losses, step - len(losses) + 1):
            before = loss if means[name] is None else means[name]
            means[name] = before + (loss - before) / min(span, number)
    short, long = means[f"loss_ema_{SPANS[0]}"], means[f"loss_ema_{SPANS[-1]}"]
    return means | {"loss_trend": (short - long) / max(abs(long), 1e-12)} if None not in (short, long) else {}


class Reporter:
    """Reads windows, writes metrics.jsonl on the main rank, and stops a run that has gone bad."""

    def __init__(self, config: TrainConfig, seed: int, world: World, run_dir: Path, step: int):
        self.config, self.seed, self.world, self.run_dir = config, seed, world, run_dir
        self.rate = config.learning_rate()
        self.metrics = MetricsLog(run_dir, step) if world.is_main else None
        self.matmul_rate = matmul_rate(world.device, torch.bfloat16 if config.autocast else torch.float32)
        self.timer = Timer()
        self.bad_in_a_row = 0

    def read(self, step: int, window: Window) -> dict:
        """The record of the steps up to `step`; waits for the device (no step does). Every rank must ask."""
        table = torch.stack(window.losses)
        self.world.sum_(table)
        norms, bad = torch.stack(window.norms).tolist(), torch.stack(window.skipped).bool().tolist()
        window.bad = bad
        by_step = table.sum(2).tolist()
        loss, count = table.sum(0).tolist()
        steps, skipped = len(norms), sum(bad)
        seconds, waited = self.timer.lap()
        values = {"step": step, "loss": sum(loss) / sum(count) if sum(count) else None}
        if self.metrics:
            values |= running_means(self.metrics.last, [total / n for total, n in by_step if n], step)
        values |= {f"loss_level_{i}": part / n for i, (part, n) in enumerate(zip(loss, count)) if n}
        values |= {
            "lr": self.rate.at(step),
            "grad_norm": sum(norm for norm, b in zip(norms, bad) if not b) / max(steps - skipped, 1),
            "skipped": skipped,
            "samples_per_second": sum(count) / seconds,
            "data_wait": waited,
            "tflops": window.flops / seconds * 1e-12,  # of one process
        }
        if self.matmul_rate:
            values["tflops_share"] = window.flops / seconds / self.matmul_rate
        if self.world.device.type == "cuda":
            values["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return values | {"eta_seconds": seconds / steps * (self.config.max_steps - step)}

    def write(self, values: dict, window: Window) -> None:
        """Write a record; RunError after too many steps without a finite loss or gradient."""
        step, skipped = values["step"], values["skipped"]
        if self.metrics:
            self.metrics.write(values)
            print(report_line(values, self.config.max_steps), flush=True)
        bad = window.bad
        if skipped:
            self._record_skipped(step, window)
        for b in bad:
            self.bad_in_a_row = self.bad_in_a_row + 1 if b else 0
        if max(skipped, self.bad_in_a_row) > self.config.max_skipped_steps or skipped == len(bad) > 1:
            raise RunError(
                f"{skipped} of the last {len(bad)} steps up to step {step} had a non-finite loss or gradient and were skipped "
                f"(limit train.max_skipped_steps = {self.config.max_skipped_steps}); their items are in "
                f"{self.run_dir}/skipped*.jsonl. The weights are those before them. Lower train.lr (now {values['lr']:.2e}), "
                "use train.precision: fp32, or look at the latents of these items"
            )

    def _record_skipped(self, last_step: int, window: Window) -> None:
        """A line per skipped step; each rank has its own items, and so its own file. No id in `non_finite_loss` on any rank:
        the gradient alone overflowed. `step` counts the steps finished before it."""
        name = f"skipped-{self.world.rank}.jsonl" if self.world.rank else "skipped.jsonl"
        with (self.run_dir / name).open("a") as file:
            steps = enumerate(zip(window.ids, window.finite, window.bad), last_step - len(window.bad))
            for step, (ids, finite, b) in steps:
                if b:
                    named = [id for id, good in zip(ids, finite.tolist()) if not good]
                    row = {"step": step, "seed": self.seed, "config": str(self.run_dir / "config.yaml")}
                    file.write(json.dumps(row | {"ids": ids, "non_finite_loss": named}) + "\n")

    def close(self) -> None:
        if self.metrics:
            self.metrics.close()
