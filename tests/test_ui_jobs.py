"""Jobs of the browser interface: forms that reach every key, commands that nothing is smuggled
into, and processes that outlive the server."""

import dataclasses
import io
import json
import os
import shlex
import shutil
import signal
import sys
import time
import typing
from pathlib import Path

import pytest
from tqdm import tqdm

pytest.importorskip("starlette")
from mmdit.config import ConfigError, FilePath, apply_overrides, load
from mmdit.experiment import config_keys
from mmdit.experiment.experiment_config import ExperimentConfig, load_experiment_config
from mmdit.scripts import ui
from mmdit.scripts.listing import commands
from mmdit.shipped import find
from mmdit.training.run_folder import text_of
from mmdit.ui import job_files, job_runner
from mmdit.ui.allowed_folders import PATH_KEYS, AllowedFolders
from mmdit.ui.command_forms import NO_PATHS, options_of, takes, words_of
from mmdit.ui.config_forms import config_of, form_of, overrides, with_types
from mmdit.ui.job_files import Job, JobStore, as_shown
from mmdit.ui.job_requests import JobRequest
from mmdit.ui.job_runner import Runner
from mmdit.ui.processes import identity, is_alive, terminate
from tests.helpers.browser import browser, send, workplace
from tests.helpers.thorough import thorough, thorough_unless

CONFIG = "configs/quickstart.yaml"
VTP_CONFIG = "VTP/configs/vtp_tiny_f16d64_stage1.yaml"
HOSTILE = "<script>alert(1)</script>"
SHELL = "a star; touch pwned $(touch pwned) `touch pwned` | touch pwned\n--out=/etc"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    """The working directory is the folder around the runs, as a person would have it."""
    monkeypatch.chdir(tmp_path)


def test_a_log_is_what_a_terminal_shows_of_bars_within_bars():
    """`mmdit sample` has a bar of steps below that of samples: each of its states was a line."""
    written = io.StringIO()
    with tqdm(total=2, desc="sampling", file=written, mininterval=0) as bar:
        for _ in range(2):
            for _ in tqdm(range(9), "a batch", leave=False, file=written, mininterval=0):
                pass
            halfway = written.getvalue()
            bar.update()
    shown = as_shown(f"begun\r\n{written.getvalue()}\x1b[31mred\x1b[0m\n").split("\n")
    assert [line[:14] for line in shown] == ["begun", "sampling: 100%", "red", ""]
    assert as_shown(halfway).split("\n")[0].startswith("sampling:  50%")
    assert as_shown("a  10%\ra  20%\ra 100%\nb\n") == "a 100%\nb\n"


# ── forms of configurations ──
@pytest.mark.parametrize("text", ["two\nlines\n", "1e5", "x\x85y", "\xa0", " a: b #", "\t", "~"])
def test_a_text_of_the_file_is_the_same_after_a_form_and_as_an_override(text):
    """A field of a form, and a word of a command line, has one line."""
    Path("plain.yaml").write_text("experiment_name: x\n")
    plain = load(ExperimentConfig, "plain.yaml")
    train = dataclasses.replace(plain.train, sample_prompts=(text, "b"))
    captions = dataclasses.replace(plain.captions, trigger=text)
    config = dataclasses.replace(plain, train=train, captions=captions)
    form = form_of(config)
    fields = {f"set:{key.path}": key.value for key in keys_of(form)}
    assert not any("\n" in value for value in fields.values())
    assert config_of(form, fields) == config
    words = overrides("plain.yaml", plain, config)
    assert load(ExperimentConfig, "plain.yaml", words) == config


@pytest.mark.parametrize("text", ["zork #3", "[a] # b", "&a b"])
def test_a_field_of_which_yaml_would_leave_a_part_out_is_refused(text):
    """And so is a word of a command line."""
    with pytest.raises(ConfigError, match="captions.trigger: is .* and leaves it out"):
        config_of(form_of(ExperimentConfig("x")), {"set:captions.trigger": text})
    with pytest.raises(ConfigError, match="leaves it out"):
        apply_overrides({}, [f"captions.trigger={text}"])


def test_a_field_that_is_emptied_is_null_and_not_the_default():
    base = form_of(ExperimentConfig("x"))
    with pytest.raises(ConfigError, match="train.lr: is None"):
        config_of(base, {"set:train.lr": ""})
    assert config_of(base, {"set:model.size": " "}).model.size is None


def keys_of(form):
    yield from form.keys
    for section in form.sections:
        yield from keys_of(section)


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
        seen |= {key.path for key in keys_of(form)}
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
OFTEN = {"train", "posttrain", "train-vtp", "sample", "evaluate", "export", "cache-latents"}


@pytest.mark.parametrize("name", thorough_unless(lambda name: name in OFTEN, ui.offers()))
def test_every_argument_has_a_field_on_the_page_of_its_command(name, tmp_path):
    """A configuration and its overrides are fields of their own; `--interactive` needs somebody
    who types."""
    offer = ui.offers()[name]
    page = browser(tmp_path / "runs").get(f"/new/{name}").text
    if 'name="config"' in page:
        config = CONFIG if offer.root is ExperimentConfig else VTP_CONFIG
        page = browser(tmp_path / "runs").get(f"/new/{name}", params={"config": config}).text
        form = form_of(load(offer.root, config))
        assert all(f'name="set:{key.path}"' in page for key in keys_of(form))
    left_out = {"help", "config", "overrides", "interactive"}
    known = {action.dest for action in offer.parser()._actions} - left_out
    assert known and not {one for one in known if f'name="{one}"' not in page}
    assert ('name="overrides"' in page) == has_free_overrides(offer.parser())
    assert ('name="nproc_per_node"' in page) == offer.distributed


def has_free_overrides(parser):
    return {"overrides"} == {action.dest for action in parser._actions} & {"overrides", "config"}


def test_every_command_is_offered_or_left_out_for_a_reason():
    left_out = commands().keys() - ui.offers().keys()
    assert left_out == ui.NOT_OFFERED.keys() and all(ui.NOT_OFFERED.values())
    assert {"train", "posttrain", "train-vtp", "sample", "evaluate", "export"} <= ui.offers().keys()
    assert set(ui.REPORTS) | set(ui.DISTRIBUTED) <= ui.offers().keys()


def test_no_visitor_chooses_where_the_secrets_of_the_environment_go():
    """A command that is told a server sends it the key that the environment of `mmdit ui` holds."""
    for name, offer in ui.offers().items():
        options = {action.dest for action in offer.parser()._actions}
        assert not options & {"server", "endpoint", "url", "host"}, name


@pytest.mark.parametrize("name", ui.offers())
def test_every_argument_reaches_the_command_line(name, tmp_path):
    """Each field alone, filled in, and what argparse makes of the words."""
    parser = ui.offers()[name].parser()
    options = options_of(parser)
    for option in options:
        value = {"flag": "yes", "number": "3"}.get(option.shape, str(tmp_path / "x"))
        value = option.choices[0] if option.choices else value
        action = next(action for action in parser._actions if action.dest == option.name)
        count = action.nargs
        if option.shape == "lines" and action.type not in (None, str, Path):
            value = "3"
        text = "\n".join([value] * count) if isinstance(count, int) and count else value
        if count == 2:
            text = "0.25\n0.5"
        needed = {one.name: str(tmp_path) for one in options if one.required}
        fields = needed | {option.name: text}
        words = words_of(options, lambda key: fields.get(key, ""), AllowedFolders([tmp_path]))
        if takes(parser, "config"):
            words.append("--config=x")
        read = getattr(parser.parse_intermixed_args(words), option.name)
        assert read not in (None, False, []), (option.flag, words)


def test_what_is_listed_as_no_path_names_no_file():
    """Texts that are not listed are looked at as paths, and all of those are names of files: a new
    option stands in one of the two lists."""
    texts = set()
    for offer in ui.offers().values():
        texts |= {one.name for one in options_of(offer.parser()) if one.is_path}
    written = {"copies", "nearest", "out", "out_dir", "save", "sheet"}
    models = {"adapter", "base", "checkpoint", "lora", "lora_low", "refine", "tuned"}
    media = {"cache_dir", "folder", "image", "images", "meta_jsonl", "samples", "train_cache_dir"}
    measured = {"clip_score", "features", "held_out", "path", "read", "real", "run", "runs"}
    assert texts == written | models | media | measured | {"prompts", "prompts_file", "train_jsonl"}
    assert not NO_PATHS & (texts - {"prompts"})  # which `evaluate` reads from a file


def test_words_begin_with_no_dash_that_a_value_brought(tmp_path):
    options = options_of(ui.offers()["sample"].parser())
    allowed = AllowedFolders([tmp_path])
    fields = {"checkpoint": "assets/x", "negative": "--out=/etc", "interval": "0.1\n-0.5"}
    words = words_of(options, lambda name: fields.get(name, ""), allowed)
    assert "--negative=--out=/etc" in words and words[words.index("--interval") + 1] == "0.1"
    for name, text in (("prompts", "--out"), ("interval", "--out\n1")):
        with pytest.raises(ValueError, match="dash"):
            words_of(options, lambda key: (fields | {name: text}).get(key, ""), allowed)


@pytest.mark.parametrize(
    "text",
    ["name=vit,weights=/etc/x,reference={folder}", "name=vit,reference=../../etc", "/etc", "a=~/x"],
)
def test_a_path_inside_of_an_option_is_looked_at(tmp_path, text):
    fields = {"checkpoint": str(tmp_path), "features": text.replace("{folder}", str(tmp_path))}
    place = workplace(tmp_path / "runs")
    with pytest.raises(ValueError, match="--features is .*outside"):
        JobRequest(place, "evaluate", fields).preview()
    fields["features"] = f"name=vit_small,weights={tmp_path}/x,reference={tmp_path}"
    assert "--features=name=vit_small" in JobRequest(place, "evaluate", fields).preview()
    fields["prompts"] = "/etc/prompts.yaml"  # here a file, not what to draw
    with pytest.raises(ValueError, match="--prompts is .*outside"):
        JobRequest(place, "evaluate", fields).preview()


def test_torchrun_starts_several_processes(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    place = dataclasses.replace(workplace(tmp_path / "runs"), automatic="cuda:0")
    added = []
    monkeypatch.setattr(place.store.__class__, "add", lambda store, *given: added.append(given))
    fields = {"config": CONFIG, "train_cache_dir": str(tmp_path / "cache"), "nproc_per_node": "2"}
    request = JobRequest(place, "train", fields)
    line = request.preview()
    assert line.startswith("torchrun --standalone --nproc_per_node=2 -m mmdit train --config=")
    request.start()
    _, words, device, run, out, processes = added[0]
    job = Job("00001", words, device, 0.0, run, out, processes)
    assert job.line == line and job.devices == {"cuda:0", "cuda:1"}
    assert job.argv[1:5] == ["-m", "torch.distributed.run", *line.split()[1:3]]
    wrong = ({"nproc_per_node": "x"}, {"nproc_per_node": "0"}, {"device": "cuda:1"})
    for more in wrong:
        with pytest.raises(ValueError, match="processes"):
            JobRequest(place, "train", fields | more).start()
    with pytest.raises(ValueError, match="one process"):
        JobRequest(place, "sample", {"checkpoint": "x", "nproc_per_node": "2"}).preview()


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../../../etc", "~/x", "assets/../../../x", "a\0", "/etc/x=1", "/etc/a=/../x"],
)
@pytest.mark.parametrize("field", ["checkpoint", "out", "lora", "image", "refine"])
def test_a_path_outside_of_the_folders_is_refused(tmp_path, field, path):
    fields = {"checkpoint": str(tmp_path), "prompts": "a star"} | {field: path}
    with pytest.raises(ValueError, match="outside|must be|no command line"):
        JobRequest(workplace(tmp_path / "runs"), "sample", fields).preview()


def test_a_job_of_another_version_or_of_another_program_stops_no_other(tmp_path):
    store, whole = JobStore(tmp_path), {"words": ["train"], "device": "cpu", "created": 1.0}
    rows = {"00001": whole | {"id": "00001", "of_a_later_version": 1}, "00002": [1]}
    rows |= {"00003": {"id": "00003"}, "00004": whole | {"id": "00004", "words": []}}
    for name, row in rows.items():
        (tmp_path / ".jobs" / name).mkdir(parents=True)
        (tmp_path / ".jobs" / name / "job.json").write_text(json.dumps(row))
        (tmp_path / ".jobs" / name / "status.json").write_text("[1]")
    assert [job.id for job in store.jobs()] == ["00001"]
    assert store.state(store.read("00001")).word == "lost"


ODD_JOBS = [
    *({"created": value} for value in ("x", None, 1e300, float("nan"))),
    *({"words": words} for words in ([1], "train")),
    *({name: 5} for name in ("device", "run", "out")),
    *({"out": "a\0b"}, {"processes": "2"}, {"id": "../../x"}),
]
ODD_STATES = [
    *({"child": value} for value in ("xy", [1], {"a": 1}, ["1", 2])),
    *({"runner": value} for value in (5, [], [None, None])),
    {"ended": 1.0, "exit": "x"},
]


@pytest.mark.parametrize("row", [*ODD_JOBS[:4], *thorough(*ODD_JOBS[4:])], ids=str)
def test_a_job_file_that_is_none_of_ours_takes_no_page_down(tmp_path, row):
    """The runs of others are looked at, too."""
    whole = {"id": "00001", "words": ["train"], "device": "cpu", "created": 1.0, "run": None}
    folder = tmp_path / "runs" / ".jobs" / "00001"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(whole | row))
    client = browser(tmp_path / "runs")
    assert [client.get(path).status_code for path in ("/jobs", "/", "/playground?job=00001")] == [
        200
    ] * 3
    assert client.get("/job/00001").status_code == 404


@pytest.mark.parametrize("status", ODD_STATES, ids=str)
def test_a_state_that_is_none_of_ours_takes_no_page_down(tmp_path, status):
    folder = tmp_path / "runs" / ".jobs" / "00001"
    folder.mkdir(parents=True)
    whole = {"id": "00001", "words": ["train"], "device": "cpu", "created": 1.0}
    (folder / "job.json").write_text(json.dumps(whole))
    (folder / "status.json").write_text(json.dumps(status))
    client = browser(tmp_path / "runs")
    assert [client.get(path).status_code for path in ("/jobs", "/job/00001")] == [200, 200]
    assert send(client, "/job/00001/stop").status_code == 303


def test_a_job_of_a_clock_that_was_set_back_does_not_hold_its_device(tmp_path):
    """Its runner never came, and jobs behind it would wait until the old time is reached."""
    folder = tmp_path / ".jobs" / "00001"
    folder.mkdir(parents=True)
    row = {"id": "00001", "words": ["train"], "device": "cpu", "created": time.time() + 9e4}
    (folder / "job.json").write_text(json.dumps(row))
    store = JobStore(tmp_path)
    assert store.state(store.read("00001")).word == "lost"


def test_the_runner_of_a_removed_job_writes_nothing_into_the_next_of_its_number(tmp_path):
    folder = tmp_path / ".jobs" / "00001"
    for created in (1.0, 2.0):
        folder.mkdir(parents=True)
        row = {"id": "00001", "words": ["train"], "device": "cpu", "created": created}
        (folder / "job.json").write_text(json.dumps(row))
        if created == 1:
            runner = Runner(folder)
            runner.note(started=1.0)
            assert JobStore(tmp_path).status("00001")["started"] == 1
            shutil.rmtree(folder)
            runner.note(stop_asked=2.0)  # nor does it end by an error
    runner.note(ended=3.0, exit=0)
    assert JobStore(tmp_path).status("00001") == {}


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_full_disk_loses_no_job(tmp_path, monkeypatch):
    """What could not be written is written when there is room again, also what a job that has
    ended ended with."""
    store = JobStore(tmp_path)
    folder = store.reserve()
    row = {"id": folder.name, "words": ["-c", "pass"], "device": "cpu", "created": time.time()}
    (folder / "job.json").write_text(json.dumps(row))
    failures = iter([1, 1, 1, 0, 1, 1, 0])

    def full_for_a_while(path, text):
        if next(failures, 0):
            full()
        path.write_text(text)

    monkeypatch.setattr(job_runner, "write_atomically", full_for_a_while)
    monkeypatch.setattr(job_runner, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(job_runner.signal, "signal", lambda *_: None)
    monkeypatch.setattr(job_runner, "print", full, raising=False)
    status = str(folder / "status.json")  # the job ends once its start could be written
    lines = ["import os, time", f"while not os.path.exists({status!r}): time.sleep(0.01)"]
    lines.append("raise SystemExit(3)")
    monkeypatch.setattr(Job, "argv", [sys.executable, "-c", "\n".join(lines)])
    Runner(folder).run()
    assert store.status(folder.name)["exit"] == 3 and next(failures, None) is None


def test_jobs_that_ended_are_looked_at_once(tmp_path, monkeypatch):
    store = JobStore(tmp_path)
    for number in range(4):
        folder = store.reserve()
        row = {"id": folder.name, "words": ["x"], "device": "cpu", "created": time.time()}
        (folder / "job.json").write_text(json.dumps(row))
        (folder / "status.json").write_text(json.dumps({"ended": 1.0, "exit": 1} if number else {}))
    runner, read = Runner(folder), []
    original = JobStore.read
    monkeypatch.setattr(JobStore, "read", lambda *args: read.append(args[1]) or original(*args))
    assert runner.waits() and runner.waits()
    assert read == ["00001", "00002", "00003", "00001"]


def test_a_job_waits_for_one_before_it_that_is_still_being_written(tmp_path):
    """Two browsers start jobs at once: the first has its number, and its form is still read."""
    store = JobStore(tmp_path)
    first, second = store.reserve(), store.reserve()
    row = {"id": second.name, "words": ["x"], "device": "cpu", "created": time.time()}
    (second / "job.json").write_text(json.dumps(row))
    runner = Runner(second)
    assert runner.waits()
    (second / "job.json").write_text(json.dumps(row | {"device": None}))
    assert not Runner(second).waits()
    os.utime(first, (1.0, 1.0))  # it never came to be
    assert not runner.waits()
    (first / "job.json").write_text(json.dumps(row | {"id": first.name, "device": "cuda:0"}))
    assert not runner.waits()


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


@pytest.mark.parametrize("given", ["train_images.jsonl", "records.txt", ""])
def test_metadata_is_looked_at_whatever_its_suffix_and_in_its_folder(tmp_path, given):
    path = tmp_path / (given or "val_videos.jsonl")
    path.write_text(' \ufeff\n {"id": "a", "video_path": "/etc/x.mp4"}\n')
    with pytest.raises(ValueError, match="--meta_jsonl, line 2: video_path is .*outside"):
        AllowedFolders([tmp_path]).check(str(tmp_path / given), "--meta_jsonl")


@pytest.mark.parametrize("outside", ["/etc/x.png", "../../x.png", "~/x.png", "link.png"])
def test_what_a_metadata_file_names_is_looked_at(tmp_path, outside):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "link.png").symlink_to("/etc/passwd")
    lines = [{"id": "a", "image_path": "a.png"}, {"id": "b", "image_path": outside}]
    path = folder / "train.jsonl"
    path.write_text("no record\n[1]\n" + "".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="--meta_jsonl, line 4: image_path is .*outside"):
        AllowedFolders([folder]).check(str(path), "--meta_jsonl")
    path.write_text(json.dumps(lines[0]))
    assert AllowedFolders([folder]).check(str(path)) == path


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


def test_a_job_can_be_stopped_before_its_runner_is_there(store):
    job = start(store, "print('ran')")
    store.stop(job.id)  # its runner is still being imported
    assert wait(store, job, lambda state: state.is_over).reason == "before it was started"
    assert "ran" not in store.log(job.id)


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


def test_jobs_that_share_one_of_their_devices_wait(store):
    first = start(store, WAITS, "cuda:0,cuda:1")
    wait(store, first, has("running"))
    second, other = start(store, "", "cuda:1,cuda:2"), start(store, "", "cuda:2")
    wait(store, second, lambda state: "waits" in state.reason)
    assert store.state(other).word == "queued"  # behind the second
    store.stop(first.id)
    assert wait(store, second, has("finished")) and wait(store, other, has("finished"))


def test_a_launcher_is_left_alone_and_its_processes_are_asked(store):
    """torchrun would kill after 30 seconds what still saves."""
    child = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )
    code = (
        "import signal, subprocess, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\n"
        f"print('child ended with', subprocess.call([sys.executable, '-c', {child!r}]))"
    )
    job = start(store, code, processes=2)
    wait(store, job, lambda state: "ready\n" in store.log(job.id))
    store.stop(job.id)
    wait(store, job, has("stopped"))
    assert "child ended with 7" in store.log(job.id)


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
    new = store.read(send(client, f"/job/{job.id}/again").headers["location"].rpartition("/")[2])
    file = store.path(new.id) / "prompts.txt"  # its own: the old job may be removed
    assert f"--prompts_file={file}" in new.words and text_of(file).splitlines() == prompts
    wait(store, new, lambda state: state.is_over)
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


def test_a_job_has_the_configuration_that_it_was_started_with(store, tmp_path):
    """Also where the file is edited or removed while the job waits, and when it is run again."""
    client, config = browser(tmp_path / "runs"), tmp_path / "my config.yaml"
    shutil.copy(find(CONFIG), config)
    (tmp_path / "cache").mkdir()
    fields = {"config": str(config), "train_cache_dir": str(tmp_path / "cache"), "device": "cpu"}
    answer = send(client, "/new/train", **fields, **{"set:train.lr": "0.5"}, do="start")
    job = store.read(answer.headers["location"].rpartition("/")[2])
    config.unlink()
    wait(store, job, lambda state: state.is_over)
    new = store.read(send(client, f"/job/{job.id}/again").headers["location"].rpartition("/")[2])
    wait(store, new, lambda state: state.is_over)
    shutil.rmtree(store.path(job.id))
    given, lr = new.words[1:3]
    path = Path(given.removeprefix("--config="))
    assert path == store.path(new.id) / "config-my config.yaml" and lr == "train.lr=0.5"
    assert path.read_bytes() == find(CONFIG).read_bytes()


def test_a_job_runs_where_it_was_made(store, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    code = "import os; print(os.getcwd())"
    job, gone = start(store, code, cwd=str(other)), start(store, code, cwd=str(tmp_path / "gone"))
    here = start(store, code)
    assert wait(store, job, has("finished")) and f"{other}\n" in store.log(job.id)
    assert wait(store, here, has("finished")) and f"{tmp_path}\n" in store.log(here.id)
    assert "gone" in wait(store, gone, has("failed")).reason


def test_a_training_is_continued_with_resume(store, tmp_path):
    place = workplace(tmp_path / "runs")
    run = tmp_path / "runs" / "one"
    checkpoint = run / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").touch()
    words = ["train", f"--config={CONFIG}", "--train_cache_dir=x"]
    old = store.add(store.reserve(), words, "cpu", str(run))
    wait(store, old, lambda state: state.is_over)
    answer = send(browser(tmp_path / "runs"), f"/job/{old.id}/again")
    new = store.read(answer.headers["location"].rpartition("/")[2])
    assert new.words == [*words, "--resume"] and new.run == old.run
    client = browser(tmp_path / "runs")
    assert client.get(f"/api/job/{new.id}").json()["run"] is None  # its page would find no run
    (run / "config.yaml").touch()
    assert client.get(f"/api/job/{new.id}").json()["run"] == "one"
    assert place.store.by_run()[run][0] == new.id


def test_a_training_that_has_saved_nothing_begins_again_without_resume(store, tmp_path):
    """With it the command would end, for there is nothing to go on from: what a kill left half
    written is no checkpoint."""
    run = tmp_path / "runs" / "one"
    (run / "checkpoints" / ".writing-step_00000002-a1").mkdir(parents=True)
    words = ["train", f"--config={CONFIG}", "--train_cache_dir=x"]
    old = store.add(store.reserve(), words, "cpu", str(run))
    wait(store, old, lambda state: state.is_over)
    answer = send(browser(tmp_path / "runs"), f"/job/{old.id}/again")
    assert store.read(answer.headers["location"].rpartition("/")[2]).words == words


def test_blanks_around_a_folder_are_no_part_of_it(tmp_path):
    fields = {"config": CONFIG, "meta_jsonl": "x.jsonl", "out_dir": f" {tmp_path}/cache "}
    request = JobRequest(workplace(tmp_path / "runs"), "cache-images", fields)
    assert f"--out_dir={tmp_path}/cache" in request.preview()
    assert request._out(tmp_path) == str(tmp_path / "cache")


def test_a_full_disk_is_told_where_a_job_is_run_again_or_stopped(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / ".jobs" / "00001"
    folder.mkdir(parents=True)
    row = {"id": "00001", "words": ["train"], "device": "cpu", "created": 1.0}
    (folder / "job.json").write_text(json.dumps(row))
    client = browser(tmp_path / "runs")
    for name, what in (("reserve", "again"), ("stop", "stop")):
        monkeypatch.setattr(JobStore, name, full)
        answer = send(client, f"/job/00001/{what}")
        assert answer.status_code == 400 and "No space left on device" in answer.text


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
    for name in ("ui", "push", "%2e%2e", "quickstart"):
        assert client.get(f"/new/{name}").status_code == 404
        assert send(client, f"/new/{name}", do="start").status_code in (404, 405)
