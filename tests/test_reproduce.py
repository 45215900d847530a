"""Recipes run stage by stage and are not run twice; results files pool their seeds; the tables of
the documents are what the files say."""

import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmdit.__main__ import commands
from mmdit.commands import reproduce as chains
from mmdit.commands.reproduce import Chain, code_hash, finished_results, held
from mmdit.config import ConfigError, decode, encode
from mmdit.data.moving_shapes import wilson
from mmdit.diagnostics.recipe import Recipe, read_recipe, recipe_names, stage_hash
from mmdit.diagnostics.results_file import (
    TIMES,
    comparison,
    curve,
    first_reaching,
    mean_of,
    pooled,
    training_facts,
)
from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.scripts import evaluate, reproduce
from mmdit.training.errors import RunError
from tests.drivers import gpu_arms, gpu_baselines
from tests.helpers.tiny import CONFIG, TINY_MODEL, TOKENIZER, refused
from tests.test_vtp_train import IMAGES, TINY

ROOT = Path(__file__).resolve().parents[1]
NAMES = recipe_names(ROOT / "results")
PROGRAMS = {gpu_baselines.__name__: gpu_baselines.baselines, gpu_arms.__name__: gpu_arms.arms}


def rate(correct: int, count: int) -> dict:
    low, high = wilson(correct, count)
    return {
        "value": correct / count,
        "low": low,
        "high": high,
        "correct": correct,
        "count": count,
    }


# ── recipes ──
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_names_configs_stages_and_words_that_exist(name):
    recipe = read_recipe(ROOT / "results", name)
    with program_of(recipe):
        check_stages(recipe)


def program_of(recipe: Recipe):
    """Return a context in which configs may say what they may say in the program of the recipe."""
    if recipe.module == "mmdit":
        return nullcontext()
    return PROGRAMS[recipe.module]()


def check_stages(recipe: Recipe) -> None:
    for stage in recipe.stages:
        for score in stage.scores:
            with pytest.raises(SystemExit) as end:
                evaluate.main([*shlex.split(score.evaluate), "--checkpoint", "none", "--help"])
            assert end.value.code == 0
        if stage.checkpoint:
            assert (ROOT / stage.checkpoint).is_file()
            continue
        config = load_experiment_config(ROOT / stage.config, stage.overrides)
        for step in steps_of(stage):
            kept = config.train.keep_every_steps and step % config.train.keep_every_steps == 0
            assert kept or step == config.train.max_steps, "a step whose checkpoint is gone"
        if str(config.train.init_from).startswith("runs/"):
            before = next(other for other in recipe.stages if other.name == stage.init_from)
            start = load_experiment_config(ROOT / before.config, before.overrides)
            assert str(start.run_dir) == config.train.init_from
        assert all(maker.cache.split()[0] in commands() for maker in recipe.cached_by(stage))


def steps_of(stage) -> list[int]:
    """Return the steps at which the scores of a stage are taken."""
    listed = [re.findall(r"--at_steps((?: \d+)+)", score.evaluate) for score in stage.scores]
    return [int(step) for text in listed for step in " ".join(text).split()]


def recipe_of(*stages: dict) -> Recipe:
    return decode(Recipe, {"title": "t", "stages": list(stages), "seeds": [0, 1]})


@pytest.mark.parametrize(
    "stages, message",
    [
        ([{"name": "a", "config": "x", "cache": "rm -r"}], "must begin with a caching command"),
        ([{"name": "a", "config": "x"}], "cache"),
        (
            [{"name": "a", "config": "x", "cache": "cache-images", "tokenizer": "train-vtp x"}],
            "must begin with train-vtp --config",
        ),
        ([{"name": "a"}], "config"),
        ([{"name": "../a", "checkpoint": "x"}], "no name of a file"),
        ([{"name": "a", "checkpoint": "x"}] * 2, "twice"),
        ([{"name": "a", "config": "x", "cache_of": "b"}], "must be an earlier stage that trains"),
        (
            [{"name": "a", "config": "x", "cache": "cache-moving-shapes", "beside": ["a"]}],
            r"stages\[0\].beside: is 'a', must be an earlier stage",
        ),
    ],
)
def test_a_recipe_that_cannot_be_run_is_refused(stages, message):
    with pytest.raises(ConfigError, match=message):
        recipe_of(*stages)


@pytest.mark.parametrize("module", ["http.server", "tests.drivers", "tests.drivers.a b", ""])
def test_a_recipe_runs_no_program_but_ours(module):
    stage = {"name": "a", "checkpoint": "x"}
    with pytest.raises(ConfigError, match="must be mmdit or a driver"):
        decode(Recipe, {"title": "t", "stages": [stage], "module": module})


# ── a chain ──
class Commands:
    """Runs the commands in this process, and keeps their words; `limits` stop a training early."""

    def __init__(self, limits: dict[str, int] | None = None):
        self.calls, self.limits = [], limits or {}

    def __call__(self, words):
        name, *rest = words
        self.calls.append(words)
        for stage, step in self.limits.items():
            if name == "train" and f"experiment_name={stage}" in rest:
                rest.append(f"train.max_steps={step}")
        assert importlib.import_module(f"mmdit.scripts.{commands()[name]}").main(rest) == 0

    @property
    def names(self) -> list[str]:
        return [words[0] for words in self.calls]


OUT = Path("runs/reproduce/tiny")  # as it is without --out: below the folder that one is in


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Run a recipe of two stages with two seeds, in a folder as the command takes by default; a
    training of the first is stopped once."""
    folder = tmp_path_factory.mktemp("chain")
    config = folder / "tiny.yaml"
    config.write_text(CONFIG.format(folder=folder))
    score = {"name": "s", "evaluate": "--count 2 --steps 1"}
    first = {"name": "a", "config": str(config), "cache": "cache-moving-shapes --count 8"}
    second = {"name": "b", "config": str(config), "cache_of": "a", "init_from": "a"}
    third = {"name": "c", "config": str(config), "cache": "cache-moving-shapes --count 4"}
    kept = ["train.save_every_steps=1", "train.keep_every_steps=1"]
    steps = score | {"evaluate": "--count 2 --steps 1 --at_steps 1 3"}
    recipe = recipe_of(
        first | {"scores": [steps], "overrides": ["train.batch_size=2", *kept]},
        second | {"scores": [score]},
        third | {"beside": ["b"]},
    )
    stopped, resumed = Commands({"b": 2}), Commands()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(RunError, match="b stopped at step 2 of 3"):
            Chain(recipe, 0, OUT, "cpu", stopped).run()
        records = [Chain(recipe, seed, OUT, "cpu", resumed).run() for seed in (0, 1)]
    return recipe, folder / OUT, stopped, resumed, records


def test_stages_that_are_done_are_not_run_again_and_a_stopped_training_goes_on(chain):
    recipe, out, stopped, resumed, records = chain
    assert stopped.names == ["cache-moving-shapes", "train", "evaluate", "train"]
    scored = ["train", "evaluate"]
    assert resumed.names == [*scored, "cache-moving-shapes", "train", *scored, *scored, "train"]
    assert "--resume" in resumed.calls[0] and "--resume" not in resumed.calls[4]
    assert records[0]["stages"]["b"]["attempts"] == 2
    nothing = Commands()
    assert Chain(recipe, 0, out, "cpu", nothing).run() == records[0] and not nothing.calls


def test_a_stage_starts_from_the_weights_of_the_one_before_and_of_the_same_seed(chain, capsys):
    _, _, _, resumed, records = chain
    words = resumed.calls[6]
    assert f"train.init_from={OUT}/seed_1/a" in words and "seed=1" in words
    assert records[0]["stages"]["a"]["training"] != records[1]["stages"]["a"]["training"]
    assert "caching" in records[1]["stages"]["a"]["seconds"], "whichever seed made the cache"
    assert "caching" not in records[1]["stages"]["b"]["seconds"]


def test_a_stage_trains_from_the_caches_beside_its_own_as_well(chain):
    recipe, _, _, resumed, records = chain
    words = resumed.calls[-1]
    caches = [words[i + 1] for i, word in enumerate(words) if word == "--train_cache_dir"]
    assert caches == [f"{OUT}/cache/c", f"{OUT}/cache/a"]
    commands = finished_results("tiny", recipe, records)["stages"]["c"]["commands"]
    assert "--train_cache_dir data/cache/c --train_cache_dir data/cache/a" in commands[1]
    alone = recipe_of(*(encode(stage) | {"beside": []} for stage in recipe.stages))
    assert stage_hash(alone, alone.stages[2]) != stage_hash(recipe, recipe.stages[2])


def test_results_hold_what_is_needed_to_believe_them(chain):
    recipe, _, _, _, records = chain
    made = finished_results("tiny", recipe, records)
    assert made["seeds"] == [0, 1] and made["code"] == code_hash()
    assert {"device", "torch"} <= made["machine"].keys() and made["seconds"] > 0
    row = made["stages"]["b"]
    assert row["training"]["steps"] == 3 and row["seconds"].keys() == {"training", "scoring s"}
    assert row["scores"]["s"].keys() == {"seen", "held_out", "ceiling", "control"}
    assert row["scores"]["s"]["seen"]["count"] == 4 and row["config_hash"]
    assert json.loads(json.dumps(made)) == made


def test_a_score_at_several_steps_is_a_curve_with_the_time_to_an_accuracy(chain, monkeypatch):
    recipe, _, _, _, records = chain
    rows = [record["stages"]["a"] for record in records]
    made = finished_results("tiny", recipe, records)["stages"]["a"]["curves"]["s"]
    assert [point["step"] for point in made["points"]] == [1, 3]
    assert [point["held_out"]["count"] for point in made["points"]] == [4, 4]
    assert rows[0]["curves"]["s"][1]["rates"] == rows[0]["scores"]["s"], "the last is the score"
    assert made["step_seconds"] == [row["training"]["step_seconds"] for row in rows]
    assert made["seconds_to"] == [None, None]
    before, last = (point["rates"]["held_out"] for point in rows[1]["curves"]["s"])
    monkeypatch.setitem(before, "value", 0.91)
    monkeypatch.setitem(last, "value", 0.99)
    monkeypatch.setitem(rows[1]["training"], "step_seconds", 10.0)
    assert curve(rows[1:], "s")["seconds_to"] == [20.0], "half way from step 1 to step 3"
    monkeypatch.setitem(rows[0]["training"], "step_seconds", 4.0)
    assert curve(rows, "s")["seconds_to"] == [None, 8.0], "at the pace of the fastest seed"


def test_what_was_trained_beside_other_work_counts_without_its_seconds(chain, tmp_path, make):
    recipe, _, _, _, records = chain
    timed = finished_results("tiny", recipe, records)["stages"]["a"]
    first, second = json.loads(json.dumps(records))
    second["stages"]["a"]["untimed"] = True
    row = finished_results("tiny", recipe, [first, second])["stages"]["a"]
    facts = first["stages"]["a"]
    assert row["seconds"] == mean_of([facts["seconds"]]) and row["scores"] == timed["scores"]
    assert row["training"]["step_seconds"] == round(facts["training"]["step_seconds"], 4)
    assert row["curves"]["s"]["step_seconds"] == [facts["training"]["step_seconds"], None]
    first["stages"]["a"]["untimed"] = True
    made = finished_results("tiny", recipe, [first, second])
    row = made["stages"]["a"]
    assert made["seconds"] is None and row["seconds"] == {} and row["training"]["steps"] == 3
    assert not row["training"].keys() & TIMES and row["curves"]["s"]["seconds_to"] == [None, None]
    (tmp_path / "tiny.json").write_text(json.dumps(made))
    template = "<!-- results: tiny -->\n<!-- end of results -->\n"
    page = make.renewed(template, tmp_path)
    assert "samples to 0.95 held out |\n" in page, "no column of seconds where no arm has any"
    assert "a seed in all" not in page
    made["stages"]["b"] = timed
    (tmp_path / "tiny.json").write_text(json.dumps(made))
    assert "| not timed |  |  |" in make.renewed(template, tmp_path)


def test_a_command_that_is_untimed_says_so_in_the_record(chain, tmp_path):
    recipe, out, _, _, _ = chain
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    record = json.loads((copy / "seed_0.json").read_text())
    del record["stages"]["b"]["scores"]["s"]
    (copy / "seed_0.json").write_text(json.dumps(record))
    rows = Chain(recipe, 0, copy, "cpu", Commands(), untimed=True).run()["stages"]
    assert rows["b"]["untimed"] and "untimed" not in rows["a"], "that one was done before"


def test_a_step_that_is_not_kept_is_refused(chain, capsys):
    _, out, _, _, _ = chain
    words = ["--checkpoint", out / "seed_0" / "b", "--at_steps", 1, "--device", "cpu"]
    refused(capsys, evaluate.main, words, "no checkpoint of the steps [1], but of [2, 3]")


def test_a_level_is_reached_on_the_line_between_two_points():
    points = [(100, 0.5), (200, 0.9), (300, 0.8)]
    assert [first_reaching(points, level) for level in (0.4, 0.7, 0.9)] == [100, 150, 200]
    assert first_reaching(points, 0.95) is None


def test_commands_that_share_a_folder_take_the_stages_that_no_other_works_on(tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(CONFIG.format(folder=tmp_path))
    stage = {"config": str(tmp_path / "tiny.yaml")}
    first = stage | {"name": "a", "cache": "cache-moving-shapes --count 8"}
    recipe = recipe_of(first, stage | {"name": "b", "cache_of": "a"})
    here, other = (Chain(recipe, 0, tmp_path, "cpu", Commands(), share=True) for _ in range(2))
    with held(tmp_path / "seed_0" / "a.lock", wait=False):
        assert here.run()["stages"].keys() == {"b"}, "with the cache that it made itself"
    assert "a] is left to the process that works on it" in capsys.readouterr().out
    assert other.run()["stages"].keys() == {"a", "b"}
    assert (here.execute.names, other.execute.names) == (
        ["cache-moving-shapes", "train"],
        ["train"],
    )


def test_nothing_starts_from_a_stage_that_another_process_left_half_trained(tmp_path, monkeypatch):
    recipe = recipe_of(
        {"name": "a", "config": "x", "cache": "cache-moving-shapes"},
        {"name": "b", "config": "x", "cache_of": "a", "init_from": "a"},
    )
    chain, trained = Chain(recipe, 0, tmp_path, share=True), []
    other = ExitStack()
    other.enter_context(held(tmp_path / "seed_0" / "a.lock", wait=False))
    monkeypatch.setattr(time, "sleep", lambda seconds: other.close())  # it ends before its stage
    monkeypatch.setattr(chain, "_config", lambda *_: None)
    monkeypatch.setattr(chain, "_check", lambda stage: None)
    monkeypatch.setattr(chain, "_stage", lambda stage, place: trained.append(stage.name))
    chain.run()
    assert trained == ["a", "b"]
    trained.clear()
    (tmp_path / "seed_0.json").write_text(json.dumps({"stages": {"a": {"training": {}}}}))
    monkeypatch.setattr(chain, "_has_weights", lambda stage: True)
    with held(tmp_path / "seed_0" / "a.lock", wait=False):  # it scores what it has trained
        chain.run()
    assert trained == ["b"]


class Stopped:
    """Stands for the commands of a stage, each of seven seconds; those at the places `ends` end by
    an error."""

    def __init__(self, monkeypatch, ends: dict[int, BaseException]):
        self.seconds, self.calls, self.ends, self.newest = 0.0, [], ends, None
        clock = SimpleNamespace(perf_counter=lambda: self.seconds)
        files = SimpleNamespace(latest=lambda folder: self.newest, step_of=lambda folder: 3)
        monkeypatch.setattr(chains, "time", clock)
        monkeypatch.setattr(chains, "checkpoint", files)
        monkeypatch.setattr(chains, "training_facts", lambda folder: {})

    def __call__(self, words: list[str]) -> None:
        self.calls.append(words)
        self.seconds += 7
        if words[0].startswith("cache"):
            Path(words[words.index("--out_dir") + 1]).mkdir(parents=True, exist_ok=True)
        if error := self.ends.get(len(self.calls) - 1):
            raise error
        if words[0] == "train":
            self.newest = Path("step_00000003")


def lone_stage(folder: Path) -> Recipe:
    (folder / "tiny.yaml").write_text(CONFIG.format(folder=folder))
    stage = {"name": "a", "config": str(folder / "tiny.yaml"), "cache": "cache-moving-shapes"}
    return recipe_of(stage)


def test_the_seconds_of_every_attempt_count(tmp_path, monkeypatch):
    recipe = lone_stage(tmp_path)
    run = Stopped(monkeypatch, {0: KeyboardInterrupt(), 2: KeyboardInterrupt()})
    for _ in run.ends:
        with pytest.raises(KeyboardInterrupt):
            Chain(recipe, 0, tmp_path, execute=run).run()
    seconds = Chain(recipe, 0, tmp_path, execute=run).run()["stages"]["a"]["seconds"]
    assert seconds == {"caching": 14, "training": 14}
    assert [words[0] for words in run.calls] == ["cache-moving-shapes"] * 2 + ["train"] * 2
    record = Chain(recipe, 1, tmp_path, execute=run).run()
    assert record["stages"]["a"]["seconds"]["caching"] == 14, "of the seed that made it"


def test_a_cache_beside_counts_for_the_stage_that_made_it(tmp_path, monkeypatch):
    first = encode(lone_stage(tmp_path).stages[0])
    recipe = recipe_of(first, first | {"name": "b", "beside": ["a"]})
    record = Chain(recipe, 0, tmp_path, execute=Stopped(monkeypatch, {})).run()
    assert [row["seconds"]["caching"] for row in record["stages"].values()] == [7, 7]


def test_a_run_of_this_machine_is_no_start_of_a_recipe(tmp_path, monkeypatch):
    first = encode(lone_stage(tmp_path).stages[0])
    second = first | {"name": "b", "overrides": ["train.init_from=runs/mine"]}
    run = Stopped(monkeypatch, {})
    with pytest.raises(ValueError, match="b: .* starts from runs/mine; name the stage that makes"):
        Chain(recipe_of(first, second), 0, tmp_path, execute=run).run()
    assert not run.calls, "it is said before the first stage takes its hours"


@pytest.mark.parametrize("number, passed_on", [("SIGTERM", [signal.SIGTERM]), ("SIGINT", [])])
def test_a_command_is_asked_once_to_stop(monkeypatch, number, passed_on):
    """A terminal sends Ctrl-C to it, too, and at a second one a training ends without saving."""

    class Command:
        sent, waits = [], 0

        def send_signal(self, signum):
            self.sent.append(signum)

        def wait(self):
            self.waits += 1
            if self.waits == 1:
                signal.raise_signal(getattr(signal, number))
            return 0

    command = Command()
    monkeypatch.setattr(chains.subprocess, "Popen", lambda words: command)
    with pytest.raises(KeyboardInterrupt):
        chains.run_command(["train"])
    assert command.sent == passed_on and command.waits == 2


def test_a_command_is_a_process_whose_status_is_heeded(capfd):
    chains.run_command(["--help"])
    assert "usage: mmdit COMMAND" in capfd.readouterr().out
    with pytest.raises(RunError, match="`mmdit trian` ended with status 2; see above"):
        chains.run_command(["trian"])
    assert "did you mean train?" in capfd.readouterr().err


def test_a_stage_that_succeeds_has_failed_no_longer(tmp_path, monkeypatch):
    recipe = lone_stage(tmp_path)
    run = Stopped(monkeypatch, {1: RunError("a full disk")})
    record = Chain(recipe, 0, tmp_path, execute=run, share=True).run()
    assert record["stages"]["a"]["failed"] == "a full disk"
    record = Chain(recipe, 0, tmp_path, execute=run).run()
    assert "failed" not in record["stages"]["a"] and len(run.calls) == 3


def test_seeds_that_count_twice_and_records_of_a_part_are_refused(capsys):
    words = ["smoke", "--results", ROOT / "results"]
    refused(capsys, reproduce.main, [*words, "--seeds", 1, 0, 1], "counts twice")
    refused(capsys, reproduce.main, [*words, "--share", "--record"], "--share pools nothing")


def test_a_record_keeps_what_others_have_added_meanwhile(tmp_path):
    rows = [{"name": name, "checkpoint": "x"} for name in "ab"]
    chains = [Chain(recipe_of(*rows), 0, tmp_path) for _ in rows]
    for chain, row in zip(chains, rows, strict=True):
        chain.record["stages"][row["name"]] = {"seconds": {}}
        chain._write(chain.recipe.stage(row["name"]))
    assert json.loads((tmp_path / "seed_0.json").read_text())["stages"].keys() == {"a", "b"}


def test_a_stage_that_cannot_be_is_refused_before_anything_is_run(tmp_path):
    plain = encode(tiny("arms_448"))
    plain["stages"][2]["overrides"].append("model.spatial=[everything]")
    with pytest.raises(ValueError, match="stage frame-everywhere: .*model.spatial"):
        Chain(decode(Recipe, plain), 0, tmp_path, execute=pytest.fail).run()
    recipe = read_recipe(ROOT / "results", "arms_baselines")
    message = "stage DiT.*: .*plain_dit.*made by `python -m tests.drivers.gpu_baselines reproduce"
    with pytest.raises(ValueError, match=message):
        Chain(recipe, 0, tmp_path, execute=pytest.fail).run()


def test_a_recipe_may_be_made_by_a_program_that_knows_more(chain):
    recipe, _, _, _, records = chain
    other = replace(recipe, module="tests.drivers.other")
    made = finished_results("tiny", other, records)
    assert made["command"] == "python -m tests.drivers.other reproduce tiny"
    lines = made["stages"]["b"]["commands"]
    assert all(line.startswith("python -m tests.drivers.other ") for line in lines)
    with pytest.raises(RunError, match="`tests.drivers.other evaluate` ended with status 1"):
        Chain(other, 0, Path("x")).execute(["evaluate"])


def test_what_lost_its_weights_is_trained_anew_if_they_are_still_wanted(chain, tmp_path, capsys):
    # A record that was brought from another machine has neither runs nor caches beside it.
    recipe, out, _, _, _ = chain
    path = tmp_path / "seed_0.json"
    record = json.loads((out / "seed_0.json").read_text())
    path.write_text(json.dumps(record))
    again = Commands()
    assert Chain(recipe, 0, tmp_path, "cpu", again).run() == record, "nothing is wanted any more"
    assert not again.calls
    del record["stages"]["b"]["scores"]["s"]
    path.write_text(json.dumps(record))
    facts = json.loads((out / "cache" / "a.json").read_text())
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "a.json").write_text(json.dumps(facts))
    rows = Chain(recipe, 0, tmp_path, "cpu", again).run()["stages"]
    assert again.names == ["cache-moving-shapes", "train", "train", "evaluate"], "a, for b"
    assert "b] was trained, but its weights are gone" in capsys.readouterr().out
    assert [rows[name]["attempts"] for name in "ab"] == [1, 1]
    assert rows["b"]["scores"]["s"]["seen"]["count"] == 2


def test_another_recipe_does_not_continue_what_was_begun_and_other_code_is_named(chain):
    recipe, out, _, _, _ = chain
    changed = decode(Recipe, json.loads(json.dumps(encode(recipe)).replace("size=2", "size=1")))
    with pytest.raises(ValueError, match="a was made by .* choose another --out"):
        Chain(changed, 0, out, "cpu", Commands()).run()
    before = (out / "seed_0.json").read_text()
    record = json.loads(before)
    del record["stages"]["b"]["scores"]["s"]
    record["versions"][0] = {"code": "other", "commit": "c0ffee"}
    (out / "seed_0.json").write_text(json.dumps(record))
    mixed = Chain(recipe, 0, out, "cpu", Commands())
    made = finished_results("tiny", recipe, [mixed.run()])
    (out / "seed_0.json").write_text(before)
    assert made["code"] == ["other", code_hash()] and made["commit"][0] == "c0ffee"


def test_what_was_made_without_git_gets_the_commit_of_the_same_code(chain, monkeypatch):
    recipe, _, _, _, records = chain
    monkeypatch.setattr("mmdit.commands.reproduce.commit", lambda: "c0ffee")

    def committed(code: str) -> str | None:
        versions = [{"commit": None, "code": code}]
        rows = [record | {"versions": versions} for record in records]
        return finished_results("tiny", recipe, rows)["commit"]

    assert committed(code_hash()) == "c0ffee" and committed("other") is None


def test_a_seed_waits_for_the_cache_that_another_makes_and_refuses_its_folder(tmp_path):
    path, first = tmp_path / "cache.lock", ExitStack()
    first.enter_context(held(path, wait=False))
    with pytest.raises(ValueError, match="another process works on"), held(path, wait=False):
        pass
    waits = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: (waits.append(seconds), first.close()))
        with held(path, wait=True):
            assert waits == [1]


def test_a_hash_follows_settings_and_not_comments(tmp_path):
    path = tmp_path / "c.yaml"
    recipe = recipe_of({"name": "a", "config": str(path), "cache": "cache-moving-shapes"})
    hashes = []
    for text in ("# x\nseed: 1\n", "# y\nseed: 1 # z\n", "seed: 2\n"):
        path.write_text(text)
        hashes.append(stage_hash(recipe, recipe.stages[0]))
    assert hashes[0] == hashes[1] != hashes[2]


def tiny(name: str, *stages: str) -> Recipe:
    """Return a recipe (or these stages of it) on 48x32 pictures or clips, with tiny networks that
    are trained for three steps."""
    plain = encode(read_recipe(ROOT / "results", name))
    plain["stages"] = [row for row in plain["stages"] if not stages or row["name"] in stages]
    steps = ["batch_size=2", "max_steps=3", "sample_every_steps=0"]
    steps += ["log_every_steps=1", "save_every_steps=1", "keep_every_steps=1"]
    sizes = ["video.width=48", "video.height=32", "bucketing.buckets=[[48,32],[32,32]]"]
    sizes += ["model.depth=3", "tread.apply_to=[1,2]"]  # with blocks before and behind
    # an alignment with the features of a tokenizer needs one that has features
    aligned = any("vtp_alignment" in word for row in plain["stages"] for word in row["overrides"])
    encoders = [word for word in TINY_MODEL if not word.startswith("model.")]
    encoders = [word for word in encoders if not (aligned and word == TOKENIZER)]
    for stage in plain["stages"]:
        network = [word for word in TINY_MODEL if word.startswith("model.")]
        if any("type: plain" in word for word in stage["overrides"]):
            network.remove("model.size=null")
        stage["overrides"] += [
            *encoders,
            *network,
            "num_workers=0",
            *(f"train.{word}" for word in steps),
        ]
        stage["overrides"] += sizes
        if stage["cache"]:
            stage["cache"] += " --count 4"
        for score in stage["scores"]:
            text = re.sub(r"--at_steps(?: \d+)+", "--at_steps 1 3", score["evaluate"])
            score["evaluate"] = text.replace("256", "32") + " --count 2 --steps 1"
    return decode(Recipe, plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["road", *(name for name in NAMES if name.startswith("arms"))])
def test_a_long_recipe_goes_through_with_tiny_networks(name, tmp_path):
    """Run every command of the recipe, in its order."""
    recipe = tiny(name)
    with program_of(recipe):
        record = Chain(recipe, 0, tmp_path, "cpu", Commands()).run()
        made = finished_results(name, recipe, [record])
    for stage in recipe.stages:
        row = record["stages"][stage.name]
        assert row["training"]["steps"] == 3
        assert row["scores"].keys() == {score.name for score in stage.scores}
        assert not steps_of(stage) or "curves" in made["stages"][stage.name]
    if name == "road":
        assert "left_right" in record["stages"]["t2v_vtp_256_80f"]["scores"]["A3"]


@pytest.mark.thorough
def test_plain_networks_are_trained_and_scored_as_ours_are(tmp_path):
    """Train a plain DiT on pictures, and a plain Latte on clips."""
    for name, stages in (
        ("arms_baselines", ["ours", "DiT"]),
        ("arms_baselines_clips", ["ours", "Latte"]),
    ):
        recipe, folder = tiny(name, *stages), tmp_path / name
        with program_of(recipe):
            record = Chain(recipe, 0, folder, "cpu", Commands()).run()
        row = record["stages"][stages[-1]]
        assert row["training"]["steps"] == 3 and row["scores"] and len(row["curves"]) == 1
        text = (folder / "seed_0" / stages[-1] / "config.yaml").read_text()
        assert f"type: plain_{stages[-1].lower()}" in text, "checkpoints say what they are of"


def test_a_stage_pretrains_the_tokenizer_of_its_cache(tmp_path):
    """It is done once for all seeds, and goes on where it was stopped."""
    settings = {"max_steps": 2, "warmup_steps": 1, "evaluation_samples": 4}
    content = {"output_dir": "unused", "model": TINY, "images": IMAGES, "train": settings}
    pretraining, config = tmp_path / "vtp.yaml", tmp_path / "tiny.yaml"
    pretraining.write_text(json.dumps(content))
    config.write_text(
        CONFIG.format(folder=tmp_path).replace("dummy, latent_d: 8", "vtp, latent_d: 16")
    )
    score = {"name": "s", "evaluate": "--count 2 --steps 1"}
    tokenizer = f"train-vtp --config {pretraining}"
    recipe = recipe_of(
        {"name": "a", "config": str(config), "tokenizer": tokenizer, "scores": [score]}
        | {"cache": "cache-moving-shapes --count 4"},
        {"name": "b", "config": str(config), "cache_of": "a", "scores": [score]},
    )
    out, ran = tmp_path / "out", Commands()
    records = [Chain(recipe, seed, out, "cpu", ran).run() for seed in (0, 1)]
    scored = ["train", "evaluate"]
    assert ran.names == ["train-vtp", "cache-moving-shapes", *scored, *scored, *scored, *scored]
    folder = f"{out}/tokenizers/a"
    assert f"output_dir={folder}" in ran.calls[0]
    assert all(f"tokenizer.name_or_path={folder}/export" in words for words in ran.calls[1:3])
    assert all(row["stages"]["a"]["seconds"]["tokenizer"] > 0 for row in records)
    assert "tokenizer" not in records[0]["stages"]["b"]["seconds"]

    (out / "tokenizers" / "a.json").unlink()  # as if it had been stopped after its last step
    (out / "cache" / "a.json").unlink()
    (out / "seed_1.json").unlink()
    again = Commands()
    Chain(recipe, 1, out, "cpu", again).run()
    assert "--resume" in again.calls[0] and again.names[0] == "train-vtp"

    typed = finished_results("tiny", recipe, records)["stages"]["b"]["commands"]
    named = "tokenizer.name_or_path=runs/tokenizers/a/export"
    assert named in typed[0] and typed[0].startswith("mmdit train ")
    first = finished_results("tiny", recipe, records)["stages"]["a"]["commands"]
    assert first[0] == f"mmdit {tokenizer} output_dir=runs/tokenizers/a" and named in first[1]
    pretraining.write_text(json.dumps(content | {"seed": 3}))
    with pytest.raises(ValueError, match="choose another --out"):
        Chain(recipe, 0, out, "cpu", Commands()).run()


# ── results ──
def test_seeds_are_pooled_over_their_prompts():
    made = pooled([rate(90, 100), rate(50, 100)])
    low, high = wilson(140, 200)
    assert (made["value"], made["low"], made["high"]) == (0.7, low, high)
    assert made["per_seed"] == [0.9, 0.5] and made["spread"] == pytest.approx(0.4)
    assert made["accept"] == [wilson(50, 100)[0], wilson(90, 100)[1]]


@pytest.mark.parametrize(
    "correct, floor, said, holds",
    [
        (93, None, "inside", True),
        (83, None, "its interval overlaps", True),
        (60, None, "OUTSIDE", False),
        (93, 0.95, "IS BELOW 0.950", False),
        (97, 0.95, "reaches 0.950", True),
    ],
)
def test_a_new_score_is_compared_with_the_published_one(correct, floor, said, holds):
    score = {"name": "s", "at_least": {"seen": floor}}
    recipe = recipe_of({"name": "a", "checkpoint": "x", "scores": [score]})

    def file(number: int) -> dict:
        return {"stages": {"a": {"scores": {"s": {"seen": pooled([rate(number, 100)])}}}}}

    lines, holding = comparison(file(correct), file(94), recipe)
    assert said in lines[0] and holding == holds
    assert comparison(file(97), None, recipe)[1]


def test_what_compiling_took_is_what_the_first_steps_took_beyond_the_pace(tmp_path):
    rows = [(10, 30.0), (20, 32.0), (25, 33.0), (35, 35.0)]
    lines = []
    for step, wall in rows:
        row = {"step": step, "wall_s": wall, "images_seen": 8 * step, "loss": 1.0}
        lines.append(json.dumps(row | {"samples_per_second": 40.0, "memory_gb": step}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    facts = training_facts(tmp_path)
    assert facts["first_steps_extra_seconds"] == 28.0 and facts["step_seconds"] == 0.2
    assert facts["memory_gb"] == 35 and facts["loop_seconds"] == 35


# ── documents ──
@pytest.fixture(scope="module")
def make():
    path = ROOT / "docs/make_results.py"
    spec = importlib.util.spec_from_file_location("make_results", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_what_the_results_files_say(make):
    text = "".join(page.read_text(encoding="utf-8") for page in make.PAGES)
    assert make.PLACE.search(text)
    assert make.renewed(text) == text, "run python docs/make_results.py"


def test_a_table_shows_the_rates_of_its_file(make, chain, tmp_path):
    recipe, _, _, _, records = chain
    made = finished_results("tiny", recipe, records)
    made["stages"]["b"]["scores"]["s"]["seen"] = pooled([rate(9, 10), rate(8, 10)])
    (tmp_path / "tiny.json").write_text(json.dumps(made))
    page = "x\n<!-- results: tiny -->\nold\n<!-- end of results -->\ny\n"
    new = make.renewed(page, tmp_path)
    assert "old" not in new and new.endswith("<!-- end of results -->\ny\n")
    low, high = wilson(17, 20)
    assert f"| 0.850 [{low:.3f}, {high:.3f}], seeds 0.800 … 0.900 |" in new
    assert "`mmdit reproduce tiny`" in new and "2 seeds" in new
    assert make.renewed(new, tmp_path) == new
    assert "start of commands" not in new
    made["stages"]["b"]["in_process"] = True
    (tmp_path / "tiny.json").write_text(json.dumps(made))
    assert "without the start of commands (`--in_process`)" in make.renewed(page, tmp_path)
    made["stages"]["b"] |= {"training": {"steps": 3}, "seconds": {"training": 7.4}}
    assert make.training(made["stages"]["b"]) == "3 steps, 7 s"
    assert make.training(made["stages"]["b"] | {"seconds": {}}) == "3 steps", "was not timed"


def test_arms_are_compared_at_equal_seconds_and_seed_by_seed(make, chain):
    recipe, _, _, _, records = chain
    made = finished_results("tiny", recipe, records)
    slow, fast = json.loads(json.dumps(made)), json.loads(json.dumps(made))
    for results, pace, name, more in ((slow, 10.0, "slow", 0), (fast, 6.0, "fast", 10)):
        curve = results["stages"]["a"]["curves"]["s"]
        curve["step_seconds"], curve["seconds_to"] = [pace, None], [20.0, 30.0]
        for point, correct in zip(curve["points"], (40, 80), strict=True):
            for key in ("seen", "held_out"):
                point[key] = pooled([rate(correct, 100), rate(correct + 2 * more, 100)])
        results["stages"] = {name: results["stages"]["a"]}
        results["stages"][name]["training"]["samples"] = 12  # of 3 steps
    slow["stages"]["slow"]["curves"]["s"]["seconds_to"] = [None, 30.0]
    table, sentence = make.arm_tables([slow, fast])
    lines = table.splitlines()
    assert "held out after 18 s" in lines[0] and "fast ends at step 3"
    assert lines[2].startswith("| slow |") and "3 of 4" in lines[2]
    assert lines[2].endswith("| 10000.0 ms | 0.560 | 1 of 2 seeds: 30 |")
    assert lines[3].endswith("| 6000.0 ms | 0.900 | 25, seeds 20 … 30 |")
    # ahead by 0 and 0.2: 0.1 on average, and half the range is the deviation of the mean
    assert "| +0.100 [-1.171, +1.371] |" in lines[3] and "Student" in sentence
    # the seeds end at 0.8 and 1.0 of the held-out pairs: the second is at 0.95 after 2.75 steps
    assert "| 1 of 2 seeds: 11 |" in lines[3]
    curve = fast["stages"]["fast"]["curves"]["s"]
    curve["step_seconds"] = [2.0, 2.0]
    assert "not scored yet" in make.arm_tables([slow, fast])[0].splitlines()[2]
    curve["points"][0]["step"] = 2
    assert "+0.1" not in make.arm_tables([slow, fast])[0], "scored after other numbers of samples"
    assert make.arm_tables([{"stages": {"x": {}}}]) == []


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda p: p.stem)
def test_a_results_file_has_its_recipe_and_is_complete(path):
    made, recipe = json.loads(path.read_text()), read_recipe(path.parent, path.stem)
    assert set(made["stages"]) <= {stage.name for stage in recipe.stages}
    assert made["commit"] and made["code"] and made["seeds"] and made["machine"]
    assert None not in [made["commit"], *made["commit"]]


# ── the command ──
def test_the_list_says_what_there_is_and_an_unknown_name_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    refused(capsys, reproduce.main, ["--list", "--results", tmp_path], "holds no recipe: give this")
    assert reproduce.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in NAMES) and {"smoke", "road"} <= set(NAMES)
    refused(capsys, reproduce.main, ["none"], "there is no recipe", "road")


def start(out: Path, *words: str) -> subprocess.Popen:
    path = f"{ROOT / 'VTP'}{os.pathsep}{ROOT}"
    command = [sys.executable, "-m", "mmdit", "reproduce", "smoke", "--device", "cpu"]
    return subprocess.Popen(
        [*command, "--out", str(out), *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_the_smoke_recipe_runs_whole_and_is_stopped_and_continued(tmp_path):
    first = start(tmp_path)
    while not (tmp_path / "seed_0" / "smoke_pictures" / "metrics.jsonl").exists():
        time.sleep(0.2)
        assert first.poll() is None, first.stdout.read()
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 130
    second = start(tmp_path)
    said = second.communicate()[0]
    assert second.returncode in (0, 1), said
    made = json.loads((tmp_path / "results.json").read_text())
    assert list(made["stages"]) == ["smoke_pictures", "smoke_clips"]
    assert "left_right" in made["stages"]["smoke_clips"]["scores"]["clips"]
    third = start(tmp_path)
    assert third.communicate()[0].count(" done") == 2
    assert "stage 1/2: smoke_pictures] caching" not in said
