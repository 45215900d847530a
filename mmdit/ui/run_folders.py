"""Find the runs in a folder, how two of them differ, and which files are locked."""

from __future__ import annotations

from pathlib import Path

from mmdit.config import differences
from mmdit.training.run_folder import RunFolder, is_run, modified

LOCKS = Path("/proc/locks")


def find_runs(runs: Path) -> list[RunFolder]:
    """Return the runs in a folder and its subfolders, the newest first."""
    listed = []
    for pattern in ("*", "*/*"):
        for folder in runs.glob(pattern):
            name = folder.relative_to(runs).as_posix()
            if any(part.startswith(".") for part in Path(name).parts) or not is_run(folder):
                continue
            try:
                listed.append(RunFolder(runs, name))
            except ValueError:
                continue  # a link that leads outside
    return sorted(listed, key=lambda run: -modified(run.folder / "metrics.jsonl"))


def config_difference(old: RunFolder, new: RunFolder) -> list[str]:
    """Return `key: old → new` for each key in which the configs of two runs differ."""
    return differences(old.config(), new.config())


def held_locks() -> set[int] | None:
    """Return the inodes of the files that processes have locked; None if the system does not tell.
    No lock is touched: a training that is just starting must get its own."""
    try:
        lines = LOCKS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    rows = [line.split() for line in lines]
    return {int(row[5].rpartition(":")[2]) for row in rows if len(row) > 5 and row[1] == "FLOCK"}
