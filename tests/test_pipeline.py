"""From captions to pixels: what decides a picture, super-resolution, files."""

import builtins

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit.data import VideoConfig, open_cache, read_records
from mmdit.data.cache.caching import Caching
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.moving_shapes import prompts
from mmdit.data.moving_shapes.latents import cache_moving_shapes
from mmdit.data.moving_shapes.prepare import Recipe, prepare_samples
from mmdit.diffusion import SamplerConfig, build_objective
from mmdit.models import VideoMMDiTConfig, build_model
from mmdit.pixels import to_shown
from mmdit.text_encoders import ByteLevelConfig, build_text_encoder
from mmdit.tokenizers import DummyTokenizerConfig, build_tokenizer
from mmdit.training import pipeline as pipeline_module
from mmdit.training.learner import Learner
from mmdit.training.media import (
    contact_sheet,
    grid_video,
    read_back,
    read_frames,
    save_sample,
    save_video,
)
from mmdit.training.pipeline import Pipeline, SampleSettings, evaluating
from mmdit.training.requests import Request, batches
from mmdit.training.samples import SampleFolder

SETTINGS = SampleSettings(SamplerConfig("ab2", 4), cfg_scale=2.0, seed=3)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(DummyTokenizerConfig(latent_d=12))
    encoder = build_text_encoder(ByteLevelConfig(dim=16, depth=1, num_heads=2))
    model = build_model(
        VideoMMDiTConfig(dim=16, depth=2, num_heads=2, window_size=2), 12, encoder.dim
    )
    for parameter in model.parameters():  # wake what starts at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return Pipeline(
        Learner(model, encoder, build_objective("flow_matching"), tokenizer.spec).eval(), tokenizer
    )


CAPTIONS = ["a red ball", "", "two blue boxes", "a star"]


def test_requests_are_drawn_together_where_they_share_all_but_prompt_and_seed():
    asked = [
        {"guidance": 2.0},
        {},
        {"guidance": 2.0},
        {"seed": 5},
        {"negative": "x"},
        {"width": 32},
    ]
    requests = {number: Request(f"{number}", **own) for number, own in enumerate(asked)}
    assert list(batches(requests, 8)) == [[0, 2], [1, 3], [4], [5]]
    assert list(batches(requests, 1)) == [[0], [2], [1], [3], [4], [5]]


def test_a_picture_depends_on_its_caption_seed_and_place_but_not_on_the_batch(pipeline):
    whole = pipeline(CAPTIONS, 48, 32, 2, SETTINGS)
    assert whole.shape == (4, 2, 3, 32, 48) and whole.min() >= 0 and whole.max() <= 1
    torch.testing.assert_close(
        pipeline(CAPTIONS, 48, 32, 2, SETTINGS, batch_size=3), whole, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        pipeline(CAPTIONS[2:], 48, 32, 2, SETTINGS, first=2), whole[2:], rtol=0, atol=1e-5
    )
    assert (pipeline(CAPTIONS[2:], 48, 32, 2, SETTINGS) - whole[2:]).abs().max() > 1e-2
    assert (pipeline(["a green ball"], 48, 32, 2, SETTINGS) - whole[:1]).abs().max() > 1e-4


def test_refining_keeps_more_of_the_guess_the_less_noise_it_gets(pipeline):
    small = torch.rand(2, 1, 3, 32, 32)
    enlarged = torch.nn.functional.interpolate(
        small[:, 0], (64, 64), mode="bicubic", antialias=True, align_corners=False
    ).clamp(0, 1)
    round_trip = pipeline.tokenizer.decode(pipeline.tokenizer.encode(enlarged[:, None]))
    distances = [
        float((pipeline.refine(small, CAPTIONS[:2], 64, 64, t, SETTINGS) - round_trip).abs().mean())
        for t in (0.01, 0.3, 0.9)
    ]
    assert distances[0] < 0.02 and distances[0] < distances[1] < distances[2]


def test_a_guess_is_not_given_the_noise_that_it_was_drawn_from(pipeline, monkeypatch):
    """It would lie on its own way back, and nothing of it would be drawn anew."""
    noises, solve = [], pipeline_module.sample
    monkeypatch.setattr(
        pipeline_module, "sample", lambda *words: noises.append(words[1]) or solve(*words)
    )
    drawn = pipeline.latents(CAPTIONS[:1], 48, 32, 1, SETTINGS)
    for seeds in (None, [3]):
        pipeline.latents(CAPTIONS[:1], 48, 32, 1, SETTINGS, guess=(drawn, 0.5), seeds=seeds)
        pipeline.latents(CAPTIONS[:1], 48, 32, 1, SETTINGS, seeds=seeds)
        first, second = (noise.flatten() for noise in noises[-2:])
        assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.3


def test_rendering_into_a_cache_equals_pictures_on_disk(tmp_path):
    """`cache_moving_shapes` is `prepare_samples` and `Caching` without the files in between."""
    tokenizer = build_tokenizer(DummyTokenizerConfig(latent_d=12))
    video = VideoConfig(width=32, height=32, num_frames=3)
    manifest, recipe = CacheManifest.of(tokenizer, video), Recipe(32, 32, frames=3)
    assert cache_moving_shapes(tokenizer, tmp_path / "direct", manifest, recipe, 4) == 4
    assert (
        cache_moving_shapes(tokenizer, tmp_path / "direct", manifest, recipe, 7) == 3
    )  # goes on, and grows
    records = read_records(prepare_samples(tmp_path / "files", recipe, 7, workers=1), "video")
    Caching(records, "video", tokenizer, tmp_path / "from_files", video, progress=False).run()
    direct, files = (
        open_cache(tmp_path / "direct", manifest),
        open_cache(tmp_path / "from_files", manifest),
    )
    assert (
        direct.ids == files.ids
        and direct.captions == files.captions
        and direct.facts == files.facts
    )
    for i in range(7):
        torch.testing.assert_close(direct.load(i).float(), files.load(i).float(), rtol=0, atol=2e-3)


def test_a_name_without_spaces_stays_below_its_cell():
    """Draw two cells, the left one with a long name: right of it and of the gap all is white."""
    names = ["photo_of_a_mountain_by_a_lake_in_the_north_1234.png", ""]
    sheet = contact_sheet(torch.zeros(2, 1, 3, 64, 64), names, 2, 64)
    below = np.array(sheet)[6 + 64 :]
    assert (below[:, 6 + 66 :] == 255).all() and (below[:, : 6 + 66] < 128).any()


def test_files_show_what_was_drawn(tmp_path):
    pixels = torch.rand(3, 1, 3, 32, 48)
    requests = dict(enumerate(map(Request, CAPTIONS[:3])))
    folder = SampleFolder(tmp_path, {}, requests, (48, 32, 1), fps=8)
    folder.add([0, 1, 2], pixels, [{}] * 3)
    assert folder.finish() == ["0000.png", "0001.png", "0002.png"]
    stored = torch.frombuffer(
        bytearray(Image.open(tmp_path / "0001.png").tobytes()), dtype=torch.uint8
    ).reshape(32, 48, 3)
    assert torch.equal(stored, (pixels[1, 0].permute(1, 2, 0) * 255).round().byte())
    assert Image.open(tmp_path / "grid.png").width > 3 * 48
    assert not list(tmp_path.glob(".writing*"))
    sheet = contact_sheet(torch.zeros(1, 20, 3, 16, 16), [prompts("seen", True)[0].caption], 1)
    assert sheet.width > 8 * 128  # a strip of eight frames, enlarged


def test_video_is_readable_and_falls_back_to_animated_png(tmp_path, monkeypatch):
    clip = torch.linspace(0, 1, 6)[:, None, None, None].expand(6, 3, 32, 48)
    av = pytest.importorskip("av")
    path = save_video(clip, tmp_path / "clip.mp4", fps=8)
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 6 and frames[0].shape == (32, 48, 3)
    assert abs(frames[3].mean() / 255 - 0.6) < 0.03

    real = builtins.__import__

    def without_av(name, *rest, **keywords):
        if name == "av":
            raise ImportError("no av")
        return real(name, *rest, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_av)
    path = save_video(clip, tmp_path / "other.mp4", fps=8)
    assert path.suffix == ".png" and Image.open(path).n_frames == 6


@pytest.mark.parametrize("numbers", [[0, 0, 0, 1, 1, 0], [1, 1]])
def test_an_animated_picture_keeps_frames_that_repeat(tmp_path, numbers):
    clip = torch.rand(2, 3, 16, 17)[numbers]
    path = save_sample(clip, tmp_path / "clip", fps=8)
    assert path.suffix == ".png" and torch.equal(read_back(path), to_shown(clip))
    assert read_frames(path)[1] == len(numbers) / 8


def test_a_grid_of_clips_keeps_each_in_its_place():
    clips = torch.rand(5, 2, 3, 4, 6)
    tiled = grid_video(clips, 3)
    assert tiled.shape == (2, 3, 8, 18)
    assert torch.equal(tiled[1, :, 4:, 6:12], clips[4, 1])


def test_each_part_has_the_mode_again_that_it_had():
    trained, frozen = torch.nn.Dropout(), torch.nn.Dropout().eval()
    both = torch.nn.Sequential(trained, frozen)
    with pytest.raises(KeyError), evaluating(both):
        assert not any(part.training for part in both.modules())
        raise KeyError
    assert (both.training, trained.training, frozen.training) == (True, True, False)
