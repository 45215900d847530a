"""Recomputed blocks whose inputs wait in the memory of the CPU (`model.checkpoint_offload`)."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from mmdit.models.routing import TreadConfig
from mmdit.nn import recomputing
from mmdit.nn.recomputing import Away, Channel, Recomputing, recompute
from tests.test_model import SMALL, TIMES, awake, captions, clip
from tests.test_wan_step import adapted, count_runs, step

HERE = replace(SMALL, checkpointing=True)
SENT = replace(HERE, checkpoint_offload=True)


class Late(Channel):
    """A channel whose copies are done when somebody waits for them, or for a later one: what is
    used without waiting is NaN. It counts the memory that it asked for, and what was done."""

    def __init__(self, device):
        super().__init__(device)
        self.queue, self.done = [], 0

    def copy(self, to, what):
        if to.is_floating_point():
            to.fill_(float("nan"))
        self.queue.append((to, what))
        return self.done + len(self.queue)

    def wait(self, done):
        while self.done < done:
            to, what = self.queue.pop(0)
            to.copy_(what)
            self.done += 1


@pytest.fixture
def late(monkeypatch):
    taken = []

    def host_memory(size, pinned):
        assert not pinned
        taken.append(size)
        return torch.empty(size, dtype=torch.uint8)

    channels = cache(Late)
    monkeypatch.setattr(recomputing, "leaves", lambda x: True)
    monkeypatch.setattr(recomputing, "channel", channels)
    monkeypatch.setattr(recomputing, "host_memory", host_memory)
    channel = channels(torch.device("cpu"))
    channel.taken = taken
    return channel


def chain(recomputed: Recomputing, x: torch.Tensor, layers: list[nn.Linear]) -> torch.Tensor:
    for index, layer in enumerate(layers):
        with recomputed.inputs(x):
            x = recompute(lambda x, layer=layer: layer(x).tanh(), x)
        assert recomputed.applies(index)
    return x


def aways(newest: Away | None) -> list[Away]:
    return [] if newest is None else [newest, *aways(newest.before)]


def gradients(layers: list[nn.Linear]) -> list[torch.Tensor]:
    result = [layer.weight.grad.clone() for layer in layers]
    for layer in layers:
        layer.weight.grad = None
    return result


def test_inputs_leave_one_after_another_and_come_back_in_time(late):
    layers = [nn.Linear(4, 4) for _ in range(6)]
    x, y = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    for start in (x, y):
        chain(Recomputing(HERE), start, layers).square().sum().backward()
    expected, once = gradients(layers), start.grad.clone()
    x.grad = y.grad = None
    first, second = Recomputing(SENT), Recomputing(SENT)
    a, b = chain(first, x, layers), chain(second, y, layers)  # both wait for their backward pass
    for passed in (first, second):
        sent = aways(passed.newest)
        assert len(sent) == 6 and [away.leaving is not None for away in sent] == [True] + 5 * [
            False
        ]
    del first, second, passed, sent
    most, back = [], Away.back

    def counted(away):
        result = back(away)
        most.append(sum(other.arriving is not None for other in aways(away)))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Away, "back", counted)
        (a.square().sum() + b.square().sum()).backward()
    assert len(most) == 12 and max(most) == 1  # beside the one that was asked for
    assert all(map(torch.equal, gradients(layers), expected)) and torch.equal(y.grad, once)
    count = len(late.taken)
    assert count == 12 and set(late.taken) == {128}  # 24 numbers, in the next power of two
    del a, b
    kept = chain(Recomputing(SENT), y, layers).square().sum()
    kept.backward(retain_graph=True)
    once = gradients(layers)
    kept.backward()
    assert all(map(torch.equal, gradients(layers), once)) and len(late.taken) == count


def test_without_gradients_and_on_a_cpu_nothing_leaves(late, monkeypatch):
    layers = [nn.Linear(4, 4) for _ in range(2)]
    with torch.no_grad():
        assert not Recomputing(SENT).applies(0)
    monkeypatch.undo()
    recomputed = Recomputing(SENT)
    chain(recomputed, torch.randn(2, 4, requires_grad=True), layers).sum().backward()
    assert recomputed.newest is None and not late.taken


@pytest.mark.parametrize("every, residual", [(1, "float32"), (2, "autocast")])
def test_wan_has_the_same_gradients_from_inputs_on_the_cpu(late, every, residual):
    model = adapted()
    model.residual, model.checkpointing, model.checkpoint_every = residual, True, every
    output, plain = step(model)
    assert not late.taken
    model.checkpoint_offload, runs = True, count_runs(model)
    again, moved = step(model)
    assert runs == ([2, 2] if every == 1 else [2, 1])
    assert torch.equal(again, output) and all(torch.equal(moved[n], plain[n]) for n in plain)
    assert len(late.taken) == (2 if every == 1 else 1)


@pytest.mark.parametrize("tread", [None, TreadConfig(enabled=True, apply_to=(1, -1))])
def test_the_video_model_has_the_same_gradients_from_inputs_on_the_cpu(late, tread):
    results = []
    for offload in (False, True):
        config = replace(SMALL, depth=3, checkpointing=True, checkpoint_offload=offload)
        model = awake(config, tread)
        keep = model.draw_keep(8, 8, 0, 0)
        output = model(clip(2, 2, 8, 8), TIMES, captions(2), keep)
        output.square().sum().backward()
        results.append([output, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert bool(late.taken) == offload
    assert all(map(torch.equal, *results))
    # of every block the stream, and what is added to it but in the first block of a run
    assert len(late.taken) == (3 if tread else 5)
