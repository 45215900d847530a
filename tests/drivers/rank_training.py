"""The same training on 1, 2 and 4 processes, copied (DDP), sharded (FSDP2) and in pairs that share
each clip, continued from 2 to 4 to 1 and from one kind to the other, and with a process preempted,
dying or hanging.

    python -m tests.drivers.rank_training          (also: pytest tests/test_processes.py)

Gloo on a CPU. Without dropout, whose masks belong to a process; all else of `forked_runs.CONFIG` is
on. Prints one JSON object: the largest difference of any weight from one process, and what is said
of a lost process after how many seconds.
"""

import argparse
import json
import os
import signal
import tempfile
import time
from pathlib import Path

import torch.distributed.checkpoint  # else every child that shards would import these
import torch.distributed.fsdp  # noqa: F401

from mmdit.training import checkpoint
from mmdit.training.trainer import Trainer
from tests.helpers.forked_runs import arguments, make, must, start_ranks, train, train_t2v, wait

# A constant rate: `max_steps` may grow on resume. And a usual one: AdamW moves a weight by the rate
# however small its gradient, so where that is rounding alone (behind modulation that starts at
# zero) weights differ by some thousandths of the rate.
# Moves stop every second step, and a run is validated where it stops.
SAME = ["model.dropout=0", "lora.dropout=0", "train.lr_schedule=constant", "train.lr=3e-4"]
SAME += ["train.val_every_steps=2"]
SPLITS = {
    1: ["train.batch_size=4", "train.grad_accum_steps=2"],
    2: ["train.batch_size=2", "train.grad_accum_steps=2"],
    4: ["train.batch_size=2", "train.grad_accum_steps=1"],
}
STEPS = 6
FSDP = "parallel.type=fsdp"
PAIRS = "parallel.shard_over=2"
CLIPS = "parallel.context_parallel=2"  # each process of a pair has one of the two frames
MOVES = {
    "moving": [(2,), (4,), (1,)],
    "sharded": [(2, FSDP), (4, FSDP), (1,)],
    "mixed": [(4, FSDP), (2,), (2, FSDP)],
    "pairs": [(4, FSDP, PAIRS), (2, FSDP), (4, FSDP, PAIRS)],
    "clips": [(2, CLIPS), (4, CLIPS), (1,)],
    "sharded_clips": [(4, FSDP, CLIPS), (2, FSDP, CLIPS), (4, FSDP, CLIPS, PAIRS)],
}
QUICK = {"sharded": [(2, FSDP), (2, CLIPS), (1,)]}


def run(folder: Path, name: str, world: int, *words: str) -> None:
    split = SPLITS[world // 2 if CLIPS in words else world]
    words = [f"experiment_name={name}", *SAME, f"train.max_steps={STEPS}", *split, *words]
    must([wait(pid) for pid in train(folder, *words, world=world)], folder)


def difference(folder: Path, name: str, other: str) -> float:
    """The largest of any weight, EMA value or moment."""
    largest = 0.0
    for kind in ("model", "ema", "optimizer"):
        folders = (checkpoint.folder_of(folder / "runs" / run, STEPS) for run in (name, other))
        a, b = (checkpoint.read_tensors(path / f"{kind}.safetensors") for path in folders)
        assert a.keys() == b.keys()
        largest = max([largest, *(float((a[key] - b[key]).abs().max()) for key in a)])
    return largest


def worlds(folder: Path, quick: bool) -> dict:
    """Return the largest difference of each run from that of one process, and that of any loss."""
    sizes, moves = ((2,), QUICK) if quick else ((2, 4), MOVES)
    names = ("world",) if quick else ("world", "sharded")
    run(folder, "one", 1)
    if not quick:  # quick: a fact of tests/test_trainer.py
        run(folder, "one_batch", 1, "train.batch_size=8", "train.grad_accum_steps=1")
    for world in sizes:
        run(folder, f"world{world}", world)
        if not quick:  # there the move begins with shards
            run(folder, f"sharded{world}", world, FSDP)
    for name, stages in moves.items():
        for number, (world, *words) in enumerate(stages, 1):
            run(
                folder,
                name,
                world,
                f"train.max_steps={2 * number}",
                *words,
                *["--resume"] * (number > 1),
            )
    others = [f"{name}{world}" for world in sizes for name in names] + [*moves]
    batches = () if quick else ("one_batch",)
    told = {
        name: [
            json.loads(line)
            for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("one", *others)
    }
    assert all(
        [record["step"] for record in records] == list(range(1, STEPS + 1))
        for records in told.values()
    )
    kinds = {key for record in told["one"] for key in record if "loss" in key}
    assert {"loss_ema_10", "val_loss_ema", "val_loss_q9"} <= kinds, kinds
    pairs = [pair for records in told.values() for pair in zip(told["one"], records, strict=True)]
    spread = max(abs((a.get(key) or 0) - (b.get(key) or 0)) for a, b in pairs for key in kinds)
    return {name: difference(folder, "one", name) for name in (*batches, *others)} | {
        "loss": spread
    }


def lost(folder: Path, name: str, blow: int, minutes: float) -> dict:
    """Rank 1 gets a signal after its first steps; what rank 0 says, and after how long."""
    words = [
        f"experiment_name={name}",
        *SPLITS[2],
        "train.max_steps=100000",
        f"train.timeout_minutes={minutes}",
    ]
    words += ["train.save_every_steps=100000", "train.keep_every_steps=0"]

    def work() -> int:
        step = Trainer.optimizer_step  # with a rest before each: they are to be there, no more
        Trainer.optimizer_step = lambda *given: time.sleep(0.05) or step(*given)
        return train_t2v.main(arguments(folder, *words))

    first, second = start_ranks(work, folder, 2)
    metrics = folder / "runs" / name / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        time.sleep(0.01)
    time.sleep(1.2)  # the ranks tell each other about once a second
    begin = time.monotonic()
    os.kill(second, blow)
    code, seconds = wait(first), time.monotonic() - begin
    if blow == signal.SIGSTOP:
        os.kill(second, signal.SIGKILL)
    wait(second)
    text = (folder / "log0.txt").read_text()
    message = text[text.rindex("error: ") :].splitlines()[:3]
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert code == 2 and f"step {last + 1}" in message[0], (code, message, last)
    assert message[1].startswith("  rank 1: last heard of "), message
    return {"seconds": round(seconds, 1), "message": "\n".join(message)}


def preempted(folder: Path) -> dict:
    """SIGTERM to one of two ranks: both finish the step, one saves, both end with 0; the run goes
    on to the same end."""
    words = ["experiment_name=preempted", *SAME, "train.max_steps=1000", *SPLITS[2]]
    pids = train(folder, *words, "train.save_every_steps=1000", "train.keep_every_steps=0", world=2)
    metrics = folder / "runs" / "preempted" / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        time.sleep(0.002)
    os.kill(pids[1], signal.SIGTERM)
    must([wait(pid) for pid in pids], folder)
    stopped = checkpoint.step_of(checkpoint.latest(folder / "runs" / "preempted"))
    if stopped >= STEPS:  # a busy machine was slow to signal
        return {"stopped_at": stopped, "difference": 0.0}
    run(folder, "preempted", 2, "--resume")
    return {"stopped_at": stopped, "difference": difference(folder, "world2", "preempted")}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="1 and 2 processes, and one move")
    parser.add_argument("--only_lost", action="store_true", help="a process that hangs or dies")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "work"
        make(folder)
        result = {
            "hangs": lost(folder, "hangs", signal.SIGSTOP, 0.06),
            "dies": lost(folder, "dies", signal.SIGKILL, 30.0),
        }
        if not args.only_lost:
            result |= {"worlds": worlds(folder, args.quick), "preempted": preempted(folder)}
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
