"""What a training step costs by model, clip and GPUs, and how it grows with the clip: a JSON line a
case, then markdown tables.

    python -m tests.drivers.gpu_costs \\
        --costs        4 GPUs, some 15 minutes: B, L, XL on 1, 2 and 4 GPUs
    python -m tests.drivers.gpu_costs \\
        --growth       1 GPU, some 4 minutes: 16 … 80 frames, 256 … 720 px square
    python -m tests.drivers.gpu_costs --tiny --costs \\
        --growth        on a CPU, to see that the script works

Cases are `mmdit.scripts.benchmark --parts train --compile` in processes of their own, those on few
GPUs beside each other; what was compiled stays in runs/compiled. Efficiency: the rate against so
many times that of one GPU. Growth: 688 M parameters with checkpointing, steps of about as many
tokens; GB beyond weights, moments and averages; a straight line and the largest relative distance
from it. All by the tokens computed, of which some only fill windows. Nothing begins after
`--seconds`; what failed or had no time left says so in its place: exit code 1.
"""

import argparse
import json
import math
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import namedtuple
from pathlib import Path

import torch

from mmdit.models import VideoMMDiTConfig
from mmdit.nn.window import WindowGrid

ROOT = Path(__file__).resolve().parents[2]
TINY = ["dim=16", "depth=1", "num_heads=2"]
# Samples x frames x rows x columns of cells; by size what fills a GPU of 140 GB where nothing is
# recomputed.
COSTS = {
    "B": ["512x1x16x16", "32x16x16x16", "8x32x16x28"],
    "L": ["256x1x16x16", "12x16x16x16", "4x32x16x28"],
    "XL": ["192x1x16x16", "10x16x16x16", "3x32x16x28"],
}
GROWTH = [
    "8x16x16x16",
    "2x80x16x16",
    "1x16x45x45",
    "3x48x16x16",
    "2x16x32x32",
    "4x32x16x16",
    "4x16x24x24",
]
LIMIT = 180  # seconds for a shape, then its process is ended
Job = namedtuple(
    "Job", "name model shapes gpus", defaults=[1]
)  # `model`: words; `shapes` are measured one after another


class Costs:
    def __init__(self, args: argparse.Namespace):
        self.args, self.end, self.rows, self.free = (
            args,
            time.monotonic() + args.seconds,
            [],
            queue.Queue(),
        )
        self.gpus = 2 if args.tiny else torch.cuda.device_count()
        own = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(
            ","
        )  # of this process: its children see what is named here
        for gpu in range(self.gpus):
            self.free.put(own[gpu] if len(own) > gpu and own[gpu] else str(gpu))

    def run(self, jobs: list[Job]) -> list[dict]:
        """The rows of `jobs`, which are begun in this order, as many at a time as there are
        GPUs."""
        threads, first = [], len(self.rows)
        for job in jobs:
            threads.append(
                threading.Thread(
                    target=self.work, args=(job, [self.free.get() for _ in range(job.gpus)])
                )
            )
            threads[-1].start()
        for thread in threads:
            thread.join()
        return [row for row in self.rows[first:] if "ms" in row]

    def tell(self, job: Job, shape: str, facts: dict) -> None:
        self.rows.append({"case": job.name} | facts | {"shape": shape, "gpus": job.gpus})
        print(json.dumps(self.rows[-1]) + "\n", end="", flush=True)

    def work(self, job: Job, mine: list[str]) -> None:
        """All shapes of a job; after one that fails the rest in new processes."""
        left = list(job.shapes)
        while left:
            error = (
                self.measure(job, left, ",".join(mine))
                if time.monotonic() < self.end
                else "no time left"
            )
            if left:
                self.tell(job, left.pop(0), {"failed": error})
        for gpu in mine:
            self.free.put(gpu)

    def measure(self, job: Job, left: list[str], gpus: str) -> str:
        """Takes from `left` what is done, and returns what ended it."""
        torchrun = (
            ["torch.distributed.run", "--standalone", f"--nproc_per_node={job.gpus}", "-m"]
            if job.gpus > 1
            else []
        )
        words = [
            "--parts",
            "train",
            "--repeats",
            "5",
            "--device=cpu" if self.args.tiny else "--compile",
            "--shapes",
            *left,
            "--model",
            *job.model,
            "--parallel",
            *self.args.parallel,
        ]
        env = os.environ | {
            "CUDA_VISIBLE_DEVICES": gpus,
            "TORCHINDUCTOR_CACHE_DIR": str(ROOT / "runs/compiled"),
        }
        with tempfile.TemporaryFile("w+") as log:
            command = [sys.executable, "-m", *torchrun, "mmdit.scripts.benchmark", *words]
            child = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=log, text=True
            )
            limit = threading.Timer(
                LIMIT * len(left), child.terminate
            )  # torchrun then ends its processes
            limit.start()
            for line in child.stdout:
                if line.startswith("{"):
                    self.tell(job, left.pop(0), json.loads(line))
            code = child.wait()
            limit.cancel()
            log.seek(0)
            lines = [line.strip() for line in log if line.strip()] or [""]
        return (
            f"exit code {code}:"
            f" {next((line for line in lines if 'rror: ' in line), lines[-1])[:500]}"
        )


def cost_jobs(tiny: bool, gpus: list[int]) -> list[Job]:
    windows = "spatial=[window,shifted]"  # as when the published table was made
    jobs = {size: Job(size, [f"size={size}", windows], shapes) for size, shapes in COSTS.items()}
    jobs["long"] = Job(
        "XL, checkpointing", ["size=XL", "checkpointing=true", windows], ["1x80x45x80"]
    )
    if tiny:
        jobs = {"B": Job("B", TINY, ["2x1x4x4", "1x2x4x4"]), "long": Job("long", TINY, ["1x3x4x5"])}
    order = {
        1: ("long", "XL", "L", "B"),
        2: ("XL", "B", "L", "long"),
        4: ("XL", "long", "B", "L"),
    }  # of least interest last
    return [
        jobs[name]._replace(gpus=n)
        for n, names in order.items()
        if n in gpus
        for name in names
        if name in jobs
    ]


def cost_table(rows: list[dict]) -> list[list]:
    table, alone = [["model", "shape", "GPUs", "ms", "GB", "clips a day", "efficiency"]], {}
    for row in sorted(rows, key=lambda row: (row["case"], row["tokens"], row["gpus"])):
        case, day, gpus = (row["case"], row["shape"]), row["clips_per_day"], row["gpus"]
        alone |= {case: day} if gpus == 1 else {}
        share = f"{day / gpus / alone[case]:.1%}" if case in alone else "-"
        table.append([*case, gpus, row["ms"], row.get("peak_gb", "-"), f"{day:,}", share])
    return table


def growth_jobs(tiny: bool, gpus: int) -> list[Job]:
    model = [*(TINY if tiny else ("dim=1152", "depth=25", "num_heads=18")), "checkpointing=true"]
    shapes = ["1x2x4x4", "1x4x4x4", "1x2x7x7"] if tiny else GROWTH
    return [Job("growth", model, shapes[i::gpus]) for i in range(gpus) if shapes[i::gpus]]


def computed(shape: str) -> int:
    """Tokens of a clip as the model computes them, those that fill its windows among them."""
    _, frames, rows, columns = map(int, shape.split("x"))
    grid = WindowGrid.fit(rows, columns, VideoMMDiTConfig.window_size)
    return frames * math.prod(grid.counts) * grid.places


def growth_table(rows: list[dict]) -> list[list]:
    table = [["shape", "tokens", "computed", "s a clip", "µs a token", "GB a clip", "MB a token"]]
    rows.sort(key=lambda row: row["tokens"])
    tokens, clips = (
        [computed(row["shape"]) for row in rows],
        [int(row["shape"].partition("x")[0]) for row in rows],
    )
    seconds = [row["ms"] / 1e3 / n for row, n in zip(rows, clips)]
    memory = [
        (row.get("peak_gb", math.nan) - row.get("rest_gb", 0)) / n for row, n in zip(rows, clips)
    ]
    for row, n, s, gb in zip(rows, tokens, seconds, memory):
        table.append(
            [
                row["shape"],
                row["tokens"],
                n,
                *(f"{value:.4g}" for value in (s, 1e6 * s / n, gb, 1e3 * gb / n)),
            ]
        )
    for name, values in (("seconds", seconds), ("GB", memory)) if len(rows) > 2 else ():
        slope, start = statistics.linear_regression(tokens, values)
        worst = max(abs((start + slope * n) / value - 1) for n, value in zip(tokens, values))
        table.append(
            [f"{name} of a clip = {start:.4g} + {slope:.4g} · tokens computed, within {worst:.1%}"]
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("costs", "growth", "tiny"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument(
        "--seconds", type=float, default=1200.0, help="nothing begins after so many [1200]"
    )
    parser.add_argument(
        "--gpus",
        type=int,
        nargs="*",
        default=[1, 2, 4],
        help="on how many, for --costs [1 2 4, where there are as many]",
    )
    parser.add_argument(
        "--parallel", nargs="*", default=[], metavar="KEY=VALUE", help="as of the benchmark"
    )
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("no CUDA GPU here; --tiny runs the same on a CPU")
    work = Costs(args)
    counts = [n for n in args.gpus if n <= work.gpus]
    costs = cost_jobs(args.tiny, counts) if args.costs else []
    if args.costs and not costs:
        parser.error(f"--gpus {args.gpus}: there are {work.gpus}")
    growth = growth_jobs(args.tiny, work.gpus) if args.growth else []
    for jobs, table in ((costs, cost_table), (growth, growth_table)):
        if jobs:
            head, *rest = table(work.run(jobs))
            for cells in (head, ["---"] * len(head), *rest):
                print(f"| {' | '.join(map(str, cells))} |")
    return 1 if any("failed" in row for row in work.rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
