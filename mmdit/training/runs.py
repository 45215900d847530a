"""Make sure that a run folder belongs to one training at a time, holds no links, and nothing that a
killed process has left."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mmdit.files import clean, held_folder, refuse_link, take_folder
from mmdit.training import checkpoint
from mmdit.training.distributed import World

REFUSAL = (
    "another process is training in {}: wait until it has ended, or choose another folder"
    " (experiment_name, output_dir)"
)


@contextlib.contextmanager
def hold(run_dir: Path, world: World = checkpoint.ALONE) -> Iterator[None]:
    """Create and hold a run folder until the block ends; what a killed training has left in it is
    removed first. Every process of the training must call. A folder that stays empty is removed at
    the end. ValueError if another training holds the folder, or if there are links in it."""

    def take() -> None:
        stack.enter_context(held_folder(run_dir, REFUSAL.format(run_dir)))
        refuse_links(run_dir)
        tidy(run_dir)

    with contextlib.ExitStack() as stack:
        world.share(take)
        yield


def refuse_links(run_dir: Path) -> None:
    """Raise ValueError for a link in a run folder. In a folder that came from others, a link could
    redirect what is written there."""
    for folder, folders, files in os.walk(run_dir):
        for name in (*folders, *files):
            refuse_link(Path(folder) / name)


def tidy(run_dir: Path) -> None:
    """Remove what killed processes left in a run folder. Only the holder of its lock may call
    this."""
    checkpoint.remove_partial(run_dir)
    checkpoint.remove_partial(run_dir / "best")
    samples = run_dir / "samples"
    clean(run_dir, run_dir / "failures", samples, *samples.glob("step_*"))


def discard(run_dir: Path) -> None:
    """Remove a run folder with everything in it. ValueError if another process is training
    there."""
    if run_dir.exists():
        held = take_folder(run_dir, REFUSAL.format(run_dir))
        shutil.rmtree(run_dir, ignore_errors=True)
        held.close()
