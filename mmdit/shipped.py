"""Find what ships with the project: configurations, weights and lists of prompts.

In a source tree they lie at the top level (`configs/`, `assets/`, `VTP/`). In an installed wheel
they lie inside the package, under `mmdit/shipped_files/`, with the same relative paths.
"""

from __future__ import annotations

from pathlib import Path

from mmdit.files import expanded

_PACKAGE = Path(__file__).resolve().parent
ROOTS = (_PACKAGE.parent, _PACKAGE / "shipped_files")
SHIPPED = ("configs", "assets", "VTP", "LICENSE")


def shipped_path(name: str | Path) -> Path | None:
    """Return the absolute path of a shipped file or folder, or None if nothing of that name ships.

    `name` is relative to the top level of the repository: `configs/quickstart.yaml`.
    """
    relative = Path(name)
    if relative.is_absolute() or relative.parts[:1] not in [(name,) for name in SHIPPED]:
        return None
    candidates = (root / relative for root in ROOTS)
    return next((path for path in candidates if path.exists()), None)


def find(path: str | Path) -> Path:
    """Return `path` if it exists, else the shipped file of that name, else `path` as it is.

    So `configs/quickstart.yaml` means the same from any folder, and a user's file of that name
    comes first.
    """
    given = expanded(path)
    if given.exists():
        return given
    return shipped_path(path) or given
