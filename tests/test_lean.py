"""Optimizers that need less memory do what plain AdamW in float32 does, and go on exactly where
they stopped."""

import json

import pytest
import torch
from torch import nn

from mmdit.commands.plan_memory.memory_plan import parked_moments
from mmdit.config import ConfigError
from mmdit.interfaces import Network
from mmdit.training.memory import lean
from mmdit.training.optim import build_optimizer, clip_and_guard
from mmdit.training.train_config import TrainConfig
from tests import test_trainer
from tests.helpers.thorough import thorough
from tests.test_trainer import assert_same, learner, trained


def stepped(
    weight: torch.Tensor, gradients: torch.Tensor, make
) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    parameter = nn.Parameter(weight.clone())
    optimizer = make([{"params": [parameter], "lr": 1e-4, "weight_decay": 0.1}])
    for gradient in gradients:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return parameter.detach(), optimizer


def test_two_bfloat16_words_follow_float32_where_one_stands_still():
    """Steps of 1e-4 on weights near 1, whose neighbours in bfloat16 lie 1/128 apart."""
    generator = torch.Generator().manual_seed(0)
    weight = (1 + 0.5 * torch.rand(500, generator=generator)).bfloat16()
    gradients = torch.randn(300, 500, generator=generator) + 0.5
    plain = lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95))
    expected, _ = stepped(weight.float(), gradients.bfloat16().float(), plain)
    moved = (expected - weight.float()).abs().mean()
    split, optimizer = stepped(
        weight, gradients, lambda groups: lean.SplitAdamW(groups, (0.9, 0.95))
    )
    value = split.float() + next(iter(optimizer.state.values()))["rest"].float()
    assert moved > 5e-3 and (value - expected).abs().max() < 0.05 * moved
    alone, _ = stepped(weight, gradients, plain)
    assert (alone.float() - expected).abs().mean() > 0.5 * moved, "plain rounding loses the steps"


@pytest.fixture
def halved(monkeypatch):
    """Let the learners of trainings have weights of 16 bits from now on."""

    def of_16_bits(*words):
        model = learner(*words)
        lean.to_bfloat16(model)
        return model

    return lambda: monkeypatch.setattr(test_trainer, "learner", of_16_bits)


@pytest.mark.thorough
def test_pure_bf16_learns_as_float32_does(tmp_path, halved):
    losses = {}
    for precision in ("fp32", "pure_bf16"):
        if precision == "pure_bf16":
            halved()
        trained(tmp_path / precision, steps=40, precision=precision, ema=False)
        losses[precision] = [
            json.loads(line)["loss"]
            for line in (tmp_path / precision / "metrics.jsonl").read_text().splitlines()
        ]
    assert (
        max(abs(a / b - 1) for a, b in zip(*losses.values(), strict=True)) < 0.01
        and losses["fp32"][-1] < 0.93 * losses["fp32"][0]
    )


def test_pure_bf16_resumes_exactly_and_skips_bad_steps(tmp_path, halved):
    halved()
    options = {"precision": "pure_bf16", "save_every_steps": 2, "keep_last": 0}
    whole = trained(tmp_path / "whole", **options)
    assert {p.dtype for p in whole.learner.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in whole.ema.shadow.values()} == {torch.float32}
    assert_same(whole, trained(tmp_path / "whole", resume_at=2, **options))
    two = trained(tmp_path / "two", steps=2, lr_schedule="constant", **options)
    poisoned = trained(
        tmp_path / "poisoned",
        steps=3,
        lr_schedule="constant",
        poison=(2,),
        log_every_steps=3,
        **options,
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(two.learner.parameters(), poisoned.learner.parameters(), strict=True)
    )


class Inner(Network):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(6, dtype=dtype))

    def matrices(self) -> set[str]:
        return {"weight"}


class Two(nn.Module):
    """Two matrices, which Muon gets, and a vector; all moments away from zero after the first
    steps."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.inner = Inner(dtype)


@pytest.mark.parametrize(
    "kind, dtype", [("adamw", torch.float32), ("muon", torch.float32), ("adamw", torch.bfloat16)]
)
def test_clipping_scales_all_gradients_of_a_step_and_a_bad_norm_skips_it(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    gradients = [
        [torch.randn(shape, generator=generator).to(dtype) for shape in ((6, 6), (6,))]
        for _ in range(3)
    ]
    outcomes = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = Two(dtype)
        optimizer = build_optimizer(model, 0.1, 0.1, (0.9, 0.95), kind)
        for number, own in enumerate(gradients):
            for p, gradient in zip(model.parameters(), own, strict=True):
                p.grad = gradient * 10.0**number  # the first within the limit of 10
            if ours:
                norm, skipped = clip_and_guard(optimizer, 10.0)
                expected = sum(p.grad.float().square().sum() for p in model.parameters()).sqrt()
                assert skipped == 0 and norm.item() == pytest.approx(expected.item(), rel=0.01)
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
        # AdamW's step does not tell by what all gradients were multiplied; its moments do.
        moments = [value for p in model.parameters() for value in optimizer.state[p].values()]
        parts = [*model.parameters(), *(value for value in moments if value.ndim)]
        outcomes.append(torch.cat([part.detach().flatten().float() for part in parts]))
    torch.testing.assert_close(*outcomes, rtol=1e-5 if dtype == torch.float32 else 0.02, atol=1e-6)
    before = [p.detach().clone() for p in model.parameters()]
    model.inner.bias.grad.fill_(torch.inf)
    assert clip_and_guard(optimizer, 10.0)[1] == 1
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("chunk", [1, *thorough(2**26)])
def test_moments_that_wait_elsewhere_change_no_bit(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(lean, "CHUNK", chunk)
    options = {"save_every_steps": 2, "keep_last": 0}
    expected = trained(tmp_path / "plain", **options)
    state = trained(tmp_path / "away", offload_optimizer=True, **options)
    assert_same(expected, state)
    assert len(state.optimizer.parts) == (
        len(list(state.learner.parameters())) if chunk == 1 else 1
    )
    homes = state.optimizer.parking.parked
    planned = parked_moments([*state.learner.parameters()])
    assert sorted(planned) == sorted(moment.nbytes for moment in homes.values())
    moments = [
        (id(p), name) for p, own in state.optimizer.state.items() for name in own if name != "step"
    ]
    assert moments and all(
        state is homes[key]
        for key, state in zip(
            moments,
            (own[name] for own in state.optimizer.state.values() for name in own if name != "step"),
            strict=True,
        )
    )
    assert_same(
        expected, trained(tmp_path / "away", resume_at=2, offload_optimizer=True, **options)
    )
    assert_same(expected, trained(tmp_path / "away", resume_at=2, **options))  # and without


def test_chunks_keep_every_parameter_with_its_settings():
    parameters = [nn.Parameter(torch.zeros(size)) for size in (5, 3, 2, 9, 1, 1)]
    groups = [
        {"params": parameters[:3], "weight_decay": 0.1},
        {"params": parameters[3:], "weight_decay": 0.0},
    ]
    original, lean.CHUNK = lean.CHUNK, 6
    try:
        chunks = list(lean.in_chunks(groups))
    finally:
        lean.CHUNK = original
    sizes = [
        [(group["weight_decay"], [p.numel() for p in group["params"]]) for group in chunk]
        for chunk in chunks
    ]
    assert sizes == [[(0.1, [5])], [(0.1, [3, 2])], [(0.0, [9])], [(0.0, [1, 1])]]


def test_the_removed_8_bit_moments_are_refused_in_training_but_old_configs_are_read():
    assert TrainConfig(optimizer="adamw8bit").optimizer == "adamw8bit"  # of a run to be sampled
    with pytest.raises(ConfigError, match="no longer there.*offload_optimizer"):
        build_optimizer(learner(), 1e-3, 0.0, (0.9, 0.95), "adamw8bit")


@pytest.mark.parametrize(
    "words,match",
    [
        ({"precision": "pure_bf16", "optimizer": "muon"}, "made for adamw"),
        ({"offload_optimizer": True, "optimizer": "muon"}, "made for adamw"),
        ({"precision": "pure_bf16", "betas": (0.9, 0.999)}, "stand still"),
    ],
)
def test_what_does_not_go_together_is_said(words, match):
    with pytest.raises(ConfigError, match=match):
        TrainConfig(**words)


def test_the_norm_of_a_step_is_of_every_gradient():
    module = nn.ParameterDict({name: nn.Parameter(torch.zeros(3, 2)) for name in "abcd"})
    optimizer = build_optimizer(module, 1e-3, 0.0, (0.9, 0.95))
    for size, parameter in enumerate(module.values(), 1):
        parameter.grad = torch.full((3, 2), float(size))
    norm, skipped = clip_and_guard(optimizer, 0)
    assert float(norm) == pytest.approx((6 * (1 + 4 + 9 + 16)) ** 0.5) and not skipped
    for parameter in module.values():
        good, parameter.grad = parameter.grad, torch.full((3, 2), float("nan"))
        assert clip_and_guard(optimizer, 0)[1] == 1
        parameter.grad = good
