"""Kill the caching command at random moments and at random file operations, and give the same
command again each time.

    python -m tests.drivers.kill_caching \\
        --kills 30          (also: pytest -m slow tests/test_processes.py)

After every kill each item that bears its name equals the undisturbed run's, byte for byte; each
cache that gets finished (30 pictures, some damaged, in two buckets with two crops, decoded by
worker processes and written by helping ones; with --generated 30 moving shapes, likewise) is the
undisturbed one, file for file. At least one goes through a third of the kills. Prints one JSON
object.
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from mmdit.data.dataset import workers
from mmdit.data.moving_shapes import latents
from mmdit.scripts import cache_moving_shapes, cache_vtp_images
from tests.helpers.forked_runs import die_at, fork, must, wait

CONFIG = {
    "experiment_name": "killed",
    "num_workers": 4,  # of which one helps to write
    "tokenizer": {"type": "dummy", "latent_d": 4},
    "bucketing": {"enabled": True, "buckets": [[64, 64], [96, 48]]},
    "preprocess": {"crop": "shifted", "num_crops": 2, "seed": 1},
}
PICTURES = 30


def make(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(CONFIG))  # JSON is YAML
    rows, draws = [], np.random.default_rng(0)
    for i in range(PICTURES):
        size = (70 + 3 * i, 64, 3) if i % 2 else (50, 90 + i, 3)
        Image.fromarray(draws.integers(0, 255, size, np.uint8)).save(folder / f"{i}.png")
        rows.append(
            {"id": f"picture{i}", "image_path": f"{i}.png", "caption": f"number {i}", "part": i % 3}
        )
    for i in (3, 17):
        (folder / f"{i}.png").write_bytes((folder / f"{i}.png").read_bytes()[:500])
    (folder / "train_images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def start(folder: Path, out: Path, generated: bool, operation: int | None = None) -> int:
    """Start the caching command in a process of its own; return its id."""
    words = ["--config", str(folder / "config.yaml"), "--out_dir", str(out), "--device", "cpu"]
    workers.ITEMS_PER_HELPER, latents.DRAWN = PICTURES // 2, 4
    if generated:
        command, words = cache_moving_shapes.main, [*words, "--count", str(PICTURES)]
    else:
        command = cache_vtp_images.main
        words += ["--meta_jsonl", str(folder), "--batch_size", "4"]

    def work() -> int:
        if operation is not None:
            die_at(operation, out.name)
        return command(words)

    return fork(work, folder / "log.txt")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def kills(folder: Path, count: int, chance: random.Random, generated: bool) -> dict:
    make(folder)
    begin = time.monotonic()
    must([wait(start(folder, folder / "whole", generated))], folder)
    seconds, whole = time.monotonic() - begin, contents(folder / "whole")
    items = {name for name in whole if name.endswith(".pt")}
    hows, moments, finished, attempts, caches, out = Counter(), set(), 0, 0, 0, folder / "killed0"
    since = 0  # kills of this cache
    while sum(hows.values()) < count or out.exists():
        how = (
            ("operation", "moment")[attempts % 2]
            if sum(hows.values()) < count and since < max(2, count // 3)
            else "nothing"
        )
        attempts += 1
        operation = chance.randrange(60) if how == "operation" else None
        pid = start(folder, out, generated, operation)
        if how == "moment":
            time.sleep(chance.uniform(0, 0.8 * seconds))
            os.kill(pid, signal.SIGKILL)  # if it has ended it waits for us as a zombie
        code = wait(pid)
        if code:
            time.sleep(0.1)  # the processes that helped it end a moment later
        if code not in (0, -signal.SIGKILL):
            must([code], folder)
        found = contents(out) if out.exists() else {}
        torn = [name for name in found.keys() & items if found[name] != whole[name]]
        assert not torn, torn
        if code:
            hows[how], since = hows[how] + 1, since + 1
            moments.add(len(found.keys() & items))
            continue
        assert found == whole, (
            found.keys() ^ whole.keys(),
            [name for name in found if found[name] != whole.get(name)],
        )
        shutil.rmtree(out)
        finished, caches, since = finished + 1, caches + 1, 0
        out = folder / f"killed{caches}"
    return {
        "kills": sum(hows.values()),
        "how": dict(hows),
        "finished": finished,
        "items": len(items),
        "files": len(whole),
        "distinct_moments": len(moments),
        "undisturbed_seconds": round(seconds, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generated", action="store_true", help="cache moving shapes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        begin = time.monotonic()
        result = kills(Path(name) / "work", args.kills, random.Random(args.seed), args.generated)
        print(json.dumps(result | {"seconds": round(time.monotonic() - begin, 1)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
