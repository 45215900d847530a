"""Features of a local timm model: weights that fit or are refused, the Frechet distance of two
Gaussians, a reward, and the command."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from mmdit.config import ConfigError, decode
from mmdit.data.dataset.frames import load_first_frame
from mmdit.data.dataset.media_sets import Shape
from mmdit.data.dataset.picture_folder import folder_pictures
from mmdit.diagnostics.distribution_distance import Moments, frechet_distance
from mmdit.diagnostics.feature_distance import FeatureDistance
from mmdit.interop.feature_encoder import FeatureEncoder
from mmdit.posttrain.feature_reward import FeatureSimilarity
from mmdit.posttrain.posttrain_config import PosttrainConfig
from mmdit.scripts import evaluate
from tests.helpers.tiny import Workshop, refused
from tests.test_posttrain_rewards import samples

CPU = torch.device("cpu")


def make_weights(folder, *names: str):
    """Random weights as timm would publish them, with a classifier."""
    timm = pytest.importorskip("timm")
    for name in names:
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False)
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        if name == "test_resnet":
            state["bn1.running_mean"] = 0.1 * torch.randn_like(state["bn1.running_mean"])
        save_file(state, folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a ViT, and of a network with running means."""
    return make_weights(tmp_path_factory.mktemp("timm"), "test_vit", "test_resnet")


def pictures(folder, count: int, value=None):
    folder.mkdir()
    for i in range(count):
        pixels = torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8)
        if value is not None:
            pixels[:] = value
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_features_are_those_of_timm_before_the_classifier_and_differentiable(weights, name):
    import timm

    encoder = FeatureEncoder(name, weights / f"{name}.safetensors")
    known = timm.create_model(
        name, checkpoint_path=str(weights / f"{name}.safetensors"), num_classes=1000
    ).eval()
    pixels = torch.rand(2, 3, encoder.size, encoder.size, requires_grad=True)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in encoder.statistics)
    with torch.no_grad():
        inner = known.forward_features((pixels - mean) / deviation)
        expected = known.forward_head(inner, pre_logits=True)
    torch.testing.assert_close(encoder(pixels), expected, atol=1e-5, rtol=1e-5)
    encoder(pixels)[:, 0].sum().backward()
    assert pixels.grad.abs().sum() > 0 and not any(p.requires_grad for p in encoder.parameters())
    wide = torch.rand(1, 3, encoder.size, encoder.size + 20)  # its middle is seen
    torch.testing.assert_close(encoder(wide), encoder(wide[..., 10:-10]))


def test_foreign_names_files_and_a_broken_timm_are_refused_in_one_sentence(
    weights, tmp_path, monkeypatch
):
    file = weights / "test_vit.safetensors"
    for name, path, message in (
        ("hf-hub:timm/test_vit", file, "timm has no model"),
        ("test_vitt", file, "near names are test_vit"),
        ("test_vit", tmp_path / "model.pth", "must be the .safetensors file"),
        ("test_vit", tmp_path / "none.safetensors", "does not exist"),
        ("test_vit", weights / "test_resnet.safetensors", "lacks"),
        ("test_resnet", file, "lacks"),
    ):
        with pytest.raises(ValueError, match=message):
            FeatureEncoder(name, path)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="pip install timm"):
        FeatureEncoder("test_vit", file)


def moments(features) -> Moments:
    result = Moments()
    for part in features.split(100):
        result.add(part)
    return result


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    """Of N(μ₁, A) and N(μ₂, B) with commuting A and B: |μ₁ - μ₂|² + Σ (√a - √b)²."""
    x = torch.randn(5000, 6, dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (len(x) - 1))).T  # exactly white
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    one, two = torch.rand(2, 6, dtype=torch.float64) + 0.1
    shift = torch.randn(6, dtype=torch.float64)
    distance = frechet_distance(moments(x * one @ turn), moments(x.flip(0) * two @ turn + shift))
    expected = shift.square().sum() + (one - two).square().sum()
    assert distance == pytest.approx(expected.item(), rel=1e-6)
    few = moments(torch.randn(4, 6))  # a covariance without full rank
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="two samples"):
        frechet_distance(few, moments(torch.randn(1, 6)))


def test_a_folder_is_not_apart_from_itself_and_few_samples_are_warned_of(weights, tmp_path, capsys):
    folder = pictures(tmp_path / "real", 5)
    (folder / "broken.png").write_bytes(b"no picture")
    setting = f"name=test_vit,weights={weights}/test_vit.safetensors,reference={folder}"
    distance = FeatureDistance(setting, Shape((64, 48)), CPU)
    assert "skipped" in capsys.readouterr().out
    same = torch.stack([load_first_frame(folder / f"{i}.png", (64, 48)) for i in range(5)])[:, None]
    distance.add(same[:3])
    distance.add(same[3:].expand(-1, 3, -1, -1, -1))  # clips: the middle frame counts
    report = distance.report()
    assert report["frechet_distance"] == pytest.approx(0, abs=1e-3)
    assert (report["samples"], report["pictures"]) == (5, 5) and "below 2048" in report["warning"]
    other = FeatureDistance(setting, Shape((64, 48)), CPU)
    other.add(torch.zeros_like(same))
    assert other.report()["frechet_distance"] > 10 * abs(report["frechet_distance"]) + 1e-3
    for bad in ("name=test_vit", f"{setting},more=1", setting.replace(str(folder), "")):
        with pytest.raises(ValueError, match="must be PATH"):
            FeatureDistance(bad, Shape((64, 48)), CPU)


def test_the_reward_prefers_what_resembles_the_folder(weights, tmp_path):
    rows = {"type": "features", "model": "test_vit", "weights": f"{weights}/test_vit.safetensors"}
    rows["reference"] = str(pictures(tmp_path / "dark", 3, value=10))
    for compare in ("mean", "nearest"):
        config = decode(PosttrainConfig, {"rewards": [rows | {"compare": compare}]})
        (reward,) = config.rewards
        assert isinstance(reward, FeatureSimilarity)
        reward.prepare(CPU)
        pixels = torch.full((2, 2, 3, 40, 40), 10 / 255)
        pixels[1] = torch.rand(2, 3, 40, 40)
        value = reward.call(samples(pixels))
        assert value[0] == pytest.approx(1, abs=1e-4) and value[1] < value[0]
    several = pictures(tmp_path / "several", 3)
    values = {}
    for compare in ("mean", "nearest"):
        reward = FeatureSimilarity(**rows | {"reference": str(several), "compare": compare})
        reward.prepare(CPU)
        encoder, _ = reward.loaded
        shown = list(folder_pictures(str(several), encoder.size, encoder.size))
        values[compare] = reward.call(samples(torch.stack([picture[None] for picture in shown])))
    directions = F.normalize(torch.stack([encoder(picture[None])[0] for picture in shown]), dim=-1)
    mean = F.normalize(directions.mean(0), dim=-1)
    torch.testing.assert_close(values["mean"], directions @ mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values["nearest"], torch.ones(3), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="reference.*is empty"):
        decode(PosttrainConfig, {"rewards": [{**rows, "reference": ""}]})
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="holds no picture"):
        FeatureSimilarity(**{**rows, "reference": str(tmp_path / "none")}).prepare(CPU)


def test_the_command_measures_samples_of_written_prompts(weights, tmp_path, capsys):
    shop = Workshop(tmp_path)
    run = shop.train("base")
    (tmp_path / "prompts.yaml").write_text("prompts: [a red circle, a blue star]")
    folder = pictures(tmp_path / "real", 3)
    setting = f"name=test_vit,weights={weights}/test_vit.safetensors,reference={folder}"
    words = ["--checkpoint", str(run), "--device", "cpu", "--steps", "1"]
    prompts = ["--prompts", str(tmp_path / "prompts.yaml"), "--count", "5"]
    out = tmp_path / "report.json"
    assert evaluate.main([*words, *prompts, "--features", setting, "--out", str(out)]) == 0
    assert "Frechet distance of test_vit features" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["features"]["samples"] == 5 and "prompt_accuracy" not in report
    assert evaluate.main([*words, "--count", "2", "--features", setting, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["features"]["samples"] == 4 and report["prompt_accuracy"]["count"] == 2
    refused(capsys, evaluate.main, [*words, *prompts], "--prompts needs --features")
