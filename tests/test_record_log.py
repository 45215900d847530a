"""The record log: what counts as a record and what does not, each reason by itself; its tests of
significance against closed forms; its tables are what its files say."""

import json
import math
import re
import statistics
import subprocess
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from mmdit.commands import code_version
from mmdit.commands import reproduce as command
from mmdit.commands.reproduce import Chain, code_hash, commit
from mmdit.config import ConfigError, decode, encode, load
from mmdit.diagnostics.recipe import Recipe, read_recipe, stage_hash
from mmdit.diagnostics.results_file import results
from mmdit.diagnostics.significance import mean_above, share_above, student_tail
from mmdit.diagnostics.speed_record import recipe_faults, record_faults, record_seconds, verdict
from mmdit.diagnostics.tracks import TRACKS
from mmdit.experiment.build import build_learner
from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.interfaces import LatentSpec
from mmdit.scripts import reproduce
from tests.test_reproduce import Commands, check_stages, make, rate, tiny

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted(path.parent.relative_to(ROOT) for path in ROOT.glob("records/*/*/recipe.yaml"))
PICTURES, CLIPS = "records/pictures_128/001_muon", "records/clips_128/001_muon"
ROAD = "records/road/001_five_stages"
H200 = {"device": "NVIDIA H200", "torch": "2.11.0", "mmdit": "0.2.0", "python": "3.12.3"}
TRAINING = {"steps": 1000, "samples": 256000, "loop_seconds": 30.0, "loss": 0.1}
TRAINING |= {"first_steps_extra_seconds": 8.0, "step_seconds": 0.02}
HELD_OUT = [250, 248, 251, 249, 252]  # of 256

assert make  # the fixture that loads docs/make_results.py


@pytest.fixture(autouse=True)
def top_level(monkeypatch):
    """Recipes name their configs from the top of the repository."""
    monkeypatch.chdir(ROOT)


# ── significance ──
@pytest.mark.parametrize(
    "t, freedom, p",
    [
        *[(31.82052, 1, 0.01), (6.964557, 2, 0.01), (4.540703, 3, 0.01), (3.746947, 4, 0.01)],
        *[(3.364930, 5, 0.01), (2.821438, 9, 0.01), (2.131847, 4, 0.05), (0.0, 4, 0.5)],
        (-2.131847, 4, 0.95),
    ],
)
def test_students_tail_is_that_of_the_tables(t, freedom, p):
    assert student_tail(t, freedom) == pytest.approx(p, rel=1e-5)


@pytest.mark.parametrize("freedom", [1, 2, 4, 5, 12, 31])
def test_students_tail_is_the_integral_of_its_density(freedom):
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    scale /= math.sqrt(freedom * math.pi)
    width, steps = 1.7, 2000
    points = [(i + 0.5) * width / steps for i in range(steps)]
    inside = sum(scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2) for x in points)
    assert student_tail(width, freedom) == pytest.approx(0.5 - inside * width / steps, abs=1e-7)


@pytest.mark.parametrize("correct, count", [(1240, 1280), (1216, 1280), (10, 10), (0, 7), (3, 320)])
def test_the_binomial_tail_is_the_exact_sum(correct, count):
    level = Fraction(95, 100)
    terms = (
        math.comb(count, k) * level**k * (1 - level) ** (count - k)
        for k in range(correct, count + 1)
    )
    assert share_above(correct, count, 0.95) == pytest.approx(float(sum(terms)), rel=1e-9)


def test_the_mean_of_seeds_is_tested_with_their_spread():
    values = [0.96, 0.97, 0.98, 0.99, 1.0]  # t = 3 sqrt(2), of which nine parts in eleven are sine
    p = (1 - math.sqrt(9 / 11) * (1 + 1 / 11)) / 2
    assert mean_above(values, 0.95) == pytest.approx(p, rel=1e-9) and p < 0.01
    assert mean_above([0.90, 1.0, 0.965, 0.96, 1.0], 0.95) > 0.2, "seeds that do not agree"
    assert mean_above([0.96] * 5, 0.95) == 0 and mean_above([0.95] * 5, 0.95) == 1
    assert mean_above([0.99], 0.95) == 1, "one seed has no spread"


@pytest.mark.parametrize(("count", "quantile"), [(2, 12.7062), (3, 4.30265), (5, 2.77645)])
def test_a_mean_reaches_as_far_as_tables_say(make, count, quantile):
    values = [0.1 * k * k for k in range(count)]
    expected = quantile * statistics.stdev(values) / count**0.5
    assert make.mean_reach(values) == pytest.approx(expected, rel=1e-5)


# ── what counts ──
def records_of(name: str, held_out=HELD_OUT, left_right=None, count=256, **changes) -> list[dict]:
    """Return the records of the seeds of a recipe as if it had been run: correct held-out prompts
    of each. `changes`: other values of their machine, version, training, attempts."""
    recipe, seeds = read_recipe("results", name), []
    version = {"code": changes.get("code", "c0de"), "commit": changes.get("commit", "c0ffee")}
    for seed, correct in enumerate(held_out):
        rates = {key: rate(correct, count) for key in ("seen", "held_out", "ceiling", "control")}
        if left_right:
            rates["left_right"] = rate(left_right[seed], 100)
        stages = {}
        for stage in recipe.stages:
            caching = {"caching": 20.0} if stage.cache else {}
            stages[stage.name] = {
                "seconds": {"training": 45.0, "scoring x": 30.0} | caching,
                "attempts": changes.get("attempts", 1),
                "training": changes.get("training", TRAINING),
                "scores": {score.name: rates for score in stage.scores},
                "untimed": seed in changes.get("untimed", []),
            }
        machine = changes.get("machine", H200)
        seeds.append({"seed": seed, "versions": [version], "machine": machine, "stages": stages})
    return seeds


def record(name: str, **changes) -> dict:
    """Return the results file of such records."""
    return results(name, read_recipe("results", name), records_of(name, **changes))


def test_a_record_that_keeps_the_rules_counts():
    for name, rates in (
        (PICTURES, {}),
        (CLIPS, {"left_right": [100, 99, 100, 100, 98]}),
        (ROAD, {"left_right": [100] * 5, "held_out": [127, 125, 126, 126, 125], "count": 128}),
    ):
        made, recipe = record(name, **rates), read_recipe("results", name)
        assert record_faults(made, recipe) == []
        lines, counts = verdict(made, recipe)
        assert counts and lines[-1] == "it counts" and "held_out above 0.95: p = " in lines[2]
        assert (" s; of it caching 60.0 s, apart from it first" in lines[1]) == (name == ROAD)


REASONS = {
    "too few seeds": ({"held_out": HELD_OUT[:4]}, r"\[0, 1, 2, 3\], and must be 0 to 4"),
    # the prompts together are above, but the seeds are too different
    "spread": (
        {"held_out": [256, 256, 256, 256, 225]},
        r"p = 0.1.* \(seeds 0.1.*, prompts 2.*e-06\)",
    ),
    # the seeds are alike, but the prompts too few for what they show
    "binomial": ({"held_out": [245] * 5}, r"p = 0.1.* \(seeds 0, "),
    "below": ({"held_out": [240] * 5}, r"p = 1 \(seeds 1, "),
    "card": ({"machine": H200 | {"device": "NVIDIA A100-SXM4-80GB"}}, "ran on NVIDIA A100"),
    "CPU": ({"machine": H200 | {"device": "CPU, threads: 2"}}, "ran on CPU.*H100 or H200"),
    "like a card": ({"machine": H200 | {"device": "NVIDIA GH200 480GB"}}, "ran on NVIDIA GH200"),
    "uncommitted": ({"commit": None}, "configs or recipe were not committed"),
    "stopped": ({"attempts": 2}, "a training of pictures was stopped"),
    "prompts": ({"held_out": [128] * 5, "count": 128}, "640 held-out prompts .* and 1280 must be"),
}


@pytest.mark.parametrize("name", REASONS)
def test_a_record_does_not_count_for_each_reason_alone(name):
    changes, reason = REASONS[name]
    made, recipe = record(PICTURES, **changes), read_recipe("results", PICTURES)
    faults = record_faults(made, replace(recipe, seeds=tuple(made["seeds"])))
    assert len(faults) == 1 and re.search(reason, faults[0]), faults
    said, counts = verdict(made, recipe)
    assert not counts and f"  {faults[0]}" in said


def test_seeds_of_other_machines_or_code_do_not_count_together():
    made, recipe = record(PICTURES), read_recipe("results", PICTURES)
    mixed = made | {"machine": [H200, H200 | {"torch": "2.14"}]}
    assert "different machines" in record_faults(mixed, recipe)[0]
    for changes in ({"commit": ["a", "b"]}, {"code": ["a", "b"]}):
        assert "code has changed" in record_faults(made | changes, recipe)[0]


def test_seeds_are_those_of_the_recipe_and_none_is_chosen():
    recipe = read_recipe("results", PICTURES)
    assert "those of the recipe [0, 1, 2, 3, 4]" in recipe_faults(recipe, range(6))[0]
    chosen = (0, 1, 2, 3, 7)
    assert "must be 0 to 4" in recipe_faults(replace(recipe, seeds=chosen), chosen)[0]


def test_what_was_changed_since_does_not_count():
    recipe = read_recipe("results", PICTURES)
    made, plain = record(PICTURES), encode(recipe)
    for key, value in (
        ("overrides", ["train.max_steps=900"]),
        ("cache", "cache-moving-shapes --count 40000"),
        ("name", "other"),
    ):
        stage = plain["stages"][0] | {key: value}
        changed = decode(Recipe, plain | {"stages": [stage]})
        said, counts = verdict(made, changed)
        assert not counts and said[-1] == "  the recipe or a config has changed since", key


def test_clips_must_move_left_and_right_as_asked():
    recipe = read_recipe("results", CLIPS)
    assert "left_right was not measured" in record_faults(record(CLIPS), recipe)
    faults = record_faults(record(CLIPS, left_right=[95, 97, 96, 94, 95]), recipe)
    assert len(faults) == 1 and faults[0].startswith("left_right is not above 0.95 with p < 0.01")


@pytest.mark.parametrize(
    "stage, reason",
    [
        ({"overrides": ["video.width=64"]}, "draws 1 frames of 64x128, not 1 frames of 128x128"),
        (
            {"overrides": ["bucketing={enabled: true, buckets: [[256, 64], [128, 128]]}"]},
            "draws 1 frames of 256x64",
        ),
        ({"overrides": ["train.init_from=assets/x.safetensors"]}, "does not train: assets/x"),
        ({"overrides": ["tokenizer={type: vtp, name_or_path: other}"]}, "another tokenizer"),
        ({"tokenizer": "train-vtp --config VTP/configs/x.yaml"}, "another tokenizer"),
        ({"cache": "cache-images --input x"}, "made by cache-images"),
        ({"cache": "cache-moving-shapes --variant many"}, "has --variant, and may have"),
        ({"scores": [{"name": "s", "evaluate": "--raw_weights"}]}, "has --raw_weights, and may"),
        ({"scores": [{"name": "s", "evaluate": "video.num_frames=4"}]}, "has video.num_frames=4"),
        ({"scores": []}, "the last stage, has no score"),
    ],
)
def test_a_recipe_that_could_not_count_is_known_before_it_runs(stage, reason):
    plain = encode(read_recipe("results", PICTURES))
    recipe = decode(Recipe, plain | {"stages": [plain["stages"][0] | stage]})
    assert any(reason in fault for fault in recipe_faults(recipe, recipe.seeds))


def test_weights_of_others_do_not_count():
    recipe = decode(
        Recipe,
        {
            "title": "t",
            "track": "pictures_128",
            "seeds": [0, 1, 2, 3, 4],
            "stages": [{"name": "a", "checkpoint": "assets/x", "scores": [{"name": "s"}]}],
        },
    )
    assert "weights that the record does not train" in recipe_faults(recipe, recipe.seeds)[0]


def test_an_unknown_track_is_refused():
    plain = encode(read_recipe("results", PICTURES))
    with pytest.raises(ConfigError, match="track: is 'x', must be one of pictures_128, "):
        decode(Recipe, plain | {"track": "x"})


# ── seconds ──
def test_compiling_start_and_caching_stand_apart_and_caching_counts_on_the_road():
    seconds = record_seconds(record(CLIPS), TRACKS["clips_128"])
    assert seconds == (2 * (30.0 - 8.0), 2 * 8.0, 2 * (45.0 - 30.0), 2 * 20.0)
    seconds = record_seconds(record(ROAD), TRACKS["road"])
    assert seconds.counted == 5 * (30.0 - 8.0) + 3 * 20.0 and seconds.caching == 3 * 20.0


def test_seeds_that_were_not_timed_are_named_and_one_must_be(make, tmp_path):
    recipe, track = read_recipe("results", PICTURES), TRACKS["pictures_128"]
    some, none = (record(PICTURES, untimed=seeds) for seeds in ([1, 3], [0, 1, 2, 3, 4]))
    assert record_faults(some, recipe) == []
    assert record_seconds(some, track) == record_seconds(record(PICTURES), track)
    assert record_seconds(none, track) is None
    said, counts = verdict(none, recipe)
    assert not counts and "timed in no seed" in said[-1]
    for name, made in (("001_a", some), ("002_b", none)):
        folder = tmp_path / "pictures_128" / name
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(json.dumps(encode(recipe)))
        (folder / "recipe.json").write_text(json.dumps(made))
    table = make.record_table("pictures_128", tmp_path)
    assert "- `001_a`: pictures was not timed with the seeds [1, 3]" in table
    assert "| 002_b | not timed | not timed |" in table


def test_first_steps_that_are_not_told_apart_count():
    few = {key: TRAINING[key] for key in ("steps", "samples", "loop_seconds", "loss")}
    assert record_seconds(record(PICTURES, training=few), TRACKS["pictures_128"]).counted == 30.0
    faster = TRAINING | {"first_steps_extra_seconds": -2.0}
    assert record_seconds(record(PICTURES, training=faster), TRACKS["pictures_128"]).counted == 30.0


# ── the log ──
@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_a_recipe_of_the_log_may_count_and_holds_its_configs(folder):
    recipe = load(Recipe, ROOT / folder / "recipe.yaml")
    check_stages(recipe)
    assert folder.parts[1] == recipe.track and re.match(r"\d{3}_\w+$", folder.name)
    assert recipe_faults(recipe, recipe.seeds) == []
    assert all(Path(stage.config).parent == folder for stage in recipe.stages)
    for stage in recipe.stages:
        config = load_experiment_config(stage.config, stage.overrides)
        with torch.device("meta"):
            build_learner(config, LatentSpec(config.tokenizer.latent_d, config.tokenizer.latent_f))


def test_every_track_has_a_recipe_and_a_table():
    page = (ROOT / "records/README.md").read_text(encoding="utf-8")
    assert {folder.parts[1] for folder in FOLDERS} == TRACKS.keys()
    assert re.findall(r"<!-- records: (\w+) -->", page) == list(TRACKS)


def test_a_table_has_the_fastest_first_and_says_why_others_do_not_count(make, tmp_path):
    page = "<!-- records: pictures_128 -->\nold\n<!-- end of records -->\n"
    empty = make.renewed(page, records=tmp_path)
    assert "old" not in empty and "in at most 30 s.\n\nThere is no record yet." in empty
    recipe = read_recipe("results", PICTURES)
    slower = TRAINING | {"loop_seconds": 40.0}
    for name, made in (
        ("001_a", record(PICTURES, training=slower)),
        ("002_b", record(PICTURES)),
        ("003_c", record(PICTURES, commit=None)),
        ("004_d", None),
    ):
        folder = tmp_path / "pictures_128" / name
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(json.dumps(encode(recipe)))
        if made:
            (folder / "recipe.json").write_text(json.dumps(made))
    new = make.renewed(page, records=tmp_path)
    assert make.renewed(new, records=tmp_path) == new and "There is no record" not in new
    rows = [line for line in new.splitlines() if line.startswith("| 00")]
    beginnings = ["| 002_b | **22.0** |", "| 001_a | **32.0** |", "| 003_c | 22.0 |"]
    assert [row[: len(start)] for row, start in zip(rows, beginnings, strict=True)] == beginnings
    assert "| **22.0** | 8.0 | 15.0 | 20.0 | 0.977 [" in rows[0]
    assert "- `003_c` does not count: code, configs or recipe were not" in new
    assert "not run yet:\n\n- `004_d`: " in new and "commit c0ffee" in new


# ── the command ──
def test_the_recipe_of_a_record_must_be_committed_and_its_results_need_not_be(
    tmp_path, monkeypatch
):
    def git(*words: str) -> str:
        person = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *person, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(code_version, "ROOT", tmp_path)
    folder = tmp_path / "records" / "track" / "001_a"
    folder.mkdir(parents=True)
    git("init", "-q")
    (folder / "recipe.yaml").write_text("x")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    (folder / "recipe.json").write_text("x")
    assert commit() == git("rev-parse", "HEAD")
    (folder / "recipe.yaml").write_text("y")
    assert commit() is None


def test_what_other_machines_made_is_pooled_and_recorded_without_them(tmp_path, monkeypatch):
    """It takes the records of the seeds alone, and gives them the commit of the same code."""
    monkeypatch.setattr(command, "commit", lambda: "c0ffee")
    folder, recipe = tmp_path / "001_a", read_recipe("results", PICTURES)
    folder.mkdir()
    (folder / "recipe.yaml").write_text(json.dumps(encode(recipe)))
    for row in records_of(PICTURES, commit=None, code=code_hash()):
        row["stages"]["pictures"]["made_by"] = stage_hash(recipe, recipe.stages[0])
        (tmp_path / f"seed_{row['seed']}.json").write_text(json.dumps(row))
    assert reproduce.main([str(folder), "--record", "--out", str(tmp_path)]) == 0
    made = json.loads((folder / "recipe.json").read_text())
    assert made["commit"] == "c0ffee" and record_faults(made, recipe) == []


@pytest.mark.thorough
def test_a_cut_down_record_is_run_recorded_and_told_why_it_does_not_count(tmp_path, capsys):
    plain = encode(tiny(PICTURES)) | {"seeds": [0, 1]}
    folder = tmp_path / "pictures_128" / "001_tiny"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(json.dumps(plain))
    words = [f"{folder}/", "--record", "--device", "cpu", "--in_process", "--out", tmp_path / "out"]
    assert reproduce.main([str(word) for word in words]) == 1
    said = capsys.readouterr().out
    before, _, after = said.partition("written: ")
    told = [line for line in before.splitlines() if line.startswith("this will not count as a rec")]
    for fault in ("the seeds are [0, 1]", "another tokenizer", "draws 1 frames of 48x32"):
        assert any(fault in line for line in told) and fault in after
    assert "it does NOT count:" in after and "not on an H100 or H200" in after
    made = json.loads((folder / "recipe.json").read_text())
    assert made["seeds"] == [0, 1] and made["code"] == code_hash()
    assert (
        record_faults(made, decode(Recipe, plain))[0] != "the recipe or a config has changed since"
    )


NEWEST = {folder.parts[1]: folder for folder in FOLDERS}  # by track
MARKS = dict.fromkeys(NEWEST.values(), pytest.mark.thorough) | {NEWEST["pictures_128"]: []}


@pytest.mark.parametrize(
    "folder",
    [pytest.param(folder, marks=MARKS.get(folder, pytest.mark.slow)) for folder in FOLDERS],
    ids=str,
)
def test_a_record_goes_through_with_tiny_networks(folder, tmp_path):
    """Run every command of the recipe, in its order, and pool it."""
    recipe = tiny(str(folder))
    done = Chain(recipe, 0, tmp_path, "cpu", Commands()).run()
    made = results(str(folder), recipe, [done])
    assert record_seconds(made, TRACKS[recipe.track]).counted > 0
    lines, counts = verdict(made, recipe)
    assert not counts and "changed" not in lines[-1]
    rates = made["stages"][recipe.stages[-1].name]["scores"]
    measured = rates[recipe.stages[-1].scores[-1].name].keys()
    assert set(TRACKS[recipe.track].rates) <= measured
