"""Prompt accuracy: a perfect sampler scores 1, one that ignores its prompts is at chance, the
ceiling is the tokenizer's."""

import json

import pytest
import torch
import torch.nn.functional as F

from mmdit.data.moving_shapes import Predictions, prompts, render
from mmdit.diagnostics import prompt_accuracy, task_accuracy
from mmdit.diagnostics.prompt_accuracy import motion_report, prompt_accuracy_report
from mmdit.experiment import load
from mmdit.interfaces import LatentSpec
from mmdit.pixels import to_unit
from mmdit.scripts import evaluate
from tests.helpers.thorough import thorough
from tests.helpers.tiny import Workshop


class Pixels:
    """A tokenizer that keeps every pixel, or only averages over `cell` of them."""

    spec, fingerprint = LatentSpec(channels=3, spatial=1), "pixels"

    def __init__(self, cell=1):
        self.cell = cell

    def encode(self, pixels):
        return F.avg_pool2d(pixels.flatten(0, 1), self.cell).unflatten(0, pixels.shape[:2])

    def decode(self, latents):
        return latents.repeat_interleave(self.cell, -1).repeat_interleave(self.cell, -2)


def perfect(frames):
    """A sampler that draws the facts behind the prompt at `offset`."""
    listed = [*prompts("seen", frames > 1), *prompts("held_out", frames > 1)]

    def sample(captions, offset):
        chosen = listed[offset : offset + len(captions)]
        assert [p.caption for p in chosen] == captions
        return to_unit(render([p.facts for p in chosen], 64, 64, frames))

    return sample


def test_a_perfect_sampler_scores_one_and_the_control_scores_at_chance():
    report = prompt_accuracy_report(perfect(1), Pixels(), width=64, height=64, frames=1, batch=100)
    for name in ("prompt_accuracy", "held_out_accuracy", "tokenizer_ceiling"):
        assert (
            report[name]["value"] == 1
            and report[name]["count"] == 256
            and report[name]["low"] > 0.98
        )
    assert (
        set(report["attributes"])
        == set(report["held_out_attributes"])
        == {"color", "shape", "size", "background"}
    )
    control = report["control"]
    assert control["value"] < 0.02 and control["low"] <= control["chance"] <= control["high"]
    for name, words in (("color", 8), ("shape", 6), ("size", 2), ("background", 4)):
        assert control["attributes"][name]["chance"] == pytest.approx(1 / words, abs=0.03)
        assert control["attributes"][name]["value"] == pytest.approx(1 / words, abs=0.08)
    assert json.loads(json.dumps(report)) == report


def test_a_sampler_that_ignores_its_prompt_scores_at_chance():
    def sample(captions, offset):
        return to_unit(
            render([p.facts for p in prompts("seen", False)[3 : 3 + len(captions)]], 64, 64)
        )

    report = prompt_accuracy_report(
        sample, Pixels(16), width=64, height=64, frames=1, count=200, batch=200
    )
    assert (
        report["prompt_accuracy"]["value"] < 0.03 and report["attributes"]["color"]["value"] < 0.25
    )
    assert report["tokenizer_ceiling"]["value"] < 0.7  # a tokenizer that keeps 16 cells shows it


def test_clips_report_motion_and_a_mirrored_sampler_mixes_up_left_and_right():
    def mirrored(captions, offset):
        return perfect(6)(captions, offset).flip(-1)

    right = prompt_accuracy_report(perfect(6), Pixels(), width=64, height=64, frames=6, count=48)
    assert (
        right["motion_moving"]["value"] == right["left_right"]["value"] == 1
        and right["left_right"]["opposite"]["value"] == 0
    )
    wrong = prompt_accuracy_report(mirrored, Pixels(), width=64, height=64, frames=6, count=48)
    assert wrong["left_right"]["value"] == 0 and wrong["left_right"]["opposite"]["value"] == 1
    assert (
        0.3 < wrong["motion_moving"]["value"] < 0.7 and wrong["attributes"]["shape"]["value"] == 1
    )
    moving = sum(p.facts.objects[0].motion != "still" for p in prompts("seen", True)[:48])
    assert wrong["motion_moving"]["count"] == moving < 48


def test_opposite_counts_only_left_shown_for_right_and_right_for_left():
    facts = [p.facts for p in prompts("seen", True) if p.facts.objects[0].motion == "left"][:4]
    column = torch.zeros(4, 1, dtype=torch.long)
    motion = torch.tensor([[1], [2], [0], [-1]])  # left, right, still, nothing
    report = motion_report(
        Predictions(column[:, 0], column == 0, column[:, 0] > 0, column, column, column, motion),
        facts,
    )
    assert report["left_right"]["correct"] == 1 and report["left_right"]["opposite"]["correct"] == 1


def test_mistakes_are_explained():
    with pytest.raises(ValueError, match="count is 300.*256"):
        prompt_accuracy_report(perfect(1), Pixels(), width=64, height=64, frames=1, count=300)
    with pytest.raises(
        ValueError, match=r"shape \(2, 1, 3, 64, 64\); must be \(2, 1, 3, 128, 128\)"
    ):
        prompt_accuracy_report(perfect(1), Pixels(), width=128, height=128, frames=1, count=2)


# ── several checkpoints of a run ──
@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    shop = Workshop(tmp_path_factory.mktemp("steps"))
    kept = ["train.save_every_steps=1", "train.keep_every_steps=1"]
    shop.train("plain", *kept)
    shop.train("adapted", *kept, "lora={enabled: true, rank: 2, train_lora_only: false}")
    shop.train("longer", *kept, "train.max_steps=2")
    shop.train("longer", "--resume", *kept, "train.max_steps=3")
    return shop


def reports(shop, run: str, words: list[str], at: list[int] | None = None) -> list[dict]:
    """Return the reports of the checkpoints of two steps: of one command for each, or of one for
    `at` all of them."""
    path, out = shop.folder / "runs" / run, shop.folder / "report.json"
    common = ["--steps", "1", "--device", "cpu", "--out", str(out), *words]
    if at is not None:
        steps = list(map(str, at))
        evaluate.main(["--checkpoint", str(path), *common, "--at_steps", *steps])
        return json.loads(out.read_text())["at_steps"]
    made = []
    for step in (2, 3):
        folder = path / "checkpoints" / f"step_{step:08d}"
        evaluate.main(["--checkpoint", str(folder), *common])
        made.append(json.loads(out.read_text()))
    return made


def facts_of(report: dict) -> dict:
    """Return a report without what is another at every call."""
    return {key: value for key, value in report.items() if key != "seconds"}


@pytest.mark.parametrize(
    "run, words, built",
    [
        ("plain", ["--count", "4"], 1),
        *thorough(
            ("plain", ["--count", "4", "--raw_weights"], 1),
            ("plain", ["--count", "2", "--variant", "many"], 1),
            ("plain", ["--count", "4", "--features", "pixels", "--real", "REAL"], 1),
            ("adapted", ["--count", "4"], 2),  # merged into the weights
        ),
        ("longer", ["--count", "4"], 2),  # its last step has another config
    ],
)
def test_checkpoints_of_a_run_share_what_their_weights_do_not_change(
    shop, monkeypatch, capsys, run, words, built
):
    words = [str(shop.cache("pictures")) if word == "REAL" else word for word in words]
    alone = reports(shop, run, words)
    made: list[str] = []

    def counted(module, name: str) -> None:
        real = getattr(module, name)

        def count(*args, **options):
            made.append(name)
            return real(*args, **options)

        monkeypatch.setattr(module, name, count)

    counted(load, "build_tokenizer")
    counted(load, "build_learner")
    counted(prompt_accuracy, "tokenizer_ceiling")
    counted(task_accuracy, "calibration")
    capsys.readouterr()
    together = reports(shop, run, words, [2, 3])
    lines = capsys.readouterr().out.splitlines()
    named = [line for line in lines if line.endswith(":") and "step_" in line]
    assert [line[-9:] for line in named] == [f"{step:08d}:" for step in (2, 3)]
    assert list(map(facts_of, together)) == list(map(facts_of, alone))
    assert all(one.keys() == other.keys() for one, other in zip(together, alone))
    assert made.count("build_tokenizer") == made.count("build_learner") == built
    measured = {"tokenizer_ceiling": 0, "calibration": 6} if "many" in words else {}
    for name, times in ({"tokenizer_ceiling": 1, "calibration": 0} | measured).items():
        assert made.count(name) == times * built, name


def test_weights_change_from_step_to_step_in_one_pipeline(shop):
    """Compare the averaged weights with those of a pipeline that is loaded alone."""
    loader, folder = load.Loader("cpu"), shop.folder / "runs" / "plain" / "checkpoints"
    seen = []
    for step in (1, 3, 2):
        path = folder / f"step_{step:08d}"
        pipeline, _, again = loader.load(path)
        alone, _ = load.load_pipeline(path, "cpu")
        expected = alone.learner.state_dict()
        now = pipeline.learner.state_dict()
        assert all(torch.equal(now[name], expected[name]) for name in expected)
        assert (again, pipeline.step, pipeline.checkpoint) == (step != 1, step, path)
        seen.append({name: value.clone() for name, value in now.items()})
    assert any(not torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
