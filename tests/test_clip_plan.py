"""What a cache is made with is its key: each setting that changes the latents is compared by
itself. Clips of a tokenizer that joins frames in time are cut when they are cached, and that plan
belongs to the key."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit.config import ConfigError
from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.batches.latent_batches import LatentBatches
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.dataset.buckets import BucketingConfig, VideoConfig
from mmdit.data.dataset.clips import cached_frames, clip_plan
from mmdit.data.dataset.frames import PreprocessConfig
from mmdit.data.dataset.media_sets import Shape
from mmdit.diagnostics.cache_sheet import cache_sheet
from mmdit.diagnostics.real_items import RealItems
from mmdit.interfaces import LatentSpec
from mmdit.posttrain.srpo import check_pace, real_latents
from tests.test_cache import MeanPixels, run, write_meta

VIDEO = VideoConfig(32, 32, num_frames=9, frame_stride=2)


class Joining(MeanPixels):
    """Latents of a clip: its first frame, then the mean of every four frames behind it."""

    spec = LatentSpec(channels=3, temporal=4)

    def encode(self, pixels):
        latents = super().encode(pixels)
        self.spec.frames(latents.shape[1])  # ValueError: a number of frames that it cannot take
        rest = (
            latents[:, 1:].unflatten(1, (-1, 4)).mean(2) if latents.shape[1] > 1 else latents[:, 1:]
        )
        return torch.cat([latents[:, :1], rest], 1)

    def decode(self, latents):
        """Return clips whose frames are of the colours of `latents`."""
        rest = latents[:, 1:].repeat_interleave(4, 1)
        frames = torch.cat([latents[:, :1], rest], 1).movedim(-1, 2)
        return frames.repeat_interleave(16, -2).repeat_interleave(16, -1)


@pytest.fixture
def clips(tmp_path):
    """Clips of which frame n is of colour n, with 8, 17 and 30 frames."""
    rows = []
    for count in (8, 17, 30):
        folder = tmp_path / f"frames{count}"
        folder.mkdir()
        for number in range(count):
            Image.fromarray(np.full((32, 32, 3), number, np.uint8)).save(folder / f"{number}.png")
        rows.append({"id": f"clip{count:02d}", "frames_dir": folder.name, "caption": ""})
    return write_meta(tmp_path, rows, "train_videos.jsonl")


def test_a_tokenizer_that_joins_frames_is_given_the_planned_ones(clips, tmp_path):
    report = run(clips, tmp_path / "cache", Joining(), kind="video", video=VIDEO)
    assert [skip.reason for skip in report.skipped] == ["too short: 8 frames, a sample needs 17"]
    cache = open_cache(tmp_path / "cache", CacheManifest.of(Joining(), VIDEO))
    assert cache.shapes[:, 0].tolist() == [3, 3]
    for index, first in ((0, 0), (1, 6)):  # the middle of the clip
        seen = (cache.load(index)[:, 0, 0, 0].float() * 255).tolist()
        assert seen == pytest.approx([first, first + 5, first + 13], abs=0.05)
        assert cache.sources[index]["frames"] == list(range(first, first + 17, 2))
    batch = LatentBatches(cache, BatchPlan(cache, VIDEO, 2, 0), num_workers=0).step(0)[0]
    assert batch.latents.shape == (2, 3, 2, 2, 3)
    order = [cache.ids.index(id) for id in batch.ids]
    assert torch.equal(batch.latents, torch.stack([cache.load(index) for index in order]))
    before = json.loads((tmp_path / "cache/manifest.json").read_text())["clip_plan"]
    assert before["num_frames"] == 9
    with pytest.raises(ValueError, match="video.frame_stride: the cache has 2, the config asks 1"):
        run(
            clips, tmp_path / "cache", Joining(), kind="video", video=replace(VIDEO, frame_stride=1)
        )


def test_short_clips_get_fewer_frames_and_stretched_ones_the_whole_clip(clips, tmp_path):
    video = VideoConfig(32, 32, num_frames=17, frame_counts=(5, 9))
    run(clips, tmp_path / "cache", Joining(), kind="video", video=video)
    cache = open_cache(tmp_path / "cache")
    assert cache.shapes[:, 0].tolist() == [2, 5, 5]
    plan = BatchPlan(cache, video, 1, 0)
    assert {
        (int(plan.batch(step).items[0]), plan.batch(step).frames.shape[1]) for step in range(3)
    } == {(0, 2), (1, 5), (2, 5)}
    assert cached_frames(30, VideoConfig(num_frames=5, shrink_video_to_frames=True)) == [
        0,
        7,
        15,
        22,
        29,
    ]


def test_real_clips_of_post_training_were_encoded_together_and_move_as_the_model_s(clips, tmp_path):
    video = VideoConfig(32, 32, num_frames=5)
    run(clips, tmp_path / "cache", Joining(), kind="video", video=video)
    srpo = SimpleNamespace(latents=str(tmp_path / "cache"))
    config = SimpleNamespace(srpo=srpo, prompts_per_epoch=2)
    running = SimpleNamespace(config=config, tokenizer=Joining(), shape=(2, 2, 2, 3))
    cache = real_latents(running)
    check_pace(cache, video)
    for change in ({"frame_stride": 2}, {"shrink_video_to_frames": True}):
        with pytest.raises(ConfigError, match=f"{next(iter(change))} .*another pace"):
            check_pace(cache, replace(video, **change))
    check_pace(cache, replace(video, num_frames=1, frame_stride=2))  # pictures do not move
    cache.rates = {24.0}
    with pytest.raises(ConfigError, match="fps 24.0, and video.fps is 16"):
        check_pace(cache, video)
    (tmp_path / "cache" / "clip08.pt").unlink()
    (tmp_path / "cache" / "index.jsonl").unlink()
    running.shape = (3, 2, 2, 3)  # there are as many frames, of two samples
    with pytest.raises(ConfigError, match="encoded 2 latent frames at a time, and 3 of them"):
        real_latents(running)


@pytest.mark.parametrize(
    "change, path",
    [
        ({"num_frames": 8}, "num_frames"),
        ({"temporal_jitter": 1}, "temporal_jitter"),
        ({"frame_counts": (4,)}, "frame_counts"),
    ],
)
def test_what_a_joining_tokenizer_cannot_do_is_refused(change, path):
    with pytest.raises(ConfigError, match=f"video.{path}"):
        clip_plan(replace(VIDEO, **change), Joining.spec)
    assert clip_plan(replace(VIDEO, **change), MeanPixels.spec) == {}


MUTATIONS = {
    "tokenizer": {"tokenizer": "other weights"},
    "latent channels": {"channels": 4},
    "pixels per latent cell": {"spatial": 8},
    "frames per latent frame": {"temporal": 8},
    "sizes": {"buckets": ((32, 64),)},
    "preprocess.shift_fraction": {"shift_fraction": 0.5},
    "preprocess.num_crops": {"num_crops": 3},
    "preprocess.seed": {"seed": 1},
    "video.num_frames": {"num_frames": 17},
    "video.frame_stride": {"frame_stride": 3},
    "video.frame_counts": {"frame_counts": (9,)},
    "video.shrink_video_to_frames": {"shrink_video_to_frames": True},
}


def manifest(
    tokenizer="weights",
    channels=3,
    spatial=16,
    temporal=4,
    scale=1.0,
    buckets=((32, 32),),
    shift_fraction=1.0,
    num_crops=2,
    seed=0,
    source="",
    **video,
):
    maker = Joining(tokenizer)
    maker.spec = LatentSpec(channels, spatial, scale=scale, temporal=temporal)
    video = {"num_frames": 25, **video}
    return CacheManifest.of(
        maker,
        VideoConfig(32, 32, **video),
        BucketingConfig(True, buckets=buckets),
        PreprocessConfig("shifted", shift_fraction, num_crops, seed),
        source,
    )


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_setting_alone_is_another_cache(name):
    (difference,) = manifest().differences(manifest(**MUTATIONS[name]))
    assert difference.startswith(f"{name}: the cache has ")


def test_other_kinds_of_sizes_and_crops_are_other_caches_but_scale_source_and_batches_are_not():
    base = manifest()
    assert len(MUTATIONS) == 12 and not base.differences(manifest(source="elsewhere", scale=2.0))
    maker = Joining("weights")
    center = CacheManifest.of(
        maker, VideoConfig(32, 32, num_frames=25), BucketingConfig(True, buckets=((32, 32),))
    )
    plain = CacheManifest.of(maker, VideoConfig(32, 32, num_frames=25))
    budget = CacheManifest.of(
        maker, VideoConfig(32, 32, num_frames=25), BucketingConfig(True, "pixel_budget", (), 4096)
    )
    assert any(line.startswith("preprocess.crop") for line in base.differences(center))
    assert [line.partition(":")[0] for line in plain.differences(center)] == ["bucketing.enabled"]
    assert (
        "bucketing.max_pixels_per_frame: the cache has 0, the config asks 4096"
        in center.differences(budget)
    )


def test_one_of_the_samples_of_a_cached_clip_is_decoded_to_compare_with(clips, tmp_path):
    video = replace(VIDEO, num_frames=5)
    run(clips, tmp_path / "cache", Joining(), kind="video", video=video)
    assert open_cache(tmp_path / "cache").shapes[:, 0].tolist() == [2, 6]

    def items(**shape) -> RealItems:
        return RealItems(str(tmp_path / "cache"), Shape(**shape), [Joining()], 0)

    (_, pixels), *_ = items(frames=3, stride=2).read(2)
    # 4 … 12, and of 1 … 9, 10 … 18, 19 … 27 those in the middle: one frame, a mean of four
    assert pixels[:, :, 0, 0, 0].tolist() == [[9, 9, 9], [15, 15, 15]]
    (_, pixels), *_ = items(frames=5, stride=2).read(2)
    assert pixels[:, :, 0, 0, 0].tolist() == [[4, 9, 9, 9, 9], [10, 15, 15, 15, 15]]
    (_, pixels), *_ = items().read(2)
    assert pixels.shape[:2] == (2, 1)
    lengths = []
    joining = Joining()
    joining.decode = lambda latents: (
        lengths.append(latents.shape[1]) or Joining.decode(joining, latents)
    )
    cache_sheet(open_cache(tmp_path / "cache"), joining, 2)
    assert lengths == [2, 2], "a sheet shows a sample, too"
    with pytest.raises(ValueError, match="clips of stride 2, and stride 1 is asked for"):
        items(frames=3)
    with pytest.raises(ValueError, match="holds samples of clips, and whole clips are asked for"):
        items(frames=3, stretch=True)
