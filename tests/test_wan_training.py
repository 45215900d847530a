"""Wan through the ordinary commands: caches of windows, full training and adapters, experts, first
frames, sampling releases."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmdit.adapters import LoRAConfig, adapters, inject, merge, remove
from mmdit.commands.cache_text import asked_texts
from mmdit.commands.inspect_adapter import changes
from mmdit.commands.sample import with_published_shift
from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.batches.data_config import SourceConfig
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.dataset.buckets import VideoConfig
from mmdit.data.dataset.clips import cached_frames
from mmdit.diffusion import SamplerConfig
from mmdit.experiment.build import build_learner
from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.experiment.load import load_pipeline
from mmdit.interfaces import LatentSpec, TextTokens
from mmdit.interop import wan_release
from mmdit.interop.lora_formats import save_lora
from mmdit.interop.wan_pictures import size_of_aspect
from mmdit.interop.wan_release import published_shift, release_config
from mmdit.interop.wan_weights import load_dit
from mmdit.models.wan import WanDiT
from mmdit.models.wan_denoiser import WanDenoiser
from mmdit.rng import Draws
from mmdit.scripts import (
    cache_moving_shapes,
    cache_text,
    cache_vtp_latents,
    export,
    inspect_adapter,
    sample,
    train_t2v,
)
from mmdit.text_encoders import build_text_encoder
from mmdit.text_encoders.umt5 import IDLE
from mmdit.tokenizers import build_tokenizer
from mmdit.training import checkpoint
from mmdit.training.expert_choice import expert_notes, resolved
from mmdit.training.media import read_back
from mmdit.training.pipeline import SampleSettings
from mmdit.training.starting import start_from_lora
from mmdit.weights import Checkpoint
from tests.helpers.thorough import thorough, thorough_unless
from tests.helpers.tiny import refused
from tests.helpers.wan_release import (
    DIT,
    I2V,
    TI2V,
    config_text,
    make_diffusers_release,
    make_release,
)

LORA = "lora={enabled: true, rank: 2, alpha: 4, target_modules: [q, v, ffn.0]}"


class Shop:
    def __init__(self, folder, config=DIT, pair=False):
        self.folder, self.release = folder, make_release(folder / "release", config, pair)
        spatial = 16 if config.out_dim == 48 else 8
        self.config = folder / "wan.yaml"
        self.config.write_text(config_text(self.release, folder, spatial, config.out_dim))

    def cache(self, *words, count=4):
        out = self.folder / f"cache{len(words)}"
        if not out.exists():
            cache_moving_shapes.main(
                [
                    "--config",
                    str(self.config),
                    "--out_dir",
                    str(out),
                    "--count",
                    str(count),
                    "--device",
                    "cpu",
                    *words,
                ]
            )
        return out

    def words(self, name, *words):
        return [
            "--config",
            str(self.config),
            "--train_cache_dir",
            str(self.cache()),
            "--device",
            "cpu",
            f"experiment_name={name}",
            *words,
        ]

    def train(self, name, *words):
        assert train_t2v.main(self.words(name, *words)) == 0
        return self.folder / "runs" / name

    def learner(self, *words):
        config = load_experiment_config(self.config, list(words))
        return build_learner(config, build_tokenizer(config.tokenizer).spec)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Shop(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return Shop(tmp_path_factory.mktemp("pair"), pair=True)


# ── caches ────────────────────────────────────────────────────────────────────────────────────────
def test_windows_are_whole_samples():
    video = VideoConfig(num_frames=9, frame_stride=2, frame_counts=(5,))
    assert cached_frames(17, video) == list(range(0, 17, 2)) and len(cached_frames(34, video)) == 18
    assert cached_frames(16, video) == [3, 5, 7, 9, 11]
    with pytest.raises(ValueError, match="too short: 8 frames, a sample needs 9"):
        cached_frames(8, video)


def test_a_long_clip_is_cached_as_the_windows_that_training_uses(shop):
    rng = np.random.default_rng(0)
    for i in range(20):
        (shop.folder / "frames").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 64, 3), dtype=np.uint8)).save(
            shop.folder / f"frames/{i}.png"
        )
    meta = shop.folder / "videos.jsonl"
    meta.write_text(json.dumps({"id": "a", "frames_dir": "frames", "caption": "noise"}))
    out = shop.folder / "windows"
    assert (
        cache_vtp_latents.main(
            [
                "--config",
                str(shop.config),
                "--meta_jsonl",
                str(meta),
                "--out_dir",
                str(out),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    cache = open_cache(out)
    assert cache.shapes.tolist() == [[6, 4, 8, 4]]  # two windows of 9 frames, 3 latent frames each
    tokenizer = build_tokenizer(load_experiment_config(shop.config).tokenizer)
    pixels = (
        torch.stack(
            [
                torch.from_numpy(np.array(Image.open(shop.folder / f"frames/{i}.png")))
                for i in range(10, 19)
            ]
        )
        / 255
    )
    expected = tokenizer.encode(pixels.permute(0, 3, 1, 2)[None])[0]
    torch.testing.assert_close(cache.load(0)[3:].float(), expected, rtol=0, atol=5e-3)
    plan = BatchPlan(
        cache, VideoConfig(width=64, height=32, num_frames=9, image_fraction=0.5), 8, 0
    )
    starts = {tuple(row) for step in range(20) for row in plan.batch(step).frames.tolist()}
    assert starts == {(0, 1, 2), (3, 4, 5), (0,), (3,)}  # a first latent frame is a picture


def test_a_cache_of_other_windows_is_refused(shop, capsys):
    words = shop.words("other", "video.num_frames=5")
    refused(capsys, train_t2v.main, words, "video.num_frames: the cache has 9, the config asks 5")
    refused(
        capsys,
        train_t2v.main,
        shop.words("other", "video.num_frames=8"),
        "video.num_frames: 8 frames",
        "4n + 1",
        "5 and 9",
    )
    refused(capsys, train_t2v.main, shop.words("other", "video.height=24"), "multiples of 16")


# ── training ──────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.thorough
def test_all_weights_are_trained_from_the_released_ones_and_resume_is_exact(shop, capsys):
    run = shop.train("full")
    stored = load_file(run / "checkpoints/step_00000003/model.safetensors")
    released = load_dit(shop.release).state_dict()
    assert {name.removeprefix("model.") for name in stored} == set(released)
    moved = [
        name for name, value in released.items() if not torch.equal(stored[f"model.{name}"], value)
    ]
    assert len(moved) == len(released)
    shop.train("parts", "train.max_steps=2")
    shop.train("parts", "--resume")
    again = load_file(shop.folder / "runs/parts/checkpoints/step_00000003/model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in stored.items())
    lora = "lora={enabled: true, rank: 2, target_modules: [q, v]}"
    words = shop.words("lost", lora, f"train.init_from={run}")
    refused(capsys, train_t2v.main, words, "train.init_from", "leaves frozen", "name_or_path")


def test_all_weights_are_trained_in_bfloat16(shop):
    """On a CPU, whose autocast leaves norms to the type of their weights; as the loss of float32
    weights."""
    words = ["train.max_steps=1", "train.precision=pure_bf16", "train.betas=[0.9, 0.95]"]
    runs = [
        shop.train("in_bf16", *words),
        shop.train("in_fp32", "train.max_steps=1", "train.precision=bf16"),
    ]
    one, two = (
        json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"] for run in runs
    )
    assert one == pytest.approx(two, rel=0.03)


def test_adapters_alone_are_stored_and_merged_for_sampling(shop):
    run = shop.train("lora", LORA, "model.dtype=bfloat16")
    stored = load_file(run / "checkpoints/step_00000003/model.safetensors")
    assert stored and all(name.endswith(("lora_A", "lora_B")) for name in stored)
    shop.train("lora", LORA, "model.dtype=bfloat16", "--resume", "train.max_steps=4")
    pipeline, _ = load_pipeline(run, "cpu")
    released = load_dit(shop.release, torch.bfloat16).state_dict()
    changed = {
        name
        for name, value in pipeline.learner.model.state_dict().items()
        if not torch.equal(value, released[name])
    }
    assert changed and all(
        name.endswith(("q.weight", "v.weight", "ffn.0.weight")) for name in changed
    )


@pytest.mark.thorough
def test_adapters_are_exported_and_laid_over_a_release(shop, capsys):
    run = shop.train("export", LORA, "ema.enabled=false", "train.lr=0.1")
    for kind in ("kohya", "comfy", "diffusers"):
        file = shop.folder / f"{kind}.safetensors"
        assert export.main(["--checkpoint", str(run), "--out", str(file), "--lora", kind]) == 0
        drawn = []
        for words in (
            ["--checkpoint", run],
            ["--checkpoint", shop.release, "--lora", file],
            ["--checkpoint", shop.release],
        ):
            out = shop.folder / "out"
            given = [
                *words,
                "--device",
                "cpu",
                "--width",
                64,
                "--height",
                32,
                "--frames",
                1,
                "--steps",
                2,
                "--solver",
                "euler",
                "--shift",
                1,
                "--guidance",
                2,
                "--negative",
                "bad",
                "--replace",
                "--out",
                out,
                "--prompts",
                "a cat",
            ]
            assert sample.main([str(word) for word in given]) == 0
            file_name = json.loads((out / "samples.json").read_text())["samples"][0]["file"]
            drawn.append(np.array(Image.open(out / file_name)).astype(int))
        assert abs(drawn[0] - drawn[1]).max() <= 1 < abs(drawn[0] - drawn[2]).max()
    refused(
        capsys,
        sample.main,
        ["--checkpoint", shop.release, "--device", "cpu", "--lora_low", file, "--prompts", "x"],
        "no pair of experts",
    )


@torch.no_grad()
def test_the_trainers_view_of_the_network_is_the_network(shop):
    model, plain = shop.learner().model.eval(), load_dit(shop.release)
    x, t, lengths = torch.randn(2, 3, 4, 8, 4), torch.tensor([700.6, 20.0]), torch.tensor([5, 1])
    garbage = TextTokens(
        torch.randn(2, 7, 24), torch.arange(7) < lengths[:, None]
    )  # rows that are not valid say nothing
    padded = torch.where(garbage.valid[..., None], garbage.embeddings, 0)
    swapped = x.permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(
        model(x, t, garbage).permute(0, 4, 1, 2, 3), plain(swapped, t, padded)
    )
    torch.testing.assert_close(
        model(x, t, garbage, whole_times=True).permute(0, 4, 1, 2, 3),
        plain(swapped, t.floor(), padded),
    )
    tokens = t[:, None].repeat(1, 24)
    tokens[:, :8] = 0
    torch.testing.assert_close(
        model(x, t, garbage, given=1).permute(0, 4, 1, 2, 3), plain(swapped, tokens, padded)
    )
    model.train()  # keeps the shape of the text, for the same result
    torch.testing.assert_close(
        model(x, t, garbage).permute(0, 4, 1, 2, 3), plain(swapped, t, padded), rtol=1e-4, atol=1e-5
    )


def test_pictures_are_trained_too(shop):
    shop.cache("video.num_frames=1")
    assert (
        train_t2v.main(
            [
                "--config",
                str(shop.config),
                "--train_cache_dir",
                str(shop.folder / "cache1"),
                "--device",
                "cpu",
                "experiment_name=pictures",
                "video.num_frames=1",
                "train.sample_every_steps=3",
                "train.sample_prompts=[a red star]",
                "train.val_every_steps=3",
                "train.val_share=0.5",
            ]
        )
        == 0
    )
    assert list((shop.folder / "runs/pictures/samples").glob("step_*/grid.png"))


def test_each_expert_is_trained_in_its_times(pair):
    for expert, low, high in (("high", 0.875, 1.0), ("low", 0.0, 0.875)):
        learner = pair.learner(f"model.expert={expert}")
        t = learner.objective.draw_time(Draws.of(0, 0, 2000))
        assert low <= t.min() < low + 0.05 and high - 0.05 < t.max() <= high
    run = pair.train("high", "model.expert=high")
    pipeline, _ = load_pipeline(run, "cpu")
    assert pipeline.model.boundary.time == 0.875
    assert torch.equal(
        pipeline.model.low.head.head.weight, load_dit(pair.release, expert="low").head.head.weight
    )
    assert not torch.equal(
        pipeline.model.high.head.head.weight,
        load_dit(pair.release, expert="high").head.head.weight,
    )
    run = pair.train("low", "model.expert=low")
    pipeline, _ = load_pipeline(run, "cpu")
    assert torch.equal(
        pipeline.model.high.head.head.weight,
        load_dit(pair.release, expert="high").head.head.weight,
    )


@pytest.mark.parametrize("share, given", [(0.0, 0), (0.4, 0), (0.5, 1), (1.0, 1)])
def test_validation_measures_what_training_has_more_often(share, given):
    """Not what one coin says, tossed for the whole curve."""
    model = SimpleNamespace(training=False, first_frame=share)
    found = {WanDenoiser.given_frames(model, 3, Draws.of(seed, 0, 2)) for seed in range(8)}
    assert found == {given} and WanDenoiser.given_frames(model, 1, Draws.of(0, 0, 2)) == 0


def test_a_first_frame_is_given_in_its_share_of_the_steps(tmp_path):
    shop = Shop(tmp_path, TI2V)
    model = shop.learner("model.first_frame=0.5").model.train()
    given = [model.given_frames(3, Draws.of(0, step, 2)) for step in range(200)]
    assert 70 < sum(given) < 130 and model.given_frames(1, Draws.of(0, 0, 2)) == 0
    assert not any(model.given_frames(1, Draws.of(0, step, 2)) for step in range(40)), (
        "all of a picture would be given"
    )
    assert given == [model.given_frames(3, Draws.of(0, step, 8)) for step in range(200)]

    shop.train("first", "model.first_frame=1")
    # in sampling the first latent frame is the picture's, whatever the noise
    pipeline, config = load_pipeline(shop.release, "cpu")
    picture, settings = (
        torch.rand(3, 32, 64),
        SampleSettings(SamplerConfig("unipc", 3, grid="wan"), 2.0),
    )
    latents = pipeline.latents(["a", "b"], 64, 32, 9, settings, image=picture)
    expected = pipeline.tokenizer.encode(picture[None, None])
    seen, ask = [], pipeline.learner.model.forward

    def forward(x, *arguments, **options):
        seen.append(x[:, :1].clone())
        return ask(x, *arguments, **options)

    pipeline.learner.model.forward = forward
    pipeline.latents(["a", "b"], 64, 32, 9, settings, image=picture)
    clean = pipeline.learner.spec.normalize(expected)
    assert seen and all(
        torch.allclose(x, clean.expand_as(x).to(x), rtol=1e-4, atol=1e-4) for x in seen
    ), "every call sees the picture"
    pipeline.learner.model.forward = ask
    torch.testing.assert_close(
        latents[:, :1], expected.expand(2, -1, -1, -1, -1), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(latents[0, 1:], latents[1, 1:])


RECIPES = sorted((Path(__file__).parents[1] / "configs/wan").glob("*.yaml"))


@pytest.mark.parametrize(
    "path",
    thorough_unless(lambda path: path.stem == "ti2v_5b_first_frame_lora", RECIPES),
    ids=lambda path: path.stem,
)
def test_shipped_recipes_run_on_a_small_release(tmp_path, path):
    channels = 48 if "5b" in path.stem else 16
    more = 20 if "i2v_a14b" in path.stem else 0
    release = make_release(
        tmp_path / "release",
        replace(DIT, in_dim=channels + more, out_dim=channels),
        pair="a14b" in path.stem,
    )
    words = [
        f"{section}.name_or_path={release}" for section in ("tokenizer", "text_encoder", "model")
    ]
    words += [
        f"output_dir={tmp_path}",
        f"text_encoder.cache_dir={tmp_path}/text",
        "train.max_steps=2",
        "train.grad_accum_steps=1",
        "video.width=64",
        "video.height=32",
        "video.num_frames=5",
        "train.precision=fp32",
    ]
    given = ["--config", str(path), "--device", "cpu", *words]
    cache_moving_shapes.main([*given, "--out_dir", str(tmp_path / "cache"), "--count", "3"])
    assert cache_text.main([*given, "--cache_dir", str(tmp_path / "cache")]) == 0
    assert train_t2v.main([*given, "--train_cache_dir", str(tmp_path / "cache")]) == 0
    run = load_experiment_config(path, words).run_dir
    assert any((run / "checkpoints/step_00000002").glob("lora.safetensors"))
    words = [
        "--checkpoint",
        str(run),
        "--device",
        "cpu",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "out"),
        "--prompts",
        "a cat",
    ]
    picture = (
        ["--image", str(Path(__file__).parents[1] / "assets/pictures.png")]
        if channels == 48 or more
        else []
    )
    assert sample.main([*words, *picture]) == 0


# ── sampling ──────────────────────────────────────────────────────────────────────────────────────
def test_a_release_is_sampled_by_the_command(pair):
    out = pair.folder / "samples"
    words = [
        "--checkpoint",
        pair.release,
        "--device",
        "cpu",
        "--width",
        64,
        "--height",
        32,
        "--frames",
        5,
        "--steps",
        4,
        "--out",
        out,
    ]
    assert sample.main([str(word) for word in [*words, "--prompts", "a cat"]]) == 0
    story = json.loads((out / "samples.json").read_text())["settings"]
    assert story["sampler"] == {
        "solver": "unipc",
        "steps": 4,
        "eta": 0.0,
        "shift": 12.0,
        "grid": "wan",
    }
    assert (story["cfg_scale"], story["cfg_scale_low"]) == (4.0, 3.0) and len(
        story["negative_prompt"]
    ) == 137
    assert len(list(out.glob("*.mp4"))) == 1


def test_a_release_of_diffusers_draws_the_same(pair):
    settings = SampleSettings(
        SamplerConfig("unipc", 3, shift=12.0, grid="wan"), 4.0, cfg_scale_low=3.0
    )
    folders = pair.release, make_diffusers_release(pair.folder / "diffusers")
    ours, theirs = (
        load_pipeline(folder, "cpu")[0].latents(["a cat"], 64, 32, 5, settings)
        for folder in folders
    )
    assert torch.equal(ours, theirs)


def test_each_expert_draws_with_its_own_guidance(pair):
    """One without guidance is asked for the prompt alone; another strength is another clip."""
    pipeline, _ = load_pipeline(pair.release, "cpu")
    asked, drawn = {}, {}
    hooks = [
        network.register_forward_pre_hook(
            lambda _, inputs, name=name: asked.setdefault(name, set()).add(len(inputs[0]))
        )
        for name, network in pipeline.model.networks().items()
    ]
    sampler = SamplerConfig("unipc", 3, shift=12.0, grid="wan")
    calls = {(1.0, 3.0): (1, 2), (3.0, 1.0): (2, 1), (3.0, 5.0): (2, 2), (3.0, None): (2, 2)}
    for scales, (high, low) in calls.items():
        asked.clear()
        settings = SampleSettings(sampler, scales[0], cfg_scale_low=scales[1])
        drawn[scales] = pipeline.latents(["a cat"], 64, 32, 5, settings)
        assert asked == {"high": {high}, "low": {low}}
    for hook in hooks:
        hook.remove()
    assert not torch.equal(drawn[3.0, 5.0], drawn[3.0, None])
    alike = SampleSettings(sampler, 3.0, cfg_scale_low=3.0)
    assert torch.equal(pipeline.latents(["a cat"], 64, 32, 5, alike), drawn[3.0, None])


def test_experts_guidance_and_whole_times_follow_the_official_rules(pair):
    pipeline, config = load_pipeline(pair.release, "cpu")
    seen = []
    for name, model in pipeline.model.networks().items():

        def forward(x, t, text, inner=model.forward, name=name, **keys):
            seen.append((name, keys["whole_times"], len(x)))
            return inner(x, t, text, **keys)

        model.forward = forward
    pipeline.latents(["a cat"], 64, 32, 5, SampleSettings.of(config.train))
    assert len(seen) == 40 and [name for name, *_ in seen] == ["high"] * 26 + ["low"] * 14
    assert all(whole and size == 2 for _, whole, size in seen)  # guided: the doubled batch


@torch.no_grad()
def test_a_negative_prompt_takes_the_place_of_the_empty_one(shop):
    pipeline, config = load_pipeline(shop.release, "cpu")
    draw = lambda **keys: pipeline.latents(
        ["a cat"], 64, 32, 1, SampleSettings(SamplerConfig("euler", 2), **keys)
    )
    plain, negative = draw(cfg_scale=3.0), draw(cfg_scale=3.0, negative_prompt="a dog")
    assert not torch.allclose(plain, negative)
    torch.testing.assert_close(draw(cfg_scale=1.0), draw(cfg_scale=1.0, negative_prompt="a dog"))
    # guidance by hand: unconditional is the encoded empty prompt, one token
    learner, t = pipeline.learner, torch.tensor([500.0])
    x, text = torch.randn(1, 1, 4, 8, 4), learner.text_encoder(["a cat"])
    empty = learner.text_encoder([""])
    torch.testing.assert_close(learner.model(x, t, text.null()), learner.model(x, t, empty))


@torch.no_grad()
def test_a_picture_becomes_mask_and_latents_for_i2v(tmp_path):
    shop = Shop(tmp_path, I2V)
    pipeline, config = load_pipeline(shop.release, "cpu")
    seen = {}
    inner = pipeline.learner.model.forward
    pipeline.learner.model.forward = lambda *rest, y=None, **keys: (
        seen.update(y=y),
        inner(*rest, y=y, **keys),
    )[1]
    picture = torch.rand(3, 32, 64)
    settings = SampleSettings(SamplerConfig("unipc", 2, grid="wan"), 2.0)
    assert pipeline.latents(["a", "b"], 64, 32, 9, settings, image=picture).shape == (2, 3, 4, 8, 4)
    y, spec = seen["y"], pipeline.tokenizer.spec
    clip = torch.cat([picture[None, None], torch.full((1, 8, 3, 32, 64), 0.5)], 1)
    torch.testing.assert_close(y[..., 4:], spec.normalize(pipeline.tokenizer.encode(clip)))
    assert (y[:, 0, ..., :4] == 1).all() and (y[:, 1:, ..., :4] == 0).all()
    with pytest.raises(ValueError, match="continues a picture, and takes one, by --image of mmdit"):
        pipeline.latents(["a"], 64, 32, 9, settings)


# ── what does not belong together ─────────────────────────────────────────────────────────────────
def test_mixtures_are_refused_in_one_sentence(shop, pair, capsys, tmp_path):
    other = make_release(tmp_path / "ti2v", TI2V)
    vae = f"tokenizer={{type: wan_vae, name_or_path: {other}, latent_f: 16, latent_d: 48}}"
    for words, expected in (
        ((vae,), ("tokenizer: gives latents of 48 channels", "takes 4")),
        (
            (f"model.name_or_path={pair.release}",),
            ("holds two experts", "say expert='high' or 'low'"),
        ),
        (("model.expert=high",), ("high-noise expert is asked for", "a model without experts")),
        (("text_encoder={type: byte_level}",), ("text_encoder: gives tokens", "takes 24", "UMT5")),
        (("model.dtype=bfloat16",), ("model.dtype: is bfloat16", "lora.enabled")),
        (("train.objective=ddpm",), ("train.objective", "velocity")),
        (("tread.enabled=true",), ("tread.enabled", "routes no tokens")),
        ((LORA.replace("q,", "proj,"),), ("'proj' matches no linear layer",)),
        (
            (f"tokenizer.name_or_path={other}/Wan2.2_VAE.pth",),
            ("Wan 2.2 VAE with 16", "TI2V-5B alone"),
        ),
        ((f"model.name_or_path={tmp_path}",), ("model.name_or_path", "no .safetensors file")),
    ):
        if words == (vae,):
            config = load_experiment_config(shop.config, list(words))
            with pytest.raises(ValueError) as caught:
                build_learner(config, build_tokenizer(config.tokenizer).spec)
            message = str(caught.value)
            assert all(part in message for part in expected), message
        else:
            message = refused(capsys, train_t2v.main, shop.words("mixed", *words), *expected)
        assert message.strip().count("\n") == 0, message
    config = load_experiment_config(pair.config, ["model.expert=high", vae])
    with pytest.raises(ValueError, match="gives latents of 48 channels, .* takes 4: use") as caught:
        build_learner(config, build_tokenizer(config.tokenizer).spec)
    assert "\n" not in str(caught.value)
    refused(
        capsys,
        train_t2v.main,
        pair.words(
            "swapped", "model.expert=low", f"model.name_or_path={pair.release}/high_noise_model"
        ),
        "the low-noise expert is asked for",
        "is the high-noise expert",
    )
    with pytest.raises(ValueError, match="takes no picture"):
        load_pipeline(shop.release, "cpu")[0].latents(
            ["a"], 64, 32, 5, SampleSettings(), image=torch.rand(3, 32, 64)
        )


@pytest.mark.thorough
def test_a_trained_transformer_leaves_in_both_layouts(shop, pair, tmp_path, capsys):
    """All weights: what a run holds is what either layout holds, bit for bit; of a pair the expert
    that was trained."""
    run = shop.train("leaves", "ema.enabled=false", "train.lr=0.01")
    stored = load_file(run / "checkpoints/step_00000003/model.safetensors")
    for layout in ("official", "diffusers"):
        assert (
            export.main(
                ["--checkpoint", str(run), "--out", str(tmp_path / layout), "--layout", layout]
            )
            == 0
        )
        there = load_dit(tmp_path / layout).state_dict()
        assert len(there) == len(stored) and all(
            torch.equal(stored[f"model.{name}"], value) for name, value in there.items()
        )
    low = pair.train("low_leaves", "model.expert=low", "ema.enabled=false")
    stored = load_file(low / "checkpoints/step_00000003/model.safetensors")
    for expert, words in (("low", []), ("high", ["--expert", "high"])):
        assert (
            export.main(
                [
                    "--checkpoint",
                    str(low),
                    "--out",
                    str(tmp_path / expert),
                    "--layout",
                    "official",
                    *words,
                ]
            )
            == 0
        )
        there = load_dit(tmp_path / expert).state_dict()
        same = [torch.equal(stored[f"model.{name}"], value) for name, value in there.items()]
        assert all(same) if expert == "low" else not all(same)
    refused(
        capsys,
        export.main,
        ["--checkpoint", run, "--out", tmp_path / "x", "--layout", "official", "--expert", "low"],
        "no pair",
    )
    adapted = pair.train("low_lora", "model.expert=low", LORA)
    assert (
        export.main(
            [
                "--checkpoint",
                str(adapted),
                "--out",
                str(tmp_path / "low.safetensors"),
                "--lora",
                "comfy",
            ]
        )
        == 0
    )
    assert load_file(tmp_path / "low.safetensors")


def test_a_run_on_float8_leaves_merged_in_the_type_asked_for(shop, tmp_path, capsys):
    """The adapted weights are float8 + the update, rounded once; or those of the release, if asked
    for."""
    run = shop.train("float8", LORA, "model.dtype=float8", "ema.enabled=false", "train.lr=0.1")
    for layout, words, kind in (
        ("official", [], "BF16"),
        ("diffusers", ["--dtype", "fp32"], "F32"),
    ):
        assert (
            export.main(
                [
                    "--checkpoint",
                    str(run),
                    "--out",
                    str(tmp_path / layout),
                    "--layout",
                    layout,
                    *words,
                ]
            )
            == 0
        )
        entries = Checkpoint(tmp_path / layout).entries
        assert {entry.dtype for name, entry in entries.items() if ".ffn." in name} == {kind}
    exact, rounded = (
        load_dit(tmp_path / layout).state_dict() for layout in ("diffusers", "official")
    )
    assert all(
        torch.equal(value.to(torch.bfloat16).float(), rounded[name])
        for name, value in exact.items()
        if ".ffn." in name
    )
    model = load_pipeline(run, "cpu", lora=None)[0].learner.model
    moved = [
        name
        for name, layer in adapters(model).items()
        if not torch.equal(exact[f"{name}.weight"], layer.weight.float())
    ]
    assert moved == list(adapters(model))
    assert capsys.readouterr().out.count("its base is kept as float8 (model.dtype), and") == 2
    words = ["--checkpoint", str(run), "--out", str(tmp_path / "x"), "--layout", "official"]
    assert export.main([*words, "model.dtype=float32"]) == 0
    assert "is kept as" not in capsys.readouterr().out
    merged, release = (load_dit(path).state_dict() for path in (tmp_path / "x", shop.release))
    for name, value in release.items():
        layer = adapters(model).get(name.removesuffix(".weight"))
        expected = value if layer is None else value + layer.delta()
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-6)
    assert (
        export.main(
            [
                "--checkpoint",
                str(run),
                "--out",
                str(tmp_path / "l.safetensors"),
                "--lora",
                "comfy",
                "--dtype",
                "bf16",
            ]
        )
        == 0
    )
    assert {tensor.dtype for tensor in load_file(tmp_path / "l.safetensors").values()} == {
        torch.bfloat16
    }


def test_what_a_release_lacks_and_the_sizes_it_can_draw_are_told(shop, tmp_path, capsys):
    draw = ["--device", "cpu", "--out", tmp_path / "out", "--prompts", "a"]
    refused(
        capsys,
        sample.main,
        ["--checkpoint", shop.release, "--width", "72", "--height", "40", *draw],
        "72x40 is not a multiple of 16",
        "the tokenizer's 8 times the model's patches of 2",
        "the nearest is 64x32",
    )
    with pytest.raises(
        ValueError, match="1280x720 is not a multiple of 32, .*the nearest is 1280x704"
    ):
        LatentSpec(48, 16).grid(1280, 720, WanDiT.patch)
    for name, words in (
        (
            "models_t5_umt5-xxl-enc-bf16.pth",
            (
                "lacks its text encoder",
                "models_t5_umt5-xxl-enc-bf16.pth",
                "text_encoder.name_or_path",
            ),
        ),
        ("Wan2.1_VAE.pth", ("without its VAE", "Wan2.1_VAE.pth", "vae/")),
    ):
        shutil.copytree(shop.release, tmp_path / name)
        (tmp_path / name / name).unlink()
        message = refused(
            capsys,
            sample.main,
            ["--checkpoint", tmp_path / name, *draw],
            str(tmp_path / name),
            *words,
        )
        assert message.strip().count("\n") == 0
    with pytest.raises(ValueError, match="lacks its VAE, Wan2.1_VAE.pth"):
        build_tokenizer(
            load_experiment_config(
                shop.config, [f"tokenizer.name_or_path={tmp_path}/Wan2.1_VAE.pth"]
            ).tokenizer
        )


def test_captions_are_cached_by_their_command(shop, capsys):
    cache, words = shop.cache(), ["--config", str(shop.config), "--device", "cpu"]
    refused(capsys, cache_text.main, [*words, "--cache_dir", cache], "text_encoder.cache_dir")
    kept = f"text_encoder.cache_dir={shop.folder}/text"
    for command in (
        lambda *given: cache_text.main([*words, "--cache_dir", *given]),
        lambda *given: train_t2v.main([*words, "--cache_only", "--train_cache_dir", *given]),
    ):
        shutil.rmtree(shop.folder / "text", ignore_errors=True)
        assert command(str(cache), kept) == 0
        assert "captions are in" in capsys.readouterr().out and any(
            (shop.folder / "text").rglob("*.safetensors")
        )
    same = load_file(shop.train("kept", kept) / "checkpoints/step_00000003/model.safetensors")
    plain = load_file(shop.train("plain") / "checkpoints/step_00000003/model.safetensors")
    assert all(torch.equal(same[name], value) for name, value in plain.items())


# ── which expert is meant ─────────────────────────────────────────────────────────────────────────
PROMPT = ("--prompts", "a red star")


@pytest.fixture(scope="module")
def runs(pair):
    """Runs of a pair that train the low expert alone, in both ways, and both."""
    lora = [
        "lora={enabled: true, rank: 2, alpha: 4, target_modules: [q]}",
        "train.lr=0.05",
        "train.max_steps=2",
        "ema.enabled=false",
    ]
    return {
        "experts": pair.train("low_of_two", *lora, "experts={enabled: true, train: low}"),
        "model": pair.train("low_alone", *lora, "model.expert=low"),
        "both": pair.train("both_of_two", *lora, "experts={enabled: true, switch_every: 1}"),
    }


@pytest.mark.parametrize("kind", ["experts", *thorough("model")])
def test_export_takes_the_expert_that_was_trained_and_says_so(pair, runs, tmp_path, kind, capsys):
    draw = ["--checkpoint", str(runs[kind])]
    export.main([*draw, "--out", str(tmp_path / "dit"), "--layout", "official"])
    assert (
        "of two experts the low-noise one (the one that its config names; --expert high"
        in capsys.readouterr().out
    )
    written = load_dit(tmp_path / "dit").state_dict()
    low, high = (load_dit(pair.release, expert=name).state_dict() for name in ("low", "high"))
    changed = {name for name, value in written.items() if not torch.equal(value, low[name])}
    assert changed and all(name.endswith("q.weight") for name in changed)
    export.main([*draw, "--out", str(tmp_path / "a.safetensors"), "--lora", "comfy"])
    assert load_file(tmp_path / "a.safetensors")
    export.main(
        [*draw, "--out", str(tmp_path / "high"), "--layout", "official", "--expert", "high"]
    )
    assert all(
        torch.equal(value, high[name])
        for name, value in load_dit(tmp_path / "high").state_dict().items()
    )


def test_a_transformer_whose_text_encoder_was_trained_is_not_written_as_the_whole(
    shop, tmp_path, capsys
):
    words = ["model.freeze=true", "text_encoder.freeze=false", "train.max_steps=1"]
    run = shop.train("words_alone", *words)
    capsys.readouterr()
    export.main(["--checkpoint", str(run), "--out", str(tmp_path / "x"), "--layout", "official"])
    assert "its text encoder was trained, too" in capsys.readouterr().out


def test_what_is_trained_of_one_expert_s_folder_is_exported_without_the_other(tmp_path, capsys):
    shop = Shop(tmp_path, pair=True)
    place = shop.release / "high_noise_model"
    words = [f"model.name_or_path={place}", "model.expert=high", "train.max_steps=1"]
    run = shop.train("one", *words, "lora={enabled: true, rank: 2, target_modules: [q]}")
    draw = ["--checkpoint", str(run), "--out", str(tmp_path / "x.safetensors"), "--lora", "comfy"]
    capsys.readouterr()
    export.main(draw)
    assert "the high-noise one (the one that its config names" in capsys.readouterr().out
    assert changes(str(run), None, None)
    refused(capsys, export.main, [*draw, "--expert", "low"], "samples are drawn by both experts")
    draw = ["--checkpoint", run, "--out", tmp_path / "drawn", "--frames", "1", *PROMPT]
    refused(capsys, sample.main, draw, "name the folder of the release that holds both by model.")
    whole = [*map(str, draw), "--steps", "1", f"model.name_or_path={shop.release}"]
    assert sample.main(whole) == 0


def test_of_two_trained_experts_it_is_said_which_is_written(pair, runs, tmp_path, capsys):
    export.main(
        [
            "--checkpoint",
            str(runs["both"]),
            "--out",
            str(tmp_path / "a.safetensors"),
            "--lora",
            "comfy",
        ]
    )
    assert (
        "the high-noise one (both were trained; --expert low takes the other)"
        in capsys.readouterr().out
    )
    export.main(
        [
            "--lora",
            "comfy",
            "--expert",
            "low",
            "--checkpoint",
            str(runs["both"]),
            "--out",
            str(tmp_path / "b.safetensors"),
        ]
    )
    one, two = (load_file(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert one.keys() == two.keys() and any(not torch.equal(one[key], two[key]) for key in one)
    for name, expert, laid in (("a", "high", "--lora "), ("b", "low", "--lora_low ")):
        card = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
        assert f"for the {expert}-noise expert of" in card and f"{laid}{name}.safetensors" in card
        assert f"lora.enabled=true model.expert={expert}" in card
        assert f"changes the model of the {expert}-noise expert alone" in card
    named = (tmp_path / "b.safetensors").rename(tmp_path / "style_LowNoise.safetensors")
    words = ["model.expert=high", f"train.init_from={named}"]
    words += ["lora={enabled: true, rank: 2, target_modules: [q]}"]
    config = load_experiment_config(pair.config, words)
    _, note = start_from_lora(pair.learner(*words), config)
    assert "its name says that it is for the other expert, not for the high-noise" in note
    capsys.readouterr()
    for expert in ("high", "low"):
        assert changes(str(pair.release), str(named), expert)
        assert ("for the other expert" in capsys.readouterr().out) == (expert == "high")
    whole = [
        "--checkpoint",
        str(runs["both"]),
        "--out",
        str(tmp_path / "c.safetensors"),
        "--expert",
        "low",
    ]
    refused(
        capsys,
        export.main,
        whole,
        "--expert is low, but the whole model is written",
        "--lora or --layout",
    )


@pytest.mark.thorough
def test_an_adapter_is_measured_and_drawn_on_its_own_expert(runs, tmp_path, capsys):
    """What it moves is what laying it over that expert moves."""
    (tmp_path / "p.txt").write_text("a red star")
    out = {}
    for kind in ("experts", "model"):
        words = [
            "--base",
            str(runs[kind]),
            "--prompts_file",
            str(tmp_path / "p.txt"),
            "--out",
            str(tmp_path / kind),
            "--device",
            "cpu",
            "--frames",
            "1",
        ]
        assert inspect_adapter.main(words) == 0
        assert "of two experts the low-noise one" in capsys.readouterr().out
        out[kind] = json.loads((tmp_path / kind / "report.json").read_text())
    pixels = []
    for lora in (False, True):
        pipeline, config = load_pipeline(runs["model"], "cpu", lora=lora)
        pixels.append(pipeline(["a red star"], 64, 32, 1, SampleSettings.of(config.train)))
    moved = (pixels[1] - pixels[0]).abs().mean().item()
    assert moved > 1e-6 and out["model"]["pixels_moved"]["a red star"] == pytest.approx(
        moved, rel=1e-4
    )
    both = {}
    for expert in ("high", "low"):
        budget = changes(str(runs["both"]), None, expert)
        both[expert] = [change.delta for change in budget]
    assert both["high"] != both["low"]
    capsys.readouterr()
    words = [
        "--base",
        str(runs["both"]),
        "--expert",
        "low",
        "--prompts_file",
        str(tmp_path / "p.txt"),
        "--out",
        str(tmp_path / "x"),
        "--device",
        "cpu",
        "--frames",
        "1",
    ]
    inspect_adapter.main(words)
    moved = json.loads((tmp_path / "x/report.json").read_text())["pixels_moved"]["a red star"]
    pipeline, config = load_pipeline(runs["both"], "cpu", lora=None)
    remove(pipeline.model.high), merge(pipeline.model.low)
    alone = pipeline(["a red star"], 64, 32, 1, SampleSettings.of(config.train))
    assert moved == pytest.approx((alone - pixels[0]).abs().mean().item(), rel=1e-4)


def test_one_guidance_is_for_both_experts_and_a_file_says_whose_it_is(pair, runs, tmp_path, capsys):
    draw = [
        "--checkpoint",
        str(pair.release),
        "--device",
        "cpu",
        "--width",
        "64",
        "--height",
        "32",
        "--frames",
        "1",
        "--steps",
        "2",
    ]
    for words, scales in (
        ([], (4.0, 3.0)),
        (["--guidance", "1"], (1.0, None)),
        (["--guidance", "2", "--guidance_low", "1.5"], (2.0, 1.5)),
    ):
        out = tmp_path / f"out{len(words)}"
        sample.main([*draw, *words, "--out", str(out), *PROMPT])
        settings = json.loads((out / "samples.json").read_text())["settings"]
        assert (settings["cfg_scale"], settings["cfg_scale_low"]) == scales
    assert "two experts: the high-noise one for t ≥ 0.875" in capsys.readouterr().out
    file = checkpoint.latest(runs["both"]) / "lora_low.safetensors"
    sample.main([*draw, "--lora", str(file), "--out", str(tmp_path / "wrong"), *PROMPT])
    told = capsys.readouterr().out
    assert "laid over the high-noise expert" in told and "give it as --lora_low" in told
    sample.main([*draw, "--lora_low", str(file), "--out", str(tmp_path / "right"), *PROMPT])
    told = capsys.readouterr().out
    assert "laid over the low-noise expert" in told and "its name" not in told


@pytest.mark.thorough
def test_a_file_with_both_experts_is_laid_over_both(pair, runs, tmp_path, capsys):
    """Its low half was left out without a word where the file was given as --lora alone."""
    draw = [
        "--checkpoint",
        str(pair.release),
        "--device",
        "cpu",
        "--width",
        "64",
        "--height",
        "32",
        "--frames",
        "1",
        "--steps",
        "3",
    ]
    parts = {
        name: checkpoint.latest(runs["both"]) / f"lora_{name}.safetensors"
        for name in ("high", "low")
    }
    words = {"high": "transformer.", "low": "transformer_2."}
    halves = [
        {words[name] + key: tensor for key, tensor in load_file(path).items()}
        for name, path in parts.items()
    ]
    both, low = tmp_path / "both.safetensors", tmp_path / "one_half.safetensors"
    save_file(halves[0] | halves[1], both)
    save_file(halves[1], low)

    def drawn(name, *words):
        sample.main([*draw, *words, "--out", str(tmp_path / name), *PROMPT])
        pixels = read_back(tmp_path / name / "0000.png").tolist()  # files hold their command, too
        return pixels, capsys.readouterr().out

    expected, _ = drawn("apart", "--lora", str(parts["high"]), "--lora_low", str(parts["low"]))
    found, told = drawn("together", "--lora", str(both))
    assert (
        found == expected
        and "over the high-noise expert" in told
        and "over the low-noise expert" in told
    )
    expected, _ = drawn("low", "--lora_low", str(parts["low"]))
    found, told = drawn("half", "--lora", str(low))
    assert found == expected and "over the high-noise expert" not in told
    assert found != drawn("plain")[0]


def test_the_boundary_is_the_release_s(pair, tmp_path, capsys):
    (tmp_path / "i2v").mkdir()
    i2v = Shop(tmp_path / "i2v", I2V, pair=True)
    for release, published in ((pair.release, 0.875), (i2v.release, 0.9)):
        for words in ("experts={enabled: true}", "model.expert=high", "model.expert=low"):
            lora = "lora={enabled: true, rank: 2, target_modules: [q]}"
            config = resolved(
                load_experiment_config(pair.config, [f"model.name_or_path={release}", lora, words])
            )
            assert config.model.boundary == published and config.experts.boundary in (
                None,
                published,
            )
            assert not any("published" in note for note in expert_notes(config))
    for words in (
        ["experts={enabled: true, boundary: 0.7}"],
        ["model.expert=low", "model.boundary=0.7"],
    ):
        config = resolved(load_experiment_config(pair.config, [LORA, *words]))
        assert config.model.boundary == 0.7
        assert "0.7; this model was published with 0.875" in expert_notes(config)[-1]
    of_file = [f"model.name_or_path={pair.release}/high_noise_model"]
    (note,) = expert_notes(resolved(load_experiment_config(pair.config, of_file)))
    assert "used at all noise levels: model.expert=high keeps it to its own" in note
    of_file.append("model.expert=high")
    (note,) = expert_notes(resolved(load_experiment_config(pair.config, of_file)))
    assert "the high-noise expert is trained, on t ≥ 0.875" in note
    single = resolved(
        load_experiment_config(
            pair.config, [f"model.name_or_path={i2v.release}", "model.expert=low"]
        )
    )
    learner = build_learner(load_experiment_config(i2v.config, ["model.expert=low"]), LatentSpec(4))
    assert learner.objective.config.between == single.model.between == (0.0, 0.9)


def test_captions_are_cached_as_they_will_be_asked_for(shop, tmp_path, capsys):
    """The trigger word is for captions, not for what guidance leads away from."""
    (tmp_path / "p.yaml").write_text(
        "prompts: [" + ", ".join(f"a cat {i}" for i in range(17)) + "]"
    )
    words = [
        "captions={trigger: zork, trim_keywords: [background]}",
        "train.sample_negative_prompt=ugly blurry",
        "train.sample_prompts=[a star]",
        f"posttrain.prompts={tmp_path}/p.yaml",
        f"text_encoder.cache_dir={tmp_path}/text",
    ]
    config = load_experiment_config(shop.config, words)
    texts = asked_texts(config, [SourceConfig(str(shop.cache()))])
    assert {"", "ugly blurry", "zork, a star", "zork, a cat 0", "zork, a cat 16"} <= {*texts}
    assert "zork, ugly blurry" not in texts and "zork" not in texts and "a cat 0" not in texts
    assert any(text.startswith("zork, ") for text in texts)
    kept = [*words, "--cache_dir", str(shop.cache()), "captions.shuffle=true"]
    assert cache_text.main(["--config", str(shop.config), "--device", "cpu", *kept]) == 0
    assert "make other captions while training" in capsys.readouterr().out
    assert cache_text.main(["--config", str(shop.config), "--device", "cpu", *words]) == 0
    encoder = build_text_encoder(config.text_encoder)
    encoder([f"zork, a cat {i}" for i in range(17)] + ["ugly blurry"])
    assert isinstance(encoder.encoder, torch.nn.Identity), (
        "all are in files: the network is not loaded"
    )
    encoder(["something new"])
    assert not isinstance(encoder.encoder, torch.nn.Identity)
    for _ in range(IDLE + 1):
        encoder(["something new", "zork, a cat 3"])
        encoder.forget()
    assert isinstance(encoder.encoder, torch.nn.Identity), "put away again"


# ── continuing an expert, or a LoRA of another tool ───────────────────────────────────────────────
def adapter_deltas(model):
    return {name: layer.delta() for name, layer in adapters(model).items()}


@pytest.mark.thorough
def test_an_expert_of_a_pair_s_run_goes_on_alone(pair, runs, capsys):
    lora = [
        "lora={enabled: true, rank: 2, alpha: 8, target_modules: [q]}",
        "train.lr=1e-30",
        "train.max_steps=1",
        "ema.enabled=false",
    ]
    folder = checkpoint.latest(runs["both"])
    whole = load_pipeline(runs["both"], "cpu", lora=None)[0]
    for expert, trained in whole.model.networks().items():
        wanted = adapter_deltas(trained)
        for kind, source in (
            ("run", runs["both"]),
            ("file", folder / f"lora_{expert}.safetensors"),
        ):
            run = pair.train(
                f"on_{expert}_{kind}", *lora, f"model.expert={expert}", f"train.init_from={source}"
            )
            loaded = load_pipeline(run, "cpu", lora=None)[0]
            found = adapter_deltas(loaded.model.networks()[expert])
            assert found.keys() == wanted.keys()
            for name, delta in found.items():  # as strong, though alpha is twice what it was
                torch.testing.assert_close(delta, wanted[name], rtol=1e-4, atol=1e-7)
    refused(
        capsys,
        train_t2v.main,
        pair.words(
            "x", *lora, f"train.init_from={runs['both']}", "model.expert=low", "lora.rank=3"
        ),
        "lora",
    )


@pytest.mark.parametrize("form", ["comfy", *thorough("kohya", "diffusers"), "peft"])
def test_a_lora_of_any_tool_goes_on(shop, tmp_path, form, capsys):
    lora = "lora={enabled: true, rank: 2, alpha: 6, target_modules: [q, v]}"
    model = load_dit(shop.release)
    inject(model, LoRAConfig(enabled=True, rank=2, alpha=4, target_modules=("q",)), seed=5)
    for layer in adapters(model).values():
        torch.nn.init.normal_(layer.lora_B)
    path = tmp_path / ("peft" if form == "peft" else "a.safetensors")
    save_lora(model, path, form)
    sign = 1.0
    if form == "peft":  # its alpha may be below zero, and what it learned is taken off then
        sign, config = -1.0, path / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": -4'))
    run = shop.train(
        f"on_{form}",
        lora,
        f"train.init_from={path}",
        "train.lr=1e-30",
        "train.max_steps=1",
        "ema.enabled=false",
    )
    assert "2 layers, 2 that it lacks start new" in capsys.readouterr().out
    found, wanted = (
        adapter_deltas(m) for m in (load_pipeline(run, "cpu", lora=None)[0].learner.model, model)
    )
    for name, delta in found.items():
        torch.testing.assert_close(
            delta, sign * wanted.get(name, torch.zeros_like(delta)), rtol=1e-4, atol=1e-6
        )
    if form == "comfy":
        other = lora.replace("[q, v]", "[v]")
        refused(
            capsys,
            train_t2v.main,
            shop.words("x", other, f"train.init_from={path}"),
            "lora.target_modules",
            "choose all of its layers",
        )
        other = lora.replace("rank: 2", "rank: 3")
        refused(
            capsys,
            train_t2v.main,
            shop.words("x", other, f"train.init_from={path}"),
            "lora: makes",
            "rank 2",
        )
        refused(
            capsys,
            train_t2v.main,
            shop.words("x", f"train.init_from={path}"),
            "lora.enabled is false",
        )


# ── sizes of pictures ─────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "picture, area, multiple, closest, size",
    [
        ((720, 1280), (1280, 720), 16, False, (720, 1280)),
        ((1024, 1024), (1280, 720), 16, False, (960, 960)),
        ((1280, 720), (1280, 720), 16, False, (1280, 720)),
        ((480, 832), (832, 480), 16, False, (480, 832)),
        ((3000, 1000), (832, 480), 16, False, (1088, 352)),
        ((1280, 704), (1280, 704), 32, True, (1280, 704)),
        ((704, 1280), (1280, 704), 32, True, (704, 1280)),
        ((1024, 1024), (1280, 704), 32, True, (960, 928)),
        ((300, 400), (1280, 704), 32, True, (800, 1088)),
        ((400, 300), (1280, 704), 32, True, (1088, 800)),
    ],
)
def test_a_clip_has_its_picture_s_aspect_at_the_release_s_area(
    picture, area, multiple, closest, size
):
    found = size_of_aspect(picture, area[0] * area[1], multiple, closest=closest)
    assert found == size
    assert size_of_aspect(picture, 1, multiple, given=(640, None))[0] == 640
    assert size_of_aspect(picture, 1, multiple, given=(None, 320))[1] == 320
    assert size_of_aspect(picture, 1, multiple, given=(640, 320)) == (640, 320)


def test_a_portrait_picture_is_not_cut_down_to_a_landscape(tmp_path, capsys):
    shop = Shop(tmp_path, TI2V)
    Image.new("RGB", (120, 240), (200, 20, 20)).save(tmp_path / "tall.png")
    draw = [
        "--checkpoint",
        str(shop.release),
        "--device",
        "cpu",
        "--frames",
        "5",
        "--steps",
        "1",
        "--image",
        str(tmp_path / "tall.png"),
    ]
    sample.main(
        [*draw, "video.width=128", "video.height=64", "--out", str(tmp_path / "a"), *PROMPT]
    )
    assert (
        json.loads((tmp_path / "a/samples.json").read_text())["size"] == [64, 128, 5]
        and "cut off" not in capsys.readouterr().out
    )
    sample.main([*draw, "--width", "128", "--height", "64", "--out", str(tmp_path / "b"), *PROMPT])
    assert json.loads((tmp_path / "b/samples.json").read_text())["size"] == [128, 64, 5]
    assert "tall.png (120x240): 75% is cut off for 128x64" in capsys.readouterr().out


def test_i2v_14b_has_another_shift_at_each_size(tmp_path, monkeypatch):
    monkeypatch.setattr(wan_release, "_release", lambda path: ("I2V-14B", I2V, False))
    assert published_shift(tmp_path, 832, 480) == published_shift(tmp_path, 480, 832) == 3
    assert published_shift(tmp_path, 1280, 720) == 5
    for name, shift, width in (("Wan2.1-I2V-14B-480P", 3, 832), ("Wan2.1-I2V-14B-720P", 5, 1280)):
        config = release_config(tmp_path / name)
        assert (config["train"]["sample_shift"], config["video"]["width"]) == (shift, width)
    chosen = SampleSettings(SamplerConfig("unipc", 3, shift=7.0))
    for words, shift in (
        ({"shift": None, "overrides": []}, 5.0),
        ({"shift": 7.0, "overrides": []}, 7.0),
        ({"shift": None, "overrides": ["train.sample_shift=7"]}, 7.0),
    ):
        args = SimpleNamespace(checkpoint=tmp_path, **words)
        assert with_published_shift(chosen, args, 1280, 720).sampler.shift == shift
    monkeypatch.setattr(wan_release, "_release", lambda path: ("T2V-14B", DIT, False))
    assert published_shift(tmp_path, 1280, 720) is None
