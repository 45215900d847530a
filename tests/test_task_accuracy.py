"""The score of several objects: a perfect sampler has 1 in every task, one that ignores its prompts
is at the control, the oracle takes no picture that misses one thing; results
files keep the tasks."""

import importlib.util
import json
from functools import cache
from pathlib import Path

import pytest
import torch

from mmdit.config import ConfigError, decode
from mmdit.data.moving_shapes import accuracy, oracle, prompts, render
from mmdit.data.moving_shapes.facts import TASKS
from mmdit.data.moving_shapes.sentences import MANY_PROMPTS
from mmdit.diagnostics.recipe import Floors, Recipe
from mmdit.diagnostics.results_file import comparison, rates_of, results, shown_rate
from mmdit.diagnostics.task_accuracy import (
    CHANGES,
    calibration,
    format_tasks,
    task_accuracy_report,
)
from mmdit.pixels import to_unit
from mmdit.scripts import evaluate
from tests.helpers.thorough import thorough
from tests.helpers.tiny import refused
from tests.test_prompt_accuracy import Pixels

WIDTH, HEIGHT = 112, 64
ROOT = Path(__file__).resolve().parents[1]


def listed(frames):
    """Return the prompts by their place, as noise is keyed."""
    every = []
    for task in TASKS:
        for split in ("seen", "held_out"):
            every += prompts(split, frames > 1, WIDTH, HEIGHT, task)
    return every


def perfect(frames):
    def sample(captions, first):
        chosen = listed(frames)[first : first + len(captions)]
        assert [prompt.caption for prompt in chosen] == captions
        return to_unit(render([prompt.facts for prompt in chosen], WIDTH, HEIGHT, frames))

    return sample


def report_of(sample, frames=1, tokenizer=None, count=16):
    size = {"width": WIDTH, "height": HEIGHT, "frames": frames}
    return task_accuracy_report(sample, tokenizer or Pixels(), **size, count=count, batch=10)


@pytest.mark.parametrize("frames, count", [*thorough((1, 9)), (4, 2)])
def test_a_perfect_sampler_scores_one_in_every_task(frames, count):
    report = report_of(perfect(frames), frames, count=count)
    assert json.loads(json.dumps(report)) == report and report["variant"] == "many"
    assert report["prompt_accuracy"]["count"] == 6 * count == report["held_out_accuracy"]["correct"]
    assert list(report["tasks"]) == list(TASKS)
    for task, row in report["tasks"].items():
        for name in ("seen", "held_out", "truth", "ceiling"):
            assert row[name]["value"] == 1 and row[name]["count"] == count
        assert row["control"]["value"] < 0.3
        assert row["control"]["count"] == count * min(8, count - 1)
        moving = {"motion"} if frames > 1 else set()
        assert row["attributes"].keys() == {*TASKS[task], "background", *moving}
        assert sum(rate["count"] for rate in row["by_objects"].values()) == count
        expected = {"one more or fewer", "shape", "background", *moving}
        expected |= {"position"} if task == "position" else set()
        expected |= {"color"} if "color" in TASKS[task] else set()
        expected |= {"swapped colors"} if task == "attribution" else set()
        assert row["one_off"].keys() == expected
        assert all(rate["correct"] == 0 < rate["count"] for rate in row["one_off"].values())
    table = format_tasks(report)
    assert (
        table.count("1.000 [") >= 24 and f"0 of {3 * count if frames == 1 else 4 * count}" in table
    )


@cache
def ten_of(task):
    """Return the facts of ten prompts, and what is seen in pictures of them."""
    listed = [p.facts for p in prompts("seen", True, WIDTH, HEIGHT, task)[:10]]
    return listed, oracle(render(listed, WIDTH, HEIGHT, 6), "many")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_asks_for_something_else_in_one_thing(task, name):
    """What is asked otherwise is wrong, and nothing else, unless an object is missing."""
    listed, drawn = ten_of(task)
    asked = [CHANGES[name](item, i) for i, item in enumerate(listed)]
    if asked[0] is None:
        assert asked == [None] * 10
        return
    verdict = accuracy(drawn, asked)
    assert verdict["prompt_accuracy"]["correct"] == 0
    changed = {"one more or fewer": "count", "swapped colors": "color"}.get(name, name)
    for attribute, rate in verdict["attributes"].items():
        if attribute == changed:
            assert rate["correct"] == 0
        elif changed != "count":
            assert rate["value"] == 1, (attribute, rate)


def test_a_sampler_that_ignores_its_prompt_scores_as_the_control():
    def sample(captions, first):
        facts = [prompt.facts for prompt in listed(1)[5 : 5 + len(captions)]]
        return to_unit(render(facts, WIDTH, HEIGHT))

    report = report_of(sample, tokenizer=Pixels(16))
    assert report["prompt_accuracy"]["value"] < 0.1 > report["control"]["value"]
    assert report["tokenizer_ceiling"]["value"] < 0.7  # a tokenizer that keeps 16 cells shows it
    assert report["tasks"]["counting"]["attributes"]["count"]["value"] == 0  # it draws one object


def test_calibration_alone_has_a_table():
    facts = [p.facts for p in prompts("seen", False, WIDTH, HEIGHT, "position")[:6]]
    rows = {"position": calibration(Pixels(), facts, 4, (1, 3, HEIGHT, WIDTH), "cpu")}
    assert rows["position"]["ceiling"] == rows["position"]["truth"]
    assert "0 of 24" in format_tasks({"tasks": rows})


# ── results ───────────────────────────────────────────────────────────────────────────────────────
def test_results_keep_the_tasks_and_each_must_reach_its_floor(tmp_path):
    report = report_of(perfect(1), count=4)
    rates = rates_of(report)
    assert rates.keys() == {"seen", "held_out", "ceiling", "control", *TASKS}
    (tmp_path / "c.safetensors").write_bytes(b"")
    score = {"name": "s", "evaluate": "--variant many", "at_least": {"each_task": 0.9}}
    stage = {"name": "a", "checkpoint": str(tmp_path / "c.safetensors"), "scores": [score]}
    recipe = decode(Recipe, {"title": "t", "stages": [stage]})

    def record(rates):
        row = {"scores": {"s": rates}, "attempts": 1, "seconds": {"scoring s": 1.0}}
        return {"seed": 0, "machine": {}, "versions": [{"commit": "c", "code": "d"}]} | {
            "stages": {"a": row}
        }

    published = results("n", recipe, [record(rates)])
    assert published["stages"]["a"]["scores"]["s"]["counting"]["correct"] == 4
    lines, holds = comparison(published, None, recipe)
    assert holds and sum("reaches 0.900" in line for line in lines) == 6
    shown = published | {"machine": {"device": "d", "torch": "t"}}
    (tmp_path / "n.json").write_text(json.dumps(shown))
    spec = importlib.util.spec_from_file_location("make_results", ROOT / "docs/make_results.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    cells = f" {shown_rate(rates['two'])} |" * 6
    assert f"| seen prompts of | {' | '.join(TASKS)} |" in make.table(["n"], tmp_path)
    assert f"| a, s |{cells}" in make.table(["n"], tmp_path)
    low = rates | {"counting": rates["counting"] | {"value": 0.5, "correct": 2}}
    lines, holds = comparison(results("n", recipe, [record(low)]), None, recipe)
    assert not holds and [line for line in lines if "IS BELOW" in line][0].startswith(
        "a · s · counting"
    )
    with pytest.raises(ConfigError, match="each_task"):
        Floors(each_task=1.5)


# ── mistakes ──────────────────────────────────────────────────────────────────────────────────────
def test_mistakes_are_explained(capsys):
    with pytest.raises(ValueError, match=f"count is 200.*{MANY_PROMPTS}"):
        report_of(perfect(1), count=200)
    with pytest.raises(ValueError, match=r"must be \(4, 1, 3, 64, 112\)"):
        report_of(lambda captions, first: torch.zeros(1, 1, 3, 64, 112), count=4)
    words = ["--checkpoint", "none", "--variant", "many", "--prompts", "p", "--features", "f"]
    refused(capsys, evaluate.main, words, "--variant many is of moving shapes")
