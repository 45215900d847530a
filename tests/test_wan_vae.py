"""The Wan VAEs: the numbers of the official code, streaming, tiles, both layouts, and what is
refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdit.config import ConfigError
from mmdit.data.cache.latent_cache import open_cache
from mmdit.scripts import cache_moving_shapes
from mmdit.tokenizers import WanVAETokenizerConfig, build_tokenizer
from mmdit.tokenizers.wan_vae import FILES, STATISTICS
from mmdit.tokenizers.wan_vae_network import WanVAE, WanVAESizes
from mmdit.tokenizers.with_picture import WithPicture
from tests.helpers.thorough import thorough
from tests.helpers.tiny import Workshop

GOLDEN = Path(__file__).parent / "golden"
SIZES = {"21": {"latent_f": 8, "latent_d": 4}, "22": {"latent_f": 16, "latent_d": 6}}


def opened(folder: Path, version: str, layout: str = "official", **keys):
    """The golden VAE from a folder as it is found in the wild."""
    meta = json.loads((GOLDEN / f"wan_vae{version}_tiny/meta.json").read_text())
    weights = load_file(GOLDEN / f"wan_vae{version}_tiny/official.safetensors")
    place = folder / "vae" if layout == "diffusers" else folder
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(meta["diffusers_config"]))
    if layout == "diffusers":
        renamed = {
            meta["key_map_official_to_diffusers"][name]: value for name, value in weights.items()
        }
        save_file(renamed, place / "diffusion_pytorch_model.safetensors")
    else:
        prefix = "model." if layout == "repacked" else ""
        prefixed = {f"{prefix}{name}": value for name, value in weights.items()}
        torch.save(prefixed, place / f"Wan2.{version[1]}_VAE.pth")
    return build_tokenizer(WanVAETokenizerConfig(name_or_path=str(folder), **SIZES[version] | keys))


def golden(version: str) -> dict:
    """In our layout: pixels [0, 1] (B, F, 3, H, W), latents (B, F, h, w, C)."""
    stored = load_file(GOLDEN / f"wan_vae{version}_tiny/io.safetensors")
    pixels = lambda x: x.permute(0, 2, 1, 3, 4) / 2 + 0.5
    latents = lambda x: x.permute(0, 2, 3, 4, 1)
    return {
        "video": pixels(stored["in.video"]),
        "mean": latents(stored["out.mu_raw"]),
        "z": latents(stored["out.z"]),
        "given": latents(stored["in.z"]),
        "decoded": pixels(stored["out.decoded_unclamped"]).clamp(0, 1),
    }


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("layout", ["official", *thorough("diffusers", "repacked")])
@pytest.mark.parametrize("version", SIZES)
def test_the_numbers_of_the_official_code(tmp_path, version, layout):
    tokenizer, known = opened(tmp_path, version, layout), golden(version)
    raw = tokenizer.encode(known["video"])
    assert (
        error(raw, known["mean"]) < 1e-6 and error(tokenizer.spec.normalize(raw), known["z"]) < 1e-6
    )
    signed = tokenizer.decode(tokenizer.spec.denormalize(known["given"])) * 2 - 1
    assert error(signed, known["decoded"] * 2 - 1) < 2e-5


def test_both_layouts_are_one_tokenizer(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    assert (
        opened(tmp_path / "a", "22").fingerprint
        == opened(tmp_path / "b", "22", "diffusers").fingerprint
    )


@torch.no_grad()
@pytest.mark.parametrize("version", SIZES)
def test_the_past_alone_decides(tmp_path, version):
    tokenizer, video = opened(tmp_path, version), torch.rand(2, 9, 3, 32, 32)
    latents = tokenizer.encode(video)
    torch.testing.assert_close(
        tokenizer.encode(video[:, :1]), latents[:, :1], rtol=0, atol=5e-6
    )  # a picture
    torch.testing.assert_close(tokenizer.encode(video[:, :5]), latents[:, :2], rtol=0, atol=5e-6)
    torch.testing.assert_close(tokenizer.encode(video[1:]), latents[1:], rtol=0, atol=5e-6)
    decoded = tokenizer.decode(latents)
    assert decoded.shape == video.shape
    torch.testing.assert_close(tokenizer.decode(latents[:, :2]), decoded[:, :5], rtol=0, atol=1e-5)
    moved = video.clone()
    moved[:, 8] = 0
    assert error(tokenizer.encode(moved)[:, 2], latents[:, 2]) > 1e-3


def test_generated_clips_are_not_added_in_another_precision(tmp_path):
    (tmp_path / "vae21").mkdir()
    opened(tmp_path / "vae21", "21")
    shop = Workshop(tmp_path)

    def cache(count: int, dtype: str) -> None:
        section = f"{{type: wan_vae, name_or_path: {tmp_path}/vae21, latent_f: 8, latent_d: 4"
        words = [f"tokenizer={section}, dtype: {dtype}}}", "video.num_frames=5"]
        arguments = ["--config", str(shop.config), "--out_dir", str(tmp_path / "cache")]
        cache_moving_shapes.main([*arguments, "--count", str(count), "--device", "cpu", *words])

    cache(2, "bfloat16")
    cache(2, "float32")  # nothing is encoded
    with pytest.raises(SystemExit):
        cache(3, "float32")
    cache(3, "bfloat16")
    assert len(open_cache(tmp_path / "cache")) == 3
    with_picture = WithPicture(opened(tmp_path / "vae21", "21", dtype="bfloat16"), "first")
    assert with_picture.precision == "bfloat16"


@torch.no_grad()
def test_tiles_are_close_to_the_whole_and_leave_small_frames_alone(tmp_path):
    whole, tiled = opened(tmp_path, "21"), opened(tmp_path, "21", tile=64)
    ramp = torch.linspace(0, 1, 144).expand(1, 5, 3, 96, 144) * torch.linspace(0.5, 1, 96)[:, None]
    latents = whole.encode(ramp)
    assert tiled.encode(ramp).shape == latents.shape == (1, 2, 12, 18, 4)
    assert 0 < error(tiled.encode(ramp), latents) < 0.3
    assert (
        0 < error(tiled.decode(latents), whole.decode(latents)) < 0.35
    )  # random weights look far aside
    assert torch.equal(tiled.encode(ramp[..., :64, :64]), whole.encode(ramp[..., :64, :64]))
    flat = torch.ones(1, 1, 12, 18, 4)
    local = tiled._tiled(
        lambda x: x * 3, flat.permute(0, 4, 1, 2, 3), 1, 1
    )  # what does not look aside comes out exact
    torch.testing.assert_close(local, torch.full_like(local, 3.0))


@pytest.mark.parametrize(
    "sizes, parameters, tensors",
    [
        (WanVAESizes(96, 96, 16, False), 126_892_531, 194),
        (WanVAESizes(160, 256, 48, True), 704_688_668, 196),
    ],
)
def test_the_released_sizes(sizes, parameters, tensors):
    with torch.device("meta"):
        model = WanVAE(sizes)
    assert (
        sum(p.numel() for p in model.parameters()) == parameters
        and len(model.state_dict()) == tensors
    )
    mean, std = STATISTICS[sizes.channels]
    assert len(mean) == len(std) == sizes.channels and sizes.spatial == (
        16 if sizes.residual else 8
    )


def test_what_does_not_belong_is_refused_in_one_sentence(tmp_path):
    tokenizer = opened(tmp_path, "21")
    for frames, near in ((4, "1 and 5"), (7, "5 and 9"), (80, "77 and 81")):
        with pytest.raises(ValueError, match=f"{frames} frames are not 4n . 1.*{near}"):
            tokenizer.encode(torch.rand(1, frames, 3, 16, 16))
    with pytest.raises(ValueError, match="multiple of 8"):
        tokenizer.encode(torch.rand(1, 1, 3, 20, 16))
    with pytest.raises(
        ConfigError, match=r"tokenizer.latent_d: is 16, but .* is a Wan 2.1 VAE with 4"
    ):
        opened(tmp_path, "21", latent_d=16)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match="4 latent channels, of which no statistics"):
        build_tokenizer(WanVAETokenizerConfig(name_or_path=str(tmp_path), **SIZES["21"]))
    with pytest.raises(ConfigError, match="multiple of 32"):
        WanVAETokenizerConfig(name_or_path="x", tile=100)
    for content, words in (({"a": torch.ones(1)}, "is no Wan VAE"), ([print], "refused")):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(ConfigError, match=words):
            build_tokenizer(WanVAETokenizerConfig(name_or_path=str(tmp_path / "x.pth")))
    for name in FILES:
        torch.save({}, tmp_path / name)
    with pytest.raises(ConfigError, match="holds Wan2.1_VAE.pth and Wan2.2_VAE.pth: name the file"):
        build_tokenizer(WanVAETokenizerConfig(name_or_path=str(tmp_path)))
    weights = load_file(GOLDEN / "wan_vae21_tiny/official.safetensors")
    del weights["decoder.head.2.bias"]
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(
        ConfigError, match="read as a Wan 2.1 VAE, lacks 1 tensors, first decoder.head.2.bias"
    ):
        build_tokenizer(WanVAETokenizerConfig(name_or_path=str(tmp_path / "x.pth")))


@torch.no_grad()
@pytest.mark.parametrize("version", SIZES)
def test_diffusers_reads_and_computes_the_same(tmp_path, version):
    diffusers = pytest.importorskip("diffusers")
    tokenizer = opened(tmp_path, version, "diffusers")
    theirs = diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "vae").eval()
    video = torch.rand(1, 9, 3, 32, 64)
    expected = (
        theirs.encode(video.permute(0, 2, 1, 3, 4) * 2 - 1)
        .latent_dist.mode()
        .permute(0, 2, 3, 4, 1)
    )
    assert error(tokenizer.encode(video), expected) < 1e-6
    latents = torch.randn(1, 3, 2, 4, SIZES[version]["latent_d"])
    pixels = theirs.decode(latents.permute(0, 4, 1, 2, 3)).sample.permute(0, 2, 1, 3, 4) / 2 + 0.5
    assert error(tokenizer.decode(latents), pixels.clamp(0, 1)) < 2e-5
