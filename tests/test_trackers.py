"""Trackers: what they are told, that a resume goes on in the same run, that nothing leaves this
machine unasked, and that they never end a training.

wandb and trackio are stood in for by modules that write down what they are told; the real ones are
asked in the slow tests, where they are installed (extra `track`)."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from mmdit.config import ConfigError
from mmdit.scripts import train_t2v
from mmdit.training.trackers import TrackConfig
from tests.helpers.thorough import thorough
from tests.helpers.tiny import Workshop, refused

ROOT = Path(__file__).resolve().parents[1]
PREVIEWS = ("train.sample_every_steps=2", "train.sample_num_images=2")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("trackers"))


@pytest.fixture(params=[*thorough("wandb"), "trackio"])
def library(request, monkeypatch):
    """A stand-in for the library; `library.runs`: of each run how it began, what it was told by
    step, and how it ended."""
    module = ModuleType(request.param)
    module.__spec__ = ModuleSpec(request.param, None)
    module.runs, module.teardown = [], lambda: None

    def init(**how):
        told = {}

        def log(values, step):
            told.setdefault(step, {}).update(values)

        def finish(**end):
            run.ended = end

        run = SimpleNamespace(how=how, told=told, log=log, finish=finish, ended=None)
        module.runs.append(run)
        return run

    module.init, module.Settings = init, dict
    module.Image = lambda path: Path(path).is_file() and path
    module.Video = lambda path, format: (Path(path).is_file() and path, format)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def test_a_tracker_is_told_all_and_a_resume_goes_on_in_the_same_run(shop, library, monkeypatch):
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.setenv(name, "elsewhere")
    name = library.__name__
    words = (f"track.type={name}", "track.project=shapes", *PREVIEWS)
    folder = shop.train(f"of_{name}", *words)
    shop.train(f"of_{name}", *words, "--resume", "train.max_steps=4", "track.name=other")
    first, second = library.runs
    told = first.told | second.told
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert told[record["step"]].items() >= {"loss": record["loss"], "lr": 1e-2}.items()
        assert "step" not in told[record["step"]] and "run_id" not in told[record["step"]]
    assert first.told.keys() == {1, 2, 3} and second.told.keys() == {4}
    assert [step for step, values in told.items() if "samples" in values] == [2, 3, 4]
    assert told[4]["samples"] == str(folder / "samples/step_00000004/grid.png")
    assert first.how["project"] == "shapes" and first.how["config"]["train"]["lr"] == 1e-2
    assert first.how["name"] == second.how["name"] and f"of_{name}" in first.how["name"]
    stored = json.loads((folder / "track.json").read_text())
    if name == "wandb":
        assert first.how["id"] == second.how["id"] == stored["id"]
        assert first.how["mode"] == second.how["mode"] == "offline"
        assert first.how["dir"] == str(folder.parent) and first.ended == {"exit_code": 0}
    else:
        assert stored["id"] in first.how["name"] and second.how["resume"] == "allow"
        assert "TRACKIO_SPACE_ID" not in os.environ and "space_id" not in first.how
        assert first.ended == second.ended == {}
    shop.train(f"another_of_{name}", *words)
    assert json.loads((folder.with_name(f"another_of_{name}") / "track.json").read_text()) != stored


def test_clips_go_along(shop, library):
    pytest.importorskip("av")
    cache = shop.cache("clips", "video.num_frames=3")
    words = (f"track.type={library.__name__}", "video.num_frames=3", *PREVIEWS)
    shop.train(f"clips_of_{library.__name__}", *words, cache=cache)
    path, form = library.runs[0].told[2]["clips"]
    assert path.endswith("step_00000002/video.mp4") and form == "mp4"


def back_to(folder, step: int) -> None:
    """Leave a run as a kill after the checkpoint of `step` would."""
    for checkpoint in (folder / "checkpoints").glob("step_*"):
        if int(checkpoint.name[5:]) > step:
            shutil.rmtree(checkpoint)


def test_steps_that_are_done_again_are_told_once(shop, library):
    name = library.__name__
    words = (f"track.type={name}", *PREVIEWS)
    folder = shop.train(f"killed_{name}", *words)
    back_to(folder, 2)
    shop.train(f"killed_{name}", *words, "--resume", "train.max_steps=4")
    first, second = library.runs
    assert list(first.told) == [1, 2, 3] and list(second.told) == [4]
    assert "samples" in second.told[4] and "samples" in first.told[3]
    kept = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]
    assert kept == [1, 2, 3, 4]


def test_what_a_kill_took_from_trackio_is_sent_again(shop, library):
    if library.__name__ == "wandb":
        pytest.skip("it has a process of its own, which survives")
    folder = shop.train("lost", "track.type=trackio", *PREVIEWS)
    back_to(folder, 2)
    init = library.init

    def knows_one_step(**how):
        run = init(**how)
        run._next_step = 2
        return run

    library.init = knows_one_step
    shop.train("lost", "track.type=trackio", *PREVIEWS, "--resume", "train.max_steps=4")
    told = library.runs[1].told
    assert list(told) == [2, 3, 4]
    assert [step for step in told if "samples" in told[step]] == [2, 4]


def test_a_tracker_that_is_chosen_later_has_the_run_from_its_first_step(shop, library):
    name = library.__name__
    folder = shop.train(f"later_{name}", *PREVIEWS)
    words = (f"track.type={name}", *PREVIEWS, "--resume", "train.max_steps=4")
    shop.train(f"later_{name}", *words)
    (run,) = library.runs
    assert list(run.told) == [1, 2, 3, 4], "in ascending order, as wandb takes them"
    assert [step for step in run.told if "samples" in run.told[step]] == [2, 3, 4]
    assert run.told[2]["samples"] == str(folder / "samples/step_00000002/grid.png")


def test_an_error_of_a_tracker_ends_tracking_alone(shop, library, capsys, monkeypatch):
    init, name = library.init, library.__name__
    monkeypatch.setenv("SOME_API_KEY", "abcdefghijkl")

    def refuse(values, step):
        raise OSError("https://host/?key=abcdefghijkl is full")

    def failing(**how):
        run = init(**how)
        run.log = refuse
        return run

    library.init = failing
    folder = shop.train(f"failing_{name}", f"track.type={name}", *PREVIEWS)
    said = capsys.readouterr().out
    message = "left out from here on (OSError: https://host/?key=<secret> is full)"
    assert said.count(f"{name} failed, and is {message}") == 1 and "abcdefgh" not in said
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    assert not (folder / "failures").exists()


def test_a_tracker_that_hangs_is_not_waited_for(shop, library, capsys, monkeypatch):
    init, name, forever = library.init, library.__name__, threading.Event()

    def hanging(**how):
        run = init(**how)
        run.log = lambda values, step: forever.wait()
        return run

    library.init = hanging
    monkeypatch.setattr("mmdit.training.trackers.CLOSE_SECONDS", 0.1)
    folder = shop.train(f"hanging_{name}", f"track.type={name}", *PREVIEWS)
    assert capsys.readouterr().out.count(f"{name} failed, and is left out") == 1
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    forever.set()


def test_a_tracker_that_cannot_start_is_left_out_a_missing_one_refused(
    shop, library, capsys, monkeypatch
):
    name = library.__name__
    library.init = lambda **how: 1 / 0
    folder = shop.train(f"unstarted_{name}", f"track.type={name}")
    assert capsys.readouterr().out.count("left out from here on (ZeroDivisionError") == 1
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("mmdit.experiment.run.build_tokenizer", lambda *a, **b: pytest.fail("late"))
    words = shop.train_words("never", f"track.type={name}")
    refused(capsys, train_t2v.main, words, "is not installed", f"pip install {name}")
    assert not list((shop.folder / "runs/never").glob("checkpoints/*"))


def test_what_cannot_be_sent_is_written_here(shop, library, capsys):
    if library.__name__ == "trackio":
        pytest.skip("it sends nothing")
    init = library.init

    def unreachable(**how):
        if how["mode"] == "online":
            raise ConnectionError("no route to host")
        return init(**how)

    library.init = unreachable
    shop.train("no_route", "track.type=wandb", "track.mode=online")
    said = capsys.readouterr().out
    assert "wandb cannot send this run (ConnectionError: no route" in said and "wandb sync" in said
    assert list(library.runs[0].told) == [1, 2, 3] and library.runs[0].how["mode"] == "offline"


def test_a_failed_training_is_told_as_failed(shop, library, monkeypatch):
    if library.__name__ == "trackio":
        pytest.skip("trackio knows no failed runs")
    monkeypatch.setattr("mmdit.training.trainer.Trainer.optimizer_step", lambda *rest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shop.train("broken", "track.type=wandb")
    assert library.runs[0].ended == {"exit_code": 1}


def test_tensorboard_is_the_default_and_none_writes_nothing(shop):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = shop.train("default", *PREVIEWS)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [scalar.step for scalar in events.Scalars("loss")] == [1, 2, 3]
    assert [image.step for image in events.Images("samples")] == [2, 3]
    assert not (folder / "track.json").exists()
    # TensorBoard reads the files of a folder by name: one process must not write two in one second,
    # of which the tenth would come before the ninth
    time.sleep(1 - time.time() % 1)
    back_to(folder, 2)
    shop.train("default", *PREVIEWS, "--resume", "train.max_steps=4")
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [scalar.step for scalar in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [image.step for image in events.Images("samples")] == [2, 4]
    assert not (shop.train("untracked", "track.type=none") / "tensorboard").exists()


@pytest.mark.parametrize(
    "words, path",
    [
        ({"type": "trackio", "mode": "online"}, "mode"),
        ({"mode": "online"}, "mode"),
        ({"type": "wandb", "project": ""}, "project"),
        ({"type": "wandb", "name": ""}, "name"),
    ],
)
def test_what_has_no_effect_is_refused(words, path):
    with pytest.raises(ConfigError) as error:
        TrackConfig(**words)
    assert error.value.path == path


# ── the real libraries ────────────────────────────────────────────────────────────────────────────
def train_apart(shop, name: str, *words: str, **environment: str) -> Path:
    """Train in a process of its own, for these libraries read the environment once."""
    words = shop.train_words(name, *words, *PREVIEWS)
    command = [sys.executable, "-m", "mmdit", "train", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "left out" not in done.stdout, done.stdout + done.stderr
    return shop.folder / "runs" / name


@pytest.mark.slow
def test_wandb_itself_writes_both_parts_under_one_id(shop, tmp_path):
    pytest.importorskip("wandb")
    words, home = ("real_wandb", "track.type=wandb"), {"HOME": str(tmp_path)}
    folder = train_apart(shop, *words, **home)
    train_apart(shop, *words, "--resume", "train.max_steps=4", **home)
    parts = sorted((folder.parent / "wandb").glob("offline-run-*"))
    stored = json.loads((folder / "track.json").read_text())["id"]
    assert len(parts) == 2 and all(part.name.endswith(f"-{stored}") for part in parts)
    for part in parts:
        assert b"loss_level_0" in (part / f"run-{stored}.wandb").read_bytes()
        assert len(list((part / "files/media/images").glob("samples_*.png")))


@pytest.mark.slow
def test_trackio_itself_has_every_step_in_one_run(shop, tmp_path):
    pytest.importorskip("trackio")
    words = ("real_trackio", "track.type=trackio", "track.project=shapes")
    place = {"HOME": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio")}
    folder = train_apart(shop, *words, **place)
    train_apart(shop, *words, "--resume", "train.max_steps=4", **place)
    stored = json.loads((folder / "track.json").read_text())
    code = (
        "import json; from trackio import Api\n"
        "runs = list(Api().runs('shapes'))\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "rows = SQLiteStorage.get_logs('shapes', runs[0].name)\n"
        "print(json.dumps([[run.name for run in runs], rows]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | place, capture_output=True, text=True
    )
    names, rows = json.loads(done.stdout.splitlines()[-1])
    assert names == [f"{stored['name']}-{stored['id']}"], done.stderr
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "samples" in row] == [2, 3, 4]
