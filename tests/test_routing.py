"""TREAD routing: what is kept, what passes by, and that it saves work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmdit.config import ConfigError, decode
from mmdit.models import TreadConfig, VideoMMDiTConfig, build_model
from mmdit.models.routing import draw_keep, route
from tests.helpers.dense_video_mmdit import dense_forward
from tests.test_model import awake, captions

SMALL = VideoMMDiTConfig(dim=16, depth=4, num_heads=2, window_size=4)


@pytest.mark.parametrize("rows, columns, frames", [(8, 8, 3), (5, 7, 2), (4, 4, 1), (13, 11, 1)])
@pytest.mark.parametrize(
    "rescale, spatial", [(False, ("window", "shifted")), (True, ("frame", "shifted"))]
)
def test_routing_equals_dense_attention_among_the_kept_tokens(
    rows, columns, frames, rescale, spatial
):
    tread = TreadConfig(enabled=True, selection_rate=0.4, apply_to=(1, -1), rescale=rescale)
    model = awake(replace(SMALL, spatial=spatial), tread)
    x, t, text = (
        torch.randn(2, frames, rows, columns, 3, dtype=torch.float64),
        torch.tensor([3.0, 700.0]).double(),
        captions(2),
    )
    keep = model.draw_keep(rows, columns, seed=0, step=0)
    width = model.windows(rows, columns).width
    expected = dense_forward(model, x, t, text, {(k // width, k % width) for k in keep.tolist()})
    torch.testing.assert_close(model(x, t, text, keep), expected, rtol=0, atol=1e-9)
    assert (model(x, t, text) - expected).abs().max() > 1e-3


def test_keeping_every_place_is_the_plain_model():
    model = awake(SMALL, TreadConfig(enabled=True, apply_to=(1, 3), rescale=True))
    x, t, text = (
        torch.randn(2, 2, 8, 8, 3, dtype=torch.float64),
        torch.tensor([3.0, 700.0]).double(),
        captions(2),
    )
    torch.testing.assert_close(
        model(x, t, text, torch.arange(16)), model(x, t, text), rtol=0, atol=1e-12
    )


def test_tokens_that_pass_by_come_back_unchanged_and_rescaling_keeps_the_mean():
    x, keep = torch.randn(2, 3, 4, 6, 5), torch.tensor([0, 2, 5])
    result = route(x, keep, lambda kept: kept + 1, rescale=False)
    assert torch.equal(result[..., [1, 3, 4], :], x[..., [1, 3, 4], :])
    torch.testing.assert_close(result[..., keep, :], x[..., keep, :] + 1)
    rescaled = route(x, keep, lambda kept: kept + 1, rescale=True)
    assert (rescaled - x).mean() == pytest.approx(
        1, abs=1e-5
    )  # as if every token had seen the span
    assert (result - x).mean() == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("mode", ["random", "stratified"])
def test_draws_are_a_function_of_seed_and_step_and_reach_every_place(mode):
    config = TreadConfig(enabled=True, mode=mode)
    assert torch.equal(draw_keep(config, (8, 8), 1, 5), draw_keep(config, (8, 8), 1, 5))
    assert not torch.equal(draw_keep(config, (8, 8), 1, 5), draw_keep(config, (8, 8), 1, 6))
    assert not torch.equal(draw_keep(config, (8, 8), 1, 5), draw_keep(config, (8, 8), 2, 5))
    drawn = torch.stack([draw_keep(config, (4, 6), 0, step) for step in range(400)])
    assert drawn.shape == (400, 12) and (drawn.diff(dim=1) > 0).all()
    counts = drawn.flatten().bincount(minlength=24)
    assert ((counts - 200).abs() < 60).all()  # six standard deviations
    assert draw_keep(config, (1, 1), 0, 0).tolist() == [0]


def test_stratified_draws_spread_over_the_window():
    patches = (torch.arange(8)[:, None] // 2 * 4 + torch.arange(8) // 2).flatten()
    for step in range(20):
        keep = draw_keep(TreadConfig(mode="stratified"), (8, 8), 0, step)
        assert (patches[keep].bincount(minlength=16) == 2).all()
    uneven = [
        patches[draw_keep(TreadConfig(mode="random"), (8, 8), 0, step)].bincount(minlength=16)
        for step in range(20)
    ]
    assert torch.stack(uneven).unique().numel() > 2


def test_nothing_is_routed_outside_training_or_when_disabled():
    model = build_model(SMALL, 3, 6, TreadConfig(enabled=True, apply_to=(1, 3)))
    assert model.draw_keep(8, 8, 0, 0) is not None
    assert model.eval().draw_keep(8, 8, 0, 0) is None
    plain = build_model(SMALL, 3, 6, TreadConfig())
    assert plain.draw_keep(8, 8, 0, 0) is None
    with pytest.raises(ValueError, match="tread.enabled"):
        plain(
            torch.randn(1, 1, 4, 4, 3), torch.ones(1), captions(1, torch.float32), torch.tensor([0])
        )


def test_the_routed_blocks_see_only_the_kept_tokens():
    model = awake(SMALL, TreadConfig(enabled=True, selection_rate=0.5, apply_to=(1, 3)))
    seen = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[3]))
    model(
        torch.randn(1, 2, 8, 8, 3).double(),
        torch.ones(1).double(),
        captions(1),
        model.draw_keep(8, 8, 0, 0),
    )
    assert seen == [16, 8, 8, 16]


def test_impossible_routing_is_refused_with_the_path_and_both_values():
    for rate in (0.0, 1.0, -0.1):
        with pytest.raises(ConfigError, match="tread.selection_rate"):
            decode(TreadConfig, {"selection_rate": rate}, "tread")
    assert TreadConfig().span(12) == (2, 10) and TreadConfig(apply_to=(0, 3)).span(3) == (0, 3)
    for span, depth in (((2, -2), 4), ((3, 2), 8), ((0, 9), 8), ((-9, 8), 8)):
        with pytest.raises(ConfigError, match=r"tread.apply_to.*\(model.depth\)"):
            TreadConfig(apply_to=span).span(depth)
