"""Muon that steps equal matrices together, against torch's own, which takes one after another."""

import copy

import pytest
import torch
from torch import nn

from mmdit.training import muon
from mmdit.training.muon import StackedMuon, orthogonalize

SETTINGS = {"lr": 0.02, "weight_decay": 0.1}


def matrices() -> list[nn.Parameter]:
    """Return wide, tall and square matrices, two of each, and more of a shape than it has rows."""
    shapes = [(8, 24), (24, 8), (16, 16)] * 2 + [(2, 3)] * 5
    numbers = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=numbers)) for shape in shapes]


def stepped(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int) -> None:
    """Step three times with gradients of rank 4 and a little noise, as those of a network are."""
    numbers = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in parameters:
            left = torch.randn(len(p), 4, generator=numbers)
            right = torch.randn(4, p.shape[1], generator=numbers)
            p.grad = left @ right + 0.1 * torch.randn(p.shape, generator=numbers)
        optimizer.step()


@pytest.mark.parametrize("at_once", [2**26, 1])
def test_steps_are_those_of_torch(monkeypatch, at_once):
    """In float32, as ours orthogonalize on a CPU; torch's do in bfloat16 everywhere."""
    monkeypatch.setattr(muon, "AT_ONCE", at_once)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    start = matrices()
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    optimizer = StackedMuon(ours, **SETTINGS)
    stepped(optimizer, ours, 3)
    reference = torch.optim.Muon(theirs, **SETTINGS, adjust_lr_fn="match_rms_adamw")
    stepped(reference, theirs, 3)
    for p, expected, before in zip(ours, theirs, start, strict=True):
        moved = (expected - before).norm()
        assert moved > 0.005 * before.norm()
        assert (p - expected).norm() < 1e-5 * moved
        momenta = (
            part.state[p]["momentum_buffer"] for part, p in ((optimizer, p), (reference, expected))
        )
        torch.testing.assert_close(*momenta)


def test_a_skipped_step_changes_nothing_and_a_scale_divides_the_gradients():
    ours, theirs = matrices(), matrices()
    optimizer, reference = (StackedMuon(group, **SETTINGS) for group in (ours, theirs))
    stepped(optimizer, ours, 1)
    stepped(reference, theirs, 1)
    optimizer.found_inf = torch.ones(())
    for p in ours:
        p.grad = torch.full_like(p, torch.inf)
    optimizer.step()
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.tensor(4.0)
    for p, other in zip(ours, theirs, strict=True):
        other.grad = torch.ones_like(p).tril()
        p.grad = 4 * other.grad
    optimizer.step()
    reference.step()
    for p, other in zip(ours, theirs, strict=True):
        assert torch.equal(p, other)
        momenta = (
            part.state[q]["momentum_buffer"] for part, q in ((optimizer, p), (reference, other))
        )
        assert torch.equal(*momenta)


def test_orthogonalized_matrices_have_singular_values_near_one():
    for p in matrices():
        spread = torch.linalg.svdvals(orthogonalize(p.detach()[None], 5)[0].float())
        assert spread.min() > 0.4 and spread.max() < 1.3


def test_small_gradients_are_orthogonalized_like_large_ones_and_none_stays_none():
    for p in matrices():
        wanted = orthogonalize(p.detach()[None], 5)
        small = orthogonalize(1e-5 * p.detach()[None], 5)
        torch.testing.assert_close(small, wanted, rtol=0, atol=1e-4)
        assert not orthogonalize(torch.zeros_like(p)[None], 5).any()
