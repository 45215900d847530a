"""Describe problems with a source, or with a file of a cache, as values.

`Unusable` is raised where a picture, a clip or a caption is read, and becomes a `Skip`: a record
that is left out. `Damaged` is raised where a file of a cache is read, and becomes a `Damage`: one
finding. Texts for people are made from these values at the end, and are never parsed again.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from mmdit.data.dataset.records import Record
from mmdit.files import write_atomically


# ── sources ───────────────────────────────────────────────────────────────────────────────────────
class Unusable(ValueError):
    """A source that cannot be used. Reports count by `problem`, a phrase that many sources share;
    `detail` adds the rest, with a remedy. `frame`: the file, if the source is a folder of
    frames."""

    def __init__(self, problem: str, detail: str = "", frame: str = ""):
        super().__init__(problem, detail, frame)  # all arguments, so that it can be pickled
        self.problem, self.detail, self.frame = problem, detail, frame

    @classmethod
    def of(cls, error: Exception, frame: str = "") -> Unusable:
        """Return the problem that any error in reading a source stands for."""
        if isinstance(error, cls):
            return cls(error.problem, error.detail, frame or error.frame)
        if isinstance(error, FileNotFoundError):
            return cls("file not found", frame=frame)
        if isinstance(error, ValueError):
            return cls(str(error), frame=frame)
        return cls(type(error).__name__, str(error), frame)

    def __str__(self) -> str:
        text = f"{self.problem}: {self.detail}" if self.detail else self.problem
        return f"{text} (frame {self.frame})" if self.frame else text


@dataclass(frozen=True)
class Skip:
    """One record that is left out: `reason` in words, and the `problem` by which reports count.
    `unreachable`: the file system failed, so nothing is known about the contents of the file."""

    id: str
    path: str  # "" where no file is to blame
    reason: str
    problem: str
    unreachable: bool = False

    @classmethod
    def of(cls, record: Record, error: Exception | str) -> Skip:
        """Return the skip of a record for an error, or for a phrase that states the reason."""
        unreachable = isinstance(error, OSError) and error.errno is not None
        cause = Unusable(error) if isinstance(error, str) else Unusable.of(error)
        return cls(record.id, record.path, str(cause), cause.problem, unreachable)

    @classmethod
    def from_json(cls, row: dict) -> Skip:
        """Read what `to_json` wrote; older versions wrote no `problem`."""
        reason = row["reason"]
        return cls(row["id"], row.get("path", ""), reason, row.get("problem", reason))

    def to_json(self) -> dict:
        """Return a line of `skipped.jsonl`."""
        row = asdict(self)
        del row["unreachable"]
        return row

    @property
    def place(self) -> str:
        """Return the absolute path of the source; "" if there is none, or if the reason names
        it."""
        if not self.path or self.path in self.reason:
            return ""
        return os.path.abspath(self.path)


def list_skipped(path: Path, skipped: Iterable[Skip]) -> None:
    """Write `skipped.jsonl`, one line for each skip. An older list is removed, because its records
    were tried again."""
    path.unlink(missing_ok=True)
    rows = [skip.to_json() for skip in skipped]
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows]
    if lines:
        write_atomically(path, "".join(lines))


def by_problem(skips: Iterable[Skip]) -> dict[str, list[Skip]]:
    """Return the skips by problem, the most frequent problem first."""
    groups: dict[str, list[Skip]] = defaultdict(list)
    for skip in skips:
        groups[skip.problem].append(skip)
    return dict(sorted(groups.items(), key=lambda pair: -len(pair[1])))


def skipped_lines(skips: Iterable[Skip]) -> list[str]:
    """Return a report line for each problem."""
    return [
        f"  skipped {len(same)}, for example: {same[0].reason} ({same[0].path})"
        for same in by_problem(skips).values()
    ]


# ── files of a cache ──────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Damage:
    """One finding about a file of a cache. `remedy`: a phrase that says what a person can do.
    `delete`: once the file is deleted, the caching command makes it anew."""

    file: str  # relative to the cache, or an index file and a line number
    problem: str
    remedy: str = ""
    delete: bool = False

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}" if self.remedy else self.problem


class Damaged(ValueError):
    """Raised for a file of a cache that cannot be used; `what` names the file in words."""

    def __init__(self, what: str, damage: Damage | None = None):
        super().__init__(what, damage)
        # DataLoader recreates the error of a worker from its text alone
        self.what, self.damage = what, damage or Damage("", "")

    def __str__(self) -> str:
        return f"{self.what} is damaged: {self.damage}" if self.damage.problem else self.what
