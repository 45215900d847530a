"""A model may know which part of its picture a sample shows; it changes nothing until it is
trained."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.batches.latent_batches import LatentBatches
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.dataset.buckets import VideoConfig
from mmdit.data.dataset.frames import crop_shares
from mmdit.models import build_model
from mmdit.scripts import cache_vtp_images
from mmdit.training import checkpoint
from tests.helpers.tiny import Workshop
from tests.test_model import CHANNELS, SMALL, TEXT, TIMES, awake, captions, clip

LEFT, RIGHT = torch.tensor([[0.0, 0.0, 0.5, 1.0]]), torch.tensor([[0.5, 0.0, 1.0, 1.0]])


def test_the_crop_matters_to_a_trained_model_and_none_is_a_whole_picture():
    model, x = awake(replace(SMALL, crop=True)), clip(2, 2, 4, 4)
    whole = model(x, TIMES, captions(2), crop=torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2).double())
    torch.testing.assert_close(model(x, TIMES, captions(2)), whole, rtol=0, atol=1e-9)
    mixed = model(x, TIMES, captions(2), crop=torch.cat([LEFT, RIGHT]))
    assert torch.equal(
        mixed[1], model(x, TIMES, captions(2), crop=torch.cat([RIGHT, RIGHT]))[1]
    )  # each sample its own
    assert not torch.allclose(
        mixed[0], model(x, TIMES, captions(2), crop=torch.cat([RIGHT, RIGHT]))[0], atol=1e-3
    )
    with pytest.raises(ValueError, match="model.crop: true"):
        awake()(x, TIMES, captions(2), crop=LEFT)


def test_before_training_any_crop_gives_the_model_without():
    torch.manual_seed(0)
    model, x = build_model(replace(SMALL, crop=True), CHANNELS, TEXT), clip(2, 1, 4, 4).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not name.startswith("crop."):
                weight.add_(0.3 * torch.randn_like(weight))
    plain = build_model(SMALL, CHANNELS, TEXT)
    plain.load_state_dict(
        {name: value for name, value in model.state_dict().items() if not name.startswith("crop.")}
    )
    times, text = TIMES.float(), captions(2, torch.float32)
    assert torch.equal(model(x, times, text, crop=torch.cat([LEFT, RIGHT])), plain(x, times, text))


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Pictures twice as wide as what is cached of them, two shifted crops each."""
    shop = Workshop(tmp_path_factory.mktemp("crops"))
    rows = []
    for i in range(6):
        Image.fromarray(np.full((32, 96 + 8 * i, 3), 20 * i, np.uint8)).save(
            shop.folder / f"{i}.png"
        )
        rows.append({"id": str(i), "image_path": f"{i}.png", "caption": "a stripe"})
    (shop.folder / "train_images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shop.crops = ["preprocess={crop: shifted, num_crops: 2}"]
    words = ["--config", str(shop.config), "--meta_jsonl", str(shop.folder), "--device", "cpu"]
    assert cache_vtp_images.main([*words, "--out_dir", str(shop.folder / "cut"), *shop.crops]) == 0
    return shop


def test_batches_say_which_part_is_shown(shop):
    cache = open_cache(shop.folder / "cut")
    batches = LatentBatches(
        cache, BatchPlan(cache, VideoConfig(48, 32), 4, 0), crops=True, num_workers=0
    )
    (batch,) = batches.step(0)
    for id, (left, top, right, bottom) in zip(batch.ids, batch.crops.tolist(), strict=True):
        width = 96 + 8 * int(id[0])
        assert (top, bottom) == (0, 1) and right - left == pytest.approx(48 / width, abs=1e-4)
        stored = cache.sources[list(cache.ids).index(id)]
        assert left == pytest.approx(stored["crop"][0] / width)
    assert LatentBatches(cache, batches.plan, num_workers=0).step(0)[0].crops is None
    assert crop_shares({}) == (0, 0, 1, 1)
    assert crop_shares({"size": [200, 100], "crop": [20, 30, 180, 60]}) == (
        0.1,
        0.3,
        0.9,
        0.6,
    )  # sides by width, top by height


def test_training_with_crops_learns_from_them_and_starts_from_a_model_without(shop):
    cache = shop.folder / "cut"
    plain = shop.train("plain", *shop.crops, cache=cache)
    words = [
        *shop.crops,
        "model.crop=true",
        f"train.init_from={plain}",
        "train.val_every_steps=2",
        "train.val_share=0.3",
    ]
    weights = checkpoint.load_weights(shop.train("told", *words, cache=cache)).tensors
    assert all(weights[f"model.crop.mlp.2.{part}"].abs().max() > 0 for part in ("weight", "bias"))
