"""Profile steps of a training: how long the CPU takes to ask for one, how long the GPU computes,
and which operations take what.

    python -m tests.drivers.profile_steps --config records/pictures_128/001_muon/config.yaml \\
        --train_cache_dir data/cache/shapes_t2i_128 --device cuda [section.key=value …]

The training is that of `mmdit train`, into a temporary folder; it ends behind the profiled steps.
The period is that of the steps before, which no profiler slows.
"""

import argparse
import statistics
import tempfile
import time

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mmdit.scripts import train_t2v
from mmdit.training.trainer import Trainer


class Profiled:
    """`Trainer.optimizer_step` whose last `count` of `steps` are profiled, and whose others are
    timed."""

    def __init__(self, steps: int, count: int):
        self.step, self.steps, self.count = Trainer.optimizer_step, steps, count
        self.began: list[float] = []
        self.asked: list[float] = []
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.profile = profile(activities=activities)

    def __call__(self, trainer: Trainer, *rest) -> None:
        if len(self.began) == self.steps - self.count:
            wait()
            self.profile.start()
        self.began.append(time.perf_counter())
        self.step(trainer, *rest)
        self.asked.append(time.perf_counter() - self.began[-1])
        if len(self.began) == self.steps:
            wait()
            self.profile.stop()

    def report(self, rows: int) -> str:
        first, last = (self.steps - self.count) // 2, self.steps - self.count
        spans = zip(self.began[first : last - 1], self.began[first + 1 : last], strict=True)
        period = statistics.median(end - begin for begin, end in spans)
        events = [e for e in self.profile.events() if e.device_type == DeviceType.CUDA]
        kernels = [e for e in events if not e.is_user_annotation]
        computed = sum(e.time_range.elapsed_us() for e in kernels) / self.count / 1e3
        table = self.profile.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=60
        )
        return (
            f"{table}\na step: {1e3 * period:.2f} ms; the CPU asks for it in"
            f" {1e3 * statistics.median(self.asked[first:last]):.2f} ms; profiled:"
            f" {len(kernels) / self.count:.0f} kernels, which take {computed:.2f} ms"
        )


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--profiled", type=int, default=20)
    parser.add_argument("--rows", type=int, default=30, help="of the table of operations")
    args, words = parser.parse_known_args(argv)
    profiled = Profiled(args.steps, args.profiled)
    Trainer.optimizer_step = lambda trainer, *rest: profiled(trainer, *rest)
    try:
        with tempfile.TemporaryDirectory() as folder:
            ends = [f"train.max_steps={args.steps}", f"train.save_every_steps={args.steps}"]
            train_t2v.main([*words, *ends, f"output_dir={folder}"])
    finally:
        Trainer.optimizer_step = profiled.step
    print(profiled.report(args.rows))


if __name__ == "__main__":
    main()
