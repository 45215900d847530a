"""Record in a run folder the circumstances of every start of its training: versions, commit,
device, data."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import mmdit
from mmdit.files import naming, objects_in, read_text, refuse_link
from mmdit.training.distributed import World

STARTS = "starts.jsonl"


def record_start(run_dir: Path, world: World, step: int, data: str, command: str = "") -> None:
    """Add a line to starts.jsonl: when and at which step the training starts, and with what.
    `data`: the data that it will see, in words; `command`: the command line."""
    cuda = world.device.type == "cuda"
    row = {
        "time": time.time(),
        "step": step,
        "mmdit": mmdit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "device": torch.cuda.get_device_name(world.device) if cuda else "CPU",
        "processes": world.size,
        "torchrun": world.torchrun,
        "data": data,
        "command": command,
    }
    with naming(run_dir / STARTS), refuse_link(run_dir / STARTS).open("a+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        torn = file.read() not in (b"", b"\n")  # a full disk: do not append to such a line
        file.write(b"\n" * torn + json.dumps(row, ensure_ascii=False).encode() + b"\n")


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """Return the starts of a run, in order; an empty list for a run of an older version."""
    try:
        return list(objects_in(read_text(run_dir / STARTS, "replace")))
    except OSError:
        return []


def continues(run_dir: Path, world: World) -> bool:
    """Return whether torchrun restarted this training after one of its processes ended, so that it
    must continue by itself. That is so if one of its torchruns (each machine has one) also took
    part in the last start of this folder. The rendezvous id proves nothing: somebody else may have
    chosen the same."""
    starts = read_starts(run_dir)
    last = starts[-1].get("torchrun") if starts else None
    return isinstance(last, list) and not set(world.torchrun[1:]).isdisjoint(map(str, last[1:]))


@lru_cache
def commit() -> str | None:
    """Return the git commit of the clone that holds this package, followed by `+` if files differ
    from it; None if it is not in a clone."""
    root = Path(mmdit.__file__).resolve().parents[1]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed into a folder of another project
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
