"""Measure the memory of the host that each process takes until a Wan base is cut over processes by
FSDP, for a random base of the shape of T2V-1.3B, in float32 or bfloat16 files; and of a start of
all its weights from another run's (`train.init_from`): an export, or a checkpoint in parts.

    python -m tests.drivers.sharded_loading [--processes 2 4 --layers 30 --only LoRA]

Gloo on a CPU, where the shards themselves lie in this memory, too. For each way the largest over
the processes, in GB: `own`, the peak of the memory that is theirs alone (RssAnon, every 2 ms) above
what they had before; `resident`, the peak of all their pages above that (VmHWM), among which are
those of the files, which they share and the system may take back. `base` is the base in the type
that it has in memory, and `limit` its part for each process and 4 GB.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from mmdit.config import encode
from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.experiment.run import Run
from mmdit.models.wan import WanConfig, WanDiT
from mmdit.tokenizers import build_tokenizer
from mmdit.training import checkpoint
from mmdit.training.distributed import process_group
from mmdit.training.memory.shards import OFFSETS, SHAPES, SHARDING
from mmdit.weights import INDEX

GB = 1e9
HEAD_DIM = 128
SHARD = 10**9  # bytes
CONFIG = """\
experiment_name: loading
output_dir: {folder}/runs
video: {{width: 64, height: 32, num_frames: 9}}
tokenizer: {{type: dummy, latent_f: 8, latent_d: 16}}
text_encoder: {{type: hash, dim: 4096}}
model: {{type: wan, name_or_path: unset}}
ema: {{enabled: false}}
"""
EXPORT, PARTS = (f"train.init_from={{folder}}/{name}" for name in ("export.safetensors", "run"))
LORA = ["lora={enabled: true, rank: 16, target_modules: [q, k, v, o]}"]
WAYS = {  # the type of the files, overrides, bytes of a weight in memory
    "LoRA on bfloat16 of bfloat16 files": ("bfloat16", [*LORA, "model.dtype=bfloat16"], 2),
    "LoRA on bfloat16 of float32 files": ("float32", [*LORA, "model.dtype=bfloat16"], 2),
    "LoRA on nf4 of bfloat16 files": ("bfloat16", [*LORA, "model.dtype=nf4"], 0.5625),
    "all weights in pure_bf16 of float32 files": ("float32", ["train.precision=pure_bf16"], 2),
    "all weights in float32 of bfloat16 files": ("bfloat16", ["train.precision=fp32"], 4),
    "all weights in float32 from an export": ("bfloat16", ["train.precision=fp32", EXPORT], 4),
    "all weights in float32 from parts": ("bfloat16", ["train.precision=fp32", PARTS], 4),
    "all weights in pure_bf16 from parts": ("bfloat16", ["train.precision=pure_bf16", PARTS], 2),
}


def make_base(folder: Path, config: WanConfig, dtype: torch.dtype) -> int:
    """Write a random base in shards with their index, its numbers drawn on a GPU where there is
    one; return the number of its weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in WanDiT(config).named_parameters()}
    files: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if files[-1] and size + math.prod(shape) * dtype.itemsize > SHARD:
            files.append([])
            size = 0
        files[-1].append(name)
        size += math.prod(shape) * dtype.itemsize
    places = {}
    for number, names in enumerate(files, 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(files):05d}.safetensors"
        places |= dict.fromkeys(names, file)
        drawn = {n: torch.randn(shapes[n], dtype=dtype, device=device) * 0.02 for n in names}
        save_file(drawn, folder / file)
    index = folder / f"diffusion_pytorch_model{INDEX}"
    index.write_text(json.dumps({"weight_map": places}))
    return sum(map(math.prod, shapes.values()))


def make_start(folder: Path, source: str, base: str) -> None:
    """Write what a run of all weights would: a float32 checkpoint in two parts, or its export in
    bfloat16."""
    config = load_experiment_config(folder / "config.yaml", [f"model.name_or_path={base}"])
    tokenizer = build_tokenizer(config.tokenizer).plain
    meta = checkpoint.Meta(1, encode(config), tokenizer.spec, tokenizer.fingerprint)
    with torch.device("meta"):
        learner = WanDiT(WanConfig(**json.loads((folder / "sizes.json").read_text())))
    shapes = {f"model.{name}": p.shape for name, p in learner.named_parameters()}
    if source == EXPORT:
        tensors = {name: torch.randn(shape).bfloat16() * 0.02 for name, shape in shapes.items()}
        text = meta.to_json()
        about = {"mmdit": text, "crc32": str(checkpoint.export_crc(text, tensors))}
        save_file(tensors, folder / "export.safetensors", about)
        return
    parts = checkpoint.folder_of(folder / "run", 1) / "model"
    parts.mkdir(parents=True)
    (parts / SHAPES).write_text(json.dumps({name: list(shape) for name, shape in shapes.items()}))
    for number in range(2):
        tensors, offsets = {}, {}
        for name, shape in shapes.items():
            first = number * -(-shape[0] // 2)
            rows = min(shape[0] - first, -(-shape[0] // 2))
            tensors[name] = torch.randn(rows, *shape[1:]) * 0.02
            offsets[name] = {OFFSETS: [first, *[0] * (len(shape) - 1)]}
        about = {SHARDING: json.dumps(offsets)}
        save_file(tensors, parts / f"shard-{number:05d}.safetensors", about)
    (parts.parent / checkpoint.META).write_text(meta.to_json())


def memory(name: str) -> float:
    """Return a line of /proc/self/status in GB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / GB
    raise LookupError(name)


def one_rank(folder: Path, base: str, *words: str) -> None:
    """Make a run up to its first step, and write down what memory that took."""
    words = ("parallel.type=fsdp", f"model.name_or_path={base}", *words)
    config = load_experiment_config(folder / "config.yaml", list(words))
    tokenizer = build_tokenizer(config.tokenizer).plain
    peak, done = 0.0, False

    def look() -> None:
        nonlocal peak
        while not done:
            peak = max(peak, memory("RssAnon"))
            time.sleep(0.002)

    with process_group("cpu", timeout_minutes=10) as world:
        world.barrier()
        before = {name: memory(name) for name in ("RssAnon", "VmHWM")}
        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        begin = time.monotonic()
        Run(config, world, tokenizer, SimpleNamespace(global_batch=1), None)
        seconds = time.monotonic() - begin
        done = True
        watcher.join()
        measured = {
            "own": peak - before["RssAnon"],
            "resident": memory("VmHWM") - before["VmHWM"],
            "seconds": seconds,
        }
        rows = world.gather(measured)
        if world.is_main:
            largest = {}
            for key in measured:
                largest[key] = round(max(row[key] for row in rows), 2)
            (folder / "measured.json").write_text(json.dumps(largest))
        world.barrier()


def main() -> int:
    if "RANK" in os.environ:
        folder, *words = sys.argv[1:]
        one_rank(Path(folder), *words)
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--only", default="", help="words of the ways to measure")
    args = parser.parse_args()
    heads, wide = args.dim // HEAD_DIM, round(args.dim * 8960 / 1536)
    config = WanConfig(args.dim, wide, heads, args.layers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
        sizes = {"dim": args.dim, "ffn_dim": wide, "num_heads": heads, "num_layers": args.layers}
        (folder / "sizes.json").write_text(json.dumps(sizes))
        made: dict[str, int] = {}
        for way, (dtype, words, weight_bytes) in WAYS.items():
            if args.only not in way:
                continue
            if dtype not in made:
                made[dtype] = make_base(folder / dtype, config, getattr(torch, dtype))
            source = words[-1]
            if source in (EXPORT, PARTS) and source not in made:
                make_start(folder, source, str(folder / dtype))
                made[source] = made[dtype]
            words = [word.replace("{folder}", str(folder)) for word in words]
            for processes in args.processes:
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
                command += ["--nproc_per_node", str(processes), __file__, str(folder)]
                command += [str(folder / dtype), *words]
                env = os.environ | {"OMP_NUM_THREADS": "1"}
                (folder / "measured.json").unlink(missing_ok=True)
                # Gloo may abort a process that has ended: what was measured is what counts.
                subprocess.run(command, env=env, check=False, stdout=subprocess.DEVNULL)
                base = made[dtype] * weight_bytes / GB
                row = {
                    "way": way,
                    "processes": processes,
                    "base": round(base, 2),
                    "limit": round(base / processes + 4, 2),
                    **json.loads((folder / "measured.json").read_text()),
                }
                print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
