"""Wan models that continue pictures: what they are told in sampling is what they are told in
training, of every variant."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmdit.data.cache.latent_cache import open_cache
from mmdit.diffusion import SamplerConfig
from mmdit.experiment.load import load_pipeline
from mmdit.interop.wan_pictures import Pictures
from mmdit.interop.wan_release import release_config
from mmdit.interop.wan_weights import load_dit
from mmdit.scripts import sample, train_t2v
from mmdit.training.memory.lean import to_bfloat16
from mmdit.training.pipeline import SampleSettings
from tests.helpers.thorough import thorough
from tests.helpers.tiny import refused
from tests.helpers.wan_release import (
    DIT,
    FLF2V,
    I2V,
    I2V_21,
    make_diffusers_release,
    make_release,
    random_dit,
)
from tests.test_wan_training import LORA, Shop

KINDS = {"i2v a14b": (I2V, "first"), "i2v 2.1": (I2V_21, "first"), "flf2v": (FLF2V, "first_last")}
SETTINGS = SampleSettings(SamplerConfig("unipc", 2, grid="wan"), 2.0)


def continuing(shop: Shop, picture: str) -> Shop:
    text = shop.config.read_text()
    shop.config.write_text(text.replace("latent_d: 4}", f"latent_d: 4, picture: {picture}}}"))
    return shop


@pytest.fixture(scope="module", params=KINDS)
def shop(request, tmp_path_factory):
    config, picture = KINDS[request.param]
    return continuing(Shop(tmp_path_factory.mktemp("pictures"), config), picture)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return Shop(tmp_path_factory.mktemp("flf2v"), FLF2V)


def told(pipeline) -> dict:
    """What the network is given, once it is drawn with."""
    seen, inner = {}, pipeline.learner.model.forward
    pipeline.learner.model.forward = lambda *rest, **keys: (
        seen.update(keys),
        inner(*rest, **keys),
    )[1]
    return seen


@torch.no_grad()
@pytest.mark.parametrize("shop", [*thorough("i2v a14b", "i2v 2.1"), "flf2v"], indirect=True)
def test_training_tells_the_network_what_sampling_tells_it(shop):
    pipeline, _ = load_pipeline(shop.release, "cpu")
    config = pipeline.learner.model.config
    latents = open_cache(shop.cache()).load(0)[None]
    assert latents.shape == (1, 3, 4, 8, 8)  # the clip's channels, then the picture's
    pictures = Pictures(pipeline.learner.model, pipeline.tokenizer)
    clips, inputs = pictures.of_latents(latents)
    assert torch.equal(clips, latents[..., :4]) and inputs["y"].shape == (1, 3, 4, 8, 8)
    torch.testing.assert_close(
        clips[:, :1].float(), latents[:, :1, ..., 4:].float(), rtol=0, atol=2e-2
    )  # the same first frame
    mask = inputs["y"][0, ..., :4]
    assert (mask[0] == 1).all() and (mask[1] == 0).all()
    assert torch.equal(mask[2, 0, 0], torch.tensor([0.0, 0, 0, config.image_positions > 0]))
    assert ("clip" in inputs) == (config.image_dim > 0)
    # a clip whose frames are known: both ways lead to the same inputs
    clip = torch.rand(1, 9, 3, 32, 64)
    ends = clip[0, [0, -1]] if config.image_positions else clip[0, :1]
    wanted, _ = pictures.given(ends, 9)
    from mmdit.tokenizers.with_picture import WithPicture

    cached = WithPicture(
        pipeline.tokenizer, "first_last" if config.image_positions else "first"
    ).encode(clip)
    _, found = pictures.of_latents(cached)
    torch.testing.assert_close(found["y"], wanted["y"])
    if config.image_dim:  # there CLIP sees what the VAE made of the picture
        decoded = pipeline.tokenizer.decode(cached[..., 4:])[0]
        seen = decoded[[0, -1]] if config.image_positions else decoded[:1]
        torch.testing.assert_close(
            found["clip"][0], pictures.clip(seen).flatten(0, 1), rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(wanted["clip"][0], pictures.clip(ends).flatten(0, 1))


@pytest.mark.parametrize("shop", ["i2v a14b", *thorough("i2v 2.1", "flf2v")], indirect=True)
def test_adapters_and_all_weights_learn_and_are_sampled(shop, tmp_path):
    run = shop.train(
        "lora", LORA, "model.dtype=bfloat16", "train.val_every_steps=3", "train.val_share=0.5"
    )
    stored = load_file(run / "checkpoints/step_00000003/model.safetensors")
    assert stored and all(name.endswith(("lora_A", "lora_B")) for name in stored)
    released = load_dit(shop.release).state_dict()
    full = load_file(
        shop.train("full", "ema.enabled=false") / "checkpoints/step_00000003/model.safetensors"
    )
    assert all(
        not torch.equal(full[f"model.{name}"], value) for name, value in released.items()
    )  # the picture's too
    for i in range(2):
        Image.new("RGB", (90, 60), (250 * i, 90, 40)).save(tmp_path / f"{i}.png")
    count = 1 + (load_dit(shop.release).config.image_positions > 0)
    images = [word for i in range(count) for word in ("--image", str(tmp_path / f"{i}.png"))]
    for checkpoint in (run, shop.release):
        out = tmp_path / checkpoint.name
        words = [
            "--device",
            "cpu",
            "--width",
            "64",
            "--height",
            "32",
            "--frames",
            "9",
            "--steps",
            "2",
            *images,
        ]
        assert (
            sample.main(
                ["--checkpoint", str(checkpoint), *words, "--out", str(out), "--prompts", "a cat"]
            )
            == 0
        )
        assert json.loads((out / "samples.json").read_text())["image"] == images[1::2]


@pytest.mark.thorough
def test_a_pair_is_trained_on_pictures(tmp_path):
    shop = continuing(Shop(tmp_path, I2V, pair=True), "first")
    run = shop.train("high", "model.expert=high", "model.boundary=0.9", LORA)
    assert load_pipeline(run, "cpu")[0].model.boundary.time == 0.9
    both = "experts={enabled: true, boundary: 0.9}"
    run = shop.train(
        "both",
        "model.boundary=0.9",
        LORA,
        both,
        "train.val_every_steps=2",
        "train.val_share=0.6",
        "train.val_samples=2",
    )
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"] > 0


@torch.no_grad()
@pytest.mark.parametrize("config", [*thorough(I2V_21), FLF2V], ids=["i2v 2.1", "flf2v"])
def test_releases_of_both_layouts_draw_the_same_and_see_the_pictures(tmp_path, config):
    shop, count = Shop(tmp_path, config), 1 + (config.image_positions > 0)
    theirs = make_diffusers_release(tmp_path / "diffusers", config, pair=False)
    pictures, drawn = torch.rand(count, 3, 32, 64), []
    for folder in (shop.release, theirs):
        pipeline = load_pipeline(folder, "cpu")[0]
        seen = told(pipeline)
        drawn.append(pipeline.latents(["a", "b"], 64, 32, 9, SETTINGS, image=pictures))
        assert seen["clip"].shape == (1, 257 * count, 80)
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-4, atol=1e-4)
    other = pipeline.latents(["a", "b"], 64, 32, 9, SETTINGS, image=pictures.flip(-1))
    assert not torch.allclose(drawn[1], other, rtol=0.01)


@torch.no_grad()
@pytest.mark.parametrize("config", [I2V_21, FLF2V], ids=["i2v 2.1", "flf2v"])
def test_pictures_are_read_where_all_weights_are_bfloat16(config):
    """As `train.precision: pure_bf16` has them."""
    embedding = random_dit(config).img_emb
    states = torch.randn(2, config.image_positions or 257, config.image_dim)
    exact = embedding(states)
    to_bfloat16(embedding)
    rounded = embedding(states)
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


def test_half_a_pair_is_no_release(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    official, diffusers = (
        make_release(tmp_path / "a", I2V, pair=True),
        make_diffusers_release(tmp_path / "b", I2V),
    )
    (diffusers / "model_index.json").write_text('{"boundary_ratio": 0.9}')
    for folder, gone, kept in (
        (official, "low_noise_model", "high_noise_model"),
        (diffusers, "transformer_2", "transformer"),
    ):
        assert release_config(folder)["model"]["expert"] == "high"
        (folder / gone).rename(tmp_path / gone)
        with pytest.raises(ValueError, match=f"one expert of two, {kept}; fetch the other"):
            release_config(folder)
    (diffusers / "model_index.json").write_text('{"boundary_ratio": null}')
    assert release_config(diffusers)["model"]["expert"] is None  # a dense model


def test_the_published_negative_prompts(two, shop):
    words = {514: "镜头切换，", 0: "镜头晃动，"}
    for release in (two.release, shop.release):
        config = load_dit(release).config
        prompt = release_config(release)["train"]["sample_negative_prompt"]
        expected = words[config.image_positions] if config.image_dim else ""
        assert len(prompt) == 137 + len(expected) and prompt.startswith(expected)


def test_a_clip_that_is_its_given_picture_alone_is_refused():
    """The result would be the picture as the VAE decodes it, whatever the prompt."""
    model = SimpleNamespace(picture="none", takes_first_frame=True, variant="TI2V-5B")
    pictures = Pictures(model, SimpleNamespace(spec=None))
    with pytest.raises(ValueError, match="TI2V-5B keeps the first frame .*: give --frames 5"):
        pictures.given(torch.rand(1, 3, 32, 32), 1)
    assert pictures.given(None, 1) == ({}, None)


def test_what_does_not_belong_together_is_one_sentence(two, tmp_path, capsys):
    pipeline, _ = load_pipeline(two.release, "cpu")
    read = pipeline.learner.text_encoder.forward
    pipeline.learner.text_encoder.forward = None  # it is told before captions are read
    for pictures in (None, torch.rand(1, 3, 32, 64), torch.rand(3, 3, 32, 64)):
        with pytest.raises(ValueError, match="takes two, its first and its last"):
            pipeline.latents(["a"], 64, 32, 9, SETTINGS, image=pictures)
    with pytest.raises(ValueError, match="FLF2V-14B goes from .*, but the clip has 1 frame"):
        pipeline.latents(["a"], 64, 32, 1, SETTINGS, image=torch.rand(2, 3, 32, 64))
    pipeline.learner.text_encoder.forward = read
    (two.release / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth").rename(
        tmp_path / "clip.pth"
    )
    with pytest.raises(
        ValueError,
        match="model.clip: .* is no CLIP picture encoder.* holds neither .*FLF2V-14B needs it",
    ):
        pipeline.latents(["a"], 64, 32, 9, SETTINGS, image=torch.rand(2, 3, 32, 64))
    elsewhere, _ = load_pipeline(two.release, "cpu", overrides=[f"model.clip={tmp_path}/clip.pth"])
    elsewhere.latents(["a"], 64, 32, 9, SETTINGS, image=torch.rand(2, 3, 32, 64))
    refused(
        capsys,
        train_t2v.main,
        two.words("plain"),
        "tokenizer.picture: is none",
        "is given first_last",
    )
    plain = Shop(tmp_path / "plain", DIT) if (tmp_path / "plain").mkdir() is None else None
    refused(
        capsys,
        train_t2v.main,
        plain.words("x", "tokenizer.picture=first"),
        "the cache has 4, the config asks 8",
    )
    refused(
        capsys,
        train_t2v.main,
        plain.words("x", "tokenizer.picture=first", "model={size: S}"),
        "only Wan's I2V models take one",
    )
    given = continuing(plain, "first")
    given.cache("seed=1")
    words = [word.replace("cache0", "cache1") for word in given.words("x", "seed=1")]
    refused(capsys, train_t2v.main, words, "tokenizer.picture: is first", "is given none")


@pytest.mark.parametrize(
    "words, expected",
    [
        (("video.image_fraction=0.5",), "video.image_fraction"),
        (("train.sample_every_steps=1", "train.sample_prompts=[a]"), "train.sample_every_steps"),
        (("model.first_frame=0.5",), "model.first_frame"),
    ],
)
def test_settings_that_mean_nothing_with_pictures_are_refused(shop, words, expected, capsys):
    refused(capsys, train_t2v.main, shop.words("odd", *words), expected)
