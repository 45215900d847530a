"""The second stage: a model that is given a small clip and redraws it larger, and drawing in tiles.
Nothing changes until it is trained; what it is told matters afterwards; tiles leave no trace."""

import json
from dataclasses import replace

import pytest
import torch

from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.batches.latent_batches import LatentBatches
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.dataset.buckets import VideoConfig
from mmdit.diffusion import SamplerConfig, build_objective
from mmdit.diffusion.tiling import OVERLAP, Tiling, starts, tiled
from mmdit.interfaces import LatentSpec
from mmdit.models import build_model
from mmdit.nn.position import JointPosition
from mmdit.nn.window import WindowGrid, coordinates, coordinates_of_tiles
from mmdit.pixels import resized
from mmdit.rng import Draws
from mmdit.scripts import export, sample, train_t2v
from mmdit.text_encoders import ByteLevelConfig, build_text_encoder
from mmdit.tokenizers import DummyTokenizerConfig, build_tokenizer
from mmdit.training import checkpoint
from mmdit.training.learner import Learner
from mmdit.training.low_resolution import SmallClips, noised
from mmdit.training.pipeline import Pipeline, SampleSettings
from tests.helpers.tiny import Workshop, refused
from tests.test_model import CHANNELS, SMALL, TEXT, TIMES, awake, captions, clip

CONDITIONED = replace(SMALL, conditioning="low_resolution")
LEVELS = torch.tensor([100.0, 300.0], dtype=torch.float64)
SETTINGS = SampleSettings(SamplerConfig("euler", 3), cfg_scale=2.0, seed=3)


# ── the network ───────────────────────────────────────────────────────────────────────────────────
def test_before_training_any_small_clip_gives_the_model_without():
    plain, model = awake(), build_model(CONDITIONED, CHANNELS, TEXT).double()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("low_resolution.") for name in missing)
    x = clip(2, 2, 4, 5)
    given = model(x, TIMES, captions(2), small=clip(2, 2, 4, 5, seed=9), small_t=LEVELS)
    assert torch.equal(given, plain(x, TIMES, captions(2)))


def test_after_one_step_the_small_clip_and_its_level_matter_to_each_sample():
    model, x, small = awake(CONDITIONED), clip(2, 2, 4, 5), clip(2, 2, 4, 5, seed=9)

    def call(small=small, levels=LEVELS):
        return model(x, TIMES, captions(2), small=small, small_t=levels)

    first, other = call(), small.clone()
    other[0] += 1
    for changed in (call(other), call(levels=LEVELS + torch.tensor([50.0, 0.0]))):
        assert (changed[0] - first[0]).abs().max() > 1e-3
        assert torch.equal(changed[1], first[1])

    fresh = build_model(CONDITIONED, CHANNELS, TEXT).double()
    with torch.no_grad():
        for weight in (fresh.output.weight, fresh.modulation.weight):
            torch.nn.init.normal_(weight, std=0.1)
    loss = (fresh(x, TIMES, captions(2), small=small, small_t=LEVELS) - small).square().mean()
    loss.backward()
    condition = fresh.low_resolution
    assert condition.clip.weight.grad.abs().max() > 0
    assert condition.level.mlp[2].weight.grad.abs().max() > 0


def test_a_small_clip_must_be_given_where_it_is_asked_for_and_nowhere_else():
    x, small = clip(2, 1, 4, 4), clip(2, 1, 4, 4)
    with pytest.raises(ValueError, match="with --refine"):
        awake(CONDITIONED)(x, TIMES, captions(2))
    with pytest.raises(ValueError, match="model.conditioning: low_resolution"):
        awake()(x, TIMES, captions(2), small=small, small_t=LEVELS)
    with pytest.raises(ValueError, match="enlarge it to the same size"):
        awake(CONDITIONED)(x, TIMES, captions(2), small=small[:, :, :2], small_t=LEVELS)


def test_the_cells_of_a_tile_have_the_coordinates_that_they_have_in_the_frame():
    whole = WindowGrid.fit(9, 13, 16)
    everywhere = whole.merge(coordinates(whole, torch.device("cpu"), torch.float64)[None, None])
    tile = WindowGrid.fit(4, 6, 3)
    places = torch.tensor([[0, 2, 5, 9, 13], [7, 5, 7, 9, 13]])
    cells = tile.merge(coordinates_of_tiles(tile, places, torch.float64)[:, None])
    assert torch.equal(cells[0, 0], everywhere[0, 0, 2:6, 5:11])
    assert torch.equal(cells[1, 0], everywhere[0, 0, 5:9, 7:13])


def test_a_part_of_a_clip_has_the_joint_positions_of_the_whole():
    position = JointPosition(4).double()
    whole, tile = WindowGrid.fit(9, 13, 4), WindowGrid.fit(4, 6, 3)
    device, dtype = torch.device("cpu"), torch.float64
    everything = whole.merge(position(coordinates(whole, device, dtype), 12, 0.5)[None])
    places = torch.tensor([[0, 2, 5, 9, 13], [7, 5, 7, 9, 13]])
    parts = position(coordinates_of_tiles(tile, places, dtype), 5, 0.5, places[:, 0])
    found = tile.merge(parts)
    torch.testing.assert_close(found[0], everything[0, :5, 2:6, 5:11])
    torch.testing.assert_close(found[1], everything[0, 7:12, 5:9, 7:13])


def test_a_place_tells_tiles_apart_and_the_place_of_everything_is_none():
    model, x = awake(), clip(2, 3, 4, 4)
    whole = torch.tensor([[0, 0, 0, 4, 4]])
    expected = model(x, TIMES, captions(2))
    torch.testing.assert_close(model(x, TIMES, captions(2), place=whole), expected)
    for moved in ([3, 0, 0, 4, 4], [0, 2, 0, 8, 4], [0, 0, 2, 4, 8]):
        place = torch.tensor([[0, 0, 0, 4, 4], moved])
        placed = model(x, TIMES, captions(2), place=place)
        torch.testing.assert_close(placed[0], expected[0])
        assert (placed[1] - expected[1]).abs().max() > 1e-3, moved
    numberless = awake(replace(SMALL, temporal_position=False))
    places = [torch.tensor([[first, 0, 0, 4, 4]]) for first in (0, 5)]
    first, second = (numberless(x, TIMES, captions(2), place=place) for place in places)
    assert torch.equal(first, second)


# ── tiles ─────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("whole, tile", [(45, 24), (80, 24), (80, 16), (16, 16), (9, 16), (5, 1)])
def test_tiles_cover_an_axis_and_share_enough_of_it(whole, tile):
    first = starts(whole, tile)
    assert first[0] == 0 and first[-1] == max(0, whole - tile)
    shared = OVERLAP * tile if tile > 1 else 0
    assert all(b - a <= tile - shared + 0.5 for a, b in zip(first, first[1:]))


def test_blended_tiles_are_what_was_cut_and_change_nowhere_with_a_step():
    tiling = Tiling.fit((10, 9, 13), (4, 4, 6))
    x = torch.randn(2, 10, 9, 13, 3, dtype=torch.float64)
    torch.testing.assert_close(tiling.blend(tiling.cut(x)), x)
    count = len(tiling.corners)
    assert tiling.cut(x).shape == (2 * count, 4, 4, 6, 3)
    assert len(tiling.places(torch.device("cpu"))) == count
    line = Tiling.fit((1, 1, 40), (1, 1, 24))  # two tiles that say 0 and 1
    says = torch.arange(2.0).view(2, 1, 1, 1, 1).expand(2, 1, 1, 24, 1)
    blended = line.blend(says).flatten()
    assert blended[0] == 0 and blended[-1] == 1 and (blended.diff() >= 0).all()
    assert blended.diff().max() < 0.3


def test_tiles_are_denoised_in_groups_of_any_order():
    tiling, x = Tiling.fit((1, 4, 6), (1, 4, 4)), torch.randn(1, 1, 4, 6, 2)
    places = tiling.places(torch.device("cpu"))

    def of(numbers):  # its result depends on which tile it is given
        return numbers, lambda tiles, t: tiles * t + places[numbers, 2].view(-1, 1, 1, 1, 1)

    together = tiled(tiling, [of(torch.tensor([0, 1]))])(x, 0.5)
    apart = tiled(tiling, [of(torch.tensor([1])), of(torch.tensor([0]))])(x, 0.5)
    assert torch.equal(together, apart) and together.shape == x.shape


# ── drawing ───────────────────────────────────────────────────────────────────────────────────────
def pipeline_of(config, std: float = 0.2) -> Pipeline:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(DummyTokenizerConfig(latent_d=12))
    encoder = build_text_encoder(ByteLevelConfig(dim=16, depth=1, num_heads=2))
    model = build_model(config, 12, encoder.dim)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    learner = Learner(model, encoder, build_objective("flow_matching"), tokenizer.spec).eval()
    return Pipeline(learner, tokenizer)


@pytest.mark.parametrize("config", [SMALL, CONDITIONED], ids=["redraw", "conditioned"])
def test_one_tile_that_holds_everything_changes_nothing(config):
    pipeline, small = pipeline_of(config), torch.rand(2, 3, 3, 32, 48)
    whole = pipeline.refine(small, ["a", "b"], 96, 64, 0.4, SETTINGS)
    pipeline.tile = (3, 4, 6)
    assert torch.equal(pipeline.refine(small, ["a", "b"], 96, 64, 0.4, SETTINGS), whole)
    pipeline.tile = (2, 4, 4)
    tiles = pipeline.refine(small, ["a", "b"], 96, 64, 0.4, SETTINGS)
    assert tiles.shape == whole.shape and not torch.equal(tiles, whole)


def test_tiles_in_small_groups_give_what_they_give_together(monkeypatch):
    pipeline, small = pipeline_of(CONDITIONED), torch.rand(1, 4, 3, 32, 48)
    pipeline.tile = (2, 3, 4)
    together = pipeline.refine(small, ["a"], 96, 64, 0.4, SETTINGS)
    monkeypatch.setattr("mmdit.training.pipeline.TILE_TOKENS", 48)
    apart = pipeline.refine(small, ["a"], 96, 64, 0.4, SETTINGS)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-4)


def test_tiles_are_drawn_from_one_noise_and_without_seams():
    """Draw with a network that sees each cell alone: however the grid is cut, it draws the same."""
    pipeline, small = pipeline_of(CONDITIONED, 0.05), torch.rand(1, 2, 3, 32, 48)
    model = pipeline.learner.model
    with torch.no_grad():  # closed gates: no token sees another
        model.modulation.weight.zero_()
        model.modulation.bias.zero_()
        for block in model.blocks:
            block.table.zero_()
    whole = pipeline.refine(small, ["a"], 128, 64, 0.4, SETTINGS)
    pipeline.tile = (2, 3, 4)
    torch.testing.assert_close(
        pipeline.refine(small, ["a"], 128, 64, 0.4, SETTINGS), whole, rtol=0, atol=1e-5
    )


def test_the_level_is_told_and_lies_over_the_small_clip():
    small = torch.randn(2, 1, 4, 4, 3)
    draws = Draws.of(0, 0, 2)
    inputs = noised(small, torch.tensor([0.0, 0.5]), draws)
    assert inputs["small_t"].tolist() == [0, 500] and torch.equal(inputs["small"][0], small[0])
    noise = draws.normal("augmentation", 1, 4, 4, 3)
    torch.testing.assert_close(inputs["small"][1], 0.5 * (small[1] + noise[1]))


def test_training_draws_the_level_for_each_sample_and_a_model_without_a_condition_gets_none():
    spec = LatentSpec(3, mean=(1.0, 0.0, 0.0), std=(2.0, 1.0, 1.0))
    latents = torch.randn(64, 1, 2, 2, 6)
    draws = Draws.of(0, 5, 64)
    clips, inputs = SmallClips(spec, 0.4).of_latents(latents, draws)
    assert torch.equal(clips, latents[..., :3])
    levels = inputs["small_t"] / 1000
    assert 0 <= levels.min() < 0.05 and 0.35 < levels.max() <= 0.4
    expected = noised(spec.normalize(latents[..., 3:]), levels, draws)["small"]
    torch.testing.assert_close(inputs["small"], expected)
    clips, inputs = SmallClips(spec, None).of_latents(latents, draws)
    assert torch.equal(clips, latents[..., :3]) and inputs == {}


# ── the cache ─────────────────────────────────────────────────────────────────────────────────────
def test_a_cache_holds_what_a_perfect_small_model_would_have_drawn_enlarged():
    config = DummyTokenizerConfig(latent_d=12, low_resolution=(48, 32))
    tokenizer, pixels = build_tokenizer(config), torch.rand(2, 2, 3, 64, 96)
    plain = tokenizer.plain
    clips, small = tokenizer.encode(pixels).chunk(2, -1)
    assert torch.equal(clips, plain.encode(pixels))
    drawn = plain.decode(plain.encode(resized(pixels, 48, 32)))
    torch.testing.assert_close(small, plain.encode(resized(drawn, 96, 64)))
    assert tokenizer.fingerprint != plain.fingerprint
    other = replace(config, low_resolution=(96, 64))
    assert build_tokenizer(other).fingerprint != tokenizer.fingerprint
    torch.testing.assert_close(tokenizer.decode(torch.cat([clips, small], -1)), plain.decode(clips))


TILES = [
    "video={width: 96, height: 64, num_frames: 2, tile: [48, 32]}",
    "tokenizer={type: dummy, latent_d: 8, low_resolution: [48, 32]}",
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    shop = Workshop(tmp_path_factory.mktemp("super_resolution"))
    shop.large = shop.cache("large", "--frames", "5", *TILES, count=6)
    return shop


@pytest.mark.parametrize("in_memory", [True, False])
def test_batches_are_tiles_and_say_where_they_lie(shop, in_memory):
    cache = open_cache(shop.large)
    plan = BatchPlan(cache, VideoConfig(96, 64, num_frames=2), 32, 0)
    batches = LatentBatches(cache, plan, tile=(2, 3), in_memory=in_memory, num_workers=0)
    (batch,) = batches.step(1)
    assert batch.latents.shape == (32, 2, 2, 3, 16)
    seen = set()
    for latents, id, place in zip(batch.latents, batch.ids, batch.places.tolist(), strict=True):
        first, row, column, rows, columns = place
        assert (rows, columns) == (4, 6)
        whole = cache.load(list(cache.ids).index(id))
        expected = whole[first : first + 2, row : row + 2, column : column + 3]
        assert torch.equal(latents, expected)
        seen.add((row, column))
    assert {row for row, _ in seen} == {0, 1, 2} and {column for _, column in seen} == {0, 1, 2, 3}
    picture = LatentBatches(
        cache, BatchPlan(cache, VideoConfig(96, 64), 4, 0), tile=(2, 3), num_workers=0
    ).step(0)[0]
    assert picture.places[:, 0].tolist() == [0] * 4, "a picture knows nothing of time"
    assert LatentBatches(cache, plan, num_workers=0).step(0)[0].places is None


def test_a_second_stage_trains_from_the_first_and_redraws_its_clips(shop, capsys, monkeypatch):
    """Train both kinds of it, from one cache."""
    words = [*TILES, "train.sample_every_steps=0", "train.lr=1.0e-4", "train.max_steps=2"]
    first = shop.train("first", cache=shop.cache("pictures"))
    start = checkpoint.load_weights(first).tensors
    small = ["--checkpoint", str(first), "--prompts", "a red star", "a blue ring", "--device=cpu"]
    drawn = {}
    for name, more in (("redraw", []), ("conditioned", ["model.conditioning=low_resolution"])):
        run = shop.train(
            name, *words, *more, f"train.init_from={first}", "train.val_every_steps=1",
            "train.val_share=0.3", cache=shop.large,
        )  # fmt: skip
        tensors = checkpoint.load_weights(run).tensors
        new = [key for key in tensors if key not in start]
        assert bool(new) == (name == "conditioned")
        assert all(key.startswith("model.low_resolution.") for key in new)
        assert not new or tensors["model.low_resolution.clip.weight"].abs().max() > 0
        out = shop.folder / name
        assert sample.main([*small, "--refine", str(run), "--out", str(out)]) == 0
        drawn[name] = (out / "0000.png").read_bytes()
        strength = json.loads((out / "samples.json").read_text())["strength"]
        assert strength == (0.1 if new else 0.5)
    assert drawn["redraw"] != drawn["conditioned"]
    asked, latents = [], Pipeline.latents

    def seen(pipeline, captions, width, height, frames, settings, *rest, **more):
        asked.append((width, settings.seed, settings.negative_prompt))
        return latents(pipeline, captions, width, height, frames, settings, *rest, **more)

    file = str(shop.folder / "stage.safetensors")
    export.main(["--checkpoint", str(run), "--out", file])
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "latents", seen)
        own = [*small[:2], "--device=cpu", "--refine", file, "--out", str(shop.folder / "own")]
        own += ["--raw_weights"]  # of the model that has others; the file has its own alone
        own += ["--seed=7", "--negative=dull", "--prompts_file", str(shop.folder / "p.jsonl")]
        lines = '{"prompt": "a"}\n{"prompt": "b", "negative": "loud"}\n'
        (shop.folder / "p.jsonl").write_text(lines)
        assert sample.main(own) == 0
    assert {(7, "dull"), (7, "loud")} == {row[1:] for row in asked}
    assert len({row[0] for row in asked}) == 2 and len(asked) == 4
    stage = str(shop.folder / "runs/conditioned")
    out = ["--device=cpu", "--out", str(shop.folder / "none")]
    alone = ["--checkpoint", stage, "--prompts", "a", *out]
    refused(capsys, sample.main, alone, "name it with --refine")
    for words, *expected in (
        (["--strength", "0.9"], "--strength is 0.9", "at most 0.5", "model.augmentation"),
        (["--width", "32", "--height", "32"], "32x32", "48x32"),
    ):
        refused(capsys, sample.main, [*small, *out, "--refine", stage, *words], *expected)


def test_held_out_tiles_are_read_from_the_disk_in_bfloat16_too(shop):
    words = ["train.precision=bf16", "data.in_memory=false", "train.max_steps=1"]
    held_out = ["train.val_every_steps=1", "train.val_share=0.3"]
    run = shop.train("held_out", *TILES, *words, *held_out, cache=shop.large)
    *_, line = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["val_loss"] > 0


def test_previews_are_drawn_in_tiles_as_samples_are(shop, monkeypatch):
    tiled, drawn = Pipeline._in_tiles, []

    def seen(pipeline, tiling, *rest):
        drawn.append(tiling.tile)
        return tiled(pipeline, tiling, *rest)

    monkeypatch.setattr(Pipeline, "_in_tiles", seen)
    shop.train("previews", *TILES, "train.sample_every_steps=3", cache=shop.large)
    assert set(drawn) == {(2, 2, 3)}


@pytest.mark.parametrize(
    "words, expected",
    [
        (["model.conditioning=low_resolution"], "tokenizer.low_resolution is null"),
        (["tokenizer.low_resolution=[40, 32]"], "multiples of 16"),
        (["video.tile=[20, 32]"], "multiples of 16"),
        (["video.tile=[0, 32]"], "multiples of 16"),
        (["model.augmentation=1"], "to below 1"),
        (
            ["model.conditioning=low_resolution", "tokenizer.low_resolution=[16, 16]",
             "train.sample_every_steps=1"],
            "previews have none",
        ),
    ],
)  # fmt: skip
def test_combinations_that_cannot_be_are_refused(shop, capsys, words, expected):
    refused(capsys, train_t2v.main, shop.train_words("never", *words, cache=shop.large), expected)


def test_a_cache_of_clips_alone_is_refused_for_small_clips(shop, capsys):
    words = ["model.conditioning=low_resolution", "tokenizer.low_resolution=[32, 16]"]
    refused(
        capsys,
        train_t2v.main,
        shop.train_words("never", *words),
        "low resolution 32x16",
        "cache again",
    )
