"""Export a finished run as a checkpoint folder: config.json, model.safetensors and
latent_stats.json, with the records training.json, scores.json and README.md."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor
from vtp.models import VTPConfig, VTPModel
from vtp.models.pretrained import checkpoint_folder, write_checkpoint
from vtp.pixels import normalize

from mmdit.config import encode
from mmdit.files import clean, write_atomically
from mmdit.foreign import read_json
from mmdit.pixels import to_unit
from mmdit.vtp_training.images import PictureSource
from mmdit.vtp_training.model_card import (
    SCORES_FILE,
    TRAINING_FILE,
    stage_of,
    write_card,
    write_json,
)
from mmdit.vtp_training.pretrain_config import PretrainConfig
from mmdit.vtp_training.tokenizer_scores import shapes_psnr, tokenizer_scores

STATISTICS_FILE = "latent_stats.json"
HALF_TOLERANCE = 0.01  # dB of PSNR that storing float16 may cost


def export_tokenizer(
    model: VTPModel, source: PictureSource, config: PretrainConfig, folder: Path, run: dict
) -> None:
    """Write the folder. `run`: steps, minutes and device, for the README."""
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    if not config.contrast.keep_text_tower:
        model = without_text_tower(model)
    stored, storage = _stored(model, config)
    write_checkpoint(folder, model.config.to_dict(), stored)
    if config.freeze_encoder:
        assert config.init_from is not None, "a frozen encoder comes from there"
        same = checkpoint_folder(config.init_from) / STATISTICS_FILE
        if same.is_file():
            write_atomically(folder / STATISTICS_FILE, same.read_bytes())
        else:  # still without: statistics would change how its latents are normalised
            (folder / STATISTICS_FILE).unlink(missing_ok=True)
    else:
        write_json(folder / STATISTICS_FILE, channel_statistics(model, source))
    loaded = VTPModel.from_pretrained(folder).to(model.device)
    write_json(folder / SCORES_FILE, tokenizer_scores(loaded, config.train.evaluation_samples))
    record = {**run, **_earlier_stages(config), **storage, "config": encode(config)}
    write_json(folder / TRAINING_FILE, record)
    write_card(folder)


def _earlier_stages(config: PretrainConfig) -> dict:
    """Return what `init_from` recorded about its training, for the README."""
    record = Path(config.init_from or "") / TRAINING_FILE
    if not (config.init_from and record.is_file()):
        return {}
    before = read_json(record, "record of a training")
    return {"earlier_stages": [*before.get("earlier_stages", []), stage_of(before)]}


def without_text_tower(model: VTPModel) -> VTPModel:
    """Return the same tokenizer with `train_clip` false; a model without a text tower stays the
    same."""
    config = VTPConfig.from_dict({**model.config.to_dict(), "train_clip": False})
    slim = VTPModel(config).to(model.device).eval()
    weights = model.state_dict()
    slim.load_state_dict({name: weights[name] for name in slim.state_dict()})
    return slim


def _stored(model: VTPModel, config: PretrainConfig) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors to store, as float16 unless that costs more than HALF_TOLERANCE of PSNR,
    and what to record about it."""
    sizes = tuple((width, height) for width, height, _ in config.images.sizes[:2])
    weights = model.state_dict()
    half = {name: t.half() if t.dtype == torch.float32 else t for name, t in weights.items()}
    rounded = copy.deepcopy(model)
    rounded.load_state_dict({name: t.to(weights[name].dtype) for name, t in half.items()})
    before, after = (shapes_psnr(m, 128, sizes) for m in (model, rounded))
    costs = [before[name] - after[name] for name in before]
    kept, dtype, cost = weights, "float32", 0.0
    if all(cost <= HALF_TOLERANCE for cost in costs):  # false for nan, of weights too large
        kept, dtype, cost = half, "float16", max(costs)
    record = {"stored_as": dtype, "cost_of_storage_db": round(cost, 4)}
    return {name: t.cpu() for name, t in kept.items()}, record


@torch.no_grad()
def channel_statistics(model: VTPModel, source: PictureSource) -> dict:
    """Return mean and standard deviation of each channel of the latents of training moving shapes,
    half of them at each of the first two sizes."""
    sizes = [tuple(size[:2]) for size in source.config.sizes[:2]]
    total, squares, count = torch.zeros(()), torch.zeros(()), 0
    for width, height in sizes:
        pixels = source.pool(width, height).pixels
        pixels = pixels[:: max(1, len(pixels) * len(sizes) // 4096)]
        for part in pixels.split(256):
            latents = model.get_reconstruction_latents(normalize(to_unit(part))).double()
            total = total + latents.sum((0, 2, 3))
            squares = squares + latents.square().sum((0, 2, 3))
            count += latents[:, 0].numel()
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=1e-12).sqrt()
    return {
        "mean": [round(v, 6) for v in mean.tolist()],
        "std": [round(v, 6) for v in std.tolist()],
        "measured": f"{count} latent cells of training moving shapes (stills and frames of clips),"
        f" sizes {sizes}",
    }
