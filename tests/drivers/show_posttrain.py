"""Reward post-training shown on moving shapes: a half-trained model, improved by GRPO, NFT, SRPO
and DPO, with null runs beside.

    python -m tests.drivers.show_posttrain --out runs/show_posttrain \\
        --seconds 515        (a GPU of 16 GB or more)

Caches pictures, trains with a checkpoint every 50 steps, takes the one whose prompt accuracy is
next to 0.5, and gives the rest of the time to the runs of configs/posttrain, three at a time.
Leaves summary.json, curves.png, and of each run its metrics, its log and a sheet of pictures;
prints a table. Overrides (section.key=value) go to every command, those of posttrain: to the runs
alone.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from mmdit.data.moving_shapes.oracle import accuracy, oracle
from mmdit.data.moving_shapes.sentences import prompts
from mmdit.experiment.load import load_pipeline
from mmdit.scripts import cache_moving_shapes, plot_run, train_t2v
from mmdit.training.media import contact_sheet, save_image
from mmdit.training.pipeline import SampleSettings

CONFIG = "configs/moving_shapes_64_t2i.yaml"
NULL = "posttrain.rewards=[{type: noise}]"
LANES = [
    [("grpo", 1.0)],
    [("nft", 0.5), ("null_nft", 1.0)],
    [("srpo", 0.25), ("dpo", 0.4), ("null_grpo", 1.0)],
]  # shares of what is left
ENDING = 35  # seconds kept for the summary
BEGINNING = 20  # without so many a run is not begun


def drawn(path: Path, device: str, count: int):
    """Pictures of the first `count` seen prompts, as evaluation draws them, with their prompts."""
    listed = prompts("seen", False, 64, 64)[:count]
    pipeline, config = load_pipeline(path, device)
    settings = replace(SampleSettings.of(config.train), cfg_scale=1.0)
    return pipeline([p.caption for p in listed], 64, 64, 1, settings, batch_size=256), listed


def half_trained(run: Path, device: str, count: int) -> tuple[Path, float]:
    """The checkpoint whose accuracy is next to 0.5, found by halving, as accuracy grows with the
    steps."""
    found, tried = sorted((run / "checkpoints").glob("step_*")), []
    low, high = 0, len(found) - 1
    while low <= high:
        middle = (low + high) // 2
        pixels, listed = drawn(found[middle], device, count)
        value = accuracy(oracle(pixels), [p.facts for p in listed])["prompt_accuracy"]["value"]
        tried.append((abs(value - 0.5), found[middle], value))
        low, high = (middle + 1, high) if value < 0.5 else (low, middle - 1)
    _, path, value = min(tried)
    return path, value


def improve(name: str, args, start: Path, seconds: float) -> None:
    """One run as a process of its own, asked to stop when its time is over."""
    algorithm, device, begun = name.removeprefix("null_"), args.device, time.monotonic()
    if seconds < BEGINNING:
        return print(f"no time for {name}", flush=True)
    words = [
        "--config",
        f"configs/posttrain/{algorithm}.yaml",
        "--device",
        device,
        f"output_dir={args.out}",
        f"experiment_name={name}",
        f"train.init_from={start}",
        "train.save_every_steps=100000",
        *args.overrides,
        *([NULL] if algorithm != name else []),
    ]
    with open(args.out / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mmdit.scripts.posttrain", *words], stdout=log, stderr=log
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # it evaluates and saves
            try:
                code = process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
    said = (args.out / f"{name}.log").read_text().strip().splitlines() or ["nothing said"]
    print(
        f"{name} ended with {code} after {time.monotonic() - begun:.0f} s: {said[-1][:200]}",
        flush=True,
    )


def sheet(path: Path, device: str, out: Path) -> None:
    pixels, listed = drawn(path, device, 24)
    save_image(contact_sheet(pixels, [p.caption for p in listed], 6), out)


def summary(out: Path, names: list[str]) -> dict:
    """First, best (held-out accuracy) and last evaluation of each run."""
    report = {}
    for name in names:
        path = out / name / "metrics.jsonl"
        rows = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        )
        seen = [row for row in rows if "seen_prompt_accuracy" in row]
        if seen:
            best = max(seen, key=lambda row: row.get("held_out_prompt_accuracy", 0))
            kept = (
                "step",
                "drift",
                "seen_",
                "held_out_",
                "score",
                "implicit",
                "pair_loss",
                "error_",
                "latent_std",
            )
            keep = [
                {key: round(value, 4) for key, value in row.items() if key.startswith(kept)}
                for row in (seen[0], best, seen[-1])
            ]
            curve = [
                [
                    row["step"],
                    *(
                        round(row.get(key, 0.0), 3)
                        for key in ("seen_prompt_accuracy", "held_out_prompt_accuracy", "drift")
                    ),
                ]
                for row in seen
            ]
            report[name] = dict(zip(("first", "best", "last"), keep)) | {
                "seconds": round(sum(row.get("seconds", 0) for row in rows), 1),
                "replay_most": max(row.get("replay", 0.0) for row in rows),
                "step_seen_held_out_drift": curve,
            }
    return report


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/show_posttrain"))
    parser.add_argument("--seconds", type=float, default=515, help="for everything")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--count", type=int, default=30000, help="pictures to cache")
    parser.add_argument(
        "--steps", type=int, default=900, help="of the training that is stopped half way"
    )
    parser.add_argument("--every", type=int, default=50, help="steps between its checkpoints")
    parser.add_argument(
        "--judged", type=int, default=256, help="prompts that choose the half-trained model"
    )
    parser.add_argument("--runs", nargs="+", default=[name for lane in LANES for name, _ in lane])
    parser.add_argument("--overrides", nargs="*", default=[])
    args = parser.parse_args(argv)
    begun, out = time.monotonic(), args.out
    left = lambda: args.seconds - ENDING - (time.monotonic() - begun)
    out.mkdir(parents=True)
    cache = [
        "--config",
        CONFIG,
        "--count",
        str(args.count),
        "--out_dir",
        str(out / "cache"),
        "--device",
        args.device,
    ]
    shared = [word for word in args.overrides if not word.startswith("posttrain.")]
    cache_moving_shapes.main([*cache, *shared])
    train_t2v.main(
        [
            "--config",
            CONFIG,
            "--train_cache_dir",
            str(out / "cache"),
            "--device",
            args.device,
            f"output_dir={out}",
            "experiment_name=half",
            f"train.max_steps={args.steps}",
            "train.lr_schedule=constant",
            f"train.save_every_steps={args.every}",
            "train.keep_last=0",
            *shared,
        ]
    )
    start, value = half_trained(out / "half", args.device, args.judged)
    print(f"begin at {start.name}, accuracy {value:.3f}; {left():.0f} s left", flush=True)

    def work(lane: list[tuple[str, float]]) -> None:
        for name, share in lane:
            if name in args.runs:
                improve(name, args, start, left() * share)

    threads = [threading.Thread(target=work, args=(lane,)) for lane in LANES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = summary(out, args.runs)
    (out / "summary.json").write_text(json.dumps(report, indent=1))
    for name, row in report.items():
        print(name, json.dumps(row), flush=True)
        shutil.copy(out / name / "metrics.jsonl", out / f"{name}.jsonl")
        if not name.startswith("null"):
            sheet(out / name, args.device, out / f"{name}.png")
    sheet(start, args.device, out / "half.png")
    if report:
        plot_run.main(
            ["--runs", *(str(out / name) for name in report), "--out", str(out / "curves.png")]
        )
    return report


if __name__ == "__main__":
    main()
