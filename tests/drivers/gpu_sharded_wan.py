"""Train Wan at its released sizes on several GPUs, by the command that trains everything, on random
weights made here: a JSON line a case.

    python -m tests.drivers.gpu_sharded_wan --folder /tmp/wan --make 14B 5B   # writes the bases
    python -m tests.drivers.gpu_sharded_wan --folder /tmp/wan --only 14B      # and measures
    python -m tests.drivers.gpu_sharded_wan --folder /tmp/wan --tiny          # on a CPU, by gloo

A case is a base, the size of its latents, a number of GPUs and words of a config. `gb` and
`host_gb` are the most that tensors of one GPU took and that the memory of the host took for one
process alone (RssAnon); `step_s` is the median after the third step. A run is killed once its steps
are reported: what it would save, 171 GB for all weights of 14 B, is not wanted here.
`loss_distance` is the largest relative one from the case named in `beside`, step by step.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from mmdit.models.wan import WanConfig
from mmdit.scripts import cache_moving_shapes
from tests.drivers.sharded_loading import make_base

CONFIG = """\
experiment_name: {name}
output_dir: {folder}/runs
num_workers: 0
video: {{width: {width}, height: {height}, num_frames: {frames}}}
tokenizer: {{type: dummy, latent_f: {patch}, latent_d: {channels}}}
text_encoder: {{type: hash, dim: 4096}}
model: {{type: wan, name_or_path: {folder}/{base}, checkpointing: true}}
train:
  batch_size: 1
  lr: 1.0e-5
  warmup_steps: 0
  max_steps: 100000
  log_every_steps: 1
  save_every_steps: 100000
ema: {{enabled: false}}
"""
BASES = {
    "14B": WanConfig(5120, 13824, 40, 40),
    "5B": WanConfig(3072, 14336, 24, 30, 48, 48),
    "1.3B": WanConfig(1536, 8960, 12, 30),
}
TINY = WanConfig(256, 512, 2, 2)
LORA = (
    "lora={enabled: true, rank: 16, target_modules: ['*.self_attn.[qkvo]', '*.cross_attn.[qkvo]']}",
    "model.dtype=bfloat16",
)
SHARDED, SHARED = "parallel.type=fsdp", "parallel.context_parallel=2"


@dataclass(frozen=True)
class Case:
    """One training: latents of `frames`, `height` and `width` cells, and words for the config."""

    name: str
    base: str
    latents: tuple[int, int, int]
    words: tuple[str, ...]
    gpus: int = 2
    steps: int = 6
    beside: str = ""


SHORT, LONG, WIDE = (9, 60, 104), (31, 44, 80), (21, 90, 160)
FULL = ("train.precision=pure_bf16", SHARDED)
CASES = [
    Case("14B, all weights, cut over 2", "14B", SHORT, FULL, steps=20),
    Case("14B, LoRA, cut over 2", "14B", SHORT, (*LORA, SHARDED)),
    Case("5B, LoRA, one GPU", "5B", LONG, LORA, gpus=1),
    Case("5B, LoRA, clip shared by 2", "5B", LONG, (*LORA, SHARED), beside="5B, LoRA, one GPU"),
    Case("1.3B, LoRA, 720p, one GPU", "1.3B", WIDE, LORA, gpus=1),
    Case(
        "1.3B, LoRA, 720p, clip shared by 2",
        "1.3B",
        WIDE,
        (*LORA, SHARED),
        beside="1.3B, LoRA, 720p, one GPU",
    ),
]


def cached(folder: Path, case: Case) -> tuple[Path, Path]:
    """Return the case's config and its cache of a clip, made unless they are there."""
    frames, rows, columns = case.latents
    channels, patch = (48, 16) if case.base == "5B" else (16, 8)
    config = folder / f"{case.name}.yaml"
    text = CONFIG.format(
        name=json.dumps(case.name),
        folder=folder,
        base=case.base,
        frames=frames,
        height=rows * patch,
        width=columns * patch,
        patch=patch,
        channels=channels,
    )
    config.write_text(text)
    cache = folder / f"cache_{case.base}_{frames}x{rows}x{columns}"
    if not cache.exists():
        words = ["--config", str(config), "--out_dir", str(cache), "--count", "2"]
        cache_moving_shapes.main([*words, "--frames", str(frames), "--device", "cpu"])
    return config, cache


def host_gb(command: int) -> float:
    """Return the most memory of its own that a process below a command has, in GB."""
    parents, sizes = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = [line.split() for line in status.read_text().splitlines()]
        except OSError:
            continue  # it has ended
        values = {line[0]: line[1] for line in lines if len(line) > 1}
        number = int(status.parent.name)
        parents[number] = int(values["PPid:"])
        sizes[number] = int(values.get("RssAnon:", 0)) * 1024 / 1e9

    def below(number: int) -> bool:
        return number == command or (number in parents and below(parents[number]))

    return max((size for number, size in sizes.items() if below(number)), default=0.0)


def trained(folder: Path, case: Case, device: str) -> dict:
    """Train until the case's steps are reported, and return what was measured. Fails with the end
    of the log where the command ends sooner."""
    config, cache = cached(folder, case)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(case.gpus), "-m", "mmdit.scripts.train_t2v"]
    command += ["--config", str(config), "--train_cache_dir", str(cache), "--device", device]
    metrics, log = folder / "runs" / case.name / "metrics.jsonl", folder / f"{case.name}.log"
    shutil.rmtree(metrics.parent, ignore_errors=True)
    begin, host, lines = time.monotonic(), 0.0, []
    with log.open("w") as out:
        run = subprocess.Popen(
            [*command, *case.words], stdout=out, stderr=out, start_new_session=True
        )
        try:
            while len(lines) < case.steps:
                if run.poll() is not None:
                    raise RuntimeError(f"{case.name} ended: {log.read_text()[-2000:]}")
                time.sleep(0.1)
                host = max(host, host_gb(run.pid))
                lines = metrics.read_text().splitlines() if metrics.exists() else []
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    rows = [json.loads(line) for line in lines]
    rates = [row["samples_per_second"] for row in rows[3:]]
    shared = 2 if SHARED in case.words else 1
    seconds = case.gpus / shared / statistics.median(rates)
    return {
        "start_s": round(time.monotonic() - begin - rows[-1]["wall_s"]),
        "step_s": round(seconds, 3),
        "gb": max(round(row.get("memory_gb", 0.0), 1) for row in rows),
        "host_gb": round(host, 1),
        "losses": [row["loss"] for row in rows],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--make", nargs="+", choices=list(BASES), help="write bases, and end")
    parser.add_argument("--only", default="", help="words of the cases to measure")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    cases = [case for case in CASES if args.only in case.name]
    bases = BASES
    if args.tiny:
        bases = {
            name: replace(TINY, in_dim=base.in_dim, out_dim=base.out_dim)
            for name, base in BASES.items()
        }
        cases = [replace(case, latents=(3, 4, 8), steps=5) for case in cases]
    for name in args.make or {case.base for case in cases}:
        if not (args.folder / name).exists():
            make_base(args.folder / name, bases[name], torch.bfloat16)
    measured: dict[str, dict] = {}
    for case in cases if not args.make else []:
        row = trained(args.folder, case, "cpu" if args.tiny else "cuda")
        losses = measured[case.name] = row.pop("losses")
        if case.beside in measured:
            pairs = zip(losses, measured[case.beside], strict=True)
            row["loss_distance"] = max(abs(a - b) / abs(b) for a, b in pairs)
        print(json.dumps({**asdict(case), **row, "last_loss": losses[-1]}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
