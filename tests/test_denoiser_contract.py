"""What `interfaces.Denoiser` promises, for every model of the union, and for two of them by noise
level. A new model needs a tiny example here."""

import typing

import pytest
import torch

from mmdit.adapters import select
from mmdit.adapters.lora import LoRAConfig
from mmdit.config import decode, encode
from mmdit.interfaces import Boundary, Denoiser, TextTokens
from mmdit.models import ModelConfig, VideoMMDiTConfig, WanModelConfig, build_model
from mmdit.models.wan import WanConfig
from mmdit.models.wan_denoiser import WanDenoiser
from mmdit.nn.experts import Experts, shared_copy
from mmdit.rng import Draws
from mmdit.training.optim import build_optimizer

CHANNELS, TEXT = 4, 6
WAN_SIZES = WanConfig(
    24, 32, 2, 2, in_dim=CHANNELS, out_dim=CHANNELS, freq_dim=8, text_dim=TEXT, text_len=8
)
CONFIGS = {
    VideoMMDiTConfig: VideoMMDiTConfig(dim=32, depth=2, num_heads=2, window_size=2),
    WanModelConfig: WanModelConfig(name_or_path="x", first_frame=0.5),
}


def example(config: ModelConfig) -> Denoiser:
    match config:
        case VideoMMDiTConfig():
            return build_model(config, CHANNELS, TEXT)
        case WanModelConfig():
            model = WanDenoiser(WAN_SIZES)
            model.settings = config
            return model
    raise AssertionError(f"no tiny example of {type(config).__name__}")


def make(name: str) -> Denoiser:
    """Return a model that is awake: no gate is closed, no weight is as it was initialised."""
    torch.manual_seed(0)
    if name == "shared pair":
        high = example(CONFIGS[VideoMMDiTConfig])
        model: Denoiser = Experts(high, shared_copy(high), Boundary(0.5, 1000.0))
    elif name == "pair":
        config = CONFIGS[WanModelConfig]
        model = Experts(example(config), example(config), Boundary(0.5, 1000.0))
    else:
        model = example(CONFIGS[next(kind for kind in CONFIGS if kind.__name__ == name)])
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model.eval()


MODELS = [*(config.__name__ for config in typing.get_args(ModelConfig)), "shared pair", "pair"]
each_model = pytest.mark.parametrize("name", MODELS)
FRAMES, ROWS, COLUMNS = 3, 4, 4


def call(model: Denoiser, rows=slice(None), words: int = 3, t=(900.0, 700.0), **inputs):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, FRAMES, ROWS, COLUMNS, CHANNELS, generator=generator)
    embeddings = torch.randn(2, 3, TEXT, generator=generator)
    text = TextTokens(embeddings, torch.tensor([[True, True, True], [True, False, False]]))
    prepared = text.pad(words)[rows]
    return model(x[rows], torch.tensor(t)[rows], prepared, **inputs)


# ── calls ─────────────────────────────────────────────────────────────────────────────────────────
@each_model
@torch.no_grad()
def test_a_prediction_is_shaped_like_the_latents_and_the_same_again(name):
    model = make(name)
    first = call(model)
    assert first.shape == (2, FRAMES, ROWS, COLUMNS, CHANNELS) and first.isfinite().all()
    assert torch.equal(call(model), first)
    assert not torch.allclose(call(model, t=(800.0, 600.0)), first), "the time matters"


@each_model
@torch.no_grad()
def test_a_sample_depends_neither_on_padding_nor_on_its_neighbours(name):
    model = make(name)
    expected = call(model)
    torch.testing.assert_close(call(model, words=7), expected, rtol=1e-4, atol=1e-5)
    for row in range(2):
        alone = call(model, slice(row, row + 1))
        torch.testing.assert_close(alone, expected[row : row + 1], rtol=1e-4, atol=1e-5)


@each_model
@torch.no_grad()
def test_prepared_texts_and_the_inputs_of_samplers_are_taken(name):
    model = make(name)
    for network in model.networks().values():
        text = TextTokens(torch.randn(2, 3, TEXT), torch.ones(2, 3, dtype=torch.bool))
        x, t = torch.randn(2, 1, ROWS, COLUMNS, CHANNELS), torch.tensor([900.0, 100.0])
        expected = network(x, t, text)
        assert torch.equal(network(x, t, network.prepare(text)), expected)
        for grid in ("even", "wan", "diffusers"):
            assert torch.equal(network(x, t, text, **network.sampling_inputs(grid)), expected)


@each_model
def test_experts_are_found_by_name_and_answer_for_their_times(name):
    model = make(name)
    networks = model.networks()
    if len(networks) == 1:
        assert networks == {"": model} and model.expert_at(500.0) == ""
        return
    assert list(networks) == ["high", "low"]
    for t, expert in ((1000.0, "high"), (500.0, "high"), (499.9, "low"), (0.0, "low")):
        assert model.expert_at(t) == model.expert_at(torch.tensor([t, t])) == expert
    with pytest.raises(ValueError, match="both sides of the boundary 500"):
        model.expert_at(torch.tensor([900.0, 100.0]))
    with torch.no_grad():
        mixed = call(model, t=(900.0, 100.0))
        for row, expert in enumerate(networks):
            own = call(networks[expert], slice(row, row + 1), t=(900.0, 100.0))
            torch.testing.assert_close(mixed[row : row + 1], own, rtol=1e-4, atol=1e-5)


# ── training ──────────────────────────────────────────────────────────────────────────────────────
@each_model
def test_a_gradient_reaches_every_weight(name):
    model = make(name).train()
    nothing = TextTokens(torch.zeros(1, 3, TEXT), torch.zeros(1, 3, dtype=torch.bool))
    for network in model.networks().values():
        unconditional = network(
            torch.randn(1, 1, ROWS, COLUMNS, CHANNELS), torch.tensor([300.0]), nothing
        )
        (call(network).square().mean() + unconditional.square().mean()).backward()
    assert [n for n, weight in model.named_parameters() if weight.grad is None] == []
    still = [n for n, weight in model.named_parameters() if not weight.grad.any()]
    allowed = ("k.bias", "self_attn.k.bias", "cross_attn.k.bias")  # softmax knows no common shift
    assert [n for n in still if not n.endswith(allowed)] == []


@each_model
def test_names_that_a_model_gives_are_those_of_its_parameters(name):
    model = make(name)
    names = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    undecayed, matrices = model.undecayed(), model.matrices()
    assert undecayed and undecayed <= names and matrices and matrices <= names
    assert not undecayed & matrices
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert all(parameters[n].ndim == 2 for n in matrices)
    state = model.state_dict()
    assert {model.is_stored(n) for n in state if n in names} <= {True, False}
    optimizer = build_optimizer(
        torch.nn.ModuleDict({"model": model}), 1e-3, 0.1, (0.9, 0.95), "muon"
    )
    counted = sum(len(group["params"]) for group in optimizer.param_groups)
    assert counted == len(list(model.parameters()))


@each_model
def test_blocks_are_all_that_is_repeated(name):
    model = make(name)
    networks = model.networks().values()
    assert len(model.blocks) == sum(len(network.blocks) for network in networks)
    inside = {id(p) for block in model.blocks for p in block.parameters()}
    assert 0 < len(inside) < len(list(model.parameters()))
    assert model.patch in (1, 2) and ROWS % model.patch == 0
    for network in networks:
        assert select(network, LoRAConfig(enabled=True)), "adapters find their default layers"


@each_model
def test_operations_grow_with_all_that_is_computed(name):
    model = make(name)
    base = model.train_flops((2, 4, 4), 8)
    assert isinstance(base, int) and base > 0
    longer = model.train_flops((4, 4, 4), 8)
    assert 1.5 < longer / base < 4, "tokens in proportion, attention at most as their square"
    assert model.train_flops((2, 4, 4), 16) > base
    model.requires_grad_(False)
    assert model.train_flops((2, 4, 4), 8) < base, "weights that are frozen get no gradient"


@each_model
def test_first_frames_are_given_as_often_as_said(name):
    model = make(name)
    assert model.given_frames(1, Draws.of(0, 0, 2)) == 0
    assert model.given_frames(FRAMES, Draws.of(0, 0, 2)) == int(model.first_frame >= 0.5)
    model.train()
    given = [model.given_frames(FRAMES, Draws.of(0, step, 2)) for step in range(200)]
    assert given == [model.given_frames(FRAMES, Draws.of(0, step, 5)) for step in range(200)]
    assert sum(given) / 200 == pytest.approx(model.first_frame, abs=0.12)
    if model.first_frame:
        call(model, given=1)


@each_model
@torch.no_grad()
def test_numbering_frames_changes_no_picture_and_happens_once(name):
    model = make(name)
    model.number_frames(0)
    before = {n: value.clone() for n, value in model.state_dict().items()}
    model.number_frames(1)
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())


@each_model
def test_other_answers_are_of_the_promised_kinds(name):
    model = make(name)
    assert model.picture in ("none", "first", "first_last") and model.clip_weights == ""
    assert isinstance(model.variant, str) and isinstance(model.takes_first_frame, bool)
    assert all(type(model.can_be_captured(training)) is bool for training in (True, False))
    keep = model.train().draw_keep(ROWS, COLUMNS, 0, 0)
    assert keep is None or keep.dtype == torch.int64
    for network in model.networks().values():
        names = {n for n, _ in network.named_modules()} | dict(network.named_parameters()).keys()
        theirs = network.diffusers_names()
        assert theirs.keys() <= names and len(set(theirs.values())) == len(theirs)


# ── configs ───────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", typing.get_args(ModelConfig), ids=lambda kind: kind.__name__)
def test_a_config_comes_back_from_its_yaml_and_answers_what_is_asked(kind):
    config = CONFIGS[kind]
    assert decode(ModelConfig, encode(config)) == config
    assert isinstance(config.released, bool) and isinstance(config.takes_picture, bool)
    assert config.patch == example(config).patch
    assert config.dtype in ("float32", "bfloat16", "float8")
    assert config.between == (0.0, 1.0) and config.expert is None and config.boundary is None
    assert (config.depth is None) == config.released
    assert all(length > 0 for length in config.lengths().values())
    for frozen in (True, False):
        for option in config.memory_options(frozen):
            key, _, value = option.partition("=")
            raw = encode(config) | {key.removeprefix("model."): value == "true" or value}
            assert decode(ModelConfig, raw) != config


def test_every_model_of_the_union_has_a_tiny_example():
    assert set(CONFIGS) == set(typing.get_args(ModelConfig))
