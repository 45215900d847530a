"""Identify the code that made a result: its commit, and a hash of the code that ran, committed or
not."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import mmdit

ROOT = Path(mmdit.__file__).resolve().parents[1]


def code_hash() -> str:
    """Return a hash of the source code of the package and of the tokenizer's network."""
    total = hashlib.sha256()
    files = [path for folder in ("mmdit", "VTP/vtp") for path in (ROOT / folder).rglob("*.py")]
    for path in sorted(files):
        total.update(f"{path.relative_to(ROOT)}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def commit() -> str | None:
    """Return the commit of this clone; None if there is no git, or if the code, a config or the
    recipe of a record has uncommitted changes."""

    def git(*words: str) -> str | None:
        try:
            command = ["git", "-C", str(ROOT), *words]
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git(
        *("status", "--porcelain", "--", "mmdit", "VTP/vtp", "configs"),
        ":(glob)records/**/*.yaml",
    )
    return git("rev-parse", "HEAD") if changes == "" else None
