"""Metrics mean what they are called: trends as least squares, means, signs against chance; nothing
is lost or told twice."""

import json
import math
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from mmdit.training import checkpoint
from mmdit.training.alpha.signs import Signs, pack, unpack
from mmdit.training.alpha.trend import BINS, LONGEST, LossHistory, StepFacts, Trend, ema
from mmdit.training.metrics import MetricsLog
from tests.helpers import warm
from tests.helpers.tiny import Workshop

DOCUMENTED = [
    "step",
    "timestamp",
    "loss",
    "gradient_stability",
    "expert",
    "lr_0",
    "lr_1",
    "alpha_enabled",
    "phase",
    "phase_idx",
    "steps_in_phase",
    "conv_alpha",
    "linear_alpha",
    "loss_slope",
    "loss_r2",
    "loss_samples",
    "gradient_stability_avg",
    *(f"{name}_ema_{span}" for name in ("loss", "grad") for span in (10, 50, 100)),
    "run_id",
    "images_seen",
    "sigma_mean",
    "loss_norm",
    "grad_norm",
    "skipped",
    "wall_s",
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("metrics"))


def facts(loss, t=0.5, bad=False, expert="", agreeing=0.0, compared=0.0, samples=1):
    """One step whose samples all have this loss at this time."""
    sums, counts = [0.0] * BINS, [0.0] * BINS
    level = min(int(t * BINS), BINS - 1)
    sums[level], counts[level] = loss * samples, float(samples)
    return StepFacts(sums, counts, t * samples, 1.0, bad, expert, agreeing, compared)


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_trends_are_least_squares():
    generator = torch.Generator().manual_seed(0)
    for n in (20, 57, 200):
        y = (
            3
            - 0.01 * torch.arange(n).double()
            + torch.randn(n, generator=generator, dtype=torch.float64)
        )
        design = torch.stack([torch.ones(n), torch.arange(n)], 1).double()
        best = torch.linalg.solve(design.T @ design, design.T @ y)  # the closed form
        rest = (y - design @ best).square().sum()
        covariance = rest / (n - 2) * torch.linalg.inv(design.T @ design)
        trend = Trend.of(y.tolist())
        assert abs(trend.slope - best[1].item()) < 1e-9
        assert abs(trend.r2 - (1 - rest / (y - y.mean()).square().sum()).item()) < 1e-9
        assert trend.t == pytest.approx((best[1] / covariance[1, 1].sqrt()).item(), rel=1e-9)
        assert (
            trend.cv == pytest.approx((y.std() / y.mean()).item(), rel=1e-9) and trend.samples == n
        )
    assert (
        Trend.of([1.0] * 19) is None
        and Trend.of([2.0] * 30).r2 is None
        and Trend.of([2.0] * 30).t == 0
    )


@pytest.mark.parametrize("cv", [0.1, 0.3, 0.6])
def test_the_noise_of_the_relative_slope_is_as_derived(cv):
    noise = 1 + cv * torch.randn(
        2000, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    slopes = torch.tensor([Trend.of(row).relative for row in noise.numpy()])
    assert slopes.std().item() == pytest.approx(cv * math.sqrt(12 / 200), rel=0.1)


def test_exponential_means():
    mean = None
    for _ in range(30):
        mean = ema(mean, 0.7, 10)
    assert mean == pytest.approx(0.7, abs=1e-15)  # of a constant
    mean = 0.0
    for n in range(1, 40):
        mean = ema(mean, 1.0, 10)
        assert mean == pytest.approx(1 - (9 / 11) ** n, rel=1e-12)  # the response to a step


def test_levelling_takes_out_what_the_draw_of_t_does_and_leaves_the_trend():
    draw = random.Random(0)
    course = LossHistory()
    for step in range(1200):
        t = draw.random()
        course.add(facts((1 - step / 2400) * (0.2 + 3 * t) * (1 + 0.05 * draw.gauss(0, 1)), t))
    plain, level = Trend.of(course.losses[-600:]), Trend.of(course.levelled[-600:])
    assert level.cv < 0.35 * plain.cv and plain.cv > 0.5
    assert level.relative == pytest.approx(-0.25 / 0.625, rel=0.1) and abs(level.t) > 4 * abs(
        plain.t
    )


def test_the_level_of_a_noise_level_is_that_of_lately():
    course = LossHistory()
    for loss in [1.0] * 1000 + [0.1] * 500:
        course.add(facts(loss, 0.3))
    assert course.means[int(0.3 * BINS)] == pytest.approx(0.1 + 0.9 * 0.99**500, rel=1e-6)


def test_skipped_steps_and_other_experts_leave_no_trace():
    course, plain = LossHistory(), LossHistory()
    for step in range(60):
        course.add(facts(1 + step % 7, agreeing=5.0 + step % 3, compared=8.0))
        plain.add(facts(1 + step % 7, agreeing=5.0 + step % 3, compared=8.0))
        course.add(facts(1e9, bad=True, agreeing=8.0, compared=8.0))
        course.add(facts(0.0, samples=0))
    assert course == plain and LossHistory(**json.loads(json.dumps(vars(course)))) == course
    assert course.values()["loss_samples"] == 60 and course.values()[
        "gradient_stability_se"
    ] == 0.5 / math.sqrt(8)
    course.reset()
    assert (
        course.values()["loss_slope"] is None
        and course.steps == 0
        and course.loss_emas == plain.loss_emas
    )
    long = LossHistory(
        losses=[1.0] * LONGEST, levelled=[1.0] * LONGEST, stabilities=[0.5] * LONGEST
    )
    long.add(facts(2.0, agreeing=5.0, compared=8.0))
    assert {len(kept) for kept in (long.losses, long.levelled, long.stabilities)} == {
        LONGEST
    } and long.losses[-1] == 2
    assert (
        LossHistory().values().keys() == plain.values().keys()
        and LossHistory().values()["gradient_stability"] is None
    )


# ── signs ─────────────────────────────────────────────────────────────────────────────────────────
GOOD, BAD = torch.tensor(0.0), torch.tensor(1.0)


def compare(signs, parameter, gradient, skipped=GOOD, expert=""):
    parameter.grad = None if gradient is None else gradient.clone()
    agreeing, compared = signs.compare(expert, skipped).tolist()
    return agreeing / compared if compared else None


@pytest.fixture
def one():
    parameter = nn.Parameter(torch.zeros(100, 1000))
    return parameter, Signs({"": [parameter]})


def test_signs_of_gradients(one):
    parameter, signs = one
    generator = torch.Generator().manual_seed(2)
    draw = lambda: torch.randn(100, 1000, generator=generator)
    first = draw()
    assert compare(signs, parameter, first) is None
    assert compare(signs, parameter, first) == 1.0 and compare(signs, parameter, -first) == 0.0
    shares = [compare(signs, parameter, draw()) for _ in range(20)]
    assert sum(shares) / 20 == pytest.approx(0.5, abs=0.002)
    torch.testing.assert_close(
        torch.tensor(shares).std(), torch.tensor(0.5 / math.sqrt(1e5)), rtol=0.5, atol=0
    )  # the claimed error
    for ratio, expected in (
        (0.5, 0.573),
        (0.2, 0.513),
        (1.0, 0.733),
    ):  # signal : noise of each element
        signal = torch.full((100, 1000), ratio)
        compare(signs, parameter, signal + draw())
        assert compare(signs, parameter, signal + draw()) == pytest.approx(expected, abs=0.005)


def test_zeros_are_not_compared(one):
    parameter, signs = one
    zero, ones = torch.zeros(100, 1000), torch.ones(100, 1000)
    assert (
        compare(signs, parameter, zero) is None and compare(signs, parameter, zero) is None
    )  # counting them would say 1
    assert compare(signs, parameter, None) is None
    assert compare(signs, parameter, ones * math.inf, BAD) is None  # skipped before any was seen
    assert compare(signs, parameter, ones) is None, "all before were zero"
    half = ones.clone()
    half[:50] = 0
    half[50:75] = -1
    assert compare(signs, parameter, half) == 0.5 and signs.compare("", GOOD)[1] == 50_000
    assert (
        compare(signs, parameter, ones * float("nan"), BAD) is None
    )  # a skipped step leaves the last one
    assert compare(signs, parameter, half) == 1.0
    assert compare(signs, parameter, ones) == 0.75, "what was 0 is compared with its last sign"


def test_experts_compare_their_own_history_and_signs_take_one_bit(one):
    parameter, other = one[0], nn.Parameter(torch.zeros(100, 1000))
    signs = Signs({"high": [parameter], "low": [other]})
    a, b = (torch.randn(100, 1000, generator=torch.Generator().manual_seed(s)) for s in (3, 4))
    for _ in range(3):
        high, low = (
            compare(signs, parameter, a, expert="high"),
            compare(signs, other, b, expert="low"),
        )
    assert high == low == 1.0
    stored = signs.tensors()
    assert sum(tensor.numel() * tensor.element_size() for tensor in stored.values()) == 2 * (
        100_000 // 8 + 1
    )
    again = Signs({"high": [parameter], "low": [other]})
    again.restore({name: tensor.clone() for name, tensor in stored.items()})
    assert compare(again, parameter, -a, expert="high") == 0.0
    with pytest.raises(ValueError, match="of other adapters"):
        Signs({"high": [parameter]}).restore(stored)
    flags = torch.rand(1003) > 0.3
    assert torch.equal(unpack(pack(flags), 1003), flags)


# ── the file ──────────────────────────────────────────────────────────────────────────────────────
def kill_writers(folder: Path) -> int:
    """Kill 50 processes after a random number of bytes each, all of which resume the log in
    `folder` from a checkpoint some steps back; return the step of the last checkpoint."""
    draw, at = random.Random(5), 0
    MetricsLog(folder / "elsewhere", 0).close()  # else each process imports TensorBoard anew
    for _ in range(50):
        child = os.fork()
        if not child:
            log = MetricsLog(folder, at)
            left = draw.randrange(1, 900)
            for step in range(at + 1, at + 40):
                line = (json.dumps({"step": step, "loss": 1 / step, "run_id": "a"}) + "\n").encode()
                os.write(log.file.fileno(), line[:left])
                left -= len(line)
                if left <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            os._exit(0)
        draw.randrange(1, 900)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, -signal.SIGKILL)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        whole = [json.loads(line)["step"] for line in lines[:-1]]
        assert whole == list(range(1, len(whole) + 1)), (
            "the process that was killed had resumed whole"
        )
        at = max(0, len(whole) - draw.randrange(5))  # the last checkpoint
    return at


@pytest.mark.thorough
def test_killed_at_any_byte_the_log_resumes_whole(tmp_path):
    """They are forked by a process that holds little, unlike that of the tests."""
    code = "import sys, pathlib, tests.test_metrics as tested\n"
    code += "print(tested.kill_writers(pathlib.Path(sys.argv[1])))"
    done = warm.run("-c", code, tmp_path)
    assert done.returncode == 0, done.stderr
    at = int(done.stdout)
    log = MetricsLog(tmp_path, at)
    log.write({"step": at + 1})
    log.close()
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, at + 2)) and at > 50


def test_a_number_that_is_not_finite_is_null(tmp_path):
    """NaN and Infinity are no JSON: a browser, or jq, would refuse the whole line."""
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1, "expert": None})
    log.close()
    row = {"step": 1, "loss": None, "grad_norm": None, "lr": 0.1, "expert": None}
    assert records(tmp_path) == [row]


def test_a_log_that_went_back_is_read_once(tmp_path):
    """Steps that were written twice, by a run that was restored without its log, and lines that are
    none."""
    written = [*({"step": step} for step in (1, 2, 3, 2, 3, 4, 9)), ["no record"]]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in written) + '{"st'
    )
    MetricsLog(tmp_path, 4).close()
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def base(shop):
    return shop.train("base", "train.max_steps=4")


def test_the_documented_names_are_always_there(base):
    for record in records(base):
        assert (
            set(DOCUMENTED) <= record.keys()
            and record["gradient_stability"] is None
            and record["linear_alpha"] is None
        ), "null where there is nothing"


@pytest.mark.thorough
def test_means_and_windows_go_on_over_a_resume_whatever_was_reported_when(shop, base):
    """With adapters."""
    lora = [
        f"train.init_from={base}",
        "lora.enabled=true",
        "lora.rank=2",
        "lora.alpha=4",
        "train.max_steps=26",
    ]
    whole = records(shop.train("whole", *lora, "train.save_every_steps=26"))
    run = shop.train(
        "parts", *lora, "train.save_every_steps=7", "train.log_every_steps=5", "train.keep_last=0"
    )
    for folder in checkpoint.complete(run):
        if checkpoint.step_of(folder) > 21:
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
    parts = records(
        shop.train(
            "parts", *lora, "train.save_every_steps=7", "train.log_every_steps=5", "--resume"
        )
    )
    last, other = whole[-1], parts[-1]
    assert set(DOCUMENTED) <= last.keys() == whole[0].keys()
    assert last["images_seen"] == other["images_seen"] == 26 * 4 and last["linear_alpha"] == 4.0
    assert (
        last["loss_slope"] is not None
        and whole[18]["loss_slope"] is None
        and last["loss_samples"] == 26
    )
    assert (
        0 < last["gradient_stability"] < 1
        and last["gradient_stability_se"] > 0
        and whole[0]["gradient_stability"] is None
    )
    for name in DOCUMENTED:
        if name not in ("timestamp", "wall_s", "run_id", "loss", "grad_norm", "sigma_mean"):
            assert last[name] == other[name], name
    assert (
        len({record["run_id"] for record in parts})
        == 1
        != len({record["run_id"] for record in parts + whole})
    )
    losses = [record["loss"] for record in whole]
    mean = None
    for loss in losses:
        mean = ema(mean, loss, 10)
    assert last["loss_ema_10"] == pytest.approx(mean, rel=1e-12)
    assert last["loss_trend"] == pytest.approx(last["loss_ema_10"] / last["loss_ema_100"] - 1)
    assert all(0 < record["sigma_mean"] < 1 for record in whole)
