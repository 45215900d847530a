"""Scores of samples from end to end: the CLIP score and its control, steady frames, two folders
compared, copies seen, every setting told; and the commands."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit.commands import evaluate as evaluate_command
from mmdit.config import ConfigError
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.writer import CacheWriter
from mmdit.data.dataset.buckets import VideoConfig
from mmdit.data.dataset.media_sets import Shape, media_records, read_media
from mmdit.diagnostics import feature_distance
from mmdit.diagnostics.clip_score import ClipScore
from mmdit.diagnostics.feature_distance import FeatureDistance, FeatureSet, read_setting
from mmdit.diagnostics.frame_scores import consistency, steadiness
from mmdit.diagnostics.real_items import RealItems
from mmdit.experiment.load import load_pipeline
from mmdit.interop.clip_similarity import Similarity
from mmdit.interop.encoders import Encoder, open_encoder, small_pixels
from mmdit.pixels import to_shown, to_unit
from mmdit.scripts import compare_samples, evaluate
from mmdit.tokenizers.dummy import DummyTokenizer, DummyTokenizerConfig
from mmdit.training.media import save_sample
from mmdit.training.pipeline import SampleSettings
from mmdit.training.previews import SCORES, Previews
from mmdit.training.train_config import TrainConfig
from tests.helpers.tiny import Workshop, refused
from tests.test_posttrain_rewards import make_clip
from tests.test_spans import write_film

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


def write_pictures(folder, count: int, seed: int, size=(32, 32)):
    """Pictures of one colour each, with a little noise."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        colour = torch.randint(40, 216, (1, 1, 3), generator=generator)
        noise = torch.randint(-20, 21, (*size[::-1], 3), generator=generator)
        Image.fromarray((colour + noise).to(torch.uint8).numpy()).save(folder / f"{i:03d}.png")
    return folder


# ── captions ──────────────────────────────────────────────────────────────────────────────────────
def test_the_score_is_the_cosine_of_its_definition_with_other_captions_beside(clip_folder):
    score = ClipScore(str(clip_folder), CPU)
    torch.manual_seed(1)
    pixels, captions = torch.rand(6, 3, 3, 20, 24), ["a red star", "a circle", "a red star"] * 2
    score.add(pixels[:4], captions[:4])
    score.add(pixels[4:], captions[4:])
    report = score.report()
    similarity = Similarity(clip_folder)
    with torch.no_grad():
        cosines = similarity(pixels, captions)
        frames = similarity.picture_features(pixels.flatten(0, 1)).unflatten(0, (6, 3))
        other = similarity(
            pixels, ["a circle" if "red" in text else "a red star" for text in captions]
        )
    assert report["cosine"] == pytest.approx(cosines.mean().item(), abs=1e-6)
    expected = cosines.clamp(min=0).mean().item()
    assert report["clip_score"] == pytest.approx(100 * expected, abs=1e-4)
    assert report["clip_score_hessel"] == pytest.approx(2.5 * expected, abs=1e-5)
    assert report["frame_consistency"] == pytest.approx(consistency(frames).mean().item(), abs=1e-6)
    # Six samples: each with all five others, of which 2 or 4 say something else.
    weights = torch.tensor([2.0, 4.0, 2.0] * 2)
    control = (100 * other.clamp(min=0) * weights).sum() / weights.sum()
    assert report["control"] == pytest.approx(control.item(), abs=1e-4)
    assert report["samples"] == 6 and len(report["weights_sha256"]) == 64
    spread = 100 * (cosines - cosines.mean()).square().sum().div(5).sqrt() / 6**0.5
    assert report["standard_error"] == pytest.approx(spread.item(), rel=1e-4)
    assert "without a prefix" in report["definition"]
    alike = ClipScore(str(clip_folder), CPU)
    alike.add(pixels[:1, :1], captions[:1])
    report = alike.report()
    assert report["control"] is None and "frame_consistency" not in report
    with pytest.raises(ValueError, match="one sample with a caption"):
        ClipScore(str(clip_folder), CPU).report()
    with pytest.raises(ValueError, match="holds no config.json"):
        ClipScore(str(clip_folder / "none"), CPU)


# ── frames ────────────────────────────────────────────────────────────────────────────────────────
def test_steady_frames_have_known_scores():
    still = torch.rand(2, 1, 3, 4, 4).expand(-1, 5, -1, -1, -1)
    torch.testing.assert_close(steadiness(still), torch.ones(2).double())
    flashing = torch.tensor([0.0, 1.0, 0.0, 0.5]).view(1, 4, 1, 1, 1).expand(1, 4, 3, 2, 2)
    torch.testing.assert_close(steadiness(flashing)[0].item(), 1 - 2.5 / 3)
    x, y = torch.eye(2)
    turning = torch.stack([x, y, -x, (x + y) / 2])[None]
    # cosines with the first: 0, -1 → 0, √½; with the one before: 0, 0, -√½ → 0
    assert consistency(turning).item() == pytest.approx(0.5**0.5 / 6)
    assert consistency(3 * torch.stack([x, x, x])[None]).item() == pytest.approx(1)


# ── what is compared ──────────────────────────────────────────────────────────────────────────────
def test_sources_are_folders_of_pictures_clips_frames_and_lines(tmp_path, capsys):
    folder = write_pictures(tmp_path / "pictures", 3, 0, (40, 24))
    (folder / "grid.png").write_bytes((folder / "000.png").read_bytes())  # of `mmdit sample`
    (folder / "torn.png").write_bytes(b"no picture")
    records = media_records(folder, 1)
    assert [record.id for record in records] == ["000.png", "001.png", "002.png", "torn.png"]
    ((read, pixels),) = read_media(records, Shape(), 8)
    assert pixels.shape == (3, 1, 3, 24, 40) and len(read) == 3
    assert "torn.png: no picture that can be read" in capsys.readouterr().out
    ((_, cut),) = read_media(records[:3], Shape((16, 16)), 8)
    assert cut.shape == (3, 1, 3, 16, 16)
    lines = [
        {"id": "b", "image_path": "pictures/001.png", "caption": "two"},
        {"id": "a", "image_path": "pictures/000.png", "caption": "one"},
    ]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    records = media_records(tmp_path / "lines.jsonl", 1)
    ((_, found),) = read_media(records, Shape(), 8)
    assert torch.equal(found, pixels[[1, 0]]) and records[0].caption == "two"
    clips = tmp_path / "clips"
    shutil.copytree(folder, clips / "walk")
    (clips / "walk" / "torn.png").unlink()
    (clips / "walk" / "grid.png").unlink()
    torch.manual_seed(0)
    moving = torch.rand(5, 3, 16, 16)
    animated = save_sample(moving, clips / "run", 8)
    records = media_records(clips, 3)
    assert [record.id for record in records] == [animated.name, "walk"]
    parts = list(read_media(records, Shape((16, 16), 3), 8))
    assert sum(len(part) for part, _ in parts) == 2 and parts[0][1].shape[1:] == (3, 3, 16, 16)
    (short,) = read_media(records, Shape((16, 16), 3, stride=2), 8)  # three frames are too short
    assert [record.id for record in short[0]] == [animated.name]
    assert "walk: too short: 3 frames, 5 are needed" in capsys.readouterr().out
    shutil.copy(folder / "000.png", clips / "loose.png")
    (clips / "film.mp4").touch()
    assert len(media_records(clips, 3)) == 3
    assert "clips: 1 files are left out, for example loose.png: clips" in capsys.readouterr().out
    assert len(media_records(clips, 1)) == 4 + (animated.suffix == ".png")
    assert "for example film.mp4: pictures are compared" in capsys.readouterr().out
    assert list(Shape(frames=2, stride=2).places(9)) == [3, 5]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no picture"):
        media_records(tmp_path / "empty", 1)
    with pytest.raises(ValueError, match="holds no clip, nor a folder of frames"):
        media_records(tmp_path / "empty", 2)
    with pytest.raises(ValueError, match="is no folder and no .jsonl"):
        media_records(tmp_path / "none", 1)


def test_a_setting_is_a_path_or_keys():
    assert read_setting("~/inception.pth") == {"weights": "~/inception.pth"}
    assert read_setting("tokenizer,clips=middle")["weights"] == "tokenizer"
    whole = read_setting("name=m,weights=f,resize=clean,reference=r")
    assert whole == {"name": "m", "weights": "f", "resize": "clean", "reference": "r"}
    for bad in ("weights=", "a,size=3", "a,resize=bicubic", "a,clips=all", "name=m", ""):
        with pytest.raises(ValueError, match="--features"):
            read_setting(bad)


# ── commands ──────────────────────────────────────────────────────────────────────────────────────
def test_what_is_compared_is_not_mixed(tmp_path, capsys):
    """The second call would compare a sheet with the pictures among which it lies; held-out items
    that are the real ones are at no distance."""
    folders = {name: write_pictures(tmp_path / name, 4, 1) for name in ("samples", "real")}
    words = ["--samples", folders["samples"], "--real", folders["real"], "--device", "cpu"]
    words += ["--features", "pixels", "--num_workers", "0"]
    same = [*words, "--held_out", folders["real"] / "../real"]
    refused(capsys, compare_samples.main, same, "--real and --held_out both are")
    inside = folders["real"] / "new/c.png"
    message = refused(capsys, compare_samples.main, [*words, "--nearest", inside], "of --real,")
    assert "--nearest" in message and not inside.exists()
    inside = folders["samples"] / "c.png"
    refused(
        capsys, compare_samples.main, [*words, "--copies", inside], "in the folder of --samples"
    )
    assert compare_samples.main([*map(str, words), "--copies", str(tmp_path / "c.png")]) == 0
    words = ["--checkpoint", "x", "--real", folders["real"], "--features", "pixels"]
    refused(capsys, evaluate.main, [*words, "--sheet", folders["real"] / "c.png"], "of --real,")


def test_two_folders_are_compared_and_copies_are_shown(tmp_path, capsys):
    real = write_pictures(tmp_path / "real", 20, 1)
    held_out = write_pictures(tmp_path / "held_out", 9, 2)
    samples = write_pictures(tmp_path / "samples", 8, 3)
    shutil.copy(real / "005.png", samples / "002.png")
    out, sheet = tmp_path / "out" / "report.json", tmp_path / "nearest.png"
    words = ["--samples", samples, "--real", real, "--held_out", held_out, "--device", "cpu"]
    words += ["--features", "tokenizer", "--num_workers", "0", "--out", out, "--copies", sheet]
    assert compare_samples.main(list(map(str, words))) == 0
    text = capsys.readouterr().out
    assert "Frechet distance of VTPTokenizer features" in text and "1 identical" in text
    report = json.loads(out.read_text())["features"]
    copies = report["copies"]
    assert copies["nearest"]["002.png"] == ["005.png", 0.0] and copies["identical"] == 1
    assert copies["control"] == "held-out items" and copies["control_distances"]["count"] == 9
    assert (report["samples"], report["pictures"], report["width"]) == (8, 20, 320)
    assert report["rank"] == {"samples": 7, "pictures": 19} and report["frechet_limit"] is None
    assert "singular covariance" in report["warning"] and "needs 640 samples" in report["warning"]
    assert set(report["neighbours"]) == {"precision", "recall", "density", "coverage"}
    assert report["real_items"]["frames"] == 1 and len(report["weights_sha256"]) == 64
    assert Image.open(sheet).width > 400
    # without held-out items real ones are compared with each other, and none with itself
    near = FeatureDistance("tokenizer", Shape((32, 32)), CPU, str(real))
    near.add(to_unit(torch.zeros(2, 1, 3, 32, 32, dtype=torch.uint8)))
    report = near.report()["copies"]
    assert report["control_distances"]["count"] == 20 and report["control_distances"]["least"] > 0
    # the same set against itself, in another order and read by workers
    words = ["--samples", real, "--real", real, "--features", "tokenizer", "--out", out]
    assert compare_samples.main(list(map(str, [*words, "--num_workers", "1"]))) == 0
    report = json.loads(out.read_text())["features"]
    assert report["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert report["neighbours"]["precision"] == report["neighbours"]["recall"] == 1
    assert report["copies"]["identical"] == 20
    assert "among themselves" in report["copies"]["control"]


def test_the_nearest_samples_are_kept_whatever_part_they_come_in(tmp_path, monkeypatch):
    real = write_pictures(tmp_path / "real", 12, 1)
    pixels = torch.rand(6, 1, 3, 32, 32)
    names = ["004.png", "009.png"]
    ((_, found),) = read_media([r for r in media_records(real, 1) if r.id in names], Shape(), 8)
    pixels[[5, 2]] = to_unit(found)
    reports = []
    for pending in (0, 1 << 20):
        monkeypatch.setattr(feature_distance, "PENDING_BYTES", pending)
        monkeypatch.setattr(feature_distance, "SHOWN", 2)
        distance = feature_distance.FeatureDistance("tokenizer", Shape((32, 32)), CPU, str(real))
        for part in pixels.split(2):
            distance.add(part)
        reports.append(distance.report()["copies"])
        # two copies are equally near, to rounding
        kept = {pair.name: distance.real.names[pair.nearest] for pair in distance.closest}
        assert kept == {"0002": "009.png", "0005": "004.png"}
        assert [pair.name for pair in distance.first] == [f"{number:04}" for number in range(6)]
        (copy,) = (pair for pair in distance.closest if pair.name == "0002")
        torch.testing.assert_close(copy.pixels, found[1])
    (names, distances), other = (
        zip(*copies["nearest"].values(), strict=True) for copies in reports
    )
    assert [names, pytest.approx(distances, abs=1e-4)] == list(other)
    assert [copies["identical"] for copies in reports] == [2, 2]


def test_each_sample_is_drawn_beside_its_nearest_training_picture(tmp_path, capsys, monkeypatch):
    """Pictures of two sizes: a copy, a picture as far from the training as held-out ones, and one
    that shows what another caption asks for."""
    real, held_out = tmp_path / "real", write_pictures(tmp_path / "held_out", 3, 5)
    write_pictures(real, 4, 1)
    wide = write_pictures(tmp_path / "wide", 2, 2, (48, 32))
    shutil.copy(wide / "000.png", real / "wide.png")
    captions = {
        "000": "a red sky",
        "001": "a green sea",
        "002": "sand",
        "003": "ice",
        "wide": "a mist",
    }
    rows = [
        {"id": name, "image_path": f"{name}.png", "caption": caption}
        for name, caption in captions.items()
    ]
    rows[-1]["captions"] = ["a mist", "a fog"]
    (real / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = tmp_path / "samples"
    drawn = {"0": (real / "001.png", "a green sea"), "1": (real / "wide.png", "a fog")}
    drawn |= {"2": (real / "002.png", "ice"), "3": (held_out / "000.png", "")}
    for name, (file, prompt) in drawn.items():
        pixels = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None]
        save_sample(pixels, samples / name, 8, {"prompt": prompt} if prompt else None)
    sheets = []
    kept = feature_distance.contact_sheet

    def sheet(pixels, captions, columns, cell):
        sheets.append((pixels, captions))
        return kept(pixels, captions, columns, cell)

    monkeypatch.setattr(feature_distance, "contact_sheet", sheet)
    monkeypatch.setattr(feature_distance, "PAIRS", 3)
    out, nearest = tmp_path / "report.json", tmp_path / "nearest.png"
    words = ["--samples", samples, "--real", real / "train.jsonl", "--held_out", held_out]
    words += ["--features", "pixels", "--num_workers", "0", "--device", "cpu"]
    assert compare_samples.main(list(map(str, [*words, "--out", out, "--nearest", nearest]))) == 0
    copies = json.loads(out.read_text())["features"]["copies"]
    assert copies["identical"] == 3 and copies["own_caption"] == {"samples": 3, "nearest": 2}
    assert [copies["nearest"][f"{i}.png"][0] for i in range(3)] == ["001", "wide", "002"]
    assert "of 3 samples with the caption of a real item 2 are nearest" in capsys.readouterr().out
    ((cells, texts),) = sheets
    assert len(cells) == 6 and Image.open(nearest).width > 6 * cells.shape[-1]
    assert torch.equal(cells[0], cells[1]) and torch.equal(cells[2], cells[3])
    shown = cells[2, 0, :, : cells.shape[-2] * 2 // 3 - 1]  # a wide picture stands above white
    assert (cells[2, 0, :, -40:] == 1).all() and shown.mean() < 0.95
    assert texts[2] == "sample 1.png: a fog"
    assert texts[3].startswith(
        "nearest real, 0 away, nearer than 100% of held-out items: wide a mist"
    )
    with pytest.raises(SystemExit):
        compare_samples.main(["--samples", str(samples), "--clip_score", "x", "--nearest", "s.png"])
    assert "--nearest needs --features" in capsys.readouterr().err


def test_the_distance_of_pixels_is_their_root_mean_square():
    encoder = open_encoder("pixels")
    dark, bright = torch.full((1, 3, 3, 20, 24), 0.25), torch.full((1, 3, 3, 64, 40), 0.75)
    bright[:, 0] = 0.25  # in one of three frames there is no difference
    features = torch.cat([encoder(dark), encoder(bright)])
    assert features.shape == (2, 3 * 3 * 16 * 16)
    assert (features[0] - features[1]).norm().item() == pytest.approx(
        0.5 * (2 / 3) ** 0.5, rel=1e-5
    )
    long = torch.linspace(0, 1, 15).view(1, 15, 1, 1, 1).expand(-1, -1, 3, 8, 8)
    shown = small_pixels(long).unflatten(1, (3, 3, 16, 16)) * (9 * 16 * 16) ** 0.5
    torch.testing.assert_close(shown[0, :, 0, 0, 0], torch.tensor([0, 0.5, 1]))


@pytest.mark.thorough
def test_clips_are_compared_with_the_scores_of_their_frames(tmp_path, clip_folder):
    torch.manual_seed(0)
    for name in ("real", "samples"):
        for i in range(7):
            facts = {"prompt": "a red star" if i % 2 else "a circle"}
            save_sample(torch.rand(4, 3, 16, 32), tmp_path / name / f"{i:04d}", 8, facts)
    out = tmp_path / "report.json"
    words = ["--samples", tmp_path / "samples", "--real", tmp_path / "real", "--frames", "4"]
    words += ["--features", f"{clip_folder},clips=halves", "--clip_score", clip_folder]
    words += ["--out", out, "--num_workers", "0", "--copies", tmp_path / "sheet.png"]
    assert compare_samples.main(list(map(str, words))) == 0
    report = json.loads(out.read_text())
    features = report["features"]
    assert features["width"] == 16 and features["of_a_clip"].startswith("means over both halves")
    assert features["frames"]["samples"].keys() == {"steadiness", "consistency"}
    assert features["frames"]["real"]["steadiness"] == pytest.approx(2 / 3, abs=0.15)
    assert report["clip_score"]["samples"] == 7 and report["clip_score"]["control"] is not None
    # a picture encoder without halves is given one frame of each real clip
    words[words.index(f"{clip_folder},clips=halves")] = str(clip_folder)
    assert compare_samples.main(list(map(str, words))) == 0
    features = json.loads(out.read_text())["features"]
    assert features["width"] == 8 and features["real_items"]["frames"] == 1
    assert features["frames"]["real"] is None
    assert features["frames"]["samples"].keys() == {"steadiness"}  # one frame is encoded


def test_options_that_do_nothing_and_samples_without_captions_are_refused(
    tmp_path, capsys, clip_folder
):
    folder = str(write_pictures(tmp_path / "samples", 2, 0))
    words = ["--samples", folder]
    for more, message in (
        ([], "nothing to measure"),
        (["--real", folder, "--clip_score", "x"], "--real needs --features"),
        (["--features", "tokenizer"], "--features needs real items"),
        (["--features", "tokenizer", "--real", folder, "--width", "9"], "are given together"),
        (["--features", f"tokenizer,reference={folder}", "--real", folder], "named twice"),
        (["--features", "tokenizer", "--real", folder, "--frames", "0"], "--frames is 0"),
        (["--clip_score", str(clip_folder), "--num_workers", "0"], "000.png has no caption"),
    ):
        refused(capsys, compare_samples.main, [*words, *more], message)


def test_a_model_is_evaluated_by_its_own_tokenizer_and_by_clip(tmp_path, capsys, clip_folder):
    shop = Workshop(tmp_path)
    run = shop.train("base")
    (tmp_path / "prompts.yaml").write_text("prompts: [a red circle, a blue star]")
    real = write_pictures(tmp_path / "real", 8, 1)
    out, sheet = tmp_path / "report.json", tmp_path / "nearest.png"
    words = ["--checkpoint", str(run), "--device", "cpu", "--steps", "1", "--out", str(out)]
    words += ["--prompts", str(tmp_path / "prompts.yaml"), "--count", "7"]
    scored = ["--features", "tokenizer", "--real", str(real), "--copies", str(sheet)]
    scored += ["--clip_score", str(clip_folder), "--num_workers", "0"]
    assert evaluate.main([*words, *scored]) == 0
    text = capsys.readouterr().out
    assert "CLIP score" in text and "of 7 samples" in text
    report = json.loads(out.read_text())
    assert report["features"]["samples"] == 7 and report["clip_score"]["samples"] == 7
    assert sheet.is_file() and list(report["features"]["copies"]["nearest"])[0] == "0000"
    refused(capsys, evaluate.main, words, "--prompts needs --features or --clip_score")
    # The training set as a cache: its items are decoded by the model's tokenizer.
    cache = shop.cache("pictures")
    scored[scored.index("--real") + 1] = str(cache)
    assert evaluate.main([*words, *scored]) == 0
    features = json.loads(out.read_text())["features"]
    opened = open_cache(cache)
    assert features["pictures"] == len(opened) and features["reference"] == str(cache)
    assert {name for name, _ in features["copies"]["nearest"].values()} <= set(opened.ids)
    pipeline, _ = load_pipeline(run, "cpu")
    items = RealItems(str(cache), Shape(), [pipeline.tokenizer], 0)
    (records, pixels), *_ = items.read(3)
    latents = opened.load(opened.ids.index(records[0].id))
    expected = to_shown(pipeline.tokenizer.decode(latents[None].float())[0])
    assert torch.equal(pixels[0], expected) and records[0].caption
    assert items.read_one(records[0], (8, 12)).shape == (1, 3, 12, 8)
    with pytest.raises(ValueError, match="whose weights are not at hand"):
        RealItems(str(cache), Shape(), [], 0)


def test_previews_are_scored_while_training(tmp_path, capsys, clip_folder):
    shop = Workshop(tmp_path)
    words = ["train.sample_every_steps=2", "train.sample_num_images=3", "train.max_steps=4"]
    words += ["train.sample_prompts=[a red star, a circle]", "train.sample_num_steps=1"]
    run = shop.train("scored", *words, f"train.sample_clip={clip_folder}")
    rows = [json.loads(line) for line in (run / "samples" / SCORES).read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    score = ClipScore(str(clip_folder), CPU)
    pipeline, config = load_pipeline(run, "cpu")
    size = config.video.width, config.video.height, config.video.num_frames
    captions = ["a red star", "a circle", "a red star"]
    settings = SampleSettings.of(config.train)
    score.add(pipeline(captions, *size, settings, batch_size=16), captions)
    report = score.report()
    assert rows[1]["preview_clip_score"] == pytest.approx(report["clip_score"], abs=1e-3)
    assert rows[1]["preview_clip_control"] == pytest.approx(report["control"], abs=1e-3)
    text = capsys.readouterr().out
    assert "preview of step 4: preview_clip_score" in text
    page = (run / "samples" / "index.html").read_text()
    assert f"step_00000004: preview_clip_score {rows[1]['preview_clip_score']:.3f}" in page
    previews = Previews(None, TrainConfig(), run, 16, 16, 1, 8, False)
    previews._record(4, {"preview_clip_score": 1.0})  # a resumed run is at this step again
    rows = [json.loads(line) for line in (run / "samples" / SCORES).read_text().splitlines()]
    assert [(row["step"], row["preview_clip_score"] == 1) for row in rows] == [
        (2, False),
        (4, True),
    ]
    with pytest.raises(SystemExit):
        shop.train("wrong", *words, f"train.sample_clip={tmp_path}")
    assert "train.sample_clip: cannot score previews" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="sample_every_steps is 0: there is no preview"):
        TrainConfig(sample_clip="clip")


def test_of_a_cached_clip_of_several_samples_the_middle_one_is_compared():
    """Each was encoded by itself: a part that spans two of them is no clip."""
    items, latents = object.__new__(RealItems), torch.arange(7)
    for joined, expected in (
        (2, [2, 3]),
        (3, [3, 4, 5]),
        (7, list(range(7))),
        (None, list(range(7))),
    ):
        cache = SimpleNamespace(manifest=SimpleNamespace(joined=joined))
        assert items._middle_sample(cache, latents).tolist() == expected


def test_real_clips_are_stretched_where_those_of_the_training_were(tmp_path, monkeypatch):
    asked, Stop = [], type("Stop", (Exception,), {})
    pipeline = SimpleNamespace(check=lambda *_: None, device=CPU, tokenizer=None)
    for name in ("describe_pair", "offload_pipeline", "keep_freed_memory"):
        monkeypatch.setattr(evaluate_command, name, lambda *_: None)

    def build(shape, *_, **__):
        asked.append(shape)
        raise Stop

    monkeypatch.setattr(evaluate_command, "build_scores", build)
    for stretched in (True, False):
        video = VideoConfig(32, 32, num_frames=3, shrink_video_to_frames=stretched)
        parts = (pipeline, SimpleNamespace(video=video), False)
        loader = SimpleNamespace(load=lambda path, parts=parts: parts, offload="none")
        of_config = (lambda config: None, lambda config: (32, 32, 3, 16))
        scorer = evaluate_command.Scorer(loader, *of_config, "one", None, None, 1, {})
        with pytest.raises(Stop):
            scorer.score(tmp_path)
    assert [list(shape.places(9)) for shape in asked] == [[0, 4, 8], [3, 4, 5]]
    assert list(Shape(stretch=True).places(9)) == [4]  # the middle one of a single frame


def test_one_frame_of_each_real_clip_is_compared_where_an_encoder_sees_one(tmp_path, monkeypatch):
    """Not each of its frames, as of a JSONL file, and no picture that lies beside the clips."""
    network = lambda pixels: pixels.flatten(1)
    encoder = Encoder("grey", network, "pictures", CPU, {"resize": "none"})
    monkeypatch.setattr(feature_distance, "open_encoder", lambda **_: encoder)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "poster.png")
    for clip in range(3):
        (tmp_path / f"clip{clip}").mkdir()
        for frame in range(5):
            value = 10 * clip + frame
            Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / f"clip{clip}/{frame}.png")
    distance = FeatureDistance("x", Shape((8, 8), 4), CPU, str(tmp_path), str(tmp_path))
    for items in (distance.real, distance.held_out):
        assert items.names == ["clip0", "clip1", "clip2"]
        assert (items.features[:, 0] * 255).round().tolist() == [2, 12, 22]
    for frames in (5, 4):  # samples that are the real clips: the same frame of both
        ((_, clips),) = read_media(media_records(tmp_path, 2), Shape((8, 8), frames), 8)
        distance = FeatureDistance("x", Shape((8, 8), frames), CPU, str(tmp_path))
        distance.add(clips)
        assert distance.drawn.features.equal(distance.real.features)
        for clip in range(3):
            (tmp_path / f"clip{clip}/4.png").unlink(missing_ok=True)
    for pictures in ("clip0", "."):  # a folder without clips; pictures are asked for
        frames = 4 if pictures == "clip0" else 1
        distance = FeatureDistance("x", Shape((8, 8), frames), CPU, str(tmp_path / pictures))
        assert len(distance.real.names) == (4 if pictures == "clip0" else 13)


def test_an_animated_picture_is_a_clip_where_an_encoder_sees_one_frame(tmp_path, monkeypatch):
    """Its middle one, as of a video; where pictures are compared it is the one that it begins
    with."""
    encoder = Encoder("grey", lambda pixels: pixels.flatten(1), "pictures", CPU, {"resize": "none"})
    monkeypatch.setattr(feature_distance, "open_encoder", lambda **_: encoder)
    frames = [Image.new("RGB", (8, 8), (10 * value,) * 3) for value in range(5)]
    for suffix in ("gif", "webp", "avif"):
        folder = tmp_path / suffix
        folder.mkdir()
        for name in "ab":
            more = {"save_all": True, "append_images": frames[1:], "lossless": True}
            frames[0].save(folder / f"{name}.{suffix}", duration=100, **more)
        paths = {name: f"{suffix}/{name}.{suffix}" for name in "ab"}
        rows = [{"id": id, "image_path": path, "caption": ""} for id, path in paths.items()]
        (tmp_path / f"{suffix}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for source, count in ((folder, 4), (tmp_path / f"{suffix}.jsonl", 4), (folder, 1)):
            real = FeatureDistance("x", Shape((8, 8), count), CPU, str(source)).real
            middle = 20 if count == 4 else 0
            assert (real.features[:, 0] * 255).round().tolist() == [middle] * 2


def test_clips_of_another_speed_are_not_compared(tmp_path):
    tokenizer = DummyTokenizer(DummyTokenizerConfig(latent_d=8))
    manifest = CacheManifest.of(tokenizer, VideoConfig(32, 32))
    with CacheWriter(tmp_path, manifest) as writer:
        writer.add("a", torch.rand(4, 2, 2, 8), "a", source={"fps": 12.0})
    RealItems(str(tmp_path), Shape(None, 4, fps=12.0), [tokenizer], 0)
    with pytest.raises(ValueError, match="at 12 frames a second, and 24 are asked for"):
        RealItems(str(tmp_path), Shape(None, 4, fps=24.0), [tokenizer], 0)


# ── what is refused before anything is drawn ──────────────────────────────────────────────────────
def test_lines_that_name_frames_of_a_film_are_those_frames(tmp_path):
    pytest.importorskip("av")
    film = write_film(tmp_path / "film.mp4")
    spans = {"a": [0, 8], "b": [30, 38], "c": [20, 23]}
    rows = [
        {"id": id, "video_path": film.name, "caption": "", "video_span": span}
        for id, span in spans.items()
    ]
    source = tmp_path / "clips.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for frames, first in ((1, {"a": 3, "b": 33, "c": 21}), (4, {"a": 2, "b": 32})):
        seen = {}
        for records, pixels in read_media(media_records(source, frames), Shape(None, frames), 1):
            seen[records[0].id] = pixels[0, :, :, :, 40:].float().mean((1, 2, 3))  # the grey half
        assert seen.keys() == first.keys()
        for id, number in first.items():
            expected = 20 + 5 * torch.arange(number, number + frames)
            assert torch.allclose(seen[id], expected.float(), atol=2.4)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--width", "0", "--height", "0"], "the size is 0x0"),
        (["--width", "16", "--height", "-16"], "the size is 16x-16"),
        (["--fps", "0"], "--fps is 0, must be above 0"),
        (["--samples", ""], "--samples: is empty"),
        (["--held_out", "one"], "--held_out: of one 1 item could be read"),
        (["--real", "one"], "--real: of one 1 item could be read"),
        (["--samples", "one"], "two real items or more, these are 1 and 2"),
        (["--samples", "odd"], "0.png: size 33x17 is not a multiple of 16"),
        (["--features", "tokenizer,resize=clean,resize=clean"], "gives resize 2 times"),
        (["--out", "a.png", "--copies", "./a.png"], "--out and --copies both are ./a.png"),
    ],
)
def test_what_would_measure_something_else_is_refused(
    tmp_path, capsys, monkeypatch, words, expected
):
    monkeypatch.chdir(tmp_path)
    for name, count, size in (("one", 1, (16, 16)), ("two", 2, (16, 16)), ("odd", 2, (33, 17))):
        write_pictures(tmp_path / name, count, 0, size)
    usual = {"--samples": "two", "--real": "two", "--features": "tokenizer", "--num_workers": "0"}
    given = usual | dict(zip(words[::2], words[1::2]))
    refused(capsys, compare_samples.main, sum(map(list, given.items()), []), expected)
    assert not (tmp_path / "a.png").exists()


def test_too_few_real_items_are_told_before_samples_are_drawn(tmp_path):
    write_pictures(tmp_path / "one", 1, 0)
    with pytest.raises(ValueError, match="two or more are needed"):
        FeatureDistance("tokenizer", Shape(), CPU, str(tmp_path / "one"))


def test_features_that_are_no_numbers_are_refused():
    features = torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [0.0, torch.inf]])
    encoder = Encoder("broken", lambda pixels: features[: len(pixels)], "pictures", CPU)
    items = FeatureSet(encoder)
    items.add(torch.zeros(1, 1, 3, 4, 4, dtype=torch.uint8), ["a"])
    with pytest.raises(ValueError, match="features of b and 1 more are nan or infinite"):
        items.add(torch.zeros(3, 1, 3, 4, 4, dtype=torch.uint8), ["a", "b", "c"])
    assert items.names == ["a"] and items.moments.count == 1
