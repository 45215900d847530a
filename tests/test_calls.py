"""Sampling reads the text once and may replay the rest: nothing but the work changes. A tape of
torch's operations stands in for CUDA graphs."""

import gc
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch

from mmdit.adapters import LoRAConfig, inject
from mmdit.diagnostics.attention_statistics import observed
from mmdit.diffusion import FlowMatchingConfig, SamplerConfig, build_objective
from mmdit.interfaces import Boundary, TextTokens
from mmdit.models import VideoMMDiTConfig, build_model
from mmdit.nn.experts import Experts
from mmdit.text_encoders import ByteLevelConfig, build_text_encoder
from mmdit.tokenizers import DummyTokenizerConfig, build_tokenizer
from mmdit.training.graphs import common
from mmdit.training.graphs import sampling_graphs as calls
from mmdit.training.graphs.sampling_graphs import Calls
from mmdit.training.learner import Learner
from mmdit.training.pipeline import Pipeline, SampleSettings
from tests.helpers.tapes import pretended_graphs
from tests.helpers.thorough import thorough

CAPTIONS = ["a red ball", "two blue boxes"]
DEPTH, CHANNELS = 3, 12


def awake(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return module


def network(adapter: str = "", **config):
    model = build_model(
        VideoMMDiTConfig(dim=16, depth=DEPTH, num_heads=2, window_size=2, **config), CHANNELS, 16
    )
    if adapter:
        inject(
            model,
            LoRAConfig(
                enabled=True,
                type=adapter,
                rank=2,
                alpha=3.0,
                target_modules=("cross.k", "cross.v", "q"),
            ),
            seed=0,
        )
    return awake(model).eval()


def pipeline(model, prediction: str, precision: str) -> Pipeline:
    encoder = awake(build_text_encoder(ByteLevelConfig(dim=16, depth=1, num_heads=2)))
    tokenizer = build_tokenizer(DummyTokenizerConfig(latent_d=CHANNELS))
    objective = build_objective(
        "flow_matching", flow_matching=FlowMatchingConfig(prediction=prediction)
    )
    return Pipeline(Learner(model, encoder, objective, tokenizer.spec).eval(), tokenizer, precision)


def draw(
    model, prediction: str = "velocity", solver: str = "ab2", precision: str = "fp32", **settings
) -> torch.Tensor:
    settings = SampleSettings(SamplerConfig(solver, 5), seed=3, **settings)
    return pipeline(model, prediction, precision).latents(CAPTIONS, 64, 48, 2, settings)


def draw_plainly(model, **settings) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Calls, "__call__", lambda self, model, *inputs, **more: model(*inputs, **more)
        )
        return draw(model, **settings)


def count(model, layers: tuple[str, ...] = ("cross.k", "cross.v")) -> list[str]:
    names = []
    for name, part in model.named_modules():
        if name.endswith(layers):
            part.register_forward_hook(lambda *_, name=name: names.append(name))
    return names


VARIANTS = [
    {},
    {"pooled_text": False},
    {"qk_norm": False},
    {"crop": True},
    {"residual": "autocast"},
    {"adapter": "lora"},
    {"adapter": "lokr"},
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("frames, autocast", [*thorough((2, False)), (1, True)])
def test_prepared_text_gives_the_same_bits(variant, frames, autocast):
    model = network(**variant)
    x, t = torch.randn(2, frames, 4, 3, CHANNELS), torch.tensor([100.0, 800.0])
    text = TextTokens(torch.randn(2, 5, 16), torch.arange(5) < torch.tensor([[5], [2]]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, prepared = model(x, t, text), model.prepare(text)
        assert torch.equal(model(x, t, prepared), expected)
        assert not torch.equal(model(x, t, model.prepare(text.null())), expected)
        with observed(model) as plain:
            model(x, t, text)
        with observed(model) as told:
            model(x, t, prepared)
        assert {name: stats.result() for name, stats in told.items()} == {
            name: stats.result() for name, stats in plain.items()
        }
    with pytest.raises(ValueError, match="2 latents, 2 times and 1 captions"):
        model(x, t, model.prepare(text[:1]))
    with pytest.raises(ValueError, match="16"):
        model.prepare(TextTokens(torch.randn(2, 5, 4), text.valid))


@pytest.mark.parametrize(
    "settings, captions",
    [
        ({"cfg_scale": 2.0}, 1),
        *thorough(({"cfg_scale": 1.0}, 1), ({"cfg_scale": 2.0, "cfg_interval": (0.3, 0.7)}, 2)),
        ({"cfg_scale": 0.0, "cfg_interval": (0.3, 0.7)}, 2),
        ({"cfg_scale": 2.0, "negative_prompt": "a star"}, 1),
        ({"cfg_scale": 2.0, "precision": "bf16"}, 1),
    ],
)
@pytest.mark.parametrize("adapter", [*thorough(""), "lora"])
def test_a_run_makes_keys_and_values_once_for_each_kind_of_captions(settings, captions, adapter):
    model = network(adapter)
    expected = draw_plainly(model, **settings)
    made, steps = count(model), count(model, ("cross.q",))
    assert torch.equal(draw(model, **settings), expected)
    assert len(made) == 2 * DEPTH * captions and len(steps) == 5 * DEPTH
    awake(model)  # other weights: nothing is left from the run before
    model.blocks[0].cross.k.weight.data.neg_()
    assert torch.equal(draw(model, **settings), draw_plainly(model, **settings))


def pair():
    return Experts(network("lora"), network("lokr"), Boundary(0.5, 1000.0)).eval()


def test_each_expert_of_a_pair_has_its_own_keys():
    model = pair()
    expected = draw_plainly(model, cfg_scale=2.0)
    assert not torch.equal(draw(model.high, cfg_scale=2.0), expected)
    made = count(model)
    assert torch.equal(draw(model, cfg_scale=2.0), expected)
    assert len(made) == 2 * 2 * DEPTH and len(set(made)) == len(made)


@pytest.fixture
def tapes(monkeypatch):
    monkeypatch.setattr(calls, "can_replay", lambda model, x: common._able)
    monkeypatch.setattr(common, "_able", True)
    monkeypatch.setattr(calls, "first_call", lambda call, x, t: call(x, t))
    return pretended_graphs(monkeypatch, calls)


@pytest.mark.parametrize(
    "variant",
    [*thorough({}), {"crop": True}, *thorough({"adapter": "lokr"}, {"pooled_text": False})],
)
@pytest.mark.parametrize(
    "settings, graphs",
    [
        ({"cfg_scale": 2.0, "cfg_interval": (0.3, 0.7)}, 2),
        ({"cfg_scale": 2.0, "precision": "bf16"}, 1),
        (
            {"cfg_scale": 1.0, "prediction": "x0", "solver": "dpmpp_2m"},
            1,
        ),  # the solver keeps the network's very output
    ],
)
def test_replays_give_the_same_bits_with_a_graph_for_each_kind_of_call(
    tapes, variant, settings, graphs
):
    model = network(**variant)
    expected = draw_plainly(model, **settings)
    steps = count(model, ("cross.q",))
    assert torch.equal(draw(model, **settings), expected) and len(tapes) == graphs
    assert len(steps) == 2 * DEPTH * graphs, (
        "each kind runs twice in Python: at first, and for the capture"
    )


def test_the_experts_of_a_pair_are_replayed_each_in_its_times(tapes):
    model = pair()
    assert (
        torch.equal(draw(model, cfg_scale=2.0), draw_plainly(model, cfg_scale=2.0))
        and len(tapes) == 2
    )


def test_a_replay_holds_the_text_whose_memory_its_graph_reads(tapes, monkeypatch):
    model, made = network(), []
    prepare = model.prepare
    monkeypatch.setattr(
        model, "prepare", lambda text: made.append(weakref.ref(kept := prepare(text))) or kept
    )
    text, x = (
        TextTokens(torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)),
        torch.randn(2, 1, 4, 3, CHANNELS),
    )
    with torch.no_grad(), Calls() as run:
        for _ in range(3):
            run(model, x, torch.tensor([100.0, 800.0]), text)
        gc.collect()
        assert len(tapes) == len(made) == 1 and made[0]() is not None
    gc.collect()
    assert made[0]() is None


def test_what_cannot_be_captured_runs_as_it_is_and_that_is_said_once(tapes):
    model = network()
    embed = model.time.forward
    model.time.forward = lambda t: embed(t) * (1 + 0 * t[0].item())
    expected = draw_plainly(model, cfg_scale=2.0)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(draw(model, cfg_scale=2.0), expected)
    assert [
        str(line.message).endswith("operation not permitted when stream is capturing")
        for line in heard
    ] == [True]
    assert len(tapes) == 1


def test_a_watched_model_is_not_replayed():
    model, x = network(), SimpleNamespace(is_cuda=True)
    assert calls.can_replay(model, x)
    with observed(model):
        assert not calls.can_replay(model, x)
    count(model)
    assert not calls.can_replay(model, x) and not calls.can_replay(network(), torch.empty(1))
