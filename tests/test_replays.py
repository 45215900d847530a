"""Training replayed as graphs is the training it was: the same weights, bit for bit, whatever the
micro-batches are. A tape of torch's operations stands in for CUDA graphs, and every replay spoils
what the others have left in their memory.
"""

import sys
import warnings
from pathlib import Path

import pytest
import torch

from mmdit.adapters import LoRAConfig, inject
from mmdit.interfaces import Denoiser, TextTokens
from mmdit.models import VideoMMDiTConfig, build_model
from mmdit.training.distributed import process_group
from mmdit.training.graphs import training_graphs as replays
from mmdit.training.graphs.training_graphs import Recorded, Replays, repeats, suits
from tests.helpers.tapes import pretended_graphs
from tests.helpers.thorough import thorough
from tests.helpers.tiny import Workshop, trained_tensors
from tests.test_trainer import assert_same, run_ranks
from tests.test_trainer import trained as of_words

CHANNELS = 8
FREED: list[object] = []  # pools of captures that failed


def with_tapes(monkeypatch) -> list:
    """The graphs made from now on."""
    run, alive = Recorded.run, {}

    def spoiling(recorded):
        alive[id(recorded)] = recorded
        for other in alive.values():
            for left in (other.output, *other.gradients):
                if left is not None:
                    left.fill_(torch.nan)
        return run(recorded)

    monkeypatch.setattr(Recorded, "run", spoiling)
    monkeypatch.setattr(replays, "can_replay", lambda model, x: True)
    monkeypatch.setattr(replays, "memory", lambda device: 1 << 30)
    monkeypatch.setattr(replays, "free_pool", lambda pool, device: FREED.append(pool))
    return pretended_graphs(monkeypatch, replays)


@pytest.fixture
def tapes(monkeypatch):
    return with_tapes(monkeypatch)


def without_compiler(monkeypatch) -> None:
    """All that compiling brings besides."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **options: None)


def trained(
    workshop: Workshop, monkeypatch, name: str, replayed: bool, *words: str
) -> dict[str, torch.Tensor]:
    """Weights, averages and moments after four steps."""
    without_compiler(monkeypatch)
    folder = workshop.train(
        name, "train.compile=true", f"train.replays={replayed}", "train.max_steps=4", *words
    )
    return trained_tensors(folder)


@pytest.mark.parametrize(
    "words, graphs",
    [
        *thorough(((), 1), (("train.precision=bf16", "train.grad_accum_steps=2"), 1)),
        *thorough((("tread.enabled=true", "tread.apply_to=[0, 1]"), 1)),
        *thorough((("model.crop=true", "model.residual=autocast", "train.precision=bf16"), 1)),
        (
            (
                "text_encoder={type: hash, dim: 16}",
                "train.grad_accum_steps=4",
                "train.batch_size=2",
                "train.grad_clip=0.01",
            ),
            1,
        ),
        (
            ("train.sample_every_steps=2", "train.val_every_steps=2", "train.val_share=0.3"),
            1,
        ),  # both with averaged weights in place
        *thorough((("model.checkpointing=true",), 1)),
        (("model.dropout=0.1",), 0),
    ],
)
def test_replayed_training_gives_the_same_bits(tapes, tmp_path, monkeypatch, words, graphs):
    workshop = Workshop(tmp_path)
    plain = trained(workshop, monkeypatch, "plain", False, *words)
    assert not tapes
    replayed = trained(workshop, monkeypatch, "replayed", True, *words)
    assert len(tapes) == 2 * graphs, "forward and backward"
    assert (
        plain.keys() == replayed.keys()
        and [name for name in plain if not torch.equal(plain[name], replayed[name])] == []
    )


@pytest.mark.slow
def test_two_processes_that_replay_train_as_two_that_do_not(tmp_path):
    run_ranks(tmp_path, 2, __file__)


def one_rank(folder: Path) -> None:
    """With micro-batches that are added up before they are exchanged, and a step whose losses are
    no numbers."""
    with pytest.MonkeyPatch.context() as patch, process_group("cpu") as world:
        tapes, states = with_tapes(patch), []
        for replayed in (False, True):
            without_compiler(patch)
            more = {"accum": 2, "poison": (3,), "steps": 8, "compile": True, "replays": replayed}
            states.append(of_words(folder / str(replayed), world=world, **more))
        assert_same(*states)
        assert len(tapes) == 2


def network(**config):
    torch.manual_seed(0)
    model = build_model(
        VideoMMDiTConfig(dim=16, depth=2, num_heads=2, window_size=2, **config), CHANNELS, 16
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def batch(rows: int, frames: int = 1, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, frames, rows, 3, CHANNELS, generator=generator)
    text = TextTokens(
        torch.randn(2, 15, 16, generator=generator), torch.arange(15) < torch.tensor([[9], [2]])
    )
    return x, torch.tensor([100.0, 800.0]), text


def gradients(model, call, batches) -> list[torch.Tensor]:
    """Of the weights, all micro-batches together."""
    for x, t, text in batches:
        with torch.autocast("cpu", torch.bfloat16):
            prediction = call(x, t, text)
        (prediction.float() - x).square().mean().backward()
    found = [weight.grad for weight in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found


def test_buckets_and_clips_in_one_step_have_graphs_each(tapes):
    model = network()
    model.turned, embed, factor = (
        torch.nn.Parameter(torch.randn(3, 5)),
        model.time.forward,
        torch.randn(5, 3),
    )
    model.time.forward = lambda t: (
        embed(t) + (factor * model.turned.t()).mean()
    )  # whose gradient has turned strides
    call = Replays(model)
    for step in range(4):
        batches = [batch(rows, frames, step) for rows, frames in ((2, 1), (3, 1), (2, 2), (2, 1))][
            : 1 + 3 * (step > 1)
        ]
        expected, found = (gradients(model, either, batches) for either in (model, call))
        assert all(map(torch.equal, found, expected)), step
        assert all(
            own.stride() == weight.stride()
            for own, weight in zip(found, model.parameters(), strict=True)
        )
    assert len(tapes) == 2 * 3


def test_weights_that_move_to_other_memory_are_followed(tapes):
    model = network()
    call = Replays(model)
    for _ in range(4):
        assert all(
            map(
                torch.equal,
                gradients(model, call, [batch(2)] * 2),
                gradients(model, model, [batch(2)] * 2),
            )
        )
        for weight in model.parameters():
            weight.data = 1.1 * weight.data


def test_who_waits_for_the_gradient_of_a_weight_gets_it(tapes):
    model, seen = network(), []
    model.output.weight.register_hook(lambda gradient: seen.append(gradient))
    call = Replays(model)
    place = [name for name, _ in model.named_parameters()].index("output.weight")
    for step in range(1, 5):
        found = gradients(model, call, [batch(2, seed=step)])
        assert len(seen) == step and torch.equal(seen[-1], found[place])
    assert len(tapes) == 2


def test_a_frozen_network_leads_the_gradient_to_its_text(tapes):
    model, (x, t, text) = network().requires_grad_(False), batch(2)
    call, found = Replays(model), []
    for step in range(1, 5):
        for either in (model, call):
            learned = (step * text.embeddings).requires_grad_()
            prediction = either(step * x, t, TextTokens(learned, text.valid))
            prediction.square().mean().backward()
            found.append((prediction.detach(), learned.grad))
    assert len(tapes) == 2 and found[0][1].any()
    for expected, replayed in zip(found[::2], found[1::2]):
        assert all(map(torch.equal, replayed, expected))


def test_a_second_call_before_the_backward_pass_is_not_replayed(tapes):
    model = network()
    call, (x, t, text) = Replays(model), batch(2)

    def pair(network):
        (network(x, t, text) * network(2 * x, t, text)).sum().backward()
        return gradients(model, network, [])

    expected = pair(model)
    for _ in range(3):
        assert all(map(torch.equal, pair(call), expected))
    assert len(tapes) == 2


def test_large_networks_many_kinds_and_full_memory_are_left_alone(tapes, monkeypatch):
    model = network()
    call = Replays(model)
    for frames in range(1, replays.SIGNATURES + 4):
        for _ in range(2):
            gradients(model, call, [batch(2, frames)])
    assert len(tapes) == 2 * replays.SIGNATURES
    monkeypatch.setattr(replays, "memory", lambda device: 0)
    gradients(model, call := Replays(model), [batch(2)] * 2)
    monkeypatch.undo()
    monkeypatch.setattr(replays, "can_replay", lambda model, x: True)
    monkeypatch.setattr(replays, "SMALL", 0)
    gradients(model, call, [batch(2)] * 2)
    assert not call.made


@pytest.mark.parametrize(
    "kind, reason",
    [("waits", "not permitted when stream is capturing"), ("changes", "other numbers")],
)
def test_what_cannot_be_replayed_runs_as_it_is_and_that_is_said_once(tapes, kind, reason):
    model = network()
    embed, calls = model.time.forward, []
    odd = {
        "waits": lambda t: embed(t) * (1 + 0 * t[0].item()),
        "changes": lambda t: embed(t) * (1 + len(calls)),
    }[kind]
    model.time.forward = lambda t: odd(t) if calls.append(t) is None else None
    call = Replays(model)
    FREED.clear()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(4):
            gradients(model, call, [batch(2)])
    assert [reason in str(line.message) for line in heard] == [True] and not call.able
    assert len(FREED) == (kind == "waits"), "graphs that were made give back their own memory"


@pytest.mark.parametrize("size, able", [(1e-6, True), (0.3, False)])
def test_a_network_that_does_not_repeat_itself_is_replayed_if_it_is_as_near_as_that(
    tapes, size, able
):
    """Kernels that add in any order differ by rounding at every call; graphs may do no more."""
    model = network()
    embed = model.time.forward
    model.time.forward = lambda t: embed(t) * (1 + size * torch.rand(()))
    call = Replays(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if not able else "error")
        for _ in range(3):
            gradients(model, call, [batch(2)])
    assert tapes and call.able == able


def test_a_replay_that_is_farther_than_two_calls_are_is_found():
    value = torch.linspace(-1, 1, 100)
    near, far = value * (1 + 1e-6), value * (1 + 1e-5)
    assert repeats([value, None], [value, None], [value.clone(), None])
    assert repeats([value], [near], [value * (1 - 2e-6)]) and not repeats([value], [near], [far])
    assert not repeats([value], [value], [near]) and not repeats([value], [near], [None])
    assert not repeats([0 * value], [0 * value], [near])
    assert not repeats([value], [value * 1.1], [value * 1.1])


def test_only_networks_whose_steps_depend_on_inputs_and_weights_alone_are_replayed():
    assert suits(network())
    assert suits(network(checkpointing=True)) and not suits(network(dropout=0.1))
    adapted = network()
    inject(adapted, LoRAConfig(enabled=True, rank=2, alpha=3.0, target_modules=("q",)), seed=0)
    assert not suits(adapted) and not suits(Denoiser())


if __name__ == "__main__":  # one rank of `run_ranks`
    one_rank(Path(sys.argv[1]))
