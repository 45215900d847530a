"""What the pages about runs show: states, curves, previews, differences; and how fast."""

import fcntl
import json
import os
import threading
import time

import pytest

pytest.importorskip("starlette")
from mmdit.diagnostics.curves import POINTS, is_main, panels_of, thinned
from mmdit.training.run_folder import RunFolder
from mmdit.ui import metric_series
from mmdit.ui.metric_series import MetricStore, curves, last_record
from mmdit.ui.run_folders import find_runs, held_locks
from mmdit.ui.run_pages import command_of, phase_of
from mmdit.ui.run_report import RunReport
from tests.helpers.browser import browser as client
from tests.helpers.thorough import thorough


def make_run(runs, name, steps=(1, 2, 3), max_steps=10, **more):
    folder = runs / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"experiment_name: {name}\ntrain: {{max_steps: {max_steps}, lr: {more.get('lr', 0.1)}}}\n"
    )
    lines = [json.dumps({"step": step, "loss_ema_100": 1 / step}) for step in steps]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def fail(folder, step, what="memory"):
    (folder / "failures").mkdir()
    row = {"kind": what, "step": step, "error": "the memory is full\nmore"}
    (folder / "failures" / f"{what}_{step:08d}_0.json").write_text(json.dumps(row))


def state(runs, name, last=3):
    return RunFolder(runs, name).state({"step": last}, held_locks())


def test_a_state_is_told_from_files(tmp_path):
    for name in ("stopped", "failed", "killed", "went_on", "preview"):
        make_run(tmp_path, name)
    make_run(tmp_path, "finished", max_steps=3)
    fail(tmp_path / "failed", 3)
    fail(tmp_path / "went_on", 1)
    fail(tmp_path / "preview", 3, "preview")
    (tmp_path / "killed" / ".lock").touch()
    words = {run.name: state(tmp_path, run.name).word for run in find_runs(tmp_path)}
    assert words == {
        "stopped": "stopped",
        "went_on": "stopped",
        "preview": "stopped",
        "failed": "failed",
        "killed": "failed",
        "finished": "finished",
    }
    assert "the memory is full" in state(tmp_path, "failed").reason
    assert "killed" in state(tmp_path, "killed").reason


def test_a_run_whose_lock_is_held_is_running_and_the_lock_is_not_touched(tmp_path, monkeypatch):
    folder = make_run(tmp_path, "one")
    with (folder / ".lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        monkeypatch.setattr(fcntl, "flock", None)  # looking must not even try
        if held_locks() is not None:
            assert state(tmp_path, "one").word == "running"
        assert RunFolder(tmp_path, "one").state({"step": 3}, None).word == "running"


def test_where_locks_are_not_told_a_clock_that_was_set_back_keeps_no_run_running(tmp_path):
    folder = make_run(tmp_path, "one")
    (folder / ".lock").touch()
    assert RunFolder(tmp_path, "one").state({"step": 3}, None).word == "running"
    later = time.time() + 9e4
    for name in (".lock", "metrics.jsonl"):
        os.utime(folder / name, (later, later))
    assert RunFolder(tmp_path, "one").state({"step": 3}, None).word == "failed"


def test_metrics_are_read_once_then_what_was_appended(tmp_path, monkeypatch):
    folder = make_run(tmp_path, "one")
    store = MetricStore()
    assert store.read(folder).columns["loss_ema_100"][0] == [1, 2, 3]
    read = []
    original = json.loads
    monkeypatch.setattr(json, "loads", lambda text: read.append(text) or original(text))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss_ema_100": 0.25}\n{"step": 5, "loss')
    assert store.read(folder).columns["loss_ema_100"][0] == [1, 2, 3, 4]
    assert len(read) == 1  # neither what was known nor the torn line
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('_ema_100": 0.2}\nno record\n')
    assert store.read(folder).columns["loss_ema_100"][1][-1] == 0.2


def test_a_run_is_not_read_on_while_its_curves_are_made(tmp_path, monkeypatch):
    """Two browsers ask in two threads."""
    folder, store, other = make_run(tmp_path, "one"), MetricStore(), []

    def asked_in_between(series):
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "loss_ema_100": 0.25, "new": 1}\n')
        other.append(threading.Thread(target=store.read, args=[folder]))
        other[0].start()
        other[0].join(0.05)
        return sorted(name for one in series for name in one.columns)

    monkeypatch.setattr(metric_series, "curves", asked_in_between)
    assert store.panels([folder]) == ["loss_ema_100"]
    other[0].join()
    assert "new" in store.read(folder).columns


def test_a_file_that_a_resume_wrote_anew_is_read_anew(tmp_path):
    folder = make_run(tmp_path, "one")
    store = MetricStore()
    store.read(folder)
    (folder / "other").write_text('{"step": 1, "loss_ema_100": 9, "note": "x", "nan": NaN}\n')
    (folder / "other").rename(folder / "metrics.jsonl")
    series = store.read(folder)
    assert series.columns == {"loss_ema_100": ([1.0], [9.0])}
    lines = [json.dumps({"step": step, "loss_ema_100": 7}) + "\n" for step in range(9)]
    # longer, and the same file to the system
    (folder / "metrics.jsonl").write_text("".join(lines))
    assert store.read(folder).columns == {"loss_ema_100": (list(range(9)), [7] * 9)}


def test_a_list_of_runs_reads_the_ends_of_their_metrics(tmp_path, monkeypatch):
    folder = make_run(tmp_path, "long", range(1, 20_000))
    read = []
    monkeypatch.setattr(metric_series, "record_of", lambda line: read.append(line) or {"step": 7})
    assert last_record(folder) == {"step": 7} and len(read) == 1
    assert json.loads(read[0])["step"] == 19_999
    assert 'href="/run/long"' in client(tmp_path).get("/").text


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ('{"step": 1}\n{"step": 2}\n', 2),
        ('{"step": 1}\n{"step": 2', 1),  # it is being written
        ('{"step": 1}\n\n[2]\nx\n{"steps": 2}\n{"step": NaN}\n', 1),
        ('{"step": 1}\n' + "x" * 300_000 + '\n{"step": 2', 1),
        ('{"step": 1, "note": "' + "x" * 300_000 + '"}\n', 1),
        ("x\n", None),
        ("", None),
    ],
)
def test_the_last_record_is_the_newest_that_is_whole(tmp_path, text, step):
    folder = make_run(tmp_path, "one")
    (folder / "metrics.jsonl").write_text(text)
    assert last_record(folder).get("step") == step


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 4, "loss_ema_100": NaN, "val_loss": Infinity}',
        *thorough(
            f'{{"step": 4, "loss_ema_100": 1{"0" * 400}, "val_loss": {{"32": 1{"0" * 400}}}}}',
            f'{{"step": 1{"0" * 400}, "loss_ema_100": 1}}',
        ),
        '{"step": NaN, "loss_ema_100": 1}',
        '{"step": "inf", "loss_ema_100": 1}',
    ],
)
def test_numbers_that_no_curve_can_show_take_no_page_down(tmp_path, line):
    """A loss that is no number, of one run among others."""
    make_run(tmp_path / "runs", "sound")
    folder = make_run(tmp_path / "runs", "odd")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    (folder / "starts.jsonl").write_text('{"time": 1e300}\n')
    browser = client(tmp_path / "runs")
    for address in ("/", "/run/odd", "/api/runs?run=odd&run=sound", "/compare?run=odd&run=sound"):
        assert browser.get(address).status_code == 200
    panels = browser.get("/api/curves?run=odd").json()["panels"]
    assert panels[0]["curves"][0]["y"] == [1, 1 / 2, 1 / 3]
    assert "sound" in browser.get("/").text
    assert "odd" in RunReport(folder).page()


def test_thinning_keeps_ends_and_peaks():
    steps = list(range(100_000))
    values = [0.0] * len(steps)
    values[54_321], values[77_777] = 9.0, -9.0
    x, y = thinned(steps, values)
    assert len(x) <= POINTS and x == sorted(set(x))
    assert x[0] == 0 and x[-1] == steps[-1] and max(y) == 9 and min(y) == -9
    assert thinned([1, 2], [3, 4]) == ([1, 2], [3, 4])


def test_every_value_is_in_a_panel(tmp_path):
    folder = make_run(tmp_path, "one")
    record = {"step": 4, "loss_level_0": 1.0, "loss_high": 2.0, "memory_gb": 3.0, "timestamp": 1e9}
    record |= {"reward_noise": 0.5, "phase": "up", "alpha_enabled": True}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    panels = curves([MetricStore().read(folder)])
    drawn = {curve["name"] for panel in panels for curve in panel["curves"]}
    assert drawn == {"loss_ema_100", "loss_level_0", "loss_high", "memory_gb", "reward_noise"}
    assert all(panel["main"] for panel in panels)


def test_two_runs_lie_over_each_other_and_their_difference_is_told(tmp_path):
    make_run(tmp_path, "one", lr=0.1)
    make_run(tmp_path, "deep/two", lr=0.2)
    browser = client(tmp_path)
    panels = browser.get("/api/curves?run=one&run=deep/two").json()["panels"]
    assert [curve["run"] for curve in panels[0]["curves"]] == [0, 1]
    assert "train.lr: 0.1 → 0.2" in browser.get("/compare?run=one&run=deep/two").text
    assert "train.lr: 0.2 → 0.1" in browser.get("/run/one?against=deep/two").text
    assert browser.get("/compare?" + "&".join(["run=one"] * 9)).status_code == 404


def test_the_pages_name_states_and_previews(tmp_path):
    folder = make_run(tmp_path, "one")
    for step in (5, 10):
        sample = folder / "samples" / f"step_{step:08d}"
        sample.mkdir(parents=True)
        (sample / "grid.png").write_bytes(b"\x89PNG picture")
    (sample / "video.mp4").write_bytes(bytes(1000))
    browser = client(tmp_path)
    assert "stopped" in browser.get("/").text
    row = browser.get("/api/runs?run=one").json()[0]
    assert row["previews"] == [
        {"step": 5, "folder": "step_00000005", "video": None},
        {"step": 10, "folder": "step_00000010", "video": "video.mp4"},
    ]
    assert browser.get("/files/one/samples/step_00000005/grid.png").content == b"\x89PNG picture"
    part = browser.get(
        "/files/one/samples/step_00000010/video.mp4", headers={"range": "bytes=10-19"}
    )
    assert part.status_code == 206 and len(part.content) == 10


def test_a_name_that_is_not_utf8_takes_no_page_down(tmp_path):
    make_run(tmp_path / "runs", "good")
    for name in (b"caf\xe9", b"caf\xe9.safetensors"):
        folder = tmp_path / "runs" / os.fsdecode(name)
        try:
            folder.mkdir()
        except OSError:
            pytest.skip("this file system takes no such names")
        (folder / "config.yaml").write_text("experiment_name: x\n")
        (folder / "metrics.jsonl").touch()
        (folder / "manifest.json").touch()
        (folder / "checkpoints").mkdir()
    for page in ("/", "/new/train", "/data", "/playground", "/jobs"):
        answer = client(tmp_path / "runs").get(page)
        assert answer.status_code == 200 and ("caf?" in answer.text or page == "/jobs")


def test_a_folder_without_runs_says_so(tmp_path):
    assert "There is no run yet" in client(tmp_path / "absent").get("/").text


def test_a_long_run_opens_in_two_seconds(tmp_path):
    folder = make_run(tmp_path, "one", steps=())
    names = [f"value_{i}" for i in range(40)]
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 10_001):
            record = {name: step * 0.1234567 for name in names}
            file.write(json.dumps({"step": step, "loss_ema_100": 1 / step} | record) + "\n")
    for step in range(500):
        sample = folder / "samples" / f"step_{step:08d}"
        sample.mkdir(parents=True)
        (sample / "grid.png").touch()
    browser = client(tmp_path)
    begin = time.process_time()  # other work may share the cores
    page, panels = browser.get("/run/one"), browser.get("/api/curves?run=one")
    assert time.process_time() - begin < 2
    assert page.status_code == 200 and len(panels.json()["panels"]) == 41
    assert len(panels.content) < 1_000_000


def test_experts_rewards_sources_and_phases_have_panels():
    names = ["loss_ema_100_low", "loss_ema_100", "phase_idx_high", "reward_style", "odd"]
    panels = panels_of([*names, "reward_style_std", "val_loss/photos"])
    assert panels == {
        "loss": ["loss_ema_100", "loss_ema_100_low"],
        "reward of rollouts": ["reward_style"],
        "phase of the alpha schedule": ["phase_idx_high"],
        "validation loss by source": ["val_loss/photos"],
        "odd": ["odd"],
        "reward_style_std": ["reward_style_std"],
    }
    assert [title for title in panels if not is_main(title)] == ["odd", "reward_style_std"]
    assert phase_of({"phase_low": "up", "phase_idx": 1, "expert": None}) == "phase low up"


def test_a_run_is_continued_by_the_command_that_began_it():
    assert command_of({"train": {}}) == "train"
    assert command_of({"posttrain": {"algorithm": {}}}) == "posttrain"
    assert command_of({"reconstruction": {}}) == "train-vtp"


def test_what_nobody_may_look_into_hides_no_other_run(tmp_path, monkeypatch):
    """As folders of other users of a machine are; who tests may be allowed everything."""
    make_run(tmp_path, "open")
    make_run(tmp_path, "private")
    (tmp_path / "open/samples/step_00000001").mkdir(parents=True)

    def refusing(look, part):
        def refuse(path, *arguments, **options):
            if part in str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return look(path, *arguments, **options)

        return refuse

    monkeypatch.setattr(os, "stat", refusing(os.stat, "private/"))
    monkeypatch.setattr(os, "listdir", refusing(os.listdir, "step_00000001"))
    page = client(tmp_path).get("/")
    assert page.status_code == 200 and "/run/open" in page.text and "private" not in page.text
    assert client(tmp_path).get("/run/open").status_code == 200
    assert client(tmp_path).get("/run/private").status_code == 404
