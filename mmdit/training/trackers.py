"""Figures and previews of a run in a tracker as well: TensorBoard, Weights & Biases or Trackio.
metrics.jsonl is written whatever becomes of it: an error in a tracker is told, and training goes on
without it."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from mmdit.config import ConfigError, Section
from mmdit.files import write_atomically
from mmdit.training.media import read_back

IDENTITY = "track.json"  # beside the run: under which id and name a tracker knows it
# With these Trackio would send a run to a server, although nobody asked for that here.
TRACKIO_SERVERS = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID")


@dataclass(frozen=True)
class TrackConfig(Section):
    """The section `track:`. The libraries come with the extra `track`; `metrics.jsonl` and previews
    are written into the run folder in any case."""

    # Where figures and previews go as well. `tensorboard` does without where it is not installed.
    type: Literal["none", "tensorboard", "wandb", "trackio"] = "tensorboard"
    # wandb, trackio: the project that lists the run.
    project: str = "mmdit"
    # wandb, trackio: the run's name there; null takes `experiment_name`.
    name: str | None = None
    # wandb: `offline` writes files into the folder `wandb` beside the run, which `wandb sync` sends
    # later; `online` sends all at once.
    mode: Literal["offline", "online"] = "offline"

    def __post_init__(self):
        if not self.project or self.name == "":
            raise ConfigError("project" if not self.project else "name", "is empty; write a word")
        if self.mode == "online" and self.type != "wandb":
            raise ConfigError(
                "mode",
                f"is online with {self.type}, which writes to this machine's disk alone; remove it,"
                " or set type to wandb",
            )


class Sink(Protocol):
    """What a library is given."""

    def figures(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of a report."""

    def preview(self, step: int, sheet: Path, clip: Path | None) -> None:
        """Take a sheet (PNG), and the clip that belongs to it."""

    def close(self, failed: bool) -> None:
        """Write what is left."""


class Tracker:
    """A sink whose errors end tracking and nothing else."""

    def __init__(self, sink: Sink, title: str):
        self.sink: Sink | None = sink
        self.title = title

    def figures(self, values: Mapping[str, Any]) -> None:
        """Send the numbers of a record of metrics on."""
        numbers = {
            name: value
            for name, value in values.items()
            if name != "step" and isinstance(value, int | float)
        }
        self._attempt(lambda sink: sink.figures(numbers, values["step"]))

    def preview(self, step: int, sheet: Path, clip: Path | None) -> None:
        """Send a preview on: its sheet, and the clip if there is one."""
        self._attempt(lambda sink: sink.preview(step, sheet, clip))

    def close(self, failed: bool) -> None:
        """End tracking; `failed`: the training ended by an error."""
        self._attempt(lambda sink: sink.close(failed))
        self.sink = None

    def _attempt(self, call: Callable[[Sink], None]) -> None:
        if self.sink is None:
            return
        try:
            call(self.sink)
        except Exception as error:  # whatever goes wrong there, hours of training go on
            self.sink = None
            print(
                f"{self.title} failed, and is left out from here on ({type(error).__name__}:"
                f" {error}); metrics.jsonl has everything",
                flush=True,
            )


class TensorBoard:
    """Event files in `<run>/tensorboard`; those of steps that are done again are purged."""

    def __init__(self, run_dir: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(run_dir / "tensorboard", purge_step=step + 1)

    def figures(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def preview(self, step: int, sheet: Path, clip: Path | None) -> None:
        """Show the sheet alone, which has strips of clips."""
        (pixels,) = read_back(sheet)
        self.board.add_image("samples", pixels, step)

    def close(self, failed: bool) -> None:
        self.board.close()


class LibraryRun:
    """Log to the run of a library that has Wandb's calls."""

    library: Any
    run: Any

    def figures(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def preview(self, step: int, sheet: Path, clip: Path | None) -> None:
        shown = {"samples": self.library.Image(str(sheet))}
        if clip is not None and clip.suffix == ".mp4":
            shown["clips"] = self.library.Video(str(clip), format="mp4")
        self.run.log(shown, step=step)


class Wandb(LibraryRun):
    """A run of Weights & Biases, which a resume continues under the same id."""

    def __init__(self, library: Any, track: TrackConfig, run_dir: Path, identity: Identity):
        self.library = library
        online = track.mode == "online"
        quiet = library.Settings(console="off", silent=True, save_code=False, disable_git=True)
        place = run_dir.parent  # it makes links, which a run folder may not hold
        self.run = library.init(
            project=track.project,
            name=identity.name,
            id=identity.id,
            resume="allow" if online else None,
            mode=track.mode,
            dir=str(place),
            config=identity.settings,
            settings=quiet,
        )
        if not online:
            print(f"wandb writes to {place / 'wandb'}; `wandb sync` sends it", flush=True)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Trackio(LibraryRun):
    """A run in Trackio's own folder on this machine (`TRACKIO_DIR`), which a resume continues."""

    def __init__(self, library: Any, track: TrackConfig, identity: Identity):
        self.library = library
        # It knows runs by their names: the id tells those of equal names apart.
        self.run = library.init(
            project=track.project,
            name=f"{identity.name}-{identity.id}",
            resume="allow",
            config=identity.settings,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def close(self, failed: bool) -> None:
        self.run.finish()


@dataclass(frozen=True)
class Identity:
    """Under which id and name a tracker knows a run, and the settings that it shows."""

    id: str
    name: str
    settings: dict[str, Any]

    @staticmethod
    def of(track: TrackConfig, run_dir: Path, step: int, settings: dict[str, Any]) -> Identity:
        """Return what is stored beside a run that continues at `step`; of a new run, or with
        another tracker, a new one, which is stored."""
        path = run_dir / IDENTITY
        if step > 0:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                stored = json.loads(path.read_text(encoding="utf-8"))
                if stored["type"] == track.type:
                    return Identity(str(stored["id"]), str(stored["name"]), settings)
        name = track.name or str(settings.get("experiment_name", run_dir.name))
        row = {"type": track.type, "id": secrets.token_hex(4), "name": name}
        write_atomically(path, json.dumps(row))
        return Identity(row["id"], name, settings)


@contextlib.contextmanager
def tracking(
    track: TrackConfig, run_dir: Path, step: int, settings: dict[str, Any], main: bool = True
) -> Iterator[Tracker | None]:
    """Open the configured tracker for a run that starts at `step`, in its `main` process alone, and
    close it when the block ends. `settings`: the whole config as plain data. ValueError: its
    library is missing, or refuses."""
    tracker = _opened(track, run_dir, step, settings) if main else None
    failed = True
    try:
        yield tracker
        failed = False
    finally:
        if tracker is not None:
            tracker.close(failed)


def _opened(
    track: TrackConfig, run_dir: Path, step: int, settings: dict[str, Any]
) -> Tracker | None:
    if track.type == "none":
        return None
    if track.type == "tensorboard":
        try:
            return Tracker(TensorBoard(run_dir, step), "TensorBoard")
        except (ImportError, RuntimeError, OSError):
            return None
    if track.mode == "offline":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        for name in TRACKIO_SERVERS:
            os.environ.pop(name, None)
    try:
        library = importlib.import_module(track.type)
    except ImportError as error:
        raise ValueError(
            f"track.type is {track.type}, which cannot be imported ({error}): install it with"
            f" pip install {track.type}, or set track.type to none"
        ) from None
    identity = Identity.of(track, run_dir, step, settings)
    try:
        if track.type == "wandb":
            return Tracker(Wandb(library, track, run_dir, identity), "wandb")
        return Tracker(Trackio(library, track, identity), "trackio")
    except Exception as error:  # errors of the library's own kinds
        raise ValueError(
            f"track.type is {track.type}, which cannot start ({type(error).__name__}: {error}); set"
            " track.mode to offline, or track.type to none"
        ) from error
