"""Encoders of metrics: the ways of resizing, the networks that published files hold, folders of
transformers, our own tokenizer; and what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from mmdit.interop import encoders, i3d, inception
from mmdit.interop.encoders import open_encoder, pooled_latents
from mmdit.interop.picture_resizing import resized_square
from mmdit.tokenizers import VTPTokenizerConfig, build_tokenizer


# ── resizing ──────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("side", [64, 300, 513])
def test_the_clean_way_is_that_of_pillow_on_floats(side):
    pixels = np.random.default_rng(0).integers(0, 256, (side, side + 20, 3)).astype(np.float32)
    planes = [Image.fromarray(pixels[..., i], mode="F") for i in range(3)]
    planes = [plane.resize((299, 299), Image.Resampling.BICUBIC) for plane in planes]
    expected = torch.from_numpy(np.stack(planes)).clamp(0, 255)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    result = resized_square(images, 299, "clean")[0] * 255
    torch.testing.assert_close(result, expected, atol=0.01, rtol=0)


def test_the_way_of_tensorflow_begins_at_the_corner_and_blends_neighbours_alone():
    row = torch.tensor([0.0, 1.0, 0.5]).expand(1, 3, 3, 3)
    result = resized_square(row, 6, "tensorflow")
    torch.testing.assert_close(result[0, 0, 0], torch.tensor([0, 0.5, 1, 0.75, 0.5, 0.5]))
    torch.testing.assert_close(resized_square(row.mT, 6, "tensorflow"), result.mT)
    image = torch.rand(1, 3, 90, 40)
    large = resized_square(image, 20, "tensorflow")
    y, x = 7 * 90 / 20, 13 * 40 / 20
    top, left = int(y), int(x)
    corners = image[0, :, top : top + 2, left : left + 2].double()
    down, right = y - top, x - left
    weights = torch.tensor([[(1 - down) * (1 - right), (1 - down) * right]] * 2).double()
    weights[1] = torch.tensor([down * (1 - right), down * right])
    expected = (corners * weights).sum((1, 2)).float()
    torch.testing.assert_close(large[0, :, 7, 13], expected, atol=1e-5, rtol=0)
    halved = resized_square(torch.rand(1, 3, 8, 8), 4, "pytorch")
    assert halved.shape == (1, 3, 4, 4)


# ── Inception ─────────────────────────────────────────────────────────────────────────────────────
def wake(network: nn.Module) -> nn.Module:
    """Give random weights of a size that keeps signals alive, and batch norms something to do."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.dim() > 1:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5, generator=generator)
            if name.endswith("running_mean"):
                tensor.sub_(1)
    return network.eval()


@pytest.fixture(scope="module")
def inception_files(tmp_path_factory):
    """A file of each variant, as published: with a classifier, of torchvision with another head."""
    folder, files = tmp_path_factory.mktemp("inception"), {}
    for variant, classes in (("fid", 1008), ("torchvision", 1000)):
        network = wake(inception.InceptionV3(variant))
        state = {name: value.half() for name, value in network.state_dict().items()}
        if variant == "fid":  # made of TensorFlow's weights, which count no batches
            state = {name: value for name, value in state.items() if "num_batches" not in name}
        state |= {"fc.weight": torch.zeros(classes, 2048), "fc.bias": torch.zeros(classes)}
        if variant == "torchvision":
            state["AuxLogits.conv0.conv.weight"] = torch.zeros(128, 768, 1, 1)
        files[variant] = folder / f"{variant}.pth"
        torch.save(state, files[variant])
    return files


@pytest.mark.thorough
def test_the_network_of_torchvision_is_computed_alike(inception_files):
    models = pytest.importorskip("torchvision.models")
    known = models.inception_v3(weights=None, init_weights=False, aux_logits=False)
    known.fc = nn.Identity()
    state = torch.load(inception_files["torchvision"], weights_only=True)
    state = {name: value.float() for name, value in state.items()}
    missing, _ = known.load_state_dict(state, strict=False)
    assert not missing
    encoder = open_encoder(str(inception_files["torchvision"]), resize="pytorch")
    pixels = torch.rand(1, 1, 3, 120, 90)
    with torch.no_grad():
        images = F.interpolate(pixels[:, 0], (299, 299), mode="bilinear")
        expected = known.eval()(2 * images - 1)
    torch.testing.assert_close(encoder(pixels), expected, atol=1e-4, rtol=1e-4)
    assert encoder.facts["resize"] == "pytorch" and encoder.facts["normalisation"] == "2x - 1"
    assert encoder.name == "inception (torchvision)" and "papers" not in encoder.facts


def test_the_variant_of_the_frechet_distance_differs_in_its_pools():
    """Its average pools count no padding, and its last block takes the largest: as pytorch-fid."""
    x = torch.rand(1, 6, 5, 5)
    branch: list = [[("branch1x1", 2, 1)]]
    for pool, expected in (
        ("average", F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)),
        ("whole_average", F.avg_pool2d(x, 3, 1, 1)),
        ("maximum", F.max_pool2d(x, 3, 1, 1)),
    ):
        block = wake(inception.Mixed(6, branch, pool, 4))
        torch.testing.assert_close(block(x)[:, 2:], block.branch_pool(expected))
    fid, plain = inception.InceptionV3("fid"), inception.InceptionV3("torchvision")
    pools = [
        {name: block.pool for name, block in network.named_children() if hasattr(block, "pool")}
        for network in (fid, plain)
    ]
    assert pools[0]["Mixed_7c"] == "maximum" and pools[1]["Mixed_7c"] == "whole_average"
    assert pools[0]["Mixed_7b"] == pools[0]["Mixed_5b"] == "average"
    assert pools[0]["Mixed_6a"] == pools[1]["Mixed_7a"] == "stride"


def test_conventions_of_inception_are_followed_and_stated(inception_files):
    file = inception_files["fid"]
    network = inception.InceptionV3("fid").eval()
    state = {name: value.float() for name, value in torch.load(file, weights_only=True).items()}
    network.load_state_dict(state, strict=False)
    pixels = torch.rand(1, 1, 3, 40, 70)
    encoder = open_encoder(str(file))
    images = resized_square(pixels[:, 0], 299, "tensorflow")
    with torch.no_grad():
        known = network((255 * images - 128) / 128)
    torch.testing.assert_close(encoder(pixels), known, atol=1e-4, rtol=1e-4)
    assert encoder.facts["resize"] == "tensorflow" and encoder.facts["size"] == 299
    assert encoder.facts["normalisation"] == "(255x - 128) / 128"
    assert len(encoder.facts["weights_sha256"]) == 64 and "50,000" in encoder.facts["papers"]


# ── I3D ───────────────────────────────────────────────────────────────────────────────────────────
def test_the_padding_of_clips_is_that_of_tensorflow():
    for side, kernel, stride in ((7, 3, 2), (8, 3, 2), (16, 7, 2), (5, 2, 2), (9, 3, 1)):
        x = torch.arange(1.0, side + 1).view(1, 1, side, 1, 1)
        padded = i3d.padded(x, (kernel, 1, 1), (stride, 1, 1))[0, 0, :, 0, 0]
        places = -(-side // stride)
        assert (len(padded) - kernel) // stride + 1 == places
        zeros = len(padded) - side
        assert not padded[: zeros // 2].any() and padded[zeros // 2] == 1  # an odd one lies behind


@pytest.mark.thorough
def test_i3d_reads_clips_of_nine_frames_or_more(tmp_path):
    network = wake(i3d.I3D())
    file = tmp_path / "rgb_imagenet.safetensors"
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, file)
    encoder = open_encoder(str(file))
    pixels = torch.rand(1, 9, 3, 32, 48)
    features = encoder(pixels)
    assert features.shape == (1, 400) and features.std() > 0 and encoder.reads == "clips"
    with pytest.raises(ValueError, match="9 frames or more"):
        encoder(pixels[:, :8])
    with pytest.raises(ValueError, match="no features of one frame"):
        encoder.of_frames(pixels)
    with pytest.raises(ValueError, match="clips=halves is for encoders of pictures"):
        open_encoder(str(file), clips="halves")


# ── tokenizers ────────────────────────────────────────────────────────────────────────────────────
def test_features_of_the_tokenizer_know_places_and_time():
    config = VTPTokenizerConfig()
    encoder = open_encoder("tokenizer")
    pixels = torch.rand(2, 4, 3, 32, 48)
    latents = build_tokenizer(config).encode(pixels)
    features = encoder(pixels)
    torch.testing.assert_close(features, pooled_latents(latents), atol=1e-4, rtol=1e-4)
    assert features.shape == (2, 10 * 64) and encoder(pixels[:, :1]).shape == (2, 5 * 64)
    one = torch.arange(16.0).view(1, 1, 4, 4, 1)
    pooled = pooled_latents(one)[0]
    torch.testing.assert_close(pooled[:4], torch.tensor([2.5, 4.5, 10.5, 12.5]))
    torch.testing.assert_close(pooled[4], one.std(correction=0))
    mirrored, reversed_ = pooled_latents(latents.flip(3)), pooled_latents(latents.flip(1))
    assert (mirrored - pooled_latents(latents)).abs().max() > 0.1
    assert (reversed_ - pooled_latents(latents)).abs().max() > 0.1


# ── transformers ──────────────────────────────────────────────────────────────────────────────────
def test_folders_of_transformers_follow_their_papers(tmp_path):
    transformers = pytest.importorskip("transformers")
    shared = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    picture = transformers.Dinov2Model(
        transformers.Dinov2Config(**shared, image_size=28, patch_size=14)
    ).eval()
    picture.save_pretrained(tmp_path / "dino")
    encoder = open_encoder(str(tmp_path / "dino"), clips="halves")
    pixels = torch.rand(2, 4, 3, 30, 50)
    mean, deviation = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (mean, deviation))
    whole = F.interpolate(pixels.flatten(0, 1), (224, 224), mode="bicubic", antialias=True)
    with torch.no_grad():
        known = picture((whole.clamp(0, 1) - mean) / deviation).pooler_output.unflatten(0, (2, 4))
    torch.testing.assert_close(encoder.of_frames(pixels), known, atol=1e-4, rtol=1e-4)
    halves = torch.cat([known[:, :2].mean(1), known[:, 2:].mean(1)], 1)
    torch.testing.assert_close(encoder(pixels), halves, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="two frames at least"):
        encoder(pixels[:, :1])
    middle = open_encoder(str(tmp_path / "dino"))
    # of four frames the one that a real clip of four gives, too
    torch.testing.assert_close(middle(pixels), known[:, 1], atol=1e-4, rtol=1e-4)
    clip_config = transformers.VideoMAEConfig(
        **shared, image_size=32, patch_size=16, num_frames=4, tubelet_size=2, intermediate_size=32
    )
    clip = transformers.VideoMAEModel(clip_config).eval()
    clip.save_pretrained(tmp_path / "videomae")
    encoder = open_encoder(str(tmp_path / "videomae"))
    longer = torch.rand(1, 6, 3, 32, 32)
    with torch.no_grad():
        tokens = clip((longer[:, 1:5] - mean) / deviation).last_hidden_state
    torch.testing.assert_close(encoder(longer), tokens.mean(1), atol=1e-4, rtol=1e-4)
    assert encoder.facts["frames"] == "the middle 4"
    with pytest.raises(ValueError, match="clips of 4 frames, these have 3"):
        encoder(longer[:, :3])
    (tmp_path / "dino" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no .safetensors file"):
        open_encoder(str(tmp_path / "dino"))


# ── what is refused ───────────────────────────────────────────────────────────────────────────────
class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def test_programs_foreign_files_and_options_without_effect_are_refused(
    tmp_path, inception_files, monkeypatch
):
    torch.jit.script(Twice()).save(str(tmp_path / "i3d_torchscript.pt"))
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    short = dict(torch.load(inception_files["fid"], weights_only=True))
    torch.save(short | {"fc.weight": torch.zeros(10, 2048)}, tmp_path / "ten.pth")
    del short["Mixed_6b.branch1x1.bn.running_var"]
    torch.save(short, tmp_path / "short.pth")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    save_file({"weight": torch.zeros(1)}, tmp_path / "bert" / "model.safetensors")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("i3d_torchscript.pt", "is TorchScript, a program that would be run.*rgb_imagenet.pt"),
        ("other.safetensors", "neither Inception V3 nor I3D; for a network of timm give name="),
        ("ten.pth", "of 10 classes; must be one of 1008"),
        ("short.pth", "lacks 1 tensors, first Mixed_6b.branch1x1.bn.running_var"),
        ("bert", "model_type is 'bert'; must be clip"),
        ("empty", "holds no config.json"),
        ("none.pth", "does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            open_encoder(str(tmp_path / name))
    with pytest.raises(ValueError, match="resize=clean is for Inception and I3D"):
        open_encoder("tokenizer", resize="clean")
    timm = SimpleNamespace(name="inception_v3", facts={"resize": "crop"}, reads="pictures")
    monkeypatch.setattr(encoders, "_timm", lambda *_: timm)
    with pytest.raises(ValueError, match="for Inception and I3D; inception_v3 has crop"):
        open_encoder("x.safetensors", name="inception_v3", resize="clean")


def test_the_hash_is_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert encoders.digest([tmp_path / "a"]) == expected
