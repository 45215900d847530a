"""Report and record failures that are nobody's mistake: a full disk, a loss that is not finite, a
lost process."""

import contextlib
import json
import traceback
from pathlib import Path

from mmdit.files import refuse_link, write_atomically


class RunError(RuntimeError):
    """The message says what happened, what is safe on disk and how to go on; commands print it
    without a stack trace."""


class StepsSkipped(RunError):
    """Raised when too many steps had no finite loss or gradient, and the earlier weights are worth
    more than the current ones."""


def record_failure(
    run_dir: Path, what: str, step: int, rank: int, error: BaseException, **facts
) -> Path:
    """Write `failures/<what>_<step>_<rank>.json` with what is needed to repeat a step from the
    nearest checkpoint before it: a step is a function of (config, seed, step). `step` counts
    finished steps, as in checkpoints. A failed write is ignored, since the disk may be the
    cause."""
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
