"""Real `train_t2v` runs in forked processes, so that a driver that has paid for its imports can
start and kill dozens of them.

The run has everything on whose state a resume could lose: AdamW, EMA, dropout, TREAD, caption
dropout, buckets of two grids, clips and single frames, gradient accumulation, adapters with
dropout, and a trained text encoder; 17 clips and batches of 4 make most stops fall inside an epoch.
Used by drivers only: nothing may compute in their process, for threads do not survive a fork.
"""

import contextlib
import gc
import json
import os
import signal
import socket
import sys
from pathlib import Path

import torch
import torch._dynamo  # else every child would import it with its optimizer

from mmdit.config import decode
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.writer import CacheWriter
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.scripts import train_t2v
from mmdit.tokenizers import build_tokenizer

with contextlib.suppress(ImportError):
    import torch.utils.tensorboard  # noqa: F401 else every child would import it with its metrics

gc.freeze()  # a child's first collection would walk, and so copy, all that was imported

CONFIG = {
    "experiment_name": "run",
    "seed": 3,
    "num_workers": 1,
    "video": {
        "width": 64,
        "height": 32,
        "num_frames": 2,
        "frame_stride": 2,
        "image_fraction": 0.25,
    },
    "bucketing": {"enabled": True, "buckets": [[64, 32], [32, 96]]},
    "tokenizer": {"type": "dummy", "latent_d": 4},
    "text_encoder": {"type": "byte_level", "dim": 16, "depth": 1, "num_heads": 2},
    "model": {"dim": 16, "depth": 3, "num_heads": 2, "window_size": 2, "dropout": 0.1},
    "train": {
        "precision": "fp32",
        "batch_size": 2,
        "grad_accum_steps": 2,
        "lr": 3e-3,
        "lr_schedule": "cosine",
        "warmup_steps": 3,
        "max_steps": 12,
        "log_every_steps": 1,
        "save_every_steps": 2,
        "keep_last": 2,
        "keep_every_steps": 4,
        "cfg_dropout_prob": 0.3,
        "val_every_steps": 6,
        "val_share": 0.2,
        "val_samples": 1,
    },
    "ema": {"decay": 0.9},
    "tread": {"enabled": True, "apply_to": [1, 2]},
    "lora": {"enabled": True, "rank": 2, "dropout": 0.1, "train_lora_only": False},
}
CAPTIONS = ["a red ball", "", "two blue boxes to the left", "ein grüner Würfel"]


def make(folder: Path) -> None:
    """`folder/config.yaml` and `folder/cache`."""
    folder.mkdir(parents=True)
    raw = CONFIG | {"output_dir": str(folder / "runs")}
    (folder / "config.yaml").write_text(json.dumps(raw))  # JSON is YAML
    config = decode(ExperimentConfig, raw)
    manifest = CacheManifest.of(
        build_tokenizer(config.tokenizer), config.video, config.bucketing, config.preprocess
    )
    generator = torch.Generator().manual_seed(1)
    with CacheWriter(folder / "cache", manifest) as writer:
        for i in range(17):
            grid = (2, 4) if i % 3 else (6, 2)
            writer.add(
                f"clip{i}", torch.randn(3 + i % 2, *grid, 4, generator=generator), CAPTIONS[i % 4]
            )


def arguments(folder: Path, *words: str) -> list[str]:
    return [
        "--config",
        str(folder / "config.yaml"),
        "--train_cache_dir",
        str(folder / "cache"),
        "--device",
        "cpu",
        *words,
    ]


def fork(work, log: Path, **environment: str) -> int:
    """Start `work()` in a child that ends with its exit code; returns the process id. It has one
    thread: several ranks would wait for one another's for minutes, and sums of two threads have
    other last bits than those of one.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(environment)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        torch.set_num_threads(1)
        code = work() or 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir")


def die_at(operation: int, *names: str) -> None:
    """Installed in a child: SIGKILL it just before its n-th file operation on a path that holds one
    of `names`, or that of a process it has forked."""
    left, child = operation, os.getpid()

    def hook(event: str, details: tuple) -> None:
        nonlocal left
        if (
            event in FILE_EVENTS
            and isinstance(details[0], (str, Path))
            and any(name in str(details[0]) for name in names)
        ):
            left -= 1
            if left < 0:
                os.kill(child, signal.SIGKILL)

    sys.addaudithook(hook)


def wait(pid: int) -> int:
    """The exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train(folder: Path, *words: str, world: int = 1) -> list[int]:
    """Process ids of `world` ranks running `train_t2v` as torchrun would start them."""

    def work() -> int:
        return train_t2v.main(arguments(folder, *words))

    if world == 1:
        return [fork(work, folder / "log.txt")]
    return start_ranks(work, folder, world)


def start_ranks(work, folder: Path, world: int) -> list[int]:
    """Start `work()` in `world` processes as torchrun would start them; return their ids."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return [fork(work, folder / f"log{r['RANK']}.txt", **r) for r in ranks]


def must(codes: list[int], folder: Path) -> None:
    if any(codes):
        logs = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("log*.txt")))
        raise SystemExit(f"exit codes {codes}\n{logs}")
