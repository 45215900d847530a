"""Send figures and previews of a run to a tracker as well: TensorBoard, Weights & Biases or
Trackio. metrics.jsonl is written in any case, and training neither stops nor waits for a tracker,
which runs in a thread of its own; an error there is reported once."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import queue
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from mmdit.config import ConfigError, Section
from mmdit.files import read_text, write_atomically
from mmdit.privacy import without_secrets
from mmdit.training.media import read_back
from mmdit.training.run_folder import sheets_in

IDENTITY = "track.json"  # beside the run: its identity in a tracker, and the last steps sent
NOT_FIGURES = ("step", "timestamp")  # of a record; trackers note the time themselves
WAITING = 10_000  # calls that may wait for a tracker; with more, it counts as hanging
START_SECONDS, CLOSE_SECONDS = 30, 60  # time limits for a network at the start and at the end
# Set in the environment, these would make Trackio send a run to a server unasked.
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
    """Passes figures and previews to a library. `has`: the last step of this run that the library
    has stored; None if it does not tell."""

    has: int | None

    def figures(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of a report."""

    def preview(self, step: int, sheet: Path, clip: Path | None) -> None:
        """Take a sheet (PNG), and the clip that belongs to it."""

    def close(self, failed: bool) -> None:
        """Write what is left."""


@dataclass
class Identity:
    """The id and name by which a tracker knows a run, and the last steps whose figures and preview
    were sent. It is stored beside the run, unless `path` is None."""

    type: str
    id: str
    name: str
    figures: int = -1
    preview: int = -1
    path: Path | None = None

    @staticmethod
    def of(track: TrackConfig, run_dir: Path, step: int, name: str) -> Identity:
        """Return the stored identity of a run that continues at `step`. For a new run, or with
        another tracker, make a new one and store it."""
        path = run_dir / IDENTITY
        if step > 0:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                row = json.loads(read_text(path))
                if row["type"] == track.type:
                    identity = Identity(track.type, str(row["id"]), str(row["name"]), path=path)
                    # an older version stored no steps; it had sent all up to the step at which it
                    # stopped
                    identity.figures = int(row.get("figures", step))
                    identity.preview = int(row.get("preview", step))
                    return identity
        identity = Identity(track.type, secrets.token_hex(4), name, path=path)
        identity.store()
        return identity

    def store(self) -> None:
        """Write the identity beside the run."""
        if self.path:
            row = {key: value for key, value in vars(self).items() if key != "path"}
            write_atomically(self.path, json.dumps(row))


class Tracker:
    """Passes figures and previews to a sink, each step once, although a resumed run repeats some
    steps. A thread opens the sink and calls it. A failure, a hang or a wait for the network there
    ends tracking and nothing else."""

    def __init__(self, opened: Callable[[], Sink], title: str, progress: Identity, run_dir: Path):
        self.title, self.progress = title, progress
        self._opened, self._run_dir = opened, run_dir
        self._ended = False
        self._calls: queue.Queue[Callable[[Sink], None] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    def history(self, lines: Sequence[str]) -> None:
        """Send what the tracker lacks of `lines`, the records up to where the run continues, and of
        their previews: a killed process may have lost some."""
        self._ask(lambda sink: self._send_all(sink, lines))

    def figures(self, values: Mapping[str, Any]) -> None:
        """Send the numbers of a record of metrics."""
        record = dict(values)
        self._ask(lambda sink: self._send(sink, record))

    def preview(self, step: int, sheet: Path, clip: Path | None) -> None:
        """Send a preview: its sheet, and the clip if there is one."""
        self._ask(lambda sink: self._show(sink, step, sheet, clip))

    def close(self, failed: bool) -> None:
        """End tracking. `failed`: the training ended with an error. Calls that still wait have
        CLOSE_SECONDS to finish."""
        self._ask(lambda sink: sink.close(failed))
        with contextlib.suppress(queue.Full):
            self._calls.put_nowait(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive() and not self._ended:
            self._end(f"it is not done {CLOSE_SECONDS} seconds after the training")
        self._ended = True

    def _send_all(self, sink: Sink, lines: Sequence[str]) -> None:
        records = [json.loads(line) for line in lines]
        shown = deque(sheets_in(self._run_dir))
        for record in records:  # libraries take steps in ascending order
            while shown and shown[0][0] < record["step"]:
                self._show(sink, *shown.popleft())
            self._send(sink, record)
        while shown and shown[0][0] <= records[-1]["step"]:
            self._show(sink, *shown.popleft())

    def _show(self, sink: Sink, step: int, sheet: Path, clip: Path | None) -> None:
        if step > self.progress.preview:
            sink.preview(step, sheet, clip)
            self.progress.preview = step
            self.progress.store()

    def _send(self, sink: Sink, record: Mapping[str, Any]) -> None:
        step = record["step"]
        if step <= self.progress.figures:
            return
        numbers = {
            name: value
            for name, value in record.items()
            if name not in NOT_FIGURES and isinstance(value, int | float)
        }
        sink.figures(numbers, step)
        self.progress.figures = step
        self.progress.store()

    def _ask(self, call: Callable[[Sink], None]) -> None:
        if self._ended:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._end(f"{WAITING} calls wait for it")

    def _work(self) -> None:
        try:
            sink = self._opened()
            if sink.has is not None:
                self.progress.figures = sink.has
                self.progress.preview = min(self.progress.preview, sink.has)
            while (call := self._calls.get()) is not None:
                call(sink)
        except Exception as error:  # whatever goes wrong there must not stop hours of training
            if not self._ended:
                self._end(in_words(error))

    def _end(self, why: str) -> None:
        self._ended = True
        print(
            f"{self.title} failed, and is left out from here on ({why}); metrics.jsonl has"
            " everything",
            flush=True,
        )


def in_words(error: Exception) -> str:
    """Return the type and text of an error, without secrets."""
    return without_secrets(f"{type(error).__name__}: {error}")


class TensorBoard:
    """Writes event files in a folder; events after `step`, of steps that will be repeated, are
    purged."""

    has: int | None = None

    def __init__(self, writer: Any, folder: Path, step: int):
        self.board = writer(folder, purge_step=step + 1)

    def figures(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()  # a process that is killed keeps what it reported

    def preview(self, step: int, sheet: Path, clip: Path | None) -> None:
        """Show only the sheet, which has strips of the clips."""
        (pixels,) = read_back(sheet)
        self.board.add_image("samples", pixels, step)
        self.board.flush()

    def close(self, failed: bool) -> None:
        self.board.close()


class LibraryRun:
    """Log to the run of a library that has Wandb's calls."""

    library: Any
    run: Any
    has: int | None = None

    def figures(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def preview(self, step: int, sheet: Path, clip: Path | None) -> None:
        shown = {"samples": self.library.Image(str(sheet))}
        if clip is not None and clip.suffix == ".mp4":
            shown["clips"] = self.library.Video(str(clip), format="mp4")
        self.run.log(shown, step=step)


class Wandb(LibraryRun):
    """A run of Weights & Biases, which a resume continues under the same id. `config`: the settings
    shown with it."""

    def __init__(
        self, library: Any, track: TrackConfig, place: Path, identity: Identity, config: dict
    ):
        self.library = library
        online = track.mode == "online"
        quiet = library.Settings(
            console="off",
            silent=True,
            save_code=False,
            disable_git=True,
            init_timeout=START_SECONDS,
            finish_timeout=CLOSE_SECONDS - 10,
        )
        self.run = library.init(
            project=track.project,
            name=identity.name,
            id=identity.id,
            resume="allow" if online else None,
            mode=track.mode,
            dir=str(place),
            config=config,
            settings=quiet,
        )
        if not online:
            print(f"wandb writes to {place / 'wandb'}; `wandb sync` sends it", flush=True)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Trackio(LibraryRun):
    """A run in Trackio's own folder on this machine (`TRACKIO_DIR`), which a resume continues."""

    def __init__(self, library: Any, track: TrackConfig, identity: Identity, config: dict):
        self.library = library
        # Trackio identifies runs by name; the id tells runs of equal names apart.
        self.run = library.init(
            project=track.project,
            name=f"{identity.name}-{identity.id}",
            resume="allow",
            config=config,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        following = getattr(self.run, "_next_step", None)
        if isinstance(following, int):
            self.has = following - 1

    def close(self, failed: bool) -> None:
        self.run.finish()


def require_library(track: TrackConfig) -> None:
    """Raise ValueError if the library that was asked for is not installed."""
    if track.type in ("wandb", "trackio") and importlib.util.find_spec(track.type) is None:
        raise ValueError(
            f"track.type is {track.type}, which is not installed: install it with pip install"
            f" {track.type}, or set track.type to none"
        )


@contextlib.contextmanager
def tracking(
    track: TrackConfig, run_dir: Path, step: int, settings: dict[str, Any], main: bool = True
) -> Iterator[Tracker | None]:
    """Open the configured tracker for a run that starts at `step`, in the `main` process alone, and
    close it when the block ends. `settings`: the whole config as plain data."""
    tracker = None
    if main and track.type == "tensorboard":
        tracker = _board(run_dir, step)
    elif main and track.type != "none":
        tracker = _library_run(track, run_dir, step, settings)
    failed = True
    try:
        yield tracker
        failed = False
    finally:
        if tracker is not None:
            tracker.close(failed)


def _board(run_dir: Path, step: int) -> Tracker | None:
    """Return a tracker that writes for TensorBoard; None if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except (ImportError, RuntimeError, OSError):
        return None
    folder = run_dir / "tensorboard"
    last = step if folder.is_dir() else -1
    identity = Identity("tensorboard", "", "", last, last)
    return Tracker(
        lambda: TensorBoard(SummaryWriter, folder, step), "TensorBoard", identity, run_dir
    )


def _library_run(
    track: TrackConfig, run_dir: Path, step: int, settings: dict[str, Any]
) -> Tracker | None:
    """Return a tracker that calls wandb or trackio; None if the library cannot be imported, which
    is printed."""
    require_library(track)
    if track.mode == "offline":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        for name in TRACKIO_SERVERS:
            os.environ.pop(name, None)
    try:
        library = importlib.import_module(track.type)
        name = track.name or str(settings.get("experiment_name", run_dir.name))
        identity = Identity.of(track, run_dir, step, name)
    except Exception as error:  # errors of the library's own kinds
        print(f"{track.type} is left out ({in_words(error)}); metrics.jsonl has all", flush=True)
        return None

    def opened() -> Sink:
        if track.type == "trackio":
            return Trackio(library, track, identity, settings)
        place = run_dir.parent  # it makes links, which are refused in a run folder
        try:
            return Wandb(library, track, place, identity, settings)
        except Exception as error:
            if track.mode == "offline":
                raise
            print(f"wandb cannot send this run ({in_words(error)})", flush=True)
            library.teardown()  # otherwise it takes the id for one in use
            return Wandb(library, replace(track, mode="offline"), place, identity, settings)

    return Tracker(opened, track.type, identity, run_dir)
