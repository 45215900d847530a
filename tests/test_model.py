"""The Video MMDiT: facts about what it computes, first waking the parameters that start at zero."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from mmdit.config import ConfigError, decode, encode
from mmdit.interfaces import TextTokens
from mmdit.models import VideoMMDiT, VideoMMDiTConfig, build_model
from mmdit.nn.conditioning import TimeEmbedding
from mmdit.nn.position import rotary_tables, rotate
from mmdit.training.optim import build_optimizer
from tests.helpers.dense_video_mmdit import dense_forward

SMALL = VideoMMDiTConfig(dim=16, depth=2, num_heads=2, window_size=4)
CHANNELS, TEXT = 3, 6


def awake(config=SMALL, tread=None) -> VideoMMDiT:
    """In float64, with every parameter away from its initial value."""
    torch.manual_seed(0)
    model = build_model(config, CHANNELS, TEXT, tread).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return model


def captions(count: int, dtype=torch.float64, length: int = 5) -> TextTokens:
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(count, length, TEXT, generator=generator, dtype=torch.float64).to(
        dtype
    )
    return TextTokens(embeddings, torch.arange(length) < torch.arange(2, 2 + count)[:, None])


def clip(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(
        *shape, CHANNELS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


TIMES = torch.tensor([20.0, 900.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "rows, columns, frames", [(8, 8, 3), (5, 7, 2), (4, 4, 1), (1, 1, 2), (6, 10, 1)]
)
def test_the_model_equals_a_dense_second_implementation(rows, columns, frames):
    model, x = awake(), clip(2, frames, rows, columns)
    expected = dense_forward(model, x, TIMES, captions(2))
    torch.testing.assert_close(model(x, TIMES, captions(2)), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "change",
    [
        {"mlp": "gelu"},
        {"qk_norm": False},
        {"temporal_position": False},
        {"frame_step": 0.4},
        {"joint_position": True, "frame_step": 0.4},
        {"pooled_text": False},
        {"spatial": ("frame", "shifted")},
    ],
)
def test_every_variant_equals_its_dense_second_implementation_and_differs_from_the_default(change):
    model, x = (
        awake(VideoMMDiTConfig(dim=16, depth=2, num_heads=2, window_size=4, **change)),
        clip(2, 2, 5, 4),
    )
    expected = dense_forward(model, x, TIMES, captions(2))
    torch.testing.assert_close(model(x, TIMES, captions(2)), expected, rtol=0, atol=1e-9)
    assert set(model.state_dict()) != set(awake().state_dict()) or not torch.allclose(
        expected, awake()(x, TIMES, captions(2))
    )


def test_the_initial_output_is_exactly_zero():
    model = build_model(SMALL, CHANNELS, TEXT)
    x = clip(2, 2, 5, 7).float()
    assert torch.equal(model(x, TIMES.float(), captions(2, torch.float32)), torch.zeros_like(x))


def test_padding_of_the_text_changes_nothing_whatever_it_holds():
    model, x, text = awake(), clip(2, 2, 4, 4), captions(2)
    expected = model(x, TIMES, text)
    for garbage in (0.0, 1e30, float("nan")):
        embeddings = torch.where(text.valid[..., None], text.embeddings, garbage)
        longer = torch.nn.functional.pad(embeddings, (0, 0, 0, 11), value=garbage)
        padded = TextTokens(longer, torch.nn.functional.pad(text.valid, (0, 11)))
        torch.testing.assert_close(model(x, TIMES, padded), expected, rtol=0, atol=1e-12)
    shorter = TextTokens(text.embeddings[:, :3], text.valid[:, :3])
    torch.testing.assert_close(model(x, TIMES, shorter), expected, rtol=0, atol=1e-12)


def test_every_valid_token_matters_and_a_dropped_caption_is_the_null_whatever_it_said():
    model, x, text = awake(), clip(2, 1, 4, 4), captions(2)
    expected = model(x, TIMES, text)
    for sample, token in text.valid.nonzero().tolist():
        changed = TextTokens(text.embeddings.clone(), text.valid)
        changed.embeddings[sample, token] += 1
        assert (model(x, TIMES, changed)[sample] - expected[sample]).abs().max() > 1e-4
    other = TextTokens(torch.randn_like(text.embeddings), text.valid)
    torch.testing.assert_close(
        model(x, TIMES, other.null()), model(x, TIMES, text.null()), rtol=0, atol=1e-12
    )
    empty = TextTokens(text.embeddings[:, :0], text.valid[:, :0])
    torch.testing.assert_close(
        model(x, TIMES, empty), model(x, TIMES, text.null()), rtol=0, atol=1e-12
    )
    assert (model(x, TIMES, text.null()) - expected).abs().max() > 1e-2


def test_samples_do_not_see_each_other_and_time_matters():
    model, x, text = awake(), clip(2, 2, 4, 4), captions(2)
    together = model(x, TIMES, text)
    alone = torch.cat([model(x[i : i + 1], TIMES[i : i + 1], text[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert (model(x, TIMES + 1, text) - together).abs().max() > 1e-4


def test_times_are_told_by_waves_from_two_pi_to_ten_thousand_times_as_long():
    embedding = TimeEmbedding(8)
    seen = []
    embedding.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    t = torch.tensor([0.0, 1.0, 437.5, 1000.0])
    embedding(t)
    rates = 10_000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angles = t[:, None] * rates
    expected = torch.cat([angles.cos(), angles.sin()], 1)
    torch.testing.assert_close(seen[0], expected.float(), rtol=0, atol=1e-4)


def test_the_order_of_frames_matters_and_without_a_position_in_time_it_does_not():
    x, text = clip(2, 4, 4, 4), captions(2)
    model = awake()
    assert (model(x.flip(1), TIMES, text) - model(x, TIMES, text).flip(1)).abs().max() > 1e-2
    control = awake(
        VideoMMDiTConfig(dim=16, depth=2, num_heads=2, window_size=4, temporal_position=False)
    )
    torch.testing.assert_close(
        control(x.flip(1), TIMES, text), control(x, TIMES, text).flip(1), rtol=0, atol=1e-10
    )


def test_frames_know_their_number_even_where_all_look_alike():
    """At the highest noise all frames are alike to the network, and what moves where must be
    decided there."""
    model, text, alike = awake(), captions(2), clip(2, 1, 4, 4).expand(-1, 4, -1, -1, -1)
    output = model(alike, TIMES, text)
    assert min((output[:, i] - output[:, j]).abs().max() for i in range(4) for j in range(i)) > 1e-2
    first = model(alike[:, :1], TIMES, text)
    with torch.no_grad():
        model.frame.embed.weight.normal_()
    torch.testing.assert_close(
        model(alike[:, :1], TIMES, text), first, rtol=0, atol=0
    )  # pictures know nothing of it


@pytest.mark.parametrize("joint", [False, True])
def test_numbers_are_drawn_once_before_clips_and_pictures_do_not_see_them(joint):
    torch.manual_seed(0)
    config, text = replace(SMALL, joint_position=joint), captions(2)
    model = build_model(config, CHANNELS, TEXT).double()
    drawn = [model.frame, *([model.joint_position] if joint else [])]
    numbers_of = [part.embed.weight for part in drawn]
    for weight in model.parameters():
        if not any(weight is number for number in numbers_of):
            weight.data.add_(0.3 * torch.randn_like(weight))
    picture, alike = clip(2, 1, 4, 4), clip(2, 1, 4, 4).expand(-1, 4, -1, -1, -1)
    before = model(picture, TIMES, text)
    model.number_frames(seed=1)
    numbers = [weight.clone() for weight in numbers_of]
    assert all(number.any() for number in numbers)
    assert torch.equal(model(picture, TIMES, text), before)
    output = model(alike, TIMES, text)
    assert min((output[:, i] - output[:, j]).abs().max() for i in range(4) for j in range(i)) > 1e-2
    model.number_frames(seed=2)
    assert all(map(torch.equal, numbers_of, numbers))  # trained numbers stay


def test_windows_know_where_they_are():
    model, x, text = awake(), clip(2, 1, 8, 8), captions(2)
    for axis in (2, 3):
        rolled = model(x.roll(4, axis), TIMES, text)
        assert (rolled - model(x, TIMES, text).roll(4, axis)).abs().max() > 1e-2


def test_every_parameter_has_a_gradient_on_clips_and_only_temporal_ones_are_zero_on_images():
    for frames in (2, 1):
        model = awake()
        text = captions(2).drop(torch.tensor([False, True]))
        model(clip(2, frames, 8, 8), TIMES, text).square().sum().backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None, name
            assert weight.grad.any() != (
                frames == 1 and (".temporal." in name or name == "frame.embed.weight")
            ), name


def test_a_model_trained_on_images_gives_the_same_for_every_frame_of_a_clip():
    torch.manual_seed(0)
    model = build_model(SMALL, CHANNELS, TEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    x, t, text = clip(2, 1, 8, 8).float(), TIMES.float(), captions(2, torch.float32)
    for _ in range(5):
        loss = (model(x, t, text) - x.flip(2)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    image = model(x, t, text)
    assert image.abs().max() > 1e-2
    with torch.no_grad():
        still = model(x.expand(-1, 4, -1, -1, -1), t, text)
        torch.testing.assert_close(still, image.expand(-1, 4, -1, -1, -1), rtol=0, atol=1e-6)
    # and from there the temporal attention can learn
    (
        model(x.expand(-1, 4, -1, -1, -1), t, text) - clip(2, 4, 8, 8).float()
    ).square().mean().backward()
    assert model.modulation.weight.grad[5 * 16 : 6 * 16].any()


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_distributed_training_on_images_goes_past_the_second_step():
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1
        )
        try:
            model = torch.nn.parallel.DistributedDataParallel(awake())
            for _ in range(3):
                model(clip(2, 1, 4, 4), TIMES, captions(2)).square().sum().backward()
        finally:
            dist.destroy_process_group()


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_gives_the_same_gradients(every):
    plain = awake()
    saving = VideoMMDiT(
        VideoMMDiTConfig(**{**encode(SMALL), "checkpointing": True, "checkpoint_every": every}),
        CHANNELS,
        TEXT,
    ).double()
    saving.load_state_dict(plain.state_dict())
    calls = [[] for _ in saving.blocks]
    for block, own in zip(saving.blocks, calls):
        block.spatial.register_forward_hook(lambda *_, own=own: own.append(1))
    for model in (plain, saving):
        model(clip(2, 2, 4, 4), TIMES, captions(2)).square().sum().backward()
    assert [len(own) for own in calls[:2]] == [
        2,
        2 if every == 1 else 1,
    ]  # once forward, once recomputed
    for a, b in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("residual", ["float32", "autocast"])
def test_autocast_stays_close_and_the_stream_has_the_type_asked_for(residual):
    model = build_model(VideoMMDiTConfig(**{**encode(SMALL), "residual": residual}), CHANNELS, TEXT)
    model.load_state_dict(awake().state_dict())
    streams = []
    model.blocks[1].register_forward_hook(
        lambda module, inputs, output: streams.append(output[0].dtype)
    )
    x, text = clip(2, 3, 5, 7).float(), captions(2, torch.float32)
    exact = model(x, TIMES.float(), text)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x, TIMES.float(), text)
    assert streams == [torch.float32, torch.float32 if residual == "float32" else torch.bfloat16]
    assert rough.dtype == torch.float32
    assert ((rough - exact).norm() / exact.norm()) < 0.05
    assert (
        model.bfloat16()(x.bfloat16(), TIMES.bfloat16(), captions(2, torch.bfloat16)).dtype
        == torch.bfloat16
    )


@pytest.mark.thorough
def test_blocks_compile_without_graph_breaks(request):
    """With what `rearrange` does, of which one block has all that the other has."""
    model, x = awake(), clip(2, 2, 5, 7)
    expected = model(x, TIMES, captions(2))
    model.blocks[1].compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(x, TIMES, captions(2)), expected)
    request.getfixturevalue("opaque_einops")
    model.blocks[0].compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(x, TIMES, captions(2)), expected)


def test_dropout_drops_in_training_only():
    model = awake(VideoMMDiTConfig(dim=16, depth=2, num_heads=2, window_size=4, dropout=0.5))
    x, text = clip(2, 2, 4, 4), captions(2)
    assert not torch.equal(model(x, TIMES, text), model(x, TIMES, text))
    model.eval()
    torch.testing.assert_close(
        model(x, TIMES, text), dense_forward(model, x, TIMES, text), rtol=0, atol=1e-9
    )


def test_rotary_scores_depend_on_differences_only():
    q, k = torch.randn(2, 8, dtype=torch.float64)

    def score(a, b):
        turned_q, turned_k = rotate(
            torch.stack([q, k]), rotary_tables(torch.tensor([a, b]), 8, 100.0)
        )
        return turned_q @ turned_k

    torch.testing.assert_close(score((3, 1), (5, 7)), score((13, 21), (15, 27)))
    assert (score((3, 1), (5, 7)) - score((3, 1), (7, 5))).abs() > 1e-6


def test_adapters_find_the_linears_by_name():
    names = {
        name
        for name, module in awake().blocks[0].named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert {
        f"{part}.{kind}"
        for part in ("spatial", "temporal", "cross")
        for kind in ("q", "k", "v", "proj")
    } <= names
    outside = [name for name, _ in awake().named_modules() if not name.startswith("blocks.")]
    assert not [name for name in outside if name.split(".")[-1] in ("q", "k", "v", "proj")]


def test_weight_decay_spares_offsets_and_norms():
    network = awake()
    optimizer = build_optimizer(torch.nn.ModuleDict({"model": network}), 1e-3, 0.1, (0.9, 0.95))
    names = {weight: name for name, weight in network.named_parameters()}
    decay = {
        names[weight]: group["weight_decay"]
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    offsets = ("blocks.0.table", "text.null", "pooled.null", "modulation.bias")
    for name in (*offsets, "blocks.0.spatial.q_norm.weight"):
        assert decay[name] == 0
    for name in ("blocks.0.spatial.q.weight", "modulation.weight", "input.weight"):
        assert decay[name] == 0.1


SIZES = [("S", 384, 12, 6), ("B", 768, 12, 12), ("L", 1024, 24, 16), ("XL", 1152, 28, 18)]


@pytest.mark.parametrize("size, dim, depth, heads", SIZES)
def test_named_sizes(size, dim, depth, heads):
    config = decode(VideoMMDiTConfig, {"size": size})
    assert (config.dim, config.depth, config.num_heads, config.head_dim) == (dim, depth, heads, 64)
    assert decode(VideoMMDiTConfig, encode(config)) == config
    with pytest.raises(ConfigError, match=f"model.depth: is 3, but size {size} means {depth}"):
        decode(VideoMMDiTConfig, {"size": size, "depth": 3}, "model")


@pytest.mark.parametrize(
    "written, path",
    [
        ({"dim": 100, "num_heads": 3}, "num_heads.*100"),
        ({"dim": 12, "num_heads": 2}, "num_heads.*12"),
        ({"depth": 0}, "depth.*0"),
        ({"num_heads": 0}, "num_heads.*0"),
        ({"window_size": 0}, "window_size.*0"),
        ({"dropout": 1.0}, "dropout.*1.0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio.*0"),
        ({"mlp_ratio": 1e308}, "mlp_ratio.*at most"),
        ({"depth": 10**6}, "depth.*at most"),
        ({"size": "M"}, "size.*'S', 'B', 'L', 'XL'"),
    ],
)
def test_impossible_models_are_refused_with_path_and_values(written, path):
    with pytest.raises(ConfigError, match=f"model.{path}"):
        decode(VideoMMDiTConfig, written, "model")


def test_foreign_shapes_are_refused_in_words():
    model, text = awake(), captions(2)
    with pytest.raises(ValueError, match="another tokenizer"):
        model(torch.randn(2, 1, 4, 4, 5), TIMES, text)
    with pytest.raises(ValueError, match="made for 6"):
        model(clip(2, 1, 4, 4), TIMES, TextTokens(torch.randn(2, 5, 7), text.valid))
    with pytest.raises(ValueError, match="1 captions"):
        model(clip(2, 1, 4, 4), TIMES, text[:1])


def test_a_copy_is_independent_and_equal():
    model = awake()
    assert torch.equal(
        copy.deepcopy(model)(clip(2, 1, 4, 4), TIMES, captions(2)),
        model(clip(2, 1, 4, 4), TIMES, captions(2)),
    )
