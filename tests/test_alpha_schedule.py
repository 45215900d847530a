"""Alpha changes how fast adapters move, not what they compute; phases end on plateaus and on
nothing else."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mmdit.adapters import LoRAConfig, adapters, inject, lora_state, merge
from mmdit.adapters.strength import adapter_parameters, alphas, load_alphas, set_alpha
from mmdit.config import ConfigError, decode, encode
from mmdit.experiment.load import load_pipeline
from mmdit.scripts import train_t2v
from mmdit.training import checkpoint
from mmdit.training.alpha.schedule import (
    PRESETS,
    AlphaSchedule,
    AlphaScheduleConfig,
    ExitConfig,
    PhaseConfig,
)
from mmdit.training.alpha.trend import LossHistory
from mmdit.training.optim import Optimizer
from tests.helpers.thorough import thorough
from tests.helpers.tiny import Workshop, forget_sums, refused
from tests.test_metrics import facts


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    shop = Workshop(tmp_path_factory.mktemp("alpha"))
    shop.base = shop.train("base", "train.max_steps=8")
    return shop


def adapted(alpha=8.0, **kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))
    inject(
        model,
        LoRAConfig(
            **{"enabled": True, "rank": 4, "alpha": alpha, "target_modules": ("0", "2")} | kind
        ),
    )
    for layer in adapters(model).values():
        nn.init.normal_(layer.outer, std=0.1)
    return model


def schedule(model, optimizer=None, shadow=None, **config):
    phases = config.pop("phases", None) or (
        PhaseConfig("first", 8, exit="steps"),
        PhaseConfig("second", 14, exit="steps"),
    )
    optimizer = optimizer or Optimizer(torch.optim.AdamW(adapter_parameters(model).values()))
    return AlphaSchedule(
        AlphaScheduleConfig(True, phases=phases, **config), {"": model}, optimizer, shadow or {}
    )


def step(model, optimizer, x):
    model(x).sin().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def deltas(model):
    return torch.cat(
        [
            (layer.scale * layer.lora_B @ layer.lora_A).detach().flatten()
            for layer in adapters(model).values()
        ]
    )


# ── changing alpha ────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_preserve_changes_no_output_and_only_the_speed(kind):
    """What the next step does through B grows by α_new / α_old under AdamW, whose steps have one
    size, and by its square under SGD, whose gradient grows by it, too. Moments and averages go on
    in the new units."""
    model, x = adapted(), torch.randn(64, 12)
    outer = {name: p for name, p in adapter_parameters(model).items() if name.endswith("lora_B")}

    def make(model):
        own = [
            p for name, p in adapter_parameters(model).items() if name in outer
        ]  # B alone: what A does is as before
        return (
            torch.optim.AdamW(own, lr=1e-5, weight_decay=0)
            if kind == "adamw"
            else torch.optim.SGD(own, lr=1e-3, momentum=0.9)
        )

    optimizer = make(model)
    for _ in range(5):
        step(model, optimizer, x)
    other = copy.deepcopy(model)
    twin = make(other)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    shadow = {p: p.detach().clone() for p in other.parameters()}
    before, start = model(x), deltas(model)
    plan = schedule(other, Optimizer(twin), shadow)
    told = plan.look(10, {"": LossHistory(steps=10)})
    assert plan.alpha("") == 14 and told == [
        "step 10: alpha 8 → 14 (preserve), phase 'first' of 10 steps → 'second'"
    ]
    assert ((other(x) - before).norm() / before.norm()).item() < 1e-6
    for layer in adapters(other).values():
        torch.testing.assert_close(shadow[layer.lora_B], layer.lora_B.detach(), rtol=0, atol=0)
    step(model, optimizer, x)
    step(other, twin, x)
    grown = ((deltas(other) - start).norm() / (deltas(model) - start).norm()).item()
    assert grown == pytest.approx(14 / 8 if kind == "adamw" else (14 / 8) ** 2, rel=0.05)


def test_preserved_moments_are_those_of_a_run_in_the_new_units():
    """Adam in units of B' = r B: the same moments as if alpha had been 14 from the start, with B'
    at its place."""
    model, x = adapted(), torch.randn(64, 12)
    other = adapted()
    parts = [list(adapter_parameters(m).values()) for m in (model, other)]
    for layer in adapters(other).values():
        set_alpha(layer, 14.0, preserve=True)
    make = lambda own: torch.optim.AdamW(own, lr=1e-12, weight_decay=0)
    first, second = map(make, parts)
    for _ in range(4):
        step(model, first, x)
        step(other, second, x)
    schedule(model, Optimizer(first), phases=(PhaseConfig("only", 14),))
    for a, b in zip(*parts):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                first.state[a][name], second.state[b][name], rtol=1e-4, atol=1e-12
            )


def test_what_rounding_left_of_a_rescaled_factor_is_rescaled_too():
    """`rest` of weights in bfloat16 is in their units, moments in the inverse ones; averages in
    those of the weights."""
    model = adapted()
    factor = next(iter(adapters(model).values())).outer
    optimizer, shadow = (
        Optimizer(torch.optim.AdamW(adapter_parameters(model).values())),
        {factor: torch.ones_like(factor)},
    )
    names = {"rest": 1, "exp_avg": -1, "momentum_buffer": -1, "exp_avg_sq": -2, "step": 0}
    state = {name: torch.ones_like(factor) for name in names}
    optimizer.parts[0].state[factor] = state
    schedule(model, optimizer, shadow, phases=(PhaseConfig("only", 16),))
    for name, power in names.items():
        assert torch.equal(state[name], torch.full_like(factor, 0.5**power)), name
    assert torch.equal(shadow[factor], torch.full_like(factor, 0.5))


@pytest.mark.parametrize(
    "kind",
    [
        {"rslora": True},
        {"type": "dora"},
        {"type": "lokr", "factor": 2, "rank": 1},
        {"type": "lokr", "factor": 4, "full_second": True},
    ],
)
def test_any_kind_of_adapter_keeps_its_function_and_merges_with_the_alpha_in_force(kind):
    model, x = adapted(**kind), torch.randn(64, 12)
    before, weights = model(x), {p: p.detach().clone() for p in adapter_parameters(model).values()}
    plan = schedule(model)
    plan.look(10, {"": LossHistory(steps=10)})
    assert set(alphas(model).values()) == {14.0}
    assert ((model(x) - before).norm() / before.norm()).item() < 1e-6
    merged = copy.deepcopy(model)
    assert ((merge(merged)(x) - before).norm() / before.norm()).item() < 1e-6
    moved = {p for p in weights if not torch.equal(p, weights[p])}
    whole = kind.get("full_second")  # nothing divides by a rank there, and alpha has no say
    assert moved == (set() if whole else {layer.outer for layer in adapters(model).values()})


def test_ramp_is_linear_and_jump_is_at_once():
    model, x = adapted(), torch.randn(4, 12)
    before = model(x)
    plan = schedule(model, on_change="jump")
    plan.look(10, {"": LossHistory(steps=10)})
    assert plan.alpha("") == 14 and (model(x) - before).norm() > 1e-3 * before.norm()
    model = adapted()
    weight = next(iter(adapters(model).values())).lora_B.detach().clone()
    plan, course, seen = schedule(model, on_change="ramp", ramp_steps=4), LossHistory(steps=10), []
    for number in range(10, 16):
        assert plan.due(number) or number == 15
        plan.look(number, {"": course})
        seen.append(plan.alpha(""))
        course.steps += 1
    assert seen == [8, 9.5, 11, 12.5, 14, 14] and torch.equal(
        weight, next(iter(adapters(model).values())).lora_B
    )


def test_the_state_goes_through_json_in_the_middle_of_a_ramp():
    model, course = adapted(), LossHistory(steps=10)
    plan = schedule(model, on_change="ramp", ramp_steps=4)
    plan.look(10, {"": course})
    course.steps = 2
    plan.look(12, {"": course})
    other = copy.deepcopy(model)
    stored, course_too = (
        json.loads(json.dumps(plan.state())),
        LossHistory(**json.loads(json.dumps(vars(course)))),
    )
    again = schedule(other, on_change="ramp", ramp_steps=4)
    load_alphas(other, alphas(model))
    again.restore(stored)
    assert again.state() == plan.state() and again.alpha("") == plan.alpha("") == 11
    for number in (13, 14, 15):
        for own, steps in ((plan, course), (again, course_too)):
            steps.steps += 1
            own.look(number, {"": steps})
        assert again.alpha("") == plan.alpha("") and again.state() == plan.state()
    for broken, words in (
        ({"high": stored["experts"][""]}, "experts"),
        ({"": {**stored["experts"][""], "name": "third"}}, "'third', .* has first, second"),
        ({"": {"phase": 2}}, "phase 2"),
    ):
        with pytest.raises(ValueError, match=words):
            again.restore({"experts": broken, "history": []})


def test_a_phase_is_known_by_its_name_wherever_it_stands_now():
    """Go on in the second phase where one was put in front of it, and where the first is gone."""
    model, history = adapted(), LossHistory(steps=10)
    plan = schedule(model)
    plan.look(10, {"": history})
    first, second = plan.config.phases
    for phases in ((PhaseConfig("new", 3), first, second), (second,)):
        again = schedule(copy.deepcopy(model), phases=phases)
        again.restore(plan.state())
        assert again.phase("").name == "second"


def test_an_alpha_that_a_resume_changes_within_a_phase_is_ramped_to():
    model, history = adapted(), LossHistory(steps=20)
    phase = PhaseConfig("only", 0.1, min_steps=1000)
    stored = schedule(model, on_change="ramp", ramp_steps=7, phases=(phase,)).state()
    plan = schedule(model, on_change="ramp", ramp_steps=7, phases=(replace(phase, alpha=0.8),))
    for layer in adapters(model).values():
        set_alpha(layer, 0.1)  # as it comes with the weights
    plan.restore(json.loads(json.dumps(stored)))
    values = []
    for step in range(20, 30):
        history.steps = step
        if plan.due(step):
            plan.look(step, {"": history})
        values.append(plan.alpha(""))
    assert values[:7] == pytest.approx([0.1 + 0.1 * number for number in range(7)])
    assert values[7:] == [0.8] * 3 and not plan.due(31)


def test_alphas_travel_and_bad_ones_are_refused():
    model, other = adapted(), adapted()
    for number, layer in enumerate(adapters(model).values()):
        set_alpha(layer, 3.5 + number)
    load_alphas(other, json.loads(json.dumps(alphas(model))))
    assert alphas(other) == alphas(model) == {"0": 3.5, "2": 4.5}
    assert lora_state(other)["2.alpha"].item() == 4.5
    for bad in (0, -1, math.inf, math.nan, "8", None):
        with pytest.raises(ValueError, match="must be a positive number"):
            load_alphas(other, {"0": bad})
    with pytest.raises(ValueError, match="has no adapter"):
        load_alphas(other, {"7": 1.0})


# ── when a phase ends ─────────────────────────────────────────────────────────────────────────────
def accepted(mean, cv, runs=300, last=4000):
    """The share of runs whose last window the tested rule takes for a plateau. `mean(steps)`: what
    the loss comes to."""
    rule, draw, count = ExitConfig(relative_slope=0.10, t=2.0), np.random.default_rng(7), 0
    expected = mean(np.arange(last))
    for _ in range(runs):
        values = (expected * (1 + cv * draw.standard_normal(last))).tolist()
        count += rule.met(LossHistory(steps=last, losses=values, levelled=values))
    return count / runs


@pytest.mark.parametrize("cv", [0.1, 0.3, 0.6])
def test_the_tested_rule_knows_a_plateau_from_a_trend(cv):
    assert accepted(lambda s: np.full(len(s), 0.5), cv) >= 0.9
    assert accepted(lambda s: np.exp(-s / 2000), cv) <= 0.05
    assert accepted(lambda s: np.exp(-s / 500), cv) <= 0.05
    assert accepted(lambda s: 0.5 * 1.2 ** (s / 200), cv) <= 0.05


def test_the_window_follows_the_noise_and_is_judged_once():
    draw = np.random.default_rng(0)
    for cv, least, most in ((0.1, 200, 200), (0.3, 330, 540), (0.6, 1300, 2160)):
        losses = (1 + cv * draw.standard_normal(200)).tolist()
        assert least <= PRESETS["tested"].window(losses) <= most
    falling = PhaseConfig("fall", 8, min_steps=0, exit=ExitConfig(relative_slope=0.1, t=2.0))
    plan, course = schedule(adapted(), phases=(falling, PhaseConfig("next", 9))), LossHistory()
    judged = []
    for number in range(1, 1001):
        course.add(facts(math.exp(-number / 300)))
        if plan.due(number):
            plan.look(number, {"": course})
            judged.append(plan.progress[""].judged_at)
    assert plan.progress[""].phase == 0 and sorted(set(judged) - {0}) == [200, 400, 600, 800, 1000]


def phase_after(phase, losses, agreeing=560.0, compared=1000.0):
    plan, course = schedule(adapted(), phases=(phase, PhaseConfig("last", 9))), LossHistory()
    for number, loss in enumerate(losses, 1):
        course.add(facts(loss, agreeing=agreeing, compared=compared))
        if plan.due(number):
            plan.look(number, {"": course})
    return plan, course


def test_the_criteria_are_those_of_the_table():
    flat = [1 + 0.01 * (-1) ** i for i in range(400)]
    tested = PhaseConfig("a", 8)
    plan, course = phase_after(tested, flat)  # 3 standard errors of 1000 elements: 0.547
    assert (
        plan.progress[""].phase == 1 and plan.history[0]["steps"] == 200 and course.steps == 200
    ), "the window begins anew"
    plan, course = (
        schedule(adapted(), phases=(tested, PhaseConfig("b", 9), PhaseConfig("c", 10))),
        LossHistory(),
    )
    for number, loss in enumerate(flat, 1):
        course.add(facts(loss, agreeing=560.0, compared=1000.0))
        if plan.due(number):
            plan.look(number, {"": course})
    assert [move["steps"] for move in plan.history] == [200, 200], "each phase has its own windows"
    for agreeing, compared in ((540.0, 1000.0), (0.0, 0.0)):
        assert phase_after(tested, flat, agreeing, compared)[0].progress[""].phase == 0, (
            "too little agreement, or none known"
        )
    assert phase_after(PhaseConfig("a", 8, min_steps=300), flat)[0].history[0]["steps"] == 300
    slow = [1 - 0.0006 * i + 0.02 * (-1) ** i for i in range(300)]
    for preset, expected in (("image", 1), ("video", 1), ("tested", 0), ("steps", 1)):
        assert (
            phase_after(PhaseConfig("a", 8, min_steps=250, exit=preset), slow)[0].progress[""].phase
            == expected
        ), preset
    steep = [5 - 0.003 * i + 0.02 * (-1) ** i for i in range(300)]
    for preset, expected in (("image", 0), ("video", 1)):  # 0.001 and 0.005 a step
        assert (
            phase_after(PhaseConfig("a", 8, min_steps=250, exit=preset), steep)[0]
            .progress[""]
            .phase
            == expected
        ), preset
    for agreeing, image, video in ((560, 1, 1), (520, 0, 1), (490, 0, 0)):
        for preset, expected in (("image", image), ("video", video)):
            assert (
                phase_after(PhaseConfig("a", 8, 50, exit=preset), slow, agreeing)[0]
                .progress[""]
                .phase
                == expected
            )
    assert not ExitConfig(cv=0.5, samples=20).met(
        LossHistory(losses=[0.1, 2.0] * 20)
    ) and ExitConfig(cv=1, samples=20).met(LossHistory(losses=[0.1, 2.0] * 20))
    assert not ExitConfig(samples=20).met(LossHistory(losses=[1.0] * 19))


def test_sections_are_refused_with_a_remedy(shop, capsys):
    for words, parts in (
        (["alpha_schedule.enabled=true"], ["phases", "is empty"]),
        (
            ["alpha_schedule={enabled: true, phases: [{name: a, alpha: 0}]}"],
            ["phases[0].alpha", "positive"],
        ),
        (
            ["alpha_schedule={enabled: true, phases: [{name: a, alpha: 1}, {name: a, alpha: 2}]}"],
            ["name of its own"],
        ),
        (
            ["alpha_schedule={enabled: true, phases: [{name: a, alpha: 1, exit: fast}]}"],
            ["exit", "'tested'"],
        ),
        (
            ["alpha_schedule={enabled: true, phases: [{name: a, alpha: 1}]}"],
            ["alpha_schedule.enabled", "but lora.enabled is false"],
        ),
        (
            [
                "alpha_schedule={enabled: true, on_change: ramp, phases: [{name: a, alpha: 1}]}",
                "lora.enabled=true",
                f"train.init_from={shop.base}",
            ],
            ["ramp", "train.compile: false"],
        ),
    ):
        refused(capsys, train_t2v.main, shop.train_words("bad", *words), *parts)
    config = AlphaScheduleConfig(
        True,
        phases=(
            PhaseConfig("a", 1, exit=ExitConfig(t=2)),
            PhaseConfig("b", 2, high=3.0, exit="video"),
        ),
    )
    assert decode(AlphaScheduleConfig, encode(config)) == config and config.phases[1].alpha_of(
        "high"
    ) == 3 != config.phases[1].alpha_of("low")
    with pytest.raises(ConfigError, match="samples"):
        ExitConfig(samples=5)


# ── in the trainer ────────────────────────────────────────────────────────────────────────────────
PHASES = (
    "alpha_schedule={enabled: true, on_change: %s, ramp_steps: 6, phases: [{name: a, alpha: 8,"
    " min_steps: 15, exit: steps}, {name: b, alpha: 14}]}"
)


def state_of(run, at):
    folder = checkpoint.folder_of(run, at)
    names = ("model", "ema", "optimizer", "lora", "signs")
    tensors = {
        f"{name}/{key}": value
        for name in names
        for key, value in checkpoint.read_tensors(folder / f"{name}.safetensors").items()
    }
    return tensors, checkpoint.read_notes(folder)


@pytest.mark.parametrize(
    "change, steps",
    [
        ("preserve", [20]),
        *thorough(("preserve", [23, 20, 19])),
        pytest.param("ramp", [23, 20, 19], marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_exactly_before_at_and_after_a_transition(shop, change, steps):
    words = [
        f"train.init_from={shop.base}",
        "lora.enabled=true",
        "lora.rank=2",
        PHASES % change,
        "train.compile=false",
        "train.max_steps=28",
        "train.keep_last=0",
    ]
    name = f"{change}_{len(steps)}"
    stop = shop.train(name, *words, "train.save_every_steps=1")
    expected, notes = state_of(stop, 28)
    assert notes["alpha_schedule"]["history"] == [
        {
            "step": 20,
            "expert": None,
            "from": "a",
            "to": "b",
            "steps": 20,
            "alpha_from": 8.0,
            "alpha_to": 14.0,
        }
    ]
    for at in steps:
        for folder in checkpoint.complete(stop):
            if checkpoint.step_of(folder) > at:
                for path in folder.iterdir():
                    path.unlink()
                folder.rmdir()
        kept = state_of(stop, at)[0]["lora/blocks.0.cross.q.alpha"].item()
        assert kept == (8 if at == 19 else 14 if change == "preserve" else 8 if at == 20 else 11)
        shop.train(name, *words, "train.save_every_steps=28", "--resume")
        again, resumed = state_of(stop, 28)
        assert again.keys() == expected.keys() and all(
            torch.equal(again[name], expected[name]) for name in again
        ), at
        assert (
            resumed["alpha_schedule"] == notes["alpha_schedule"]
            and resumed["monitor"]["courses"] == notes["monitor"]["courses"]
        )


@pytest.mark.thorough
def test_what_is_drawn_and_handed_on_has_the_alpha_in_force(shop):
    """preserve at the last step: samples, the exported file and a run that starts from this one see
    no change."""
    words = [
        f"train.init_from={shop.base}",
        "lora.enabled=true",
        "lora.rank=2",
        "lora.alpha=8",
        "train.lr=0.05",
        "train.max_steps=20",
        "train.save_every_steps=20",
    ]
    plain = load_pipeline(shop.train("fixed", *words), "cpu")[0].learner
    run = shop.train("changed", *words, PHASES % "preserve")
    meta = checkpoint.Meta.read(checkpoint.latest(run))
    assert set(meta.alphas.values()) == {14.0}
    changed = load_pipeline(run, "cpu")[0].learner
    for (name, a), b in zip(plain.state_dict().items(), changed.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.equal(
        plain.model.blocks[0].cross.q.weight,
        load_pipeline(shop.base, "cpu")[0].learner.model.blocks[0].cross.q.weight,
    )
    still = [
        "lora.enabled=true",
        "lora.rank=2",
        "lora.alpha=3",
        "train.lr=1e-30",
        "train.weight_decay=0",
        "train.max_steps=1",
    ]
    after = load_pipeline(shop.train("after", *still, f"train.init_from={run}"), "cpu")[0].learner
    torch.testing.assert_close(
        after.model.blocks[0].cross.q.weight,
        changed.model.blocks[0].cross.q.weight,
        rtol=1e-5,
        atol=1e-6,
    )
    assert set(
        checkpoint.Meta.read(checkpoint.latest(shop.folder / "runs/after")).alphas.values()
    ) == {3.0}


@pytest.mark.parametrize("change, alpha", [("preserve", 3.0), ("jump", 3.0), ("ramp", 8.0)])
def test_a_schedule_that_a_run_gets_later_begins_then(change, alpha):
    """Count no step of before for the first phase, whose alpha is in force at once, or at the end
    of its ramp."""
    model, history = adapted(alpha=8.0), LossHistory()
    phases = (PhaseConfig("first", 3, min_steps=20, exit="steps"), PhaseConfig("second", 14))
    late = schedule(model, phases=phases, on_change=change, ramp_steps=10)
    for layer in adapters(model).values():
        set_alpha(layer, 8.0)  # as a checkpoint has it
    history.steps = 500
    late.begin({"": history})
    assert {layer.alpha for layer in adapters(model).values()} == {alpha}
    history.steps += 10
    assert not late.look(510, {"": history}) and late.phase("").name == "first"
    assert late.alpha("") == 3.0


def test_state_of_another_step_is_refused_and_none_starts_anew(shop, capsys):
    words = [
        f"train.init_from={shop.base}",
        "lora.enabled=true",
        "lora.rank=2",
        PHASES % "preserve",
        "train.save_every_steps=20",
    ]
    run = shop.train("foreign", *words, "train.max_steps=20")
    path = checkpoint.latest(run) / "monitor.json"
    forget_sums(path.parent)
    text, again = (
        path.read_text(),
        shop.train_words("foreign", *words, "train.max_steps=22", "--resume"),
    )
    path.write_text(text.replace('"step": 20', '"step": 19', 1))
    refused(capsys, train_t2v.main, again, "monitor.json", "step 19", "step 20")
    for broken in (
        "[1",
        "[]",
        '{"step": 20, "monitor": 3}',
        '{"step": 20, "monitor": {"courses": {"high": {}}}}',
        text.replace('"name": "b"', '"name": "c"'),
    ):
        path.write_text(broken)
        refused(capsys, train_t2v.main, again, "")
    path.unlink()
    train_t2v.main(again)
    assert "holds no alpha schedule: it starts with phase 'a'" in capsys.readouterr().out
    notes = checkpoint.read_notes(checkpoint.latest(run))
    assert set(checkpoint.Meta.read(checkpoint.latest(run)).alphas.values()) == {8.0}
    assert (
        notes["alpha_schedule"]["experts"][""]["phase"] == 0
        and notes["monitor"]["courses"][""]["steps"] == 2
    )
