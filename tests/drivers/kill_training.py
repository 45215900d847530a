"""Kill a training at random moments and at random file operations of its saving, and continue it
each time.

    python -m tests.drivers.kill_training \\
        --kills 50          (also: pytest -m slow tests/test_processes.py)

After every kill: each checkpoint that bears its name equals the undisturbed run's of that step,
byte for byte, and metrics.jsonl parses with strictly increasing steps. At the end: the final
checkpoint equals the undisturbed run's. Then SIGTERM, and a disk that is full while saving. Prints
one JSON object.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from mmdit.training import checkpoint
from tests.helpers.forked_runs import (
    CONFIG,
    arguments,
    die_at,
    fork,
    make,
    must,
    train,
    train_t2v,
    wait,
)

STEPS = CONFIG["train"]["max_steps"]


def metric_steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return (
        [json.loads(line)["step"] for line in path.read_text().splitlines()]
        if path.exists()
        else []
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def check(run: Path, whole: Path) -> None:
    """The facts that hold after any kill."""
    steps = metric_steps(run)
    assert steps == sorted(set(steps)), steps
    for folder in checkpoint.complete(run):
        assert contents(folder) == contents(whole / "checkpoints" / folder.name), folder
        assert checkpoint.Meta.from_json(
            (folder / "checkpoint.json").read_text(), ""
        ).step == checkpoint.step_of(folder)
    if checkpoint.complete(run):
        assert checkpoint.latest(run) == checkpoint.complete(run)[-1]


def kill_once(folder: Path, name: str, how: str, chance: random.Random, seconds: float) -> int:
    """Start or continue the run and kill it; returns the exit code (0: it finished first)."""
    run = folder / "runs" / name
    words = [f"experiment_name={name}", *(["--resume"] if checkpoint.complete(run) else [])]
    words += [
        f"data.in_memory={chance.choice(('true', 'false'))}"
    ]  # from disk: by a worker process, which must not outlive us
    words += [f"train.save_in_background={chance.choice(('true', 'false'))}"]
    if how == "operation":
        operation = chance.randrange(60)

        def work():
            die_at(operation, "step_", "metrics")
            return train_t2v.main(arguments(folder, *words))

        return wait(fork(work, folder / "log.txt"))
    (pid,) = train(folder, *words)
    if how == "moment":
        time.sleep(chance.uniform(0, seconds))
    else:  # soon after a checkpoint is begun
        before = time.monotonic()
        while (
            not list((run / "checkpoints").glob(".writing-*"))
            and time.monotonic() - before < 2 * seconds
        ):
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.01))
    os.kill(pid, signal.SIGKILL)  # if it has ended it waits for us as a zombie
    return wait(pid)


def kills(folder: Path, count: int, seed: int) -> dict:
    make(folder)
    begin = time.monotonic()
    must([wait(pid) for pid in train(folder, "experiment_name=whole", "train.keep_last=0")], folder)
    seconds = time.monotonic() - begin
    whole = folder / "runs" / "whole"
    chance, hows, rounds, attempts, at_steps = random.Random(seed), Counter(), 0, 0, set()

    def going_on() -> bool:
        """Return whether more kills are due: a few may all fall before the first step."""
        killed = sum(hows.values())
        return killed < count or (len(at_steps) < 2 and killed < 3 * count)

    while going_on():
        rounds += 1
        name, code = f"killed{rounds}", -9
        run = folder / "runs" / name
        while code and going_on():
            how = ("operation", "saving", "moment")[attempts % 3]
            code, attempts = kill_once(folder, name, how, chance, 0.6 * seconds), attempts + 1
            if code not in (0, -signal.SIGKILL):
                must([code], folder)
            hows[how] += code != 0
            at_steps.add(max(metric_steps(run), default=0))
            check(run, whole)
        if code:
            words = ["--resume"] if checkpoint.complete(run) else []
            must([wait(pid) for pid in train(folder, f"experiment_name={name}", *words)], folder)
        check(run, whole)
        assert metric_steps(run) == list(range(1, STEPS + 1))
        assert [checkpoint.step_of(path) for path in checkpoint.complete(run)] == [
            4,
            6,
            8,
            10,
            12,
        ]  # milestones 4, 8, 12; the last two
        shutil.rmtree(run)
    return {
        "kills": sum(hows.values()),
        "how": dict(hows),
        "runs": rounds,
        "distinct_last_steps": len(at_steps),
        "undisturbed_seconds": round(seconds, 2),
    }


def sigterm(folder: Path) -> dict:
    """A preempted run saves the step it is in, ends with 0, and continues to the undisturbed
    result."""
    run = folder / "runs" / "preempted"
    (pid,) = train(
        folder,
        "experiment_name=preempted",
        "train.save_every_steps=1000",
        "train.keep_every_steps=0",
    )
    while not metric_steps(run):
        time.sleep(0.002)
    begin = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    code, seconds = wait(pid), time.monotonic() - begin
    must([code], folder)
    stopped = checkpoint.step_of(checkpoint.latest(run))
    assert stopped < STEPS and metric_steps(run)[-1] == stopped, stopped
    must([wait(pid) for pid in train(folder, "experiment_name=preempted", "--resume")], folder)
    check(run, folder / "runs" / "whole")
    return {"stopped_at": stopped, "seconds": round(seconds, 3), "exit_code": code}


def full_disk(folder: Path) -> dict:
    """No file may grow beyond a limit, as when the disk is full: the error is told, earlier
    checkpoints stay, resume goes on."""
    run = folder / "runs" / "full"
    must(
        [
            wait(pid)
            for pid in train(
                folder, "experiment_name=full", "train.max_steps=4", "train.keep_last=0"
            )
        ],
        folder,
    )
    before = {path.name: contents(path) for path in checkpoint.complete(run)}
    largest = max(map(len, next(iter(before.values())).values()))
    results = {}
    for share in (0.5, 0.99):
        log = folder / f"full{share}.txt"

        def work(limit=int(largest * share)):
            words = arguments(
                folder,
                "experiment_name=full",
                "--resume",
                "train.keep_last=0",
                f"train.log_every_steps={STEPS}",
            )
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            return train_t2v.main(words)

        code = wait(fork(work, log))
        text = log.read_text()
        assert code == 2 and "error: " in text and "Traceback" not in text, (code, text)
        assert "could not save the checkpoint" in text and "continue with --resume" in text, text
        assert {path.name: contents(path) for path in checkpoint.complete(run)} == before
        results[str(share)] = text[text.index("error: ") :].strip().splitlines()[0]
    must(
        [
            wait(pid)
            for pid in train(folder, "experiment_name=full", "--resume", "train.keep_last=0")
        ],
        folder,
    )
    assert len(checkpoint.complete(run)) == STEPS // 2
    return {"exit_code": 2, "message": results["0.5"]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only_kills", action="store_true", help="no SIGTERM, no full disk")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "work"
        begin = time.monotonic()
        result = {"kills": kills(folder, args.kills, args.seed)}
        if not args.only_kills:
            result |= {"sigterm": sigterm(folder), "full_disk": full_disk(folder)}
        print(json.dumps(result | {"seconds": round(time.monotonic() - begin, 1)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
