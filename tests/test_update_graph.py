"""Updates that are replayed as graphs are the updates that they were, bit for bit. A tape of
torch's operations stands in for CUDA graphs."""

import shutil
import warnings
from itertools import chain

import pytest
import torch
from torch import nn

from mmdit.training import checkpoint
from mmdit.training.graphs import update_graph
from mmdit.training.graphs.update_graph import ReplayedUpdates
from mmdit.training.muon import StackedMuon
from mmdit.training.optim import Optimizer, clip_and_guard
from tests.helpers.tapes import pretended_graphs
from tests.helpers.thorough import thorough
from tests.helpers.tiny import Workshop, trained_tensors

WORDS = ("train.compile=true", "train.max_steps=6")
FREED: list[object] = []  # pools of captures that failed


@pytest.fixture
def tapes(monkeypatch):
    monkeypatch.setattr(update_graph, "suits", lambda optimizer: True)
    monkeypatch.setattr(update_graph, "free_pool", lambda pool, device: FREED.append(pool))
    FREED.clear()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **options: None)
    return pretended_graphs(monkeypatch, update_graph)


def trained(workshop: Workshop, name: str, *words: str) -> dict[str, torch.Tensor]:
    """Return weights, averages and moments after six steps."""
    return trained_tensors(workshop.train(name, *WORDS, *words))


@pytest.mark.parametrize(
    "words",
    [
        *thorough(((),), (("train.optimizer=muon", "train.lr_schedule=cosine"),)),
        ("train.optimizer=muon", "train.grad_accum_steps=2", "train.grad_clip=0.01"),
        *thorough((("train.optimizer=muon", "train.warmup_steps=5", "train.precision=bf16"),)),
        ("train.grad_clip=0", "text_encoder={type: byte_level, dim: 16, lr_scale: 0.3}"),
    ],
)
def test_replayed_updates_leave_the_same_bits(tapes, tmp_path, words):
    # The rate differs from step to step, which a graph must read anew.
    workshop = Workshop(tmp_path)
    plain = trained(workshop, "plain", "train.replays=false", *words)
    assert not tapes
    replayed = trained(workshop, "replayed", *words)
    assert len(tapes) == 1 and not FREED
    assert plain.keys() == replayed.keys()
    assert [name for name in plain if not torch.equal(plain[name], replayed[name])] == []


@pytest.mark.thorough
def test_a_resumed_run_goes_on_with_the_same_bits(tapes, tmp_path):
    workshop = Workshop(tmp_path)
    words = ("train.optimizer=muon", "train.lr_schedule=cosine", "train.max_steps=8")
    whole = trained(workshop, "whole", *words)
    cut = checkpoint.latest(workshop.train("cut", *WORDS, *words, "train.save_every_steps=5"))
    shutil.rmtree(cut)
    folder = workshop.train("cut", *WORDS, *words, "--resume")
    weights = checkpoint.read_tensors(checkpoint.latest(folder) / "model.safetensors")
    assert len(tapes) == 3 and not FREED and checkpoint.latest(folder) == cut
    assert all(torch.equal(whole[f"model {name}"], value) for name, value in weights.items())


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 3))
        self.second = nn.Parameter(torch.randn(4, 3))
        self.vector = nn.Parameter(torch.randn(5))


def optimizer_of(weights: Weights) -> Optimizer:
    common = {"weight_decay": 0.1, "lr_scale": 1.0, "lr": 0.1}
    return Optimizer(
        StackedMuon([{"params": [weights.matrix, weights.second], **common}]),
        torch.optim.AdamW([{"params": [weights.vector], **common}], fused=True),
    )


def steps_of(updated: str, gradients, max_norm: float = 1.0):
    """Return the weights and all moments after steps with `gradients`, a list of (matrix, second,
    vector) each, and what each step said."""
    torch.manual_seed(0)
    weights = Weights()
    optimizer, said = optimizer_of(weights), []
    updates = ReplayedUpdates(optimizer, max_norm) if updated == "replayed" else None
    for number, given in enumerate(gradients):
        optimizer.set_lr(0.1 / (1 + number))
        for parameter, gradient in zip(weights.parameters(), given, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        if updates:
            said.append(updates())
        else:
            said.append(clip_and_guard(optimizer, max_norm))
            optimizer.step()
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in weights.parameters())
    kept = [v for p in weights.parameters() for v in optimizer.state.get(p, {}).values()]
    return [*weights.parameters(), *kept], said


def draws(count: int, seed: int = 1) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, 3), (4, 3), (5,))
    return [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(count)]


def same(one, other) -> bool:
    """Return whether the weights, the moments and what was said are the same, bit for bit."""
    (kept, said), (expected, again) = one, other
    kept, expected = [*kept, *chain(*said)], [*expected, *chain(*again)]
    return all(map(torch.equal, kept, expected))


def test_gradients_that_are_no_numbers_change_nothing_in_a_replay(tapes):
    gradients = draws(7)
    gradients[4][0][1, 1] = torch.inf
    plain, replayed = steps_of("plain", gradients), steps_of("replayed", gradients)
    assert len(tapes) == 1 and not FREED and same(plain, replayed)
    assert [bool(skipped) for _, skipped in replayed[1]] == [number == 4 for number in range(7)]


def test_each_set_of_weights_has_a_graph_and_the_others_rest(tapes):
    gradients = draws(9)
    for number in (1, 3, 6):
        gradients[number][1] = None
    plain, replayed = steps_of("plain", gradients), steps_of("replayed", gradients)
    assert len(tapes) == 2 and not FREED and same(plain, replayed)


def test_more_sets_than_graphs_are_updated_as_they_are(tapes, monkeypatch):
    monkeypatch.setattr(update_graph, "SIGNATURES", 1)
    gradients = draws(9)
    for number in (1, 3, 6):
        gradients[number][1] = None
    assert same(steps_of("plain", gradients), steps_of("replayed", gradients))
    assert len(tapes) == 1


def test_a_graph_that_leaves_other_numbers_is_not_used(tapes, monkeypatch):
    replay = update_graph.RecordedUpdate.__call__

    def wrong(recorded, gradients):
        return replay(recorded, [2 * gradient for gradient in gradients])

    monkeypatch.setattr(update_graph.RecordedUpdate, "__call__", wrong)
    gradients = draws(5)
    plain = steps_of("plain", gradients, max_norm=0)
    with pytest.warns(UserWarning, match="without a CUDA graph.*other numbers"):
        replayed = steps_of("replayed", gradients, max_norm=0)
    assert same(plain, replayed) and len(tapes) == 1 and FREED


@pytest.mark.parametrize("when", ["copied", "stepped", "captured"])
def test_what_fails_while_a_graph_is_made_costs_no_step(tapes, monkeypatch, when):
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    step, taken = Optimizer.step, []

    def fails_in_the_end(optimizer):
        step(optimizer)
        taken.append(optimizer)
        if len(taken) == 2:
            fails()

    gradients = draws(5)
    plain = steps_of("plain", gradients)
    if when == "copied":
        monkeypatch.setattr(update_graph, "_copies", fails)
    elif when == "stepped":
        monkeypatch.setattr(Optimizer, "step", fails_in_the_end)
    else:
        monkeypatch.setattr(update_graph.RecordedUpdate, "__init__", fails)
    with pytest.warns(UserWarning, match="out of memory"):
        replayed = steps_of("replayed", gradients)
    assert same(plain, replayed)


def test_weights_in_other_memory_are_followed(tapes):
    torch.manual_seed(0)
    weights = Weights()
    optimizer = optimizer_of(weights)
    updates = ReplayedUpdates(optimizer, 1.0)
    for number, given in enumerate(draws(8)):
        if number == 4:
            weights.matrix.data = weights.matrix.data.clone()
        for parameter, gradient in zip(weights.parameters(), given, strict=True):
            parameter.grad = gradient
        before = weights.matrix.detach().clone()
        updates()
        assert not torch.equal(before, weights.matrix), "the weights of now, not of then"
    assert len(tapes) == 2 and not FREED


def test_only_small_networks_that_lie_whole_on_a_gpu_are_replayed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not update_graph.suits(optimizer_of(Weights())), "on a CPU nothing is launched"
