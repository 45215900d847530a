"""What a training step costs, by size of the model, clip and number of GPUs, and how it grows with the clip. A JSON line a case
as soon as it is known, then a markdown table.

    PYTHONPATH=VTP:. python tests/gpu_costs.py --costs        4 GPUs, some 5 minutes: B, L, XL on 1, 2 and 4 GPUs
    PYTHONPATH=VTP:. python tests/gpu_costs.py --growth       1 GPU, some 4 minutes: 16 … 80 frames, 256 … 720 px square
    PYTHONPATH=VTP:. python tests/gpu_costs.py --tiny --costs --growth         on a CPU with gloo, to see that the script works

Each case is `mmdit.scripts.benchmark --parts train --compile` in processes of its own; those on few GPUs run beside each other.
What was compiled is kept in runs/compiled, for all cases and for a later call. Efficiency: the rate against so many times that
of one GPU. Growth: 688 M parameters with checkpointing, batches of about as many tokens; a straight line through what one clip
takes, and the largest relative distance from it; GB are those beyond weights, moments and averages. Nothing begins after
`--seconds`; a case that fails or has no time left says so in its place, and the exit code is then 1.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TINY = ["dim=16", "depth=1", "num_heads=2"]
PICTURE, CLIP, WIDE, LONG = (1, 16, 16), (16, 16, 16), (32, 16, 28), (80, 45, 80)  # frames, rows, columns of cells
BATCHES = {"B": (512, 32, 8), "L": (256, 12, 4), "XL": (192, 10, 3)}  # of the first three on a GPU of 140 GB, nothing recomputed
GROWING = [(16, 16), (80, 16), (16, 45), (48, 16), (16, 32), (32, 16), (16, 24)]  # frames, rows and columns
TOKENS = 32768  # of a growing step, about


@dataclass(frozen=True)
class Job:
    name: str
    gpus: int
    model: list[str]
    shapes: list[tuple[int, ...]]
    repeats: int = 5


class Costs:
    def __init__(self, args: argparse.Namespace):
        self.args, self.begun = args, time.monotonic()
        self.free = list(range(2 if args.tiny else torch.cuda.device_count()))
        self.gpus, self.changed = len(self.free), threading.Condition()
        self.rows: list[dict] = []
        self.good = True

    def late(self) -> bool:
        return time.monotonic() - self.begun > self.args.seconds

    def run(self, jobs: list[Job]) -> None:
        """In this order, as many at a time as there are GPUs."""
        threads = []
        for job in jobs:
            with self.changed:
                left = self.args.seconds - (time.monotonic() - self.begun)
                if job.gpus > self.gpus or not self.changed.wait_for(lambda: len(self.free) >= job.gpus, max(0.0, left)):  # noqa: B023
                    for shape in job.shapes:
                        self.tell(job, shape, failed=f"has {self.gpus} GPUs" if job.gpus > self.gpus else "no time left")
                    continue
                mine = [self.free.pop(0) for _ in range(job.gpus)]
            threads.append(threading.Thread(target=self.work, args=(job, mine)))
            threads[-1].start()
        for thread in threads:
            thread.join()

    def tell(self, job: Job, shape: tuple[int, ...], **facts) -> None:
        with self.changed:
            self.rows.append({"case": job.name, "gpus": job.gpus, "shape": list(shape), **facts})
            self.good &= "failed" not in facts
            print(json.dumps(self.rows[-1] | {"at_s": round(time.monotonic() - self.begun)}), flush=True)

    def work(self, job: Job, mine: list[int]) -> None:
        """All shapes in one process after another; after a failure the rest in a new one."""
        left = list(job.shapes)
        while left:
            if self.late():
                self.tell(job, left.pop(0), failed="no time left")
                continue
            error = self.child(job, left, mine)
            if left:
                self.tell(job, left.pop(0), failed=error)
        with self.changed:
            self.free = sorted(self.free + mine)
            self.changed.notify_all()

    def child(self, job: Job, left: list[tuple[int, ...]], mine: list[int]) -> str:
        """Measures `left` and takes from it what is done; the error, if any."""
        command = [sys.executable, "-m", *("torch.distributed.run --standalone --nproc_per_node".split() + [str(job.gpus), "-m"]) * (job.gpus > 1),
                   "mmdit.scripts.benchmark", "--parts", "train", "--repeats", str(job.repeats), "--shapes",
                   *("x".join(map(str, shape)) for shape in left), "--model", *job.model,
                   *(["--parallel", *self.args.parallel] if self.args.parallel else []),
                   *(["--device", "cpu"] if self.args.tiny else ["--compile"])]  # fmt: skip
        env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "VTP"))), "CUDA_VISIBLE_DEVICES": ",".join(map(str, mine)),
                            "TORCHINDUCTOR_CACHE_DIR": str(ROOT / "runs/compiled")}  # fmt: skip
        with tempfile.TemporaryFile("w+") as log:
            child = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
            limits = [threading.Timer(self.args.limit * len(left), child.terminate),  # torchrun then ends its processes
                      threading.Timer(self.args.limit * len(left) + 40, child.kill)]  # fmt: skip
            for limit in limits:
                limit.start()
            for line in child.stdout:
                if line.startswith("{"):
                    self.tell(job, left.pop(0), **{k: v for k, v in json.loads(line).items() if k not in ("shape", "gpus", "part")})
            code = child.wait()
            for limit in limits:
                limit.cancel()
            log.seek(0)
            lines = [line.strip() for line in log if line.strip()] or ["nothing on stderr"]
        return f"exit code {code}: {next((line for line in reversed(lines) if 'rror: ' in line), lines[-1])[:500]}"


def cost_jobs(tiny: bool) -> list[Job]:
    if tiny:
        cases = {"B": Job("B", 1, TINY, [(2, 1, 4, 4), (1, 2, 4, 4)], 2), "long": Job("XL", 1, TINY, [(1, 3, 4, 5)], 2)}
    else:
        cases = {size: Job(size, 1, [f"size={size}"], [(n, *shape) for n, shape in zip(batch, (PICTURE, CLIP, WIDE))])
                 for size, batch in BATCHES.items()}  # fmt: skip
        cases["long"] = Job("XL, checkpointing", 1, ["size=XL", "checkpointing=true"], [(1, *LONG)], 3)
    order = {1: ("long", "XL", "L", "B"), 2: ("XL", "B", "L", "long"), 4: ("XL", "long", "B", "L")}
    return [Job(cases[name].name, gpus, cases[name].model, cases[name].shapes, cases[name].repeats)
            for gpus, names in order.items() if not tiny or gpus < 4 for name in names if name in cases]  # fmt: skip


def cost_table(rows: list[dict]) -> str:
    lines = ["| model | frames, cells | a GPU | ms | GB | clips a day on 1 GPU | 2 | 4 |", "|---|---|---|---|---|---|---|---|"]
    for name, shape in dict.fromkeys((row["case"], tuple(row["shape"])) for row in rows):
        found = {row["gpus"]: row for row in rows if (row["case"], tuple(row["shape"])) == (name, shape) and "ms" in row}
        alone = found.get(1, {})
        days = []
        for gpus in (1, 2, 4):
            day = found.get(gpus, {}).get("clips_per_day")
            share = f" ({100 * day / gpus / alone['clips_per_day']:.1f} %)" if day and alone and gpus > 1 else ""
            days.append(f"{day:,}{share}" if day else "-")
        lines.append(f"| {name} | {shape[1]}, {shape[3]}x{shape[2]} | {shape[0]} | {alone.get('ms', '-')} | {alone.get('peak_gb', '-')} | "
                     f"{' | '.join(days)} |")  # fmt: skip
    return "\n".join(lines)


def growth_jobs(tiny: bool, gpus: int) -> list[Job]:
    """One for each GPU."""
    model = [*(TINY if tiny else ("dim=1152", "depth=25", "num_heads=18")), "checkpointing=true"]
    growing = [(frames // 8, side // 4) for frames, side in GROWING[:4]] if tiny else GROWING
    shapes = [(max(1, round(TOKENS / frames / side**2 / (512 if tiny else 1))), frames, side, side) for frames, side in growing]
    return [Job("growth", 1, model, shapes[i::gpus], 2 if tiny else 5) for i in range(min(gpus, len(shapes)))]


def growth_table(rows: list[dict]) -> str:
    lines = ["| frames, cells | tokens | clips | s a clip | µs a token | GB a clip | MB a token |", "|---|---|---|---|---|---|---|"]
    rows = sorted((row for row in rows if "ms" in row), key=lambda row: row["tokens"])
    sides: dict[str, list[float]] = {"seconds": [], "GB": []}
    for row in rows:
        clips, frames, height, width = row["shape"]
        seconds, memory = row["ms"] / 1e3 / clips, (row.get("peak_gb", 0.0) - row.get("rest_gb", 0.0)) / clips
        sides["seconds"].append(seconds)
        sides["GB"].append(memory)
        lines.append(f"| {frames}, {width}x{height} | {row['tokens']} | {clips} | {seconds:.4f} | {1e6 * seconds / row['tokens']:.2f} | "
                     f"{memory:.2f} | {1e3 * memory / row['tokens']:.3f} |")  # fmt: skip
    tokens = [row["tokens"] for row in rows]
    for name, values in sides.items():
        if len(tokens) > 2 and all(values):
            slope, start = statistics.linear_regression(tokens, values)
            worst = max(abs(value / (start + slope * n) - 1) for n, value in zip(tokens, values))
            lines.append(f"\n{name} of a clip = {start:.4g} + {slope:.4g} · tokens, within {100 * worst:.1f} %")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=300.0, help="nothing begins after so many [300]")
    parser.add_argument("--limit", type=float, default=100.0, help="seconds for a shape of a process; then it is ended [100]")
    parser.add_argument("--parallel", nargs="+", default=[], metavar="KEY=VALUE", help="as of the benchmark, like reduce=bfloat16")
    args = parser.parse_args()
    if not args.costs and not args.growth:
        parser.error("nothing to do: give --costs, --growth or both")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("no CUDA GPU here; --tiny runs the same on a CPU")
    work = Costs(args)
    with contextlib.suppress(KeyboardInterrupt):
        work.run([*(cost_jobs(args.tiny) if args.costs else []), *(growth_jobs(args.tiny, work.gpus) if args.growth else [])])
    if args.costs:
        print("\n" + cost_table([row for row in work.rows if row["case"] != "growth"]))
    if args.growth:
        print("\n" + growth_table([row for row in work.rows if row["case"] == "growth"]))
    return 0 if work.good else 1


if __name__ == "__main__":
    raise SystemExit(main())
