"""The ablation arms do what they say, leave the network as it is where they are off, and go through
the product's own training, sampling and scoring."""

import copy
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from mmdit.config import ConfigError
from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.batches.latent_batches import LatentBatches
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.moving_shapes.prepare import Recipe
from mmdit.data.moving_shapes.sentences import BACKGROUND_WORDS, SHAPE_WORDS, SIZE_WORDS
from mmdit.diagnostics.recipe import read_recipe
from mmdit.diffusion import FlowMatchingConfig
from mmdit.diffusion.objective import FlowMatching
from mmdit.experiment import run
from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.interfaces import TextTokens
from mmdit.models import TreadConfig, VideoMMDiT, VideoMMDiTConfig
from mmdit.nn.window import place_tables
from mmdit.rng import Draws
from mmdit.scripts import evaluate, train_t2v
from mmdit.tokenizers import build_tokenizer
from mmdit.training.checkpoint import load_weights, read_tensors
from mmdit.training.graphs.common import can_replay
from mmdit.training.graphs.training_graphs import Replays, suits
from tests.drivers.arms import frozen
from tests.drivers.arms.both_ways import OPPOSITE, ArmsVideoConfig, opposite
from tests.drivers.arms.captions import ArmsCaptionsConfig, drawn_lengths, with_facts
from tests.drivers.arms.hidden import reveal
from tests.drivers.arms.model import CHANGES, ArmsConfig, build_arms
from tests.drivers.arms.objective import ArmsFlowMatching, ArmsFlowMatchingConfig
from tests.drivers.gpu_arms import arms
from tests.helpers.thorough import thorough
from tests.helpers.tiny import Workshop, refused

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"dim": 16, "depth": 6, "num_heads": 2, "window_size": 4}
ROUTED = TreadConfig(enabled=True, selection_rate=0.75)
each_change = pytest.mark.parametrize("name", CHANGES)


def noise(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, T = noise(2, 1, 4, 4, 4), torch.tensor([900.0, 300.2])
TEXT = TextTokens(noise(2, 3, 6), torch.tensor([[True] * 3, [True, False, False]]))


def base(**further) -> VideoMMDiT:
    torch.manual_seed(0)
    return VideoMMDiT(VideoMMDiTConfig(**SMALL), 4, 6, **further)


def changed(*names: str, **size: int) -> VideoMMDiT:
    torch.manual_seed(0)
    tread = ROUTED if "sprint" in names else None
    return build_arms(ArmsConfig(**SMALL | size, changes=names), 4, 6, tread)


def awake(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Return `model` with weights none of which is zero, the same ones under the same names."""
    for name, weight in model.named_parameters():
        generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
        weight.data.normal_(std=0.2, generator=generator)
    return model


# ── arms of the network ──
@each_change
def test_an_arm_leaves_the_other_weights_as_they_are_drawn(name):
    plain, other = base().state_dict(), changed(name).state_dict()
    same = [key for key in plain if key in other and other[key].shape == plain[key].shape]
    assert all(torch.equal(plain[key], other[key]) for key in same)
    assert plain.keys() != other.keys() or len(same) < len(plain)


def switch_off(model: VideoMMDiT) -> None:
    """Give what an arm adds the weights with which it changes nothing."""
    dim = model.config.dim
    for name, weight in model.named_parameters():
        if name.endswith((".share", ".skip.weight")) or "time.mlp.2" in name and "input" in name:
            weight.data.zero_()
        if name.endswith(".fuse.weight"):
            weight.data.copy_(torch.cat([torch.zeros(dim, dim), torch.eye(dim)], 1))


@pytest.mark.parametrize("name", [*CHANGES][2:])
@torch.no_grad()
def test_an_arm_that_is_off_is_the_base_to_the_bit(name):
    plain, other = awake(base()).eval(), awake(changed(name)).eval()
    expected = plain(X, T, TEXT)
    assert not torch.equal(other(X, T, TEXT), expected), "it does something"
    switch_off(other)
    assert torch.equal(other(X, T, TEXT), expected)
    assert torch.equal(changed().eval()(X, T, TEXT), base().eval()(X, T, TEXT))


@torch.no_grad()
def test_modulation_of_each_block_is_the_shared_one_where_all_blocks_have_the_same():
    plain, other = awake(base()).eval(), awake(changed("block_modulation")).eval()
    depth, dim = len(plain.blocks), plain.config.dim
    for mine, theirs in zip(other.modulation.parameters(), plain.modulation.parameters()):
        parts = theirs.unflatten(0, (-1, 1, dim)).repeat_interleave(depth, 1)
        mine.copy_(parts.flatten(0, 2))
    torch.testing.assert_close(other(X, T, TEXT), plain(X, T, TEXT))
    other.modulation.bias.unflatten(0, (-1, depth, dim))[:, 3].zero_()
    assert not torch.allclose(other(X, T, TEXT), plain(X, T, TEXT)), "one block has another"


@torch.no_grad()
def test_values_are_mixed_with_those_of_the_first_block():
    model = awake(changed("value_residual")).eval()
    first, third = (model.blocks[i].spatial.v for i in (0, 2))
    seen = {}
    for layer in (first, third):
        layer.register_forward_hook(lambda layer, x, y: seen.update({layer: (x[0], y)}))
    model(X, T, TEXT)
    values = F.linear(seen[third][0], third.weight)
    mixed = values + third.share * (seen[first][1] - values)
    torch.testing.assert_close(seen[third][1], mixed)


@torch.no_grad()
def test_skips_bring_each_late_block_the_stream_of_its_mirror_image():
    model, early, late = awake(changed("u_skips")).eval(), {}, {}
    for i in (0, 1):
        note = lambda block, x, y, i=i: early.update({i: y[0] + y[2] * y[1]})
        model.blocks[i].register_forward_hook(note)
        note = lambda layer, x, y, i=i: late.update({i: x[0]})
        model.blocks[5 - i].skip.register_forward_hook(note)
    model(X, T, TEXT)
    for i in (0, 1):
        assert torch.equal(late[i][..., 16:], early[i])
    assert not hasattr(model.blocks[2], "skip")


@torch.no_grad()
def test_a_picture_reads_its_caption_and_itself_in_one_softmax():
    model = awake(changed("joint_text")).eval()
    block, x = model.blocks[0], noise(2, 1, 1, 16, 16)
    places = run_tables(model)
    context, valid = model.text(TEXT)
    got = block.read(x, context, valid, places)
    spatial, text = block.spatial, block.cross
    for row in range(2):
        q, k, v = (part[row, 0, 0] for part in spatial.heads(x, x, places.rotary))
        words = context[row, valid[row]]
        more = (
            text.k_norm(text.k(words).unflatten(-1, (2, 8))),
            text.v(words).unflatten(-1, (2, 8)),
        )
        k, v = (torch.cat(pair) for pair in zip((k, v), more))
        weights = (torch.einsum("qhd,khd->hqk", q, k) / 8**0.5).softmax(-1)
        expected = spatial.proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        torch.testing.assert_close(got[row, 0, 0], expected, rtol=1e-4, atol=1e-4)
    prepared = model.prepare(TEXT)
    torch.testing.assert_close(model(X, T, prepared), model(X, T, TEXT))


def run_tables(model: VideoMMDiT):
    grid = model.windows(4, 4)
    return place_tables(grid, "window", model.config.head_dim, torch.device("cpu"), torch.float32)


@torch.no_grad()
def test_sprint_joins_few_deep_tokens_with_all_shallow_ones():
    model = awake(changed("sprint")).train()
    keep, end = model.draw_keep(4, 4, 0, 0), model.span[1]
    assert len(keep) == 4, "three in four are not computed"
    seen = {}
    model.blocks[end].fuse.register_forward_hook(lambda layer, x, y: seen.update(x=x[0]))
    model(X, torch.tensor([900.1, 300.0]), TEXT, keep=keep)  # the second sample tosses 0: dropped
    deep, block = seen["x"][..., model.config.dim :], model.blocks[end]
    masked = (deep == block.mask).all(-1)[:, 0, 0]
    assert masked[1].all() and masked[0].sum() == 12 and not masked[0, keep].any()
    shallow = seen["x"][..., : model.config.dim]
    assert not (shallow == block.mask).all(-1).any()
    model.eval()(X, T, TEXT)
    assert not (seen["x"][..., model.config.dim :] == block.mask).all(-1).any(), "all in sampling"


TOGETHER = [name for name in CHANGES if name != "sprint"]


@pytest.mark.parametrize("names", [*([name] for name in CHANGES), TOGETHER])
def test_every_weight_of_a_changed_network_is_trained(names):
    model = awake(changed(*names))
    keep = model.draw_keep(4, 4, 0, 0)
    inputs = {} if keep is None else {"keep": keep}
    for text in (TEXT, TEXT.null()):
        model(X, T, text, **inputs).square().mean().backward()
    absent = [name for name, weight in model.named_parameters() if weight.grad is None]
    still = [name for name, weight in model.named_parameters() if not weight.grad.any()]
    assert not absent and not [
        n for n in still if ".temporal." not in n and n != "frame.embed.weight"
    ]


@pytest.mark.parametrize("names", [["sprint"], TOGETHER])
def test_a_changed_network_may_be_called_with_other_weights_as_graphs_call_it(names):
    model, other = awake(changed(*names)), awake(changed(*names), seed=2)
    keep = model.draw_keep(4, 4, 0, 0)
    inputs = {} if keep is None else {"keep": keep}
    if keep is None:
        reveal(model, 2)
        reveal(other, 2)
    weights = {name: weight.detach() for name, weight in other.named_parameters()}
    called = functional_call(model, weights, (X, T, TEXT), inputs)
    assert torch.equal(called, other(X, T, TEXT, **inputs))
    assert called.shape[-1] == (4 + 16 if keep is None else 4)


# ── as CUDA graphs ──
def given(model: VideoMMDiT, seed: int) -> dict[str, torch.Tensor]:
    """Return the inputs of a step of training, other ones for another seed."""
    times = torch.tensor([900.1, 300.0]).roll(seed)  # the coin of sprint falls for one of two
    text = {"embeddings": noise(2, 3, 6, seed=seed + 1), "valid": TEXT.valid.roll(seed, 0)}
    keep = model.draw_keep(4, 4, 0, seed)
    channels = 5 if hasattr(model.input, "time") else 4  # with times of tokens
    named = {"x": noise(2, 1, 4, 4, channels, seed=seed), "t": times} | text
    return named if keep is None else named | {"keep": keep}


@pytest.mark.parametrize("names", [*([name] for name in CHANGES), TOGETHER])
def test_no_arm_watches_calls_so_that_they_may_be_replayed(names):
    model, gpu = changed(*names), SimpleNamespace(is_cuda=True)
    assert can_replay(model, gpu) and suits(model)
    if "sprint" not in names:
        on = objective_of(ArmsFlowMatchingConfig(self_alignment=1), model)
        assert can_replay(model, gpu) and can_replay(on.alignments["self_alignment"].teacher, gpu)
    model.blocks[0].register_forward_hook(lambda *_: None)
    assert not can_replay(model, gpu), "this is what is asked"


@pytest.mark.thorough
@pytest.mark.parametrize(
    "names, depth", [(TOGETHER, 3), (["sprint", "u_skips"], 5), (["value_residual"], 2)]
)
def test_a_step_with_arms_is_one_graph_of_its_weights_and_inputs(names, depth):
    """Record the operations of a step, as a GPU records its kernels: with other numbers they are
    another step, for nothing is read from a tensor, drawn, or kept from call to call."""
    model, other = (awake(changed(*names, depth=depth), seed) for seed in (1, 2))
    if "sprint" not in names:
        reveal(model, 1)
    first, second = given(model, 0), given(model, 1)
    call = Replays(model)._call(tuple(first))

    def step(weights: dict[str, torch.Tensor], *inputs: torch.Tensor) -> list:
        output = call(weights, *inputs)
        wanted = list(weights.values())
        gradients = torch.autograd.grad(output.square().mean(), wanted, allow_unused=True)
        return [output.detach(), *gradients]

    weights, others = (dict(network.named_parameters()) for network in (model, other))
    before = torch.get_rng_state()
    step(weights, *first.values())  # tables are made once
    assert torch.equal(torch.get_rng_state(), before)
    recorded = make_fx(step)(weights, *first.values())
    replayed, expected = (call(others, *second.values()) for call in (recorded, step))
    there = [gradient is not None for gradient in expected]
    assert there == [gradient is not None for gradient in replayed] and sum(there) > 50
    assert all(torch.equal(*pair) for pair in zip(replayed, expected) if pair[0] is not None)
    for node in recorded.graph.nodes:
        if torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ()):
            assert node.target is torch.ops.aten.index.Tensor, node
            places = [place.meta["val"] for place in node.args[1] if place is not None]
            assert not [place for place in places if place.dtype == torch.bool], node


@pytest.mark.thorough
@pytest.mark.parametrize(
    "names, depth", [(TOGETHER, 3), (["sprint", "u_skips"], 5), (["value_residual"], 2)]
)
@torch.no_grad()
def test_a_step_of_sampling_with_arms_is_one_graph_of_latents_and_times(names, depth):
    model = awake(changed(*names, depth=depth)).eval()
    if "sprint" not in names:
        reveal(model, 1)
    text = model.prepare(TEXT)
    model(X, T, text)  # tables are made once
    recorded = make_fx(lambda x, t: model(x, t, text))(X, T)
    later = noise(2, 1, 4, 4, 4, seed=5), torch.tensor([20.0, 700.5])
    assert torch.equal(recorded(*later), model(*later, text))
    assert recorded(*later).shape == X.shape


@pytest.mark.parametrize("names", [["sprint", "u_skips"], TOGETHER])
def test_a_call_leaves_nothing_behind_and_copies_call_themselves(names):
    model = awake(changed(*names))
    if "sprint" not in names:
        reveal(model, 2)
    x, t, *words = [*given(model, 0).values()][:4]
    inputs = x, t, TextTokens(*words), model.draw_keep(4, 4, 0, 0)
    expected = model(*inputs)
    for part in model.modules():
        values = [value for name, value in vars(part).items() if name[0] != "_"]
        kept = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
        assert not kept, type(part)
    other = copy.deepcopy(model)
    assert torch.equal(other(*inputs), expected)
    for weight in model.parameters():
        weight.data.zero_()
    assert torch.equal(other(*inputs), expected)
    assert [*other.state_dict()] == [*model.state_dict()]


@torch.no_grad()
def test_a_replayed_teacher_reads_its_captions_and_weights_as_they_are_now(monkeypatch):
    model = awake(base()).train()
    arm = objective_of(ArmsFlowMatchingConfig(self_alignment=1), model)
    teacher = arm.alignments["self_alignment"].teacher
    where = [weight.data_ptr() for weight in teacher.parameters()]
    seen, calls = [], frozen.Frozen(teacher)

    def recorded(call, x, t):  # a graph reads what is in the memory of its inputs
        x, t = x.clone(), t.clone()
        return lambda *now: (seen.append(1), x.copy_(now[0]), t.copy_(now[1]), call(x, t))[-1]

    monkeypatch.setattr(frozen, "can_replay", lambda *_: True)
    monkeypatch.setattr(frozen, "first_call", lambda call, x, t: call(x, t))
    monkeypatch.setattr(frozen, "captured", recorded)
    for seed in (0, 1, 2):
        x, t, *words = given(teacher, seed).values()
        text = TextTokens(*words)
        assert torch.equal(calls(x, t, text), teacher(x, t, text))
        for weight in model.parameters():
            weight.add_(0.1)
        arm.alignments["self_alignment"].follow(seed)
    assert len(calls.made) == 1 and len(seen) == 3
    assert where == [weight.data_ptr() for weight in teacher.parameters()]
    monkeypatch.setattr(frozen, "captured", lambda call, x, t: lambda *_: torch.zeros(1))
    wrong = frozen.Frozen(teacher)
    assert all(torch.equal(wrong(x, t, text), teacher(x, t, text)) for _ in range(2))


def test_arms_refuse_what_they_are_not_made_for():
    for shape in ((2, 2, 4, 4, 4), (2, 1, 4, 8, 4)):
        with pytest.raises(ValueError, match="the arms are for pictures in one window"):
            changed()(noise(*shape), T, TEXT)
    with pytest.raises(ConfigError, match="must be enabled for sprint"):
        build_arms(ArmsConfig(**SMALL, changes=("sprint",)), 4, 6)
    with pytest.raises(ConfigError, match="value_residual mixes all tokens"):
        changed("sprint", "value_residual")
    with pytest.raises(ConfigError, match="alignments need the tokens of every place"):
        objective_of(ArmsFlowMatchingConfig(self_alignment=1), changed("sprint"))


# ── arms of the loss ──
class Line(torch.nn.Module):
    """A network that predicts a share of its input."""

    def forward(self, x, t, text):
        return 0.5 * x


def objective_of(section: ArmsFlowMatchingConfig, model=None) -> ArmsFlowMatching:
    torch.manual_seed(0)
    vtp = load_experiment_config(ROOT / "configs/moving_shapes_t2i_128.yaml").tokenizer

    class Given:
        flow_matching, tokenizer = section, vtp

    class Learner:
        objective, spec = FlowMatching(section), build_tokenizer(vtp, device="cpu").spec

    Learner.model = model
    return ArmsFlowMatching(Given, Learner)


def test_the_contrastive_loss_is_its_closed_form():
    clean, draws = noise(3, 1, 2, 2, 4), Draws.of(0, 5, 3)
    parts = objective_of(ArmsFlowMatchingConfig(contrast=0.05)).loss(Line(), clean, None, draws)
    added, t = draws.normal("noise", 1, 2, 2, 4), draws.uniform("time")
    for i, other in enumerate([1, 2, 0]):
        x = (1 - t[i]) * clean[i] + t[i] * added[i]
        near = (0.5 * x - (added[i] - clean[i])).square().mean()
        far = (0.5 * x - (added[other] - clean[other])).square().mean()
        torch.testing.assert_close(parts.per_sample[i], near - 0.05 * far)


def test_arms_of_the_loss_that_are_off_are_the_base_to_the_bit():
    clean, draws, text = noise(2, 1, 4, 4, 4), Draws.of(0, 5, 2), TEXT
    expected = FlowMatching(FlowMatchingConfig()).loss(awake(base()), clean, text, draws)
    off = objective_of(ArmsFlowMatchingConfig(), awake(base()))
    assert torch.equal(off.loss(awake(base()), clean, text, draws).per_sample, expected.per_sample)
    model = awake(base())
    on = objective_of(ArmsFlowMatchingConfig(contrast=1, self_alignment=1), model)
    held_out = on.eval().loss(model.eval(), clean, text, draws)
    assert torch.equal(held_out.per_sample, expected.per_sample), "in evaluation too"
    got = on.train().loss(model.train(), clean, text, draws)
    assert not torch.equal(got.per_sample, expected.per_sample)


def test_self_alignment_compares_an_early_block_with_a_late_one_of_a_cleaner_teacher():
    model = awake(base())
    objective = objective_of(ArmsFlowMatchingConfig(self_alignment=1), model)
    arm = objective.alignments["self_alignment"]
    clean, draws = noise(2, 1, 4, 4, 4), Draws.of(0, 5, 2)
    parts = objective.loss(model, clean, TEXT, draws)
    t = parts.t - 0.2 * draws.uniform("teacher")
    added = draws.normal("noise", 1, 4, 4, 4)
    early, late = (
        streams(model, (1 - s.view(-1, 1, 1, 1, 1)) * clean + s.view(-1, 1, 1, 1, 1) * added, s, n)
        for s, n in ((parts.t, 2), (t.clamp(min=0), 4))
    )
    cosine = F.cosine_similarity(arm.projector(early), F.layer_norm(late, (16,)), dim=-1)
    plain = FlowMatching(FlowMatchingConfig()).loss(awake(base()), clean, TEXT, draws).per_sample
    torch.testing.assert_close(parts.per_sample, plain + 1 - cosine.flatten(1).mean(1))
    parts.per_sample.sum().backward()
    assert all(weight.grad.any() for weight in arm.projector.parameters())
    assert all(weight.grad is None for weight in arm.teacher.parameters())
    before = [weight.clone() for weight in arm.teacher.parameters()]
    for weight in model.parameters():
        weight.data.add_(1)
    objective.loss(model, clean, TEXT, Draws.of(0, 1000, 2))
    for old, new in zip(before, arm.teacher.parameters()):
        torch.testing.assert_close(new - old, torch.full_like(old, 0.01), atol=1e-5, rtol=1e-3)


def streams(model, x, t, count: int) -> torch.Tensor:
    """Return the stream of a plain network behind its first blocks, in rows and columns."""
    plain = awake(base())
    plain.blocks = plain.blocks[:count]
    seen = []
    plain.blocks[-1].register_forward_hook(lambda block, x, y: seen.append(y[0] + y[2] * y[1]))
    plain(x, t * 1000, TEXT)
    return plain.windows(4, 4).merge(seen[0])


@torch.no_grad()
def test_tokens_are_told_their_times():
    model = awake(changed("token_times")).eval()
    times = T[:, None, None, None, None].expand(2, 1, 4, 4, 1).clone()
    torch.testing.assert_close(model(torch.cat([X, times], -1), T, TEXT), model(X, T, TEXT))
    model = awake(changed("token_times", depth=1)).eval()
    model.blocks[0].spatial.proj.weight.zero_()  # no token sees another one
    before = model(X, T, TEXT)
    times[0, 0, 1, 2] -= 200
    apart = (model(torch.cat([X, times], -1), T, TEXT) - before).abs().amax(-1)[:, 0]
    assert apart[0, 1, 2] > 1e-3 and (apart > 1e-3).sum() == 1


def test_some_tokens_are_at_a_second_time_and_the_teacher_sees_the_cleaner_one():
    model = awake(changed("token_times"))
    section = ArmsFlowMatchingConfig(self_alignment=1, token_times=0.25)
    objective, clean = objective_of(section, model), noise(2, 1, 4, 4, 4)
    arm, draws, seen = objective.alignments["self_alignment"], Draws.of(0, 5, 2), {}
    frozen_call = arm.frozen

    def teacher(x, t, text):
        seen["teacher"] = x, t
        return frozen_call(x, t, text)

    def student(x, t, text):
        seen["student"] = x, t
        return model(x, t, text)

    arm.frozen = teacher
    parts = objective.loss(student, clean, TEXT, draws)
    first, added = parts.t, draws.normal("noise", 1, 4, 4, 4)
    (x, t), (teacher_x, teacher_t) = seen["student"], seen["teacher"]
    second = x[..., 4].flatten(1).min(1).values + x[..., 4].flatten(1).max(1).values
    second = second / 1000 - first  # of the two times in a sample it is the other one
    torch.testing.assert_close(t, first * 1000)
    share = (x[..., 4] != t.view(2, 1, 1, 1)).float().mean()
    assert 0.05 < share < 0.5 and (first - second).abs().min() > 0.01
    at = x[..., 4:] / 1000
    torch.testing.assert_close(x[..., :4], (1 - at) * clean + at * added)
    cleaner = torch.minimum(first, second)
    torch.testing.assert_close(teacher_t, cleaner * 1000)
    at = cleaner.view(2, 1, 1, 1, 1)
    torch.testing.assert_close(teacher_x, (1 - at) * clean + at * added)
    parts.per_sample.sum().backward()
    assert all(weight.grad.any() for weight in model.input.time.parameters())


def test_vtp_alignment_tells_a_middle_state_of_the_decoder_of_clean_latents():
    torch.manual_seed(0)
    model = awake(VideoMMDiT(VideoMMDiTConfig(**SMALL), 64, 6))
    objective = objective_of(ArmsFlowMatchingConfig(vtp_alignment=1), model)
    arm, clean = objective.alignments["vtp_alignment"], noise(2, 1, 4, 4, 64)
    decoder, seen = arm.outside["decoder"], []
    decoder.blocks[3].register_forward_hook(lambda block, x, y: seen.append(y))
    raw = arm.outside["spec"].denormalize(clean)
    with torch.no_grad():
        decoder(raw[:, 0].permute(0, 3, 1, 2))
    expected = F.layer_norm(seen[0], (256,)).view(2, 1, 4, 4, 256)
    torch.testing.assert_close(arm.target(clean), expected)
    objective.loss(model, clean, TEXT, Draws.of(0, 5, 2)).per_sample.sum().backward()
    assert all(weight.grad.any() for weight in arm.projector.parameters())
    assert not any("decoder" in name for name in objective.state_dict())


# ── arms of the data ──
@pytest.mark.parametrize("length", ["cached", "complete", "short"])
def test_captions_are_longer_or_shorter_and_say_what_is_so(length):
    facts = Recipe(128, 128).draw(range(40))
    worded = [Recipe(128, 128).words(i, fact) for i, fact in enumerate(facts)]
    items = [with_facts(text, {"facts": known}) for text, known in worded]
    config, draws = ArmsCaptionsConfig(length=length), Draws.of(0, 5, 40)
    texts = drawn_lengths(items, config, draws)
    assert texts == drawn_lengths(items, config, Draws.of(0, 6, 40)), "one for each item"
    cached = [item[0] for item in items]
    if length == "cached":
        assert texts == cached
        return
    size, expected = sum(map(len, texts)), sum(map(len, cached))
    stated = [said_of(text, fact) for text, fact in zip(texts, facts)]
    if length == "complete":
        assert size > expected and all(map(all, stated)), "every fact is stated"
    else:
        assert size < 0.8 * expected and not all(map(all, stated))


def test_a_reversed_clip_is_the_clip_of_the_opposite_direction():
    recipe = Recipe(64, 64, frames=5)
    facts = recipe.draw(range(60))
    others = []
    for fact in facts:
        (item,) = fact.objects
        across, down = item.velocity()  # it begins where the other one ends
        place = {"x": item.x + across, "y": item.y + down}
        turned = replace(item, motion=OPPOSITE.get(item.motion, item.motion), **place)
        others.append(replace(fact, objects=(turned,)))
    assert len({fact.objects[0].motion for fact in facts}) == 5
    reversed_clips, clips = recipe.render(facts).flip(1).int(), recipe.render(others).int()
    assert (reversed_clips - clips).abs().max() <= 1, "rounding"
    for i, (fact, other) in enumerate(zip(facts, others)):
        assert opposite(recipe.words(i, fact)[0]) == recipe.words(i, other)[0]


def test_a_batch_has_half_of_its_clips_both_ways(tmp_path):
    sized = ["video.num_frames=4", "train.val_every_steps=1"]
    with workshop(tmp_path) as shop:
        cache = open_cache(shop.cache("clips", *sized, count=40))
        size = {"width": 48, "height": 32, "num_frames": 4}

        def batches(**words) -> LatentBatches:
            plan = BatchPlan(cache, ArmsVideoConfig(**size, **words), 5, 0, held_out=0.2)
            return LatentBatches(cache, plan, num_workers=0)

        plain, both = batches().step(3)[0], batches(both_ways=True).step(3)[0]
        assert both.ids == [*plain.ids[:3], *plain.ids[:2]]
        expected = torch.cat([plain.latents[:3], plain.latents[:2].flip(1)])
        assert torch.equal(both.latents, expected)
        assert both.captions == [*plain.captions[:3], *map(opposite, plain.captions[:2])]
        assert both.captions[3:] != plain.captions[:2], "some of them move"
        for one, other in zip(batches().held_out(8), batches(both_ways=True).held_out(8)):
            assert torch.equal(one.latents, other.latents) and one.captions == other.captions
        pictures = [batches(image_fraction=1, **word).step(0)[0] for word in ({}, {"both_ways": 1})]
        assert pictures[0].ids == pictures[1].ids and len(set(pictures[0].ids)) == 5
        run = shop.train("clips", *sized, "video.both_ways=true", cache=shop.folder / "clips")
        assert (run / "checkpoints/step_00000003/model.safetensors").is_file()


def test_the_last_stage_of_arms_data_sees_every_picture_once():
    recipe = read_recipe(ROOT / "results", "arms_data")
    *few, last = recipe.stages
    train = load_experiment_config(ROOT / last.config, list(last.overrides)).train
    assert int(last.cache.split()[-1]) == train.batch_size * train.max_steps
    assert {stage.overrides for stage in few} == {last.overrides}, "equal seconds"


def said_of(text: str, fact) -> list[bool]:
    """Return which facts `text` states with the right word."""
    item = fact.objects[0]
    words = (BACKGROUND_WORDS[fact.background], SHAPE_WORDS[item.shape], SIZE_WORDS[item.size])
    return [re.search("|".join(some), text) is not None for some in words]


# ── the product's commands ──
@contextmanager
def workshop(folder):
    with arms():
        yield Workshop(folder)


EVERYTHING = [
    "model={type: arms, dim: 16, depth: 4, num_heads: 2, window_size: 4, changes: [value_residual,"
    " u_skips, block_modulation, joint_text, token_times]}",
    "flow_matching={contrast: 0.05, self_alignment: 0.2, token_times: 0.3}",
    "train.optimizer=muon",
    "captions.length=complete",
]
SPRINT = [
    "model={type: arms, dim: 16, depth: 3, num_heads: 2, window_size: 4, changes: [sprint]}",
    "tread={enabled: true, selection_rate: 0.75, apply_to: [1, 2]}",
]


@pytest.mark.parametrize("words", [EVERYTHING, *thorough((SPRINT,))], ids=["together", "sprint"])
def test_arms_are_trained_resumed_and_scored_by_the_commands(tmp_path, words, capsys):
    with workshop(tmp_path) as shop:
        whole = shop.train("whole", *words)
        half = shop.train("half", *words, "train.max_steps=2")
        train_t2v.main(shop.train_words("half", "--resume", *words, "train.max_steps=3"))
        files = ("model", "ema", "optimizer")
        for name in files:
            path = f"checkpoints/step_00000003/{name}.safetensors"
            one, other = read_tensors(whole / path), read_tensors(half / path)
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one), name
        trained = {key.partition(".")[0] for key in one}
        assert trained == {"model", "text_encoder"} | ({"objective"} if len(words) == 4 else set())
        assert not [name for name in load_weights(whole).tensors if name.startswith("objective")]
        report = tmp_path / "report.json"
        asked = ["--checkpoint", whole, "--count", 2, "--steps", 1, "--device", "cpu"]
        assert evaluate.main(list(map(str, [*asked, "--out", report]))) == 0
        assert report.is_file()
    refused(capsys, evaluate.main, asked, "video.both_ways: unknown key")


def test_times_of_tokens_are_refused_where_nothing_would_see_them(tmp_path, capsys):
    with workshop(tmp_path) as shop:
        aligned = ["flow_matching.token_times=0.2", "flow_matching.self_alignment=0.2"]
        change = ["model.type=arms", "model.changes=[token_times]"]
        for words in (
            aligned,
            aligned[:1] + change,
            [*aligned, *change, "flow_matching.path=cosine"],
            [*aligned, *change, "flow_matching.prediction=x0"],
        ):
            words = shop.train_words("x", *words, "model.window_size=4")
            refused(capsys, train_t2v.main, words, "flow_matching.token_times: is 0.2; needs")
        assert shop.train("good", *aligned, *change, "model.window_size=4").is_dir()


def test_sprint_is_refused_where_all_samples_share_the_digits_of_its_coin(tmp_path, capsys):
    with workshop(tmp_path) as shop:
        words = shop.train_words("x", *SPRINT, "train.objective=ddpm")
        refused(capsys, train_t2v.main, words, "train.objective: is ddpm, but sprint")


def test_arms_are_known_inside_their_program_alone():
    config = ROOT / "configs/moving_shapes_t2i_128.yaml"
    learner = run.build_learner
    with arms():
        assert load_experiment_config(config, ["flow_matching.contrast=0.05"])
        assert run.build_learner is not learner
    with pytest.raises(ConfigError, match="contrast: unknown key"):
        load_experiment_config(config, ["flow_matching.contrast=0.05"])
    assert run.build_learner is learner
