"""JPEG files decoded by torchvision on the device that encodes. On a CPU it decodes the same pixels
as Pillow, so that only the crop, which begins at a whole pixel, may differ."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from mmdit.config import ConfigError
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.dataset.frames import PreprocessConfig
from mmdit.data.dataset.jpegs import CodedPicture, decode_jpegs, read_plain
from tests.test_cache import MeanPixels, run, write_meta

try:
    import torchvision.io  # noqa: F401 (only whether it can be imported)
except (ImportError, RuntimeError, OSError):
    pytest.skip("torchvision cannot be imported", allow_module_level=True)

TORCHVISION = PreprocessConfig(jpeg_decoder="torchvision")


def photo(size, seed=0):
    noise = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def swapped_profile():
    """A profile whose red is sRGB's green."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"-XYZ").replace(b"gXYZ", b"rXYZ").replace(b"-XYZ", b"gXYZ")


@pytest.fixture
def pictures(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    photo((80, 48)).save(tmp_path / "plain.jpg")
    photo((70, 51), 1).save(tmp_path / "odd.jpeg", progressive=True)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo((64, 64), 2).save(tmp_path / "srgb.jpg", icc_profile=srgb)
    photo((80, 48), 3).save(tmp_path / "turned.jpg", exif=turned)
    photo((80, 48), 4).save(tmp_path / "profile.jpg", icc_profile=swapped_profile())
    photo((80, 48), 5).convert("CMYK").save(tmp_path / "cmyk.jpg")
    photo((80, 48), 6).convert("L").save(tmp_path / "grey.jpg")
    photo((80, 48), 7).save(tmp_path / "lossless.png")
    whole = (tmp_path / "plain.jpg").read_bytes()
    (tmp_path / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "broken.jpg").write_bytes(whole[:30] + b"\xff\xd9")
    names = [path.name for path in sorted(tmp_path.iterdir())]
    rows = [{"id": name, "image_path": name, "caption": name} for name in names]
    return write_meta(tmp_path, rows)


def test_only_a_jpeg_that_any_viewer_shows_as_it_is_stored_is_left_to_the_device(pictures):
    plain = [
        path.name
        for path in sorted(pictures.parent.iterdir())
        if path.suffix in (".jpg", ".jpeg", ".png")
        and path.name != "broken.jpg"
        and read_plain(path)
    ]
    assert plain == ["odd.jpeg", "plain.jpg", "srgb.jpg"]


def test_the_same_items_come_from_either_decoder(pictures, tmp_path):
    reports = {}
    for name, preprocess in (("pillow", PreprocessConfig()), ("torchvision", TORCHVISION)):
        reports[name] = run(pictures, tmp_path / name, preprocess=preprocess, batch_size=4)
    assert reports["torchvision"].skipped == reports["pillow"].skipped != []
    before, after = open_cache(tmp_path / "pillow"), open_cache(tmp_path / "torchvision")
    assert after.ids == before.ids and after.sources == before.sources
    for number, name in enumerate(before.ids):
        difference = (after.load(number).float() - before.load(number).float()).abs().max()
        exact = name not in ("odd.jpeg", "plain.jpg", "srgb.jpg")
        assert difference == 0 if exact else difference < 0.02, name


def test_the_manifest_says_which_decoder_made_it_and_refuses_another(pictures, tmp_path):
    run(pictures, tmp_path / "cache", preprocess=TORCHVISION)
    with pytest.raises(ValueError, match=r"preprocess\.jpeg_decoder: the cache has torchvision"):
        run(pictures, tmp_path / "cache")
    run(pictures, tmp_path / "other")
    assert "jpeg_decoder" not in open_cache(tmp_path / "other").manifest.preprocess


def test_a_file_that_cannot_be_decoded_takes_no_other_with_it(pictures):
    data, size = read_plain(pictures.parent / "plain.jpg")
    whole = CodedPicture(data, (32, 16), [(0, 0, *size), (8, 0, 40, 16)])
    broken = CodedPicture(data[:40], (32, 16), [(0, 0, *size)])
    first, nothing, second = decode_jpegs([whole, broken, whole], "cpu")
    assert nothing is None
    assert [crop.shape for crop in first] == [torch.Size((3, 16, 32))] * 2
    assert all(map(torch.equal, first, second))


def test_without_torchvision_the_remedy_is_said_before_any_work(pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    tokenizer = MeanPixels()
    with pytest.raises(ConfigError, match=r"preprocess\.jpeg_decoder.*set it to pillow"):
        run(pictures, tmp_path / "cache", tokenizer, preprocess=TORCHVISION)
    assert tokenizer.encoded == 0 and not (tmp_path / "cache").exists()
