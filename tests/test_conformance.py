"""Facts that hold for every member of every union: tokenizers, text encoders, objectives, solvers,
rewards, scorers and adapters. The unions decide what is tested: a new member fails here until it
has a tiny example below. (Models: tests/test_denoiser_contract.py.)"""

import typing
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmdit.adapters import LoRAConfig, adapters, inject, is_adapter, merge
from mmdit.config import decode, encode
from mmdit.data.moving_shapes.render import render
from mmdit.data.moving_shapes.sentences import prompts
from mmdit.diffusion import (
    DiffusionConfig,
    FlowMatchingConfig,
    SamplerConfig,
    Solver,
    build_objective,
    sample,
)
from mmdit.interfaces import TextEncoder, Tokenizer
from mmdit.models import VideoMMDiTConfig, build_model
from mmdit.pixels import to_unit
from mmdit.posttrain.posttrain_config import RewardConfig, ScorerConfig
from mmdit.posttrain.rewards import RewardPool, Samples
from mmdit.rng import Draws
from mmdit.text_encoders import (
    ByteLevelConfig,
    HashConfig,
    HuggingFaceConfig,
    TextEncoderConfig,
    UMT5Config,
    build_text_encoder,
)
from mmdit.tokenizers import (
    DummyTokenizerConfig,
    TokenizerConfig,
    VTPTokenizerConfig,
    WanVAETokenizerConfig,
    build_tokenizer,
)
from mmdit.training.train_config import TrainConfig
from tests import test_features as tiny_timm
from tests import test_posttrain_rewards as tiny_clip
from tests import test_text_encoders as tiny_t5
from tests import test_umt5 as tiny_umt5
from tests import test_wan_vae as tiny_vae

FRAMES, HEIGHT, WIDTH = 5, 32, 48
CAPTIONS = ["a red star", "", "a blue ball left a red star on gray"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("conformance")


def members(union) -> list:
    """Parametrize a test by the members of a union of configs, named by their `type`."""
    return [pytest.param(member, id=member.type) for member in typing.get_args(union)]


def example(examples: dict, member, folder: Path):
    """The tiny config of a member of a union; `examples` holds functions of a folder."""
    if member not in examples:
        pytest.fail(f"{member.__name__} is in the union: add a tiny example of it to this file")
    config = examples[member](folder)
    assert type(config) is member
    return config


def assert_round_trip(union, config) -> None:
    assert decode(union, encode(config)) == config


# ── tokenizers ────────────────────────────────────────────────────────────────────────────────────
def wan_vae(folder: Path) -> WanVAETokenizerConfig:
    place = folder / "wan_vae"
    if not place.exists():
        place.mkdir()
        tiny_vae.opened(place, "21")
    return WanVAETokenizerConfig(name_or_path=str(place), **tiny_vae.SIZES["21"])


TOKENIZERS = {
    VTPTokenizerConfig: lambda folder: VTPTokenizerConfig(),
    DummyTokenizerConfig: lambda folder: DummyTokenizerConfig(latent_d=6),
    WanVAETokenizerConfig: wan_vae,
}


@pytest.mark.parametrize("member", members(TokenizerConfig))
@torch.no_grad()
def test_a_tokenizer_keeps_its_contract(member, folder):
    config = example(TOKENIZERS, member, folder)
    assert_round_trip(TokenizerConfig, config)
    tokenizer = build_tokenizer(config)
    spec = tokenizer.spec
    assert isinstance(tokenizer, Tokenizer)
    assert (spec.channels, spec.spatial) == (config.latent_d, config.latent_f)
    assert spec.temporal == config.temporal
    assert tokenizer.fingerprint == build_tokenizer(config).fingerprint

    pixels = torch.rand(2, FRAMES, 3, HEIGHT, WIDTH)
    latents = tokenizer.encode(pixels)
    assert latents.shape == (2, spec.frames(FRAMES), *spec.grid(WIDTH, HEIGHT), spec.channels)
    assert latents.isfinite().all() and latents.std() > 0
    assert torch.equal(tokenizer.encode(pixels), latents)
    torch.testing.assert_close(tokenizer.encode(pixels[1:]), latents[1:], rtol=1e-4, atol=1e-4)
    decoded = tokenizer.decode(latents)
    assert decoded.shape == pixels.shape
    assert decoded.isfinite().all() and decoded.min() >= 0 and decoded.max() <= 1
    for wrong in (pixels[0], pixels[..., :-1], (pixels * 255).byte()):
        with pytest.raises(ValueError):
            tokenizer.encode(wrong)


# ── text encoders ─────────────────────────────────────────────────────────────────────────────────
def t5(folder: Path) -> HuggingFaceConfig:
    place = folder / "t5"
    if not place.exists():
        tiny_t5.make_t5().save_pretrained(place)
        tiny_t5.save_tokenizer(place)
    return HuggingFaceConfig(name_or_path=str(place), max_length=16)


def umt5(folder: Path) -> UMT5Config:
    place = folder / "umt5"
    if not place.exists():
        place.mkdir()
        tiny_umt5.opened(place)
    return UMT5Config(name_or_path=str(place), dtype="float32", max_length=64)


TEXT_ENCODERS = {
    ByteLevelConfig: lambda folder: ByteLevelConfig(dim=16, depth=1, num_heads=2, convolution=3),
    HashConfig: lambda folder: HashConfig(dim=16),
    HuggingFaceConfig: t5,
    UMT5Config: umt5,
}


def built_encoder(member, folder: Path, **keys) -> nn.Module:
    if member in (HuggingFaceConfig, UMT5Config):
        pytest.importorskip("transformers")
    torch.manual_seed(1)
    return build_text_encoder(replace(example(TEXT_ENCODERS, member, folder), **keys))


@pytest.mark.parametrize("member", members(TextEncoderConfig))
def test_a_text_encoder_keeps_its_contract(member, folder):
    encoder = built_encoder(member, folder)
    assert_round_trip(TextEncoderConfig, example(TEXT_ENCODERS, member, folder))
    text = encoder(CAPTIONS)
    assert isinstance(encoder, TextEncoder)
    assert text.embeddings.shape == (*text.valid.shape, encoder.dim)
    assert text.embeddings.dtype == torch.float32 and text.embeddings.isfinite().all()
    again = encoder(CAPTIONS)
    assert torch.equal(again.embeddings, text.embeddings) and torch.equal(again.valid, text.valid)
    assert not text.embeddings[~text.valid].any(), "what is not valid is zero"
    dropped = text.drop(torch.tensor([True, False, False]))
    unconditional = encoder([""])
    length = int(unconditional.valid.sum())
    assert int(dropped.valid[0].sum()) == length, "a dropped caption is an empty one"
    assert torch.equal(dropped.embeddings[0, :length], unconditional.embeddings[0, :length])


@pytest.mark.parametrize("member", members(TextEncoderConfig))
def test_neighbours_and_padding_do_not_change_a_caption(member, folder):
    encoder = built_encoder(member, folder)
    together = encoder(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        alone = encoder([caption])
        length = int(alone.valid.sum())
        assert int(together.valid[row].sum()) == length
        torch.testing.assert_close(
            together.embeddings[row, :length], alone.embeddings[0, :length], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("member", members(TextEncoderConfig))
def test_a_gradient_reaches_every_trained_weight_of_a_text_encoder(member, folder):
    if member is HashConfig:
        assert not list(built_encoder(member, folder).parameters())
        return
    frozen = built_encoder(member, folder, freeze=True)
    assert not any(weight.requires_grad for weight in frozen.parameters())
    encoder = built_encoder(member, folder, freeze=False)
    trained = {name: w for name, w in encoder.named_parameters() if w.requires_grad}
    assert trained
    embeddings = encoder(CAPTIONS).embeddings
    (embeddings * torch.randn_like(embeddings)).sum().backward()
    assert not [name for name, weight in trained.items() if weight.grad is None]
    assert not [name for name, weight in trained.items() if not weight.grad.any()]


# ── objectives and solvers ────────────────────────────────────────────────────────────────────────
def objectives() -> list:
    """Every objective with every path and prediction that its config offers."""
    hints = {
        name: typing.get_type_hints(config)
        for name, config in (("ddpm", DiffusionConfig), ("flow_matching", FlowMatchingConfig))
    }
    assert set(hints) == set(typing.get_args(typing.get_type_hints(TrainConfig)["objective"]))
    keys = {"ddpm": ("schedule", "prediction_type"), "flow_matching": ("path", "prediction")}
    cases = []
    for name, (path, prediction) in keys.items():
        for way in typing.get_args(hints[name][path]):
            for said in typing.get_args(hints[name][prediction]):
                words = {path: way, prediction: said}
                cases.append(pytest.param(name, words, id=f"{name}-{way}-{said}"))
    return cases


def built_objective(name: str, words: dict):
    sections = {"ddpm": DiffusionConfig(), "flow_matching": FlowMatchingConfig()}
    sections[name] = replace(sections[name], **words)
    assert_round_trip(type(sections[name]), sections[name])
    return build_objective(name, sections["ddpm"], sections["flow_matching"])


@pytest.mark.parametrize("name, words", objectives())
def test_an_objective_keeps_its_contract(name, words):
    """A network that knows the answer has no loss and is a perfect denoiser; another has one, which
    does not depend on the other samples of its batch."""
    objective, draws = built_objective(name, words), Draws.of(7, 3, 4)
    clean = torch.randn(4, 2, 3, 3, 5)

    def knowing(x, t, text, rows=slice(None)):
        noise = draws.normal("noise", *clean.shape[1:])[rows]
        time = t.double() / objective.time_scale
        return objective.path.mix(objective.prediction, clean[rows], noise, time)

    parts = objective.loss(knowing, clean, None, draws)
    assert parts.per_sample.shape == parts.t.shape == (4,)
    assert parts.per_sample.max() < 1e-5
    first, last = objective.t_range
    assert parts.t.min() >= first - 1e-6 and parts.t.max() <= last + 1e-6

    def ignorant(x, t, text):
        return 0.5 * x

    losses = objective.loss(ignorant, clean, None, draws).per_sample
    assert losses.isfinite().all() and losses.min() > 0
    assert torch.equal(objective.loss(ignorant, clean, None, draws).per_sample, losses)
    alone = objective.loss(ignorant, clean[2:3], None, draws[torch.tensor([2])]).per_sample
    torch.testing.assert_close(alone, losses[2:3])

    t = 0.5
    noise = draws.normal("noise", *clean.shape[1:])
    denoise = objective.denoiser(knowing, None)
    estimate = denoise(objective.path.add_noise(clean, noise, t), t)
    torch.testing.assert_close(estimate, clean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", typing.get_args(Solver))
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_solver_is_exact_where_the_velocity_is_constant(solver, steps):
    """Of data that are one point the linear path is a straight line: every solver stays on it."""
    objective = built_objective("flow_matching", {"path": "linear"})
    point, noise = torch.randn(2, 1, 2, 2, 3).double(), torch.randn(2, 1, 2, 2, 3).double()
    visited = []
    result = sample(
        lambda x, t: point,
        noise,
        objective,
        SamplerConfig(solver=solver, steps=steps),
        callback=lambda done, t, x, clean: visited.append((t, x)),
    )
    torch.testing.assert_close(result, point, rtol=0, atol=1e-10)
    assert len(visited) == steps and all(t > s for (t, _), (s, _) in pairwise(visited))
    for t, x in visited:
        torch.testing.assert_close(x, (1 - t) * point + t * noise, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", typing.get_args(Solver))
@pytest.mark.parametrize("name, words", objectives())
def test_a_solver_arrives_at_the_only_point_there_is(solver, name, words):
    objective = built_objective(name, words)
    point, noise = torch.randn(2, 1, 2, 2, 3).double(), torch.randn(2, 1, 2, 2, 3).double()
    config = SamplerConfig(solver=solver, steps=40)
    assert_round_trip(SamplerConfig, config)
    result = sample(lambda x, t: point, noise, objective, config)
    torch.testing.assert_close(result, point, rtol=0, atol=0.02)


# ── rewards and scorers ───────────────────────────────────────────────────────────────────────────
def clip(folder: Path) -> dict[str, str]:
    place = folder / "clip"
    if not place.exists():
        tiny_clip.make_clip(place)
    return {"path": str(place)}


def hps(folder: Path) -> dict[str, str]:
    keys = clip(folder)
    weights = folder / "hps.safetensors"
    if not weights.exists():
        own = load_file(Path(keys["path"]) / "model.safetensors")
        save_file(tiny_clip.open_clip_tensors(own), weights)
    return keys | {"weights": str(weights)}


def features(folder: Path) -> dict[str, str]:
    place = folder / "features"
    if not place.exists():
        place.mkdir()
        tiny_timm.make_weights(place, "test_vit")
        tiny_timm.pictures(place / "reference", 2)
    weights = str(place / "test_vit.safetensors")
    return {"model": "test_vit", "weights": weights, "reference": str(place / "reference")}


NEEDS_WEIGHTS = {"clip": clip, "pickscore": clip, "hps": hps, "features": features}


def judge(member, folder: Path):
    """A reward or scorer, ready: most have no keys that must be given."""
    keys = NEEDS_WEIGHTS[member.type](folder) if member.type in NEEDS_WEIGHTS else {}
    config = member(**keys)
    assert_round_trip(RewardConfig | ScorerConfig, config)
    config.prepare(torch.device("cpu"))
    return config


@cache
def judged_samples() -> Samples:
    some = prompts("seen", False)[:6]
    facts = [prompt.facts for prompt in some]
    pixels = to_unit(render(facts, 64, 64, 3))
    pixels = 0.9 * pixels + 0.1 * torch.rand_like(pixels)
    pixels = pixels * torch.linspace(0.6, 1, 6)[:, None, None, None, None]  # no two are alike
    return Samples(
        captions=[prompt.caption for prompt in some],
        latents=torch.randn(6, 3, 4, 4, 8),
        groups=torch.tensor([0, 0, 0, 1, 1, 1]),
        draws=Draws.of(0, 0, 6),
        pixels=pixels,
        facts=facts,
    )


@pytest.mark.parametrize("member", members(RewardConfig))
def test_a_reward_keeps_its_contract(member, folder):
    """One value a sample, finite and within its limits (`RewardPool` checks both), the same each
    time, whoever else is judged: other samples, or for a groupwise reward other groups."""
    reward, samples = judge(member, folder), judged_samples()
    pool = RewardPool((reward,), workers=0)
    (value,) = pool.score(samples).values()
    assert value.shape == (6,) and value.dtype == torch.float32
    assert torch.equal(pool.score(samples)[reward.label], value)
    assert value.std() > 0 or member.type == "prompt_accuracy"
    rows = torch.tensor([0, 1, 2] if reward.groupwise else [1])
    alone = pool.score(samples.rows(rows))[reward.label]
    torch.testing.assert_close(alone, value[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("member", members(ScorerConfig))
def test_a_scorer_keeps_its_contract(member, folder):
    """One value a sample, for its own text, with a gradient in its own pixels alone."""
    scorer, samples = judge(member, folder), judged_samples()
    pixels = samples.pixels[:3].clone().requires_grad_()
    texts = ["a red star", "a blue circle", "red"]
    value = scorer(pixels, texts)
    assert value.shape == (3,) and value.isfinite().all()
    assert torch.equal(scorer(pixels, texts), value)
    torch.testing.assert_close(scorer(pixels[1:2], texts[1:2]), value[1:2], rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(value[1], pixels)
    assert gradient[1].any() and not gradient[[0, 2]].any()


# ── adapters ──────────────────────────────────────────────────────────────────────────────────────
ADAPTERS = typing.get_args(typing.get_type_hints(LoRAConfig)["type"])


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_keeps_its_contract(name):
    """It changes nothing at first; then every one of its weights learns, and no other; merged, the
    model computes the same."""
    more = {"factor": 4} if name == "lokr" else {}
    config = LoRAConfig(enabled=True, type=name, rank=2, alpha=3.0, **more)
    assert_round_trip(LoRAConfig, config)
    model = build_model(VideoMMDiTConfig(dim=16, depth=1, num_heads=2, window_size=2), 3, 8)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    encoder = build_text_encoder(HashConfig(dim=8))
    x, t, text = torch.randn(2, 3, 2, 4, 3), torch.tensor([100.0, 700.0]), encoder(CAPTIONS[:2])
    before = model(x, t, text)
    inject(model, config, seed=5)
    assert torch.equal(model(x, t, text), before)

    layers = adapters(model)
    weights = [w for layer in layers.values() for w in layer.adapter_parameters().values()]
    for weight in weights:
        weight.data += 0.1 * torch.randn_like(weight)
    after = model(x, t, text)
    assert (after - before).abs().max() > 0.01
    (after * torch.randn_like(after)).sum().backward()
    trained = {name for name, w in model.named_parameters() if w.grad is not None and w.grad.any()}
    assert trained == {name for name, _ in model.named_parameters() if is_adapter(name)}
    assert len(trained) == len(weights)
    torch.testing.assert_close(merge(model)(x, t, text), after, rtol=1e-4, atol=1e-5)
