"""Name and record what stops a run although nobody wrote anything wrong: a full disk, a loss that
is no number, a lost process."""

import contextlib
import json
import traceback
from pathlib import Path

from mmdit.files import refuse_link, write_atomically


class RunError(RuntimeError):
    """The message says what happened, what is safe on disk and how to go on; commands print it
    without a stack trace."""


class StepsSkipped(RunError):
    """Too many steps had no finite loss or gradient: what came before is worth more than what is
    now."""


def record_failure(
    run_dir: Path, what: str, step: int, rank: int, error: BaseException, **facts
) -> Path:
    """Write `failures/<what>_<step>_<rank>.json`: what is needed to repeat a step, which is a
    function of (config, seed, step), from the nearest checkpoint before it. `step` counts finished
    steps, as in checkpoints. Never raises: the disk may have failed."""
    path = run_dir / "failures" / f"{what}_{step:08d}_{rank}.json"
    row = {
        "kind": what,
        "step": step,
        "rank": rank,
        "config": str(run_dir / "config.yaml"),
        **facts,
        "error": str(error),
    }
    row["trace"] = "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError, ValueError):
        refuse_link(path.parent).mkdir(parents=True, exist_ok=True)
        write_atomically(
            path, json.dumps(row, indent=1, ensure_ascii=False).encode(errors="replace")
        )
    return path
