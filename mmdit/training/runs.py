"""The folder of a run belongs to one training at a time: a lock, no links in it, and nothing that
a killed process has left."""

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
    """Hold a run folder, which is made, until the block ends; what a killed training has left in it
    is removed first. Every process of the training must call. ValueError: another training holds
    it, or there are links in it. A folder in which nothing came to be is removed at the end."""

    def take() -> None:
        stack.enter_context(held_folder(run_dir, REFUSAL.format(run_dir)))
        refuse_links(run_dir)
        tidy(run_dir)

    with contextlib.ExitStack() as stack:
        world.share(take)
        yield


def refuse_links(run_dir: Path) -> None:
    """Raise ValueError for a link in a run folder: what is written there would get elsewhere, where
    a folder that came from others may have pointed it."""
    for folder, folders, files in os.walk(run_dir):
        for name in (*folders, *files):
            refuse_link(Path(folder) / name)


def tidy(run_dir: Path) -> None:
    """Remove what killed processes left in a run folder; only for who holds its lock."""
    checkpoint.remove_partial(run_dir)
    checkpoint.remove_partial(run_dir / "best")
    samples = run_dir / "samples"
    clean(run_dir, run_dir / "failures", samples, *samples.glob("step_*"))


def discard(run_dir: Path) -> None:
    """Remove a run folder with all that is in it. ValueError: another process is training there."""
    if run_dir.exists():
        held = take_folder(run_dir, REFUSAL.format(run_dir))
        shutil.rmtree(run_dir, ignore_errors=True)
        held.close()
