"""What a run tells is true: operations as torch counts them, means as defined, held-out items
apart, fixed draws, curves."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmdit.adapters import LoRAConfig, inject
from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.dataset.buckets import VideoConfig
from mmdit.diagnostics.curves import draw_curves
from mmdit.diffusion import DiffusionConfig, FlowMatchingConfig, build_objective
from mmdit.interfaces import TextTokens
from mmdit.models import TreadConfig, VideoMMDiTConfig, build_model
from mmdit.rng import Draws
from mmdit.scripts import plot_run
from mmdit.training import checkpoint
from mmdit.training.distributed import World
from mmdit.training.validation import QUANTILES, FixedTimes, Validation
from tests.helpers.thorough import thorough
from tests.helpers.tiny import Workshop, refused
from tests.test_batches import listing


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("observability"))


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", [*thorough("clip", "picture"), "routed", "adapters"])
def test_operations_are_those_that_torch_counts(case):
    tread = TreadConfig(enabled=True, apply_to=(1, 2)) if case == "routed" else None
    model = build_model(VideoMMDiTConfig(dim=64, depth=3, num_heads=2, window_size=4), 8, 16, tread)
    if case == "adapters":
        inject(model, LoRAConfig(enabled=True, rank=4))
    frames, rows, columns, words = 1 if case == "picture" else 3, 5, 8, 7
    keep = model.draw_keep(rows, columns, 0, 0)
    text = TextTokens(torch.randn(2, words, 16), torch.ones(2, words, dtype=torch.bool))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(
            torch.randn(2, frames, rows, columns, 8), torch.rand(2), text, keep=keep
        ).sum().backward()
    counted = counter.get_total_flops() / 2
    claimed = model.train_flops((frames, rows, columns), words, None if keep is None else len(keep))
    # Nothing is asked of what lies before the first adapter: a large part of three blocks.
    assert claimed == pytest.approx(counted, rel=0.04 if case == "adapters" else 0.01)


@pytest.mark.parametrize(
    "objective",
    [
        build_objective("ddpm", diffusion=DiffusionConfig()),
        build_objective("flow_matching"),
        build_objective(
            "flow_matching",
            flow_matching=FlowMatchingConfig(time="logit_normal", logit_mean=0.4, shift=2.0),
        ),
    ],
)
def test_fixed_times_are_quantiles_of_the_drawn_ones(objective):
    many = torch.arange(20_001)
    drawn = objective.draw_time(FixedTimes(0, 0, many, (many + 0.5) / 20_001))
    random = objective.draw_time(Draws(3, 4, many)).sort().values
    assert (drawn - random).abs().max() < 0.02
    assert torch.equal(drawn, drawn.sort().values)


def test_held_out_items_are_in_no_batch_and_stay_held_out_as_the_cache_grows():
    small, large = listing((60, 9, 2, 2)), listing((90, 9, 2, 2))
    video = VideoConfig(num_frames=4, image_fraction=0.5)
    cases = ((small, 1), (large, 1), (small, 2))
    plan, grown, other = (BatchPlan(cache, video, 4, seed, held_out=0.2) for cache, seed in cases)
    held = set(plan.held_out.tolist())
    assert 3 < len(held) < 25 and held == {i for i in grown.held_out.tolist() if i < 60} != set(
        other.held_out.tolist()
    )
    seen = {item for step in range(200) for item in plan.batch(step).items.tolist()}
    assert seen == set(range(60)) - held, "all else is used, by clips and by pictures"
    small.ids = [f"photo{i // 3}_c{i % 3}" for i in range(60)]
    crops = BatchPlan(small, video, 4, 1, held_out=0.2).held_out.tolist()
    assert crops and all({i - i % 3, i - i % 3 + 1, i - i % 3 + 2} <= set(crops) for i in crops)
    with pytest.raises(ValueError, match=r"val_share 0.0001 holds 0 of the 60 items"):
        BatchPlan(small, video, 4, 1, held_out=0.0001)


def test_clips_that_are_too_short_are_not_measured():
    plan = BatchPlan(listing((30, 9, 2, 2), (30, 2, 2, 2)), VideoConfig(num_frames=4), 4, 1, 0.3)
    held = plan.held_out
    assert (held < 30).any() and (held >= 30).any()
    (planned,) = plan.held_out_batches(99)
    assert planned.items.tolist() == [item for item in held.tolist() if item < 30]


class Quantiles:
    """Stands for a learner whose losses are the quantile of the time and the number in a caption
    added up."""

    def __call__(self, latents, captions, draws, crops, places):
        return draws.quantiles + torch.tensor(list(map(float, captions))), None

    def eval(self):
        return self

    def eager(self):
        return nullcontext()


def test_validation_measures_the_middles_of_equal_parts_each_item_once():
    """Two items in batches of four, which the last one of fills up by repetition."""
    items = SimpleNamespace(ids=["a", "b"], captions=["0", "5"], indices=torch.arange(2))
    items.latents, items.crops, items.places = torch.zeros(2, 1), None, None
    source = SimpleNamespace(held_out=lambda most: [items], plan=SimpleNamespace(seed=0))
    config = SimpleNamespace(batch_size=4, autocast=False, val_samples=2)
    state = SimpleNamespace(learner=Quantiles(), ema=None)
    values = Validation(config, SimpleNamespace(sources=[source]), World())(state)
    for i in range(QUANTILES):
        assert values[f"val_loss_q{i + 1}"] == pytest.approx((i + 0.5) / QUANTILES + 2.5)
    assert values["val_loss"] == pytest.approx(0.5 + 2.5)


def test_validation_is_fixed_and_touches_no_training(shop):
    """The same weights give the same curve at any step and batch size; the training is the same
    with and without measuring."""
    words = [
        "train.val_share=0.3",
        "train.val_samples=4",
        "train.max_steps=4",
        "train.save_every_steps=4",
        "num_workers=0",
    ]
    often = shop.train("often", *words, "train.val_every_steps=1")
    rarely = shop.train("rarely", *words, "train.val_every_steps=4")
    a, b = (
        checkpoint.read_tensors(checkpoint.latest(run) / "model.safetensors")
        for run in (often, rarely)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    last, same = records(often)[-1], records(rarely)[-1]
    names = ["val_loss", "val_loss_ema", *(f"val_loss_q{i}" for i in range(1, QUANTILES + 1))]
    assert [last[name] for name in names] == [same[name] for name in names]
    assert last["val_loss"] == pytest.approx(
        sum(last[f"val_loss_q{i}"] for i in range(1, QUANTILES + 1)) / QUANTILES
    )
    still = shop.train(
        "still", *words, "train.val_every_steps=1", "train.lr=1e-30", "train.weight_decay=0"
    )
    curve = [record["val_loss"] for record in records(still)]
    assert (
        max(curve) - min(curve) < 1e-6 * curve[0]
        and len({record["loss"] for record in records(still)}) == 4
    )
    still_average = shop.train(
        "still_average",
        *words,
        "train.val_every_steps=4",
        "train.lr=1e-30",
        f"train.init_from={often}",
    )
    averaged = records(still_average)[-1][
        "val_loss"
    ]  # a run that starts from the average of `often` measures it as its weights
    assert averaged == pytest.approx(last["val_loss_ema"], rel=1e-5) and averaged != pytest.approx(
        last["val_loss"], rel=1e-5
    )
    smaller = [
        "train.val_every_steps=4",
        "train.lr=1e-30",
        "train.batch_size=2",
        "train.grad_accum_steps=2",
    ]
    batched = shop.train("batched", *words, *smaller)
    assert records(batched)[-1]["val_loss"] == pytest.approx(curve[0], rel=1e-6)
    fixed = [
        *words,
        "train.val_every_steps=4",
        "train.lr=1e-30",
        f"train.init_from={often}",
        "ema.enabled=false",
    ]
    kept, dropped = (
        records(shop.train(f"dropout{p}", *fixed, f"train.cfg_dropout_prob={p}"))[-1]
        for p in (0, 1)
    )
    assert kept["val_loss"] == dropped["val_loss"] and kept["loss"] != dropped["loss"], (
        "captions are dropped in training alone"
    )


def test_curves_are_drawn_where_their_values_are(shop, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = shop.train("drawn", "train.val_every_steps=2", "train.val_share=0.3")
    assert (
        plot_run.main(
            ["--runs", str(run), str(run / "metrics.jsonl"), "--out", str(tmp_path / "curves.png")]
        )
        == 0
    )
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width == 920 and picture.height > 1000
    rising = draw_curves({"a": [{"step": i, "loss_ema_100": float(i)} for i in range(11)]})
    below_legend = np.asarray(rising)[40:].astype(int)
    rows, columns = np.nonzero(np.abs(below_legend - (31, 119, 180)).max(-1) < 3)
    left, right = columns.argmin(), columns.argmax()
    assert rows[left] - rows[right] > 100 and columns[right] - columns[left] > 250
    assert math.isclose((rows[left] + rows[right]) / 2, rows.mean(), abs_tol=4)
    (tmp_path / "bad.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    refused(
        capsys, plot_run.main, ["--runs", tmp_path / "bad.jsonl"], "bad.jsonl:2", "not a record"
    )
    (tmp_path / "empty.jsonl").write_text('{"step": 1, "val_loss": null}\n')
    refused(capsys, plot_run.main, ["--runs", tmp_path / "empty.jsonl"], "no figure yet")
    refused(capsys, plot_run.main, ["--runs", tmp_path / "none"], "no metrics at", "run folder")
    refused(capsys, plot_run.main, ["--runs", run, "--out", "x.jpg"], "--out", ".png")
