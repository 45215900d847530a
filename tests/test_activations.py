"""What blocks leave to the backward pass, in the memory of the CPU: `offload_activations`."""

import weakref
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from mmdit.adapters import LoRAConfig, inject
from mmdit.models.routing import TreadConfig
from mmdit.nn import activations
from mmdit.nn.activations import Activations, Away, Channel, Sent, recompute
from tests.helpers.thorough import thorough
from tests.test_memory_ladder import adapted, passes
from tests.test_model import SMALL, TIMES, awake, captions, clip
from tests.test_wan_step import count_runs

HERE = replace(SMALL, checkpointing=True)
KEEPING = replace(SMALL, checkpointing=False)


class Late(Channel):
    """A channel whose copies are done when somebody waits for them, or for a later one: what is
    used without waiting is NaN. `taken`: the length of each piece of memory, by its address;
    `done`: how many copies are."""

    def __init__(self, device):
        super().__init__(device)
        self.queue, self.done, self.taken = [], 0, {}
        take = self.memory.take

        def counted(size):
            piece = take(size)
            self.taken[piece.data_ptr()] = len(piece)
            return piece

        self.memory.take = counted

    @torch.no_grad()
    def copy(self, to, what):
        if to.is_floating_point():
            to.fill_(float("nan"))
        self.queue.append((to, weakref.ref(what)))
        return self.done + len(self.queue)

    @torch.no_grad()
    def wait(self, done):
        while self.done < done:
            to, what = self.queue.pop(0)
            if what() is not None:  # else its memory was given up too early
                to.copy_(what())
            self.done += 1


@pytest.fixture
def late(monkeypatch):
    channels = cache(Late)
    monkeypatch.setattr(activations, "can_offload", lambda x: True)
    monkeypatch.setattr(activations, "channel", channels)
    return channels(torch.device("cpu"))


def chain(passed: Activations, x: torch.Tensor, layers: list[nn.Module]) -> torch.Tensor:
    for index, layer in enumerate(layers):
        with passed.of_block(layer, x):
            x = recompute(layer, x) if passed.recomputed(index) else layer(x)
    return x


def sent_by(passed: Activations) -> list[Sent]:
    """Return what the blocks sent, the last block first."""
    newest, result = passed.newest, []
    while newest is not None:
        result.append(newest)
        newest = newest.before
    return result


def gradients(layers: list[nn.Module]) -> list[torch.Tensor]:
    result = [weight.grad.clone() for layer in layers for weight in layer.parameters()]
    for layer in layers:
        layer.zero_grad()
    return result


class Layer(nn.Module):
    """It keeps its input, four factors (one of them twice), a product that lies transposed, its
    sine and a wide result; parts of a tensor's memory stay, and so do weights, which are large."""

    def __init__(self):
        super().__init__()
        self.both, self.wide, self.out = nn.Linear(4, 8), nn.Linear(4, 30), nn.Linear(30, 4)

    def forward(self, x):
        a, b = self.both(x).chunk(2, -1)
        product = (a * b).tanh() * (a.sin() * b.cos())
        return self.out(self.wide(product.transpose(1, 2).sin().transpose(1, 2)))


@pytest.mark.parametrize("settings, kept", [(HERE, 1), (KEEPING, 8)])
def test_what_blocks_leave_comes_back_in_time(late, settings, kept):
    layers = [Layer() for _ in range(6)]
    x, y = torch.randn(2, 9, 4, requires_grad=True), torch.randn(2, 9, 4, requires_grad=True)
    for start in (x, y):
        chain(Activations(settings), start, layers).square().sum().backward()
    expected, once = gradients(layers), start.grad.clone()
    x.grad = y.grad = None
    sends = replace(settings, offload_activations=True)
    first, second = Activations(sends), Activations(sends)
    a, b = chain(first, x, layers), chain(second, y, layers)  # both wait for their backward pass
    for passed in (first, second):
        here = [[away.leaving is not None for away in sent.wanted()] for sent in sent_by(passed)]
        assert here == 2 * [kept * [True]] + 4 * [kept * [False]]
    del first, second, passed, here
    most, back = [], Away.back

    def counted(away):
        result, sent, there = back(away), away.sent, 0
        while sent is not None:
            there += any(other.arriving is not None for other in sent.wanted())
            sent = sent.before
        most.append(there)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Away, "back", counted)
        (a.square().sum() + b.square().sum()).backward()
    # the one before the block that is asked for, and what this still keeps
    assert max(most) == (1 if kept == 1 else 2)
    # there and back, but for the last two blocks, which have not left
    assert late.done == 2 * (6 + 4) * kept and not late.queue
    found = [*gradients(layers), y.grad]
    assert all(map(torch.equal, found, [*expected, once])) and len(found) == 37
    count = len(late.taken)
    assert count == 12 * kept
    # 72 numbers, and 540, in the next multiples of 256 bytes
    assert {*late.taken.values()} == ({512} if kept == 1 else {512, 2304})
    del a, b
    before = late.done
    loss = chain(Activations(sends), y, layers).square().sum()
    loss.backward(retain_graph=True)
    once = gradients(layers)
    loss.backward()
    assert all(map(torch.equal, gradients(layers), once)) and len(late.taken) == count
    # once there; then back, but for two blocks; then back
    assert late.done + len(late.queue) == before + (6 + 4 + 6) * kept


def test_without_gradients_and_on_a_cpu_nothing_leaves(late, monkeypatch):
    layers = [Layer(), Layer()]
    x = torch.randn(2, 9, 4, requires_grad=True)
    with torch.no_grad():
        passed = Activations(replace(HERE, offload_activations=True))
        chain(passed, x, layers)
    assert not passed.recomputed(0) and passed.newest is None
    monkeypatch.undo()
    passed = Activations(replace(HERE, offload_activations=True))
    chain(passed, x, layers).sum().backward()
    assert passed.recomputed(0) and passed.newest is None and not late.taken


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False])
def test_compiled_blocks_leave_theirs_too(late, checkpointing):
    torch._dynamo.reset()
    model = adapted(checkpointing=checkpointing)
    for block in model.blocks:
        block.compile(dynamic=False, backend="aot_eager")
    plain = passes(model, autocast=True)
    model.offload_activations = True
    assert all(map(torch.equal, passes(model, autocast=True), plain))
    blocks = len(model.blocks)
    assert len(late.taken) == blocks if checkpointing else len(late.taken) > 5 * blocks


@pytest.mark.parametrize("encoding", [*thorough(None), "nf4"])
@pytest.mark.parametrize("every", [0, 1, 2])
def test_wan_has_the_same_gradients_with_activations_on_the_cpu(late, every, encoding):
    model = adapted(checkpointing=every > 0, encoding=encoding)
    model.checkpoint_every = every
    plain = passes(model, autocast=True)
    assert not late.taken
    model.offload_activations, runs = True, count_runs(model)
    assert all(map(torch.equal, passes(model, autocast=True), plain))
    again = [every > 0 and index % every == 0 for index in range(len(runs))]
    assert runs == [4 if recomputed else 2 for recomputed in again]
    assert len(late.taken) == len(runs) if every == 1 else len(late.taken) > 5 * len(runs)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("tread", [None, TreadConfig(enabled=True, apply_to=(1, -1))])
def test_the_video_model_has_the_same_gradients_with_activations_on_the_cpu(
    late, tread, checkpointing
):
    results = []
    for offload in (False, True):
        config = replace(SMALL, depth=3, checkpointing=checkpointing, offload_activations=offload)
        model = awake(config, tread)
        keep = model.draw_keep(8, 8, 0, 0)
        output = model(clip(2, 2, 8, 8), TIMES, captions(2), keep)
        output.square().sum().backward()
        results.append([output, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert bool(late.taken) == offload
    assert all(map(torch.equal, *results))
    # of a recomputed block the stream, and what is added to it but in the first block of a run
    assert len(late.taken) == (3 if tread else 5) if checkpointing else len(late.taken) > 20


@pytest.mark.parametrize("place", ["block", "adapter"])
def test_what_is_recomputed_drops_what_was_dropped(place):
    gradients = []
    for checkpointing in (False, True):
        dropout = 0.5 if place == "block" else 0.0
        model = awake(replace(SMALL, checkpointing=checkpointing, dropout=dropout)).train()
        if place == "adapter":
            lora = LoRAConfig(enabled=True, rank=2, target_modules=("blocks.*",), dropout=0.5)
            inject(model, lora, seed=0)
            for name, weight in model.named_parameters():
                if name.endswith("lora_B"):
                    nn.init.ones_(weight)
        torch.manual_seed(1)
        model(clip(2, 2, 4, 4), TIMES, captions(2)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 8
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)
