"""A size of its own for every source: within the budget, never above the source, almost nothing
cropped."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit.config import ConfigError, decode
from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.writer import CacheWriter
from mmdit.data.dataset.buckets import BucketingConfig, VideoConfig, budget_size, target_sizes
from tests.test_cache import VIDEO, MeanPixels, run, write_meta

BUDGET = BucketingConfig(True, "pixel_budget", max_pixels_per_frame=64 * 64)


def random_sources(count, pixels, seed=0):
    """Aspect ratios from 0.4 to 2.5, areas from the budget to 20 times it, both uniform in the
    logarithm."""
    draws = np.random.default_rng(seed)
    ratios, areas = (
        np.exp(draws.uniform(math.log(0.4), math.log(2.5), count)),
        pixels * np.exp(draws.uniform(0, 3, count)),
    )
    return [
        (round((a * ratio) ** 0.5), round((a / ratio) ** 0.5))
        for a, ratio in zip(areas, ratios, strict=True)
    ]


SIZES = [(16, 256 * 256), (16, 448 * 256), (16, 512 * 512), (8, 256 * 256), (32, 512 * 512)]


@pytest.mark.parametrize("spatial, pixels", SIZES)
def test_sizes_fit_the_budget_and_the_source_and_keep_nearly_every_pixel(spatial, pixels):
    kept, fill = [], []
    for source in random_sources(400, pixels):
        size = budget_size(source, pixels, spatial)
        assert size[0] % spatial == size[1] % spatial == 0 and math.prod(size) <= pixels
        assert size[0] <= source[0] and size[1] <= source[1]
        ratio = size[0] / size[1] / (source[0] / source[1])
        kept.append(min(ratio, 1 / ratio))
        fill.append(math.prod(size) / pixels)
    assert min(kept) >= 1 / 1.05 - 1e-9 and np.mean(kept) >= 0.975 and np.mean(fill) >= 0.95


def test_known_shapes():
    assert budget_size((1920, 1080), 512 * 512, 32) == (672, 384)
    assert budget_size((2390, 1000), 512 * 512, 32) == (768, 320)
    assert budget_size((1080, 1920), 512 * 512, 32) == (384, 672)
    assert budget_size((300, 300), 512 * 512, 16) == (288, 288)  # a small source is not enlarged
    assert budget_size((47, 320), 512 * 512, 16) == (
        32,
        224,
    )  # 48x320 would be nearer and larger, but enlarged
    assert budget_size((17, 4000), 512 * 512, 16)[0] == 16
    with pytest.raises(ValueError, match="too small: 30000x10 pixels"):
        budget_size((30000, 10), 65536, 16)


@pytest.mark.parametrize("seed", range(3))
def test_no_size_loses_less_by_direct_search(seed):
    def loss(source, size, pixels):
        off = abs(math.log(size[0] * source[1] / size[1] / source[0]))
        return (
            off > math.log(1.05),
            off if off > math.log(1.05) else 0,
            (1 - math.exp(-off) + 0.5 * math.log(min(pixels, math.prod(source)) / math.prod(size))),
        )

    for source in random_sources(20, 48 * 48, seed):
        sizes = [
            (w, h)
            for w in range(8, source[0] + 1, 8)
            for h in range(8, source[1] + 1, 8)
            if w * h <= 48 * 48
        ]
        best = min(loss(source, size, 48 * 48) for size in sizes)
        assert loss(source, budget_size(source, 48 * 48, 8), 48 * 48) == pytest.approx(best)


@pytest.mark.parametrize(
    "values, told",
    [
        ({"strategy": "pixel_budget"}, "max_pixels_per_frame: is 0; .* needs it"),
        (
            {"strategy": "pixel_budget", "max_pixels_per_frame": 9, "buckets": [[64, 64]]},
            "remove the list",
        ),
        ({"max_pixels_per_frame": 65536, "buckets": [[64, 64]]}, "set strategy: pixel_budget"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values, told):
    with pytest.raises(ConfigError, match=told):
        decode(BucketingConfig, {"enabled": True, **values})


def test_a_budget_below_one_cell_is_refused_and_previews_have_the_videos_size():
    with pytest.raises(ConfigError, match="at least 256"):
        target_sizes(
            VideoConfig(), BucketingConfig(True, "pixel_budget", max_pixels_per_frame=255), 16
        )
    assert target_sizes(VideoConfig(96, 64), BUDGET, 16) == ((96, 64),)


def test_pictures_and_clips_of_many_shapes_and_lengths_share_a_cache(tmp_path):
    shapes = {
        "square": (100, 100),
        "wide": (160, 80),
        "tall": (70, 140),
        "small": (40, 35),
        "thread": (500, 9),
    }
    for name, size in shapes.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    meta = write_meta(
        tmp_path, [{"id": name, "image_path": f"{name}.png", "caption": name} for name in shapes]
    )
    report = run(meta, tmp_path / "cache", bucketing=BUDGET)
    assert report.sizes == {"64x64": 1, "64x32": 1, "32x64": 1, "32x32": 1}
    assert [skip.id for skip in report.skipped] == [
        "thread"
    ] and "too small: 500x9" in report.skipped[0].reason
    assert (tmp_path / "cache/64x64/square.pt").exists()
    tokenizer = MeanPixels()
    assert (
        run(meta, tmp_path / "cache", tokenizer, bucketing=BUDGET).already == 4
        and tokenizer.encoded == 0
    )
    wanted = CacheManifest.of(
        MeanPixels(),
        VideoConfig(),
        BucketingConfig(True, "pixel_budget", max_pixels_per_frame=4097),
    )
    with pytest.raises(
        ValueError, match="max_pixels_per_frame: the cache has 4096, the config asks 4097"
    ):
        open_cache(tmp_path / "cache", wanted)
    plan = BatchPlan(open_cache(tmp_path / "cache"), VideoConfig(), 2, seed=0)
    assert sorted({item for step in range(4) for item in plan.batch(step).items.tolist()}) == [
        0,
        1,
        2,
        3,
    ]
    writer = CacheWriter(tmp_path / "cache", CacheManifest.of(MeanPixels(), VIDEO, BUDGET))
    with writer, pytest.raises(ValueError, match="at most 4096 pixels"):
        writer.add("large", torch.zeros(1, 5, 4, 3), "")


def test_manifests_of_before_can_still_be_read(tmp_path):
    manifest = CacheManifest.of(MeanPixels(), VideoConfig())
    manifest.write(tmp_path)
    row = json.loads((tmp_path / "manifest.json").read_text())
    del row["max_pixels_per_frame"]
    (tmp_path / "manifest.json").write_text(json.dumps(row))
    assert CacheManifest.read(tmp_path) == manifest
