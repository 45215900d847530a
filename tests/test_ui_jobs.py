"""Jobs of the browser interface: forms that reach every key, commands that nothing is smuggled
into, and processes that outlive the server."""

import dataclasses
import json
import os
import shlex
import signal
import sys
import time
import typing
from pathlib import Path

import pytest

pytest.importorskip("starlette")
from mmdit.config import ConfigError, FilePath
from mmdit.experiment import config_keys
from mmdit.experiment.experiment_config import ExperimentConfig, load_experiment_config
from mmdit.scripts import ui
from mmdit.training.run_folder import text_of
from mmdit.ui import job_files
from mmdit.ui.allowed_folders import PATH_KEYS, AllowedFolders
from mmdit.ui.command_forms import NO_PATHS, options_of, words_of
from mmdit.ui.config_forms import all_keys, config_of, form_of, overrides, with_types
from mmdit.ui.job_files import Job, JobStore
from mmdit.ui.job_requests import JobRequest
from mmdit.ui.processes import identity, is_alive, terminate
from tests.helpers.browser import browser, send, workplace

CONFIG = "configs/quickstart.yaml"
HOSTILE = "<script>alert(1)</script>"
SHELL = "a star; touch pwned $(touch pwned) `touch pwned` | touch pwned\n--out=/etc"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    """The working directory is the folder around the runs, as a person would have it."""
    monkeypatch.chdir(tmp_path)


# ── forms of configurations ──
def paths_of(cls, path=""):
    """Yield every dotted key that a config of this class may have, whatever types it chooses."""
    hints = typing.get_type_hints(cls)
    for name in config_keys.keys(cls):
        parts = [
            part for part in config_keys.options(hints[name]) if dataclasses.is_dataclass(part)
        ]
        place = f"{path}.{name}".lstrip(".")
        if not parts:
            yield place
        for part in parts:
            yield from paths_of(part, place)


def choices_of(form):
    for section in form.sections:
        yield from ((section.path, name) for name in section.types)
        yield from choices_of(section)


def test_every_key_of_every_type_is_in_a_form():
    base = form_of(ExperimentConfig("x"))
    forms, seen, tried = [base], set(), set()
    while forms:
        form = forms.pop()
        seen |= set(all_keys(form))
        for choice in set(choices_of(form)) - tried:
            tried.add(choice)
            forms.append(with_types(form, {f"type:{choice[0]}": choice[1]}))
    missing = set(paths_of(ExperimentConfig)) - seen
    assert not missing and len(seen) > 200


def test_a_changed_type_forgets_what_the_old_one_was_told():
    base = form_of(ExperimentConfig("x"))
    fields = {"was:text_encoder": "byte_level", "type:text_encoder": "hash"}
    fields |= {"set:text_encoder.dim": "78", "set:train.lr": "0.5"}
    config = config_of(base, fields)
    assert config.text_encoder.type == "hash" and config.text_encoder.dim != 78
    assert config.train.lr == 0.5
    fields["was:text_encoder"] = "hash"  # the page was shown with the new type
    assert config_of(base, fields).text_encoder.dim == 78
    with pytest.raises(ConfigError, match="text_encoder.type"):
        with_types(base, {"type:text_encoder": "none"})


def test_a_key_shows_its_comment_type_and_default():
    form = form_of(ExperimentConfig("x"))
    train = next(section for section in form.sections if section.path == "train")
    lr = next(key for key in train.keys if key.name == "lr")
    assert lr.about and lr.words == "number" and lr.usual == lr.value
    objective = next(key for key in train.keys if key.name == "objective")
    assert set(objective.choices) >= {"ddpm", "flow_matching"}


@pytest.mark.parametrize("name", ["quickstart", "posttrain/grpo", "wan/t2v_1_3b_lora"])
def test_an_untouched_form_says_the_same_as_the_file(name):
    path = f"configs/{name}.yaml"
    config = load_experiment_config(path)
    form = form_of(config)
    fields = {f"set:{key}": value for key, value in values_of(form).items()}
    assert config_of(form, fields) == config
    assert overrides(path, config, config_of(form, fields)) == []


def values_of(form):
    values = {key.path: key.value for key in form.keys}
    for section in form.sections:
        values |= values_of(section)
    return values


@pytest.mark.parametrize(
    "fields",
    [
        {"set:train.lr": "1.5e-3"},
        {"set:train.sample_prompts": f"[a star, '{HOSTILE}', 'it''s: #1']"},
        {"set:experiment_name": "'007'", "set:video.num_frames": "1"},
        {"type:text_encoder": "hash"},
        {"set:lora.enabled": "true", "set:lora.rank": "3", "set:train.init_from": "runs/x"},
        {"type:posttrain": "given", "set:train.init_from": "runs/x"},
    ],
)
def test_overrides_make_of_the_file_what_the_form_says(fields):
    old = load_experiment_config(CONFIG)
    new = config_of(form_of(old), fields)
    words = overrides(CONFIG, old, new)
    assert new != old and words
    assert load_experiment_config(CONFIG, words) == new


@pytest.mark.parametrize("text", ["[", "1\nother: 2", "!!python/object:os.system x", "many"])
def test_a_value_that_cannot_be_names_its_key(text):
    old = load_experiment_config(CONFIG)
    with pytest.raises(ConfigError, match="train.lr"):
        config_of(form_of(old), {"set:train.lr": text})


# ── forms of commands ──
@pytest.mark.parametrize("command", ui.JOBS | ui.REPORTS)
def test_every_option_is_in_the_form_of_its_command(command):
    parser = ui.parsers()[command]()
    listed = {option.flag for option in options_of(parser)}
    known = {word for action in parser._actions for word in action.option_strings[:1]}
    assert known - listed <= {"-h", "--help", "--config", "--json", "--interactive"}


def test_what_is_listed_as_no_path_names_no_file():
    """Texts that are not listed are looked at as paths; this is the list, and what it is about."""
    texts = {}
    for parser in ui.parsers().values():
        texts |= {option.name: option for option in options_of(parser()) if option.is_path}
    assert {"out", "checkpoint", "image", "lora", "meta_jsonl", "train_cache_dir"} <= texts.keys()
    assert not NO_PATHS & {"out", "out_dir", "cache_dir", "base", "adapter", "prompts_file"}


def test_words_begin_with_no_dash_that_a_value_brought(tmp_path):
    options = options_of(ui.parsers()["sample"]())
    allowed = AllowedFolders([tmp_path])
    fields = {"checkpoint": "assets/x", "negative": "--out=/etc", "interval": "0.1\n-0.5"}
    words = words_of(options, lambda name: fields.get(name, ""), allowed)
    assert "--negative=--out=/etc" in words and words[words.index("--interval") + 1] == "0.1"
    for name, text in (("prompts", "--out"), ("interval", "--out\n1")):
        with pytest.raises(ValueError, match="dash"):
            words_of(options, lambda key: (fields | {name: text}).get(key, ""), allowed)


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../etc", "~/x", "assets/../../../x", "a\0"])
@pytest.mark.parametrize("field", ["checkpoint", "out", "lora", "image", "refine"])
def test_a_path_outside_of_the_folders_is_refused(tmp_path, field, path):
    fields = {"checkpoint": str(tmp_path), "prompts": "a star"} | {field: path}
    with pytest.raises(ValueError, match="outside|must be|no command line"):
        JobRequest(workplace(tmp_path / "runs"), "sample", fields).preview()


def test_a_link_out_of_the_folders_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to("/etc")
    allowed = AllowedFolders([tmp_path / "in"])
    assert allowed.check(str(tmp_path / "in" / "new"))
    assert allowed.check("configs/quickstart.yaml")  # it ships
    for path in ("link/passwd", "../out", "link"):
        with pytest.raises(ValueError, match="outside"):
            allowed.check(str(tmp_path / "in" / path))


@pytest.mark.parametrize(
    "fields",
    [
        {"set:output_dir": "/etc/runs"},
        {"set:train.init_from": "/etc/x.safetensors"},
        {"set:tokenizer.name_or_path": "/etc"},
    ],
)
def test_a_path_in_a_configuration_is_looked_at(tmp_path, fields):
    key = next(iter(fields)).removeprefix("set:")
    request = {"config": CONFIG, "train_cache_dir": str(tmp_path)} | fields
    with pytest.raises(ValueError, match=f"{key} is .*outside"):
        JobRequest(workplace(tmp_path / "runs"), "train", request).preview()


@pytest.mark.parametrize(
    "word",
    ["tokenizer.name_or_path=/etc", "tokenizer={name_or_path: /etc}", "--out=x", "a b=c", "x"],
)
def test_an_override_of_a_stored_config_is_looked_at(tmp_path, word):
    fields = {"checkpoint": str(tmp_path), "prompts": "a star", "overrides": word}
    with pytest.raises(ValueError, match="outside|not of the form"):
        JobRequest(workplace(tmp_path / "runs"), "sample", fields).preview()
    allowed = AllowedFolders([tmp_path])
    for good in ("flow_matching.path=linear", "train.sample_cfg_scale=3", "ema.decay="):
        allowed.check_override(good)


def test_keys_that_hold_paths_are_known():
    assert {"name_or_path", "output_dir", "init_from", "repo_path", "latents"} <= PATH_KEYS
    hints = typing.get_type_hints(ExperimentConfig)
    assert FilePath in config_keys.options(hints["output_dir"])


# ── processes ──
@pytest.fixture
def store(tmp_path, monkeypatch):
    """Jobs whose words are a Python program."""
    runner = Path(__file__).parent / "helpers/plain_runner.py"
    monkeypatch.setattr(job_files, "RUNNER", (sys.executable, str(runner)))
    store = JobStore(tmp_path / "runs")
    yield store
    for job in store.jobs():
        store.stop(job.id)
    for job in store.jobs():
        wait(store, job, lambda state: state.is_over)


def start(store, code, device=None, **more):
    return store.add(store.reserve(), ["-c", code], device, **more)


def wait(store, job, holds, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = store.state(job)
        if holds(state):
            return state
        time.sleep(0.02)
    raise AssertionError(f"{job.id} is {store.state(job)}: {store.log(job.id)}")


def has(word):
    return lambda state: state.word == word


WAITS = "import time; print('ready', flush=True); time.sleep(60)"


def test_a_job_ends_as_its_process_does(store):
    good = start(store, "print('fine')")
    bad = start(store, "import sys; print('error: no cache at x'); sys.exit(2)")
    torn = start(store, "import os; os.abort()")
    assert wait(store, good, has("finished")) and "fine" in store.log(good.id)
    assert wait(store, bad, has("failed")).reason == "no cache at x"
    assert "signal 6" in wait(store, torn, has("failed")).reason


def test_stopping_is_sigterm_and_what_it_does_is_the_commands(store):
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(0)))\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )
    job = start(store, code)
    wait(store, job, lambda state: "ready\n" in store.log(job.id))
    store.stop(job.id)
    assert wait(store, job, has("stopped")) and "saved" in store.log(job.id)


def test_jobs_of_one_device_wait_for_each_other(store):
    first = start(store, WAITS, "cpu")
    wait(store, first, has("running"))
    second, third = start(store, WAITS, "cpu"), start(store, "print(3)", "cpu")
    other = start(store, "print(4)", "cuda:0")
    assert wait(store, other, has("finished"))
    assert store.state(second).word == store.state(third).word == "queued"
    wait(store, second, lambda state: "waits" in state.reason)
    store.stop(second.id)
    assert wait(store, second, has("stopped")).reason == "before it was started"
    store.stop(first.id)
    assert wait(store, third, has("finished"))


def test_a_job_outlives_the_server_and_is_found_again(store, monkeypatch):
    """A runner has a session of its own, and knows no secret."""
    monkeypatch.setenv("MMDIT_UI_TOKEN", "a secret of many letters")
    code = "import os; print(os.getsid(0), 'MMDIT_UI_TOKEN' in os.environ, flush=True)\n" + WAITS
    job = start(store, code)
    wait(store, job, lambda state: "ready\n" in store.log(job.id))
    session, knows = store.log(job.id).split("\n")[-3].split()
    assert int(session) != os.getsid(0) and knows == "False"
    again = JobStore(store.folder.parent)  # as a restarted server has it
    assert [one.id for one in again.jobs()] == [job.id]
    assert again.state(again.read(job.id)).word == "running"
    again.stop(job.id)
    wait(again, job, has("stopped"))


def test_a_killed_runner_is_told_and_its_number_is_not_trusted(store):
    job = start(store, WAITS)
    wait(store, job, lambda state: "ready\n" in store.log(job.id))
    status = store.status(job.id)
    os.kill(status["runner"][0], signal.SIGKILL)
    os.kill(status["child"][0], signal.SIGKILL)
    assert wait(store, job, has("lost"))
    mine = identity(os.getpid())
    assert is_alive(mine) and not is_alive([mine[0], "another start"])
    terminate([mine[0], "another start"])  # else this test would end here


def test_a_job_whose_runner_never_came_is_lost(store):
    path = store.reserve()
    row = dataclasses.asdict(Job(path.name, ["-c", ""], None, time.time() - 100))
    (path / "job.json").write_text(json.dumps(row))
    assert store.state(store.read(path.name)).word == "lost"


@pytest.mark.parametrize("name", ["..", "1", "00001/..", "../..", "00001x", ""])
def test_no_other_folder_is_a_job(store, name):
    start(store, "")
    with pytest.raises(ValueError, match="no job"):
        store.read(name)


def test_the_log_of_a_progress_bar_is_its_last_state(store):
    job = start(store, r"print('\r10%\r20%\r100%'); print('x' * 100)")
    wait(store, job, has("finished"))
    assert "100%\nxxx" in store.log(job.id) and "20%" not in store.log(job.id).split("\n", 1)[1]


# ── pages ──
def test_the_page_shows_the_exact_command_and_starts_nothing_to_check(tmp_path):
    client = browser(tmp_path / "runs")
    (tmp_path / "cache").mkdir()
    fields = {"config": CONFIG, "train_cache_dir": str(tmp_path / "cache"), "do": "check"}
    answer = send(client, "/new/train", **fields, **{"set:train.lr": "<b>x"})
    assert answer.status_code == 400 and "train.lr: is &#39;&lt;b&gt;x&#39;" in answer.text
    answer = client.post("/new/train", data=fields)
    assert answer.status_code == 403  # no secret
    page = send(client, "/new/train", **fields, **{"set:train.lr": "0.5"}).text
    cache = tmp_path / "cache"
    line = f"mmdit train --config={CONFIG} train.lr=0.5 --train_cache_dir={cache}"
    assert line in page and not list((tmp_path / "runs").glob(".jobs/*"))


def test_a_prompt_of_any_letters_is_a_line_of_a_file_and_text_in_a_page(store, tmp_path):
    client = browser(tmp_path / "runs")
    fields = {"checkpoint": str(tmp_path), "prompts": f"{SHELL}\n{HOSTILE}", "device": "cpu"}
    answer = send(client, "/new/sample", **fields, do="start")
    job = store.read(answer.headers["location"].rpartition("/")[2])
    prompts = text_of(store.path(job.id) / "prompts.txt").splitlines()
    assert prompts == [*SHELL.split("\n"), HOSTILE]
    assert not any("touch" in word or "--out=/etc" in word for word in job.words)
    assert shlex.split(job.line) == ["mmdit", *job.words] and isinstance(job.argv, list)
    wait(store, job, lambda state: state.is_over)
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()
    # what it printed, and what was typed, are text
    (store.path(job.id) / "log.txt").write_text(HOSTILE)
    for page in (f"/job/{job.id}", "/jobs"):
        assert "<script>alert" not in client.get(page).text
    fields |= {"checkpoint": HOSTILE, "do": "check", "negative": HOSTILE}
    for path in ("/new/sample", "/playground"):
        page = send(client, path, **fields).text
        assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_a_page_stops_a_job_and_runs_it_again(store, tmp_path):
    client = browser(tmp_path / "runs")
    job = start(store, WAITS)
    wait(store, job, lambda state: "ready\n" in store.log(job.id))
    assert client.get(f"/api/job/{job.id}").json()["state"] == "running"
    assert client.post(f"/job/{job.id}/stop", data={"x": "y"}).status_code == 403
    assert send(client, f"/job/{job.id}/stop").is_redirect
    wait(store, job, has("stopped"))
    assert send(client, "/job/00099/stop").status_code == 404
    assert client.get("/job/..%2f..").status_code == 404


def test_a_training_is_continued_with_resume(store, tmp_path):
    place = workplace(tmp_path / "runs")
    run = tmp_path / "runs" / "one"
    (run / "checkpoints" / "step_1").mkdir(parents=True)
    words = ["train", f"--config={CONFIG}", "--train_cache_dir=x"]
    old = store.add(store.reserve(), words, "cpu", str(run))
    wait(store, old, lambda state: state.is_over)
    answer = send(browser(tmp_path / "runs"), f"/job/{old.id}/again")
    new = store.read(answer.headers["location"].rpartition("/")[2])
    assert new.words == [*words, "--resume"] and new.run == old.run
    assert place.store.by_run()[run][0] == new.id


def test_the_files_of_a_job_are_pictures_in_its_own_folder(store, tmp_path):
    client = browser(tmp_path / "runs")
    out = tmp_path / "drawn"
    out.mkdir()
    (out / "grid.png").write_bytes(b"picture")
    (out / "page.html").write_text(HOSTILE)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (out / "skipped.jsonl").write_text(json.dumps({"id": HOSTILE, "reason": "torn"}) + "\nx\n")
    job = start(store, "", out=str(out))
    assert client.get(f"/job-files/{job.id}/grid.png").content == b"picture"
    for path in ("page.html", "..%2fsecret.png", "skipped.jsonl", "/etc/passwd"):
        assert client.get(f"/job-files/{job.id}/{path}").status_code == 404
    page = client.get(f"/job/{job.id}").text
    assert "torn" in page and "<script>alert" not in page


def test_before_and_after_are_two_jobs_of_one_seed(store, tmp_path):
    client = browser(tmp_path / "runs")
    (tmp_path / "style.safetensors").touch()
    fields = {"checkpoint": str(tmp_path), "other_checkpoint": str(tmp_path), "prompts": "a star"}
    fields |= {"lora": str(tmp_path / "style.safetensors"), "seed": "7", "device": "cpu"}
    answer = send(client, "/playground", **fields, do="start")
    page = client.get(answer.headers["location"])
    before, after = store.jobs()
    assert before.id in page.text and after.id in page.text and "a star" in page.text
    assert "--seed=7" in before.words and "--seed=7" in after.words
    assert not any("--lora" in word for word in before.words)
    assert f"--lora={tmp_path}/style.safetensors" in after.words


@pytest.mark.parametrize(
    "path", ["/jobs", "/data", "/playground", "/new/train", "/new/plan-memory"]
)
def test_pages_open_and_ask_for_nothing_elsewhere(tmp_path, path):
    answer = browser(tmp_path / "runs").get(path)
    assert answer.status_code == 200 and "//" not in answer.text.replace("://127.0.0.1", "")


def test_a_command_that_is_not_offered_is_not_started(tmp_path):
    client = browser(tmp_path / "runs")
    for name in ("ui", "export", "%2e%2e", "quickstart"):
        assert client.get(f"/new/{name}").status_code == 404
        assert send(client, f"/new/{name}", do="start").status_code in (404, 405)
