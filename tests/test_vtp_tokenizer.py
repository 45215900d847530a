"""The tokenizers that mmdit uses: layout and range of pixels and latents, refusals, and a foreign
clone of the VTP code."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdit import config as configs
from mmdit.config import ConfigError
from mmdit.interfaces import Tokenizer
from mmdit.tokenizers import (
    DummyTokenizerConfig,
    TokenizerConfig,
    VTPTokenizerConfig,
    build_tokenizer,
)
from tests.helpers import warm

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests/golden/vtp_tiny"
MEAN, STD = (
    torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1),
    torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1),
)


def vtp(folder=GOLDEN, **changes):
    return build_tokenizer(
        VTPTokenizerConfig(**{"name_or_path": str(folder), "latent_d": 16, **changes})
    )


def relative(actual, expected):
    """Relative L2 error. Where inputs differ in the last bit, the bfloat16 rounding of positions
    makes that up to 1e-4."""
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden checkpoint that a test may damage."""
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("size", ["64x64", "48x80"])
def test_golden_latents_through_the_wrapper(size):
    golden = load_file(GOLDEN / "io.safetensors")
    tokenizer = vtp(chunk_size=1)
    assert isinstance(tokenizer, Tokenizer)
    pixels = golden[f"{size}.image"] * STD + MEAN
    latents = tokenizer.encode(pixels[:, None])
    expected = golden[f"{size}.latents"].permute(0, 2, 3, 1)[:, None]
    assert latents.dtype == torch.float32 and relative(latents, expected) < 1e-4
    decoded = tokenizer.decode(expected)[:, 0]
    expected = (golden[f"{size}.decoded"] * STD + MEAN).clamp(0, 1)
    assert relative(decoded, expected) < 1e-5 and expected.max() == 1


def test_frames_are_images_whatever_the_chunks():
    pixels = torch.rand(2, 3, 3, 32, 48)
    tokenizer = vtp(chunk_size=4)  # a chunk that crosses from one clip into the next
    latents = tokenizer.encode(pixels)
    assert latents.shape == (2, 3, 2, 3, 16)
    for clip in range(2):
        for frame in range(3):
            alone = tokenizer.encode(pixels[clip : clip + 1, frame : frame + 1])
            assert relative(latents[clip, frame], alone[0, 0]) < 1e-3
    decoded = tokenizer.decode(latents)
    assert decoded.shape == pixels.shape and decoded.min() >= 0 and decoded.max() <= 1
    assert relative(decoded[1, 2], tokenizer.decode(latents[1:, 2:])[0, 0]) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_returns_float32(dtype):
    pixels = torch.rand(1, 2, 3, 32, 32)
    settings = VTPTokenizerConfig(name_or_path=str(GOLDEN), latent_d=16)
    low, full = build_tokenizer(settings, dtype=dtype).encode(pixels), vtp().encode(pixels)
    assert low.dtype == torch.float32 and 1e-6 < relative(low, full) < 2e-2


def test_gradients_reach_latents_but_not_weights():
    tokenizer = vtp()
    latents = tokenizer.encode(torch.rand(1, 1, 3, 32, 32))
    assert not latents.requires_grad
    latents.requires_grad_()
    tokenizer.decode(latents).sum().backward()
    assert latents.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "make", [vtp, lambda: build_tokenizer(DummyTokenizerConfig(latent_d=16))], ids=["vtp", "dummy"]
)
def test_refusals(make):
    tokenizer = make()
    for pixels, words in (
        (torch.rand(1, 1, 3, 48, 50), "50x48 is not a multiple of 16"),
        (torch.rand(1, 1, 3, 40, 48), "48x40"),
        (torch.rand(1, 3, 48, 48), r"\(1, 3, 48, 48\); must be \(batch, frames, 3"),
        (torch.rand(1, 3, 1, 48, 48), r"must be \(batch, frames, 3"),
        (torch.zeros(1, 1, 3, 48, 48, dtype=torch.uint8), "uint8; must be floating"),
    ):
        with pytest.raises(ValueError, match=words):
            tokenizer.encode(pixels)
    with pytest.raises(
        ValueError, match=r"\(1, 1, 3, 3, 17\); must be \(batch, frames, rows, columns, 16\)"
    ):
        tokenizer.decode(torch.zeros(1, 1, 3, 3, 17))


def test_configs_that_contradict_the_checkpoint(folder, tmp_path):
    with pytest.raises(
        ConfigError, match=r"tokenizer.latent_d: is 64, but the checkpoint .* has 16; set it to 16"
    ):
        vtp(latent_d=64)
    with pytest.raises(ConfigError, match=r"tokenizer.latent_f: is 8, but .* has 16"):
        vtp(latent_f=8)
    with pytest.raises(
        ConfigError, match=r"is 'no/such/folder', which is not there .*train-vtp --config"
    ):
        vtp("no/such/folder")
    with pytest.raises(ConfigError, match="holds no config.json"):
        vtp(ROOT / "tests")
    with pytest.raises(ConfigError, match="repo_path: is 'tests'; must be a clone"):
        vtp(repo_path="tests")
    with pytest.raises(ConfigError, match="chunk_size: is 0; must be above 0"):
        VTPTokenizerConfig(chunk_size=0)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="cannot be opened: .*not a readable safetensors file"):
        vtp(folder)


def test_patches_that_the_decoder_cannot_undo(tmp_path):
    from vtp.models import VTPConfig, VTPModel

    small = dict(
        vision_embed_dim=8,
        vision_depth=1,
        vision_num_heads=2,
        decoder_embed_dim=8,
        decoder_depth=1,
        decoder_num_heads=2,
    )
    VTPModel(VTPConfig(**small, vision_patch_size=8, train_clip=False)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="vision_patch_size 8, but the decoder upsamples by 16"):
        vtp(tmp_path, latent_f=8, latent_d=64)


def test_latent_statistics(folder):
    stats = {"mean": [0.5] * 16, "std": [2.0] * 16}
    (folder / "latent_stats.json").write_text(json.dumps(stats))
    spec = vtp(folder, latent_scale=3.0).spec
    assert torch.allclose(spec.normalize(torch.full((1, 16), 2.5)), torch.full((1, 16), 3.0))
    assert vtp(folder, latent_stats="none").spec.mean == () == vtp().spec.mean
    other = folder / "other.json"
    for text, words in (
        (
            json.dumps({"mean": [0.0] * 15, "std": [1.0] * 16}),
            "has 15 means and 16 deviations; must be latent_d = 16",
        ),
        (json.dumps({"mean": [0.0] * 16, "std": [0.0] * 16}), "deviation of 0"),
        (json.dumps({"mean": [float("nan")] * 16, "std": [1.0] * 16}), "not finite"),
        (json.dumps({"vtp_s": stats}), "must hold"),
        ("[]", "must be statistics"),
        ("{", "is no statistics"),
    ):
        other.write_text(text)
        with pytest.raises(ConfigError, match=words):
            vtp(folder, latent_stats=str(other))
    with pytest.raises(ConfigError, match="'absent.json', not a file"):
        vtp(latent_stats="absent.json")


def test_fingerprint_is_of_what_latents_depend_on(folder):
    original = vtp().fingerprint
    assert vtp(folder).fingerprint == original  # the place does not matter
    assert vtp(folder, latent_scale=2.0, chunk_size=1).fingerprint == original
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "vision_clip_feat": "pooled"}))
    changed = vtp(folder).fingerprint
    weights = load_file(folder / "model.safetensors")
    for part, changes in (("pixel_decoder.", False), ("trunk.", True)):
        name = next(
            name for name in weights if name.startswith(part) and weights[name].is_floating_point()
        )
        weights[name] = weights[name] + 1
        save_file(weights, folder / "model.safetensors")
        assert (vtp(folder).fingerprint != changed) == changes, name
    assert original != changed
    dummies = [build_tokenizer(DummyTokenizerConfig(latent_d=d)).fingerprint for d in (16, 16, 32)]
    assert dummies[0] == dummies[1] != dummies[2]


def test_relative_paths_reach_the_files_that_ship(monkeypatch, tmp_path):
    name = "VTP/checkpoints/vtp_tiny_f16d64"
    monkeypatch.chdir(tmp_path)
    assert vtp(name, latent_d=64).fingerprint == vtp(ROOT / name, latent_d=64).fingerprint


CHILD = """
import sys, torch
sys.modules["transformers"] = None  # as if not installed
from mmdit.config import ConfigError
from mmdit.tokenizers import VTPTokenizerConfig, build_tokenizer
checkpoint, clone, out = sys.argv[1:]
settings = dict(name_or_path=checkpoint, latent_d=16)
tokenizer = build_tokenizer(VTPTokenizerConfig(**settings, repo_path=clone))
assert sys.modules["vtp"].__file__.startswith(clone), sys.modules["vtp"].__file__
pixels = torch.rand(1, 1, 3, 48, 32, generator=torch.Generator().manual_seed(5))
torch.save(tokenizer.encode(pixels), out)
try:
    build_tokenizer(VTPTokenizerConfig(**settings))
except ConfigError as error:
    print(error)
"""


def test_a_clone_elsewhere_gives_the_same_latents(tmp_path):
    """In a process without transformers; a second code base in the same process is
    refused."""
    clone = tmp_path / "clone"
    shutil.copytree(
        ROOT / "VTP/vtp", clone / "vtp", ignore=shutil.ignore_patterns("__pycache__", "train")
    )
    out = tmp_path / "latents.pt"
    child = warm.run("-c", CHILD, GOLDEN, clone, out, cwd=tmp_path)
    assert child.returncode == 0, child.stderr
    assert "has already imported that of" in child.stdout and str(clone) in child.stdout
    pixels = torch.rand(1, 1, 3, 48, 32, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.load(out, weights_only=True), vtp().encode(pixels))


def test_a_clone_that_cannot_be_imported_leaves_nothing_behind(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "vtp"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "vtp/models").mkdir(parents=True)
    (tmp_path / "vtp/__init__.py").write_text("import a_package_that_nobody_has\n")
    path = list(sys.path)
    for _ in range(2):
        with pytest.raises(
            ConfigError, match="cannot be imported: No module named 'a_package_that_nobody_has'"
        ):
            vtp(repo_path=str(tmp_path))
    assert sys.path == path and "vtp" not in sys.modules


NEVER_INSTALLED = """
import sys
from importlib.machinery import PathFinder
sys.path = [place for place in sys.path if PathFinder.find_spec("vtp", [place]) is None]
from mmdit.tokenizers.vtp import import_vtp
code = import_vtp()
from vtp.pixels import normalize  # on the path from now on, once
import_vtp()
print(code.__file__, sum(place.endswith("VTP") for place in sys.path))
"""


def test_a_source_tree_that_was_never_installed_has_the_package_too(tmp_path):
    child = warm.run("-c", NEVER_INSTALLED, cwd=tmp_path)
    assert child.stdout.split() == [str(ROOT / "VTP/vtp/models/vtp_hf.py"), "1"], child.stderr


# ── dummy ─────────────────────────────────────────────────────────────────────────────────────────
def test_dummy_keeps_smooth_pictures():
    tokenizer = build_tokenizer(DummyTokenizerConfig())
    ramp = torch.linspace(0.1, 0.9, 64).expand(1, 2, 3, 48, 64)
    latents = tokenizer.encode(ramp)
    assert latents.shape == (1, 2, 3, 4, 64) and isinstance(tokenizer, Tokenizer)
    assert (tokenizer.decode(latents) - ramp).abs().max() < 0.01
    flat = torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1).expand(1, 1, 3, 16, 16)
    assert torch.allclose(
        tokenizer.encode(flat)[..., :3].flatten(), torch.tensor([-0.6, 0.0, 0.8]), atol=1e-6
    )


def test_dummy_with_all_channels_is_exact_and_linear():
    tokenizer = build_tokenizer(DummyTokenizerConfig(latent_f=4, latent_d=48))
    a, b = torch.rand(2, 1, 2, 3, 8, 12)
    assert torch.allclose(tokenizer.decode(tokenizer.encode(a)), a, atol=1e-5)
    middle = tokenizer.encode((a + b) / 2)
    assert torch.allclose(middle, (tokenizer.encode(a) + tokenizer.encode(b)) / 2, atol=1e-6)
    with pytest.raises(ConfigError, match="latent_d: is 49; must be at most 48"):
        DummyTokenizerConfig(latent_f=4, latent_d=49)


def test_configs_decode_by_type():
    assert configs.decode(
        TokenizerConfig, {"type": "dummy", "latent_d": 8}
    ) == DummyTokenizerConfig(latent_d=8)
    assert configs.decode(TokenizerConfig, {"type": "vtp"}, "tokenizer") == VTPTokenizerConfig()
    with pytest.raises(ConfigError, match="latent_scale: is 0"):
        configs.decode(TokenizerConfig, {"type": "vtp", "latent_scale": 0}, "tokenizer")
