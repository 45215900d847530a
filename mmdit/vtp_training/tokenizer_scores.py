"""Measure the quality of a tokenizer: PSNR of pictures, and what an oracle still recognises in
them.

PSNR is computed for each picture, after clamping to [0, 1], and then averaged over pictures. Moving
shapes are drawn with a seed that training never uses; half of them show (colour, shape) pairs that
training never shows. Accuracies are measured on the decoded pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from vtp.models import VTPModel
from vtp.pixels import denormalize, normalize

from mmdit.data import moving_shapes
from mmdit.data.dataset.picture_folder import folder_pictures
from mmdit.pixels import to_unit
from mmdit.rng import key
from mmdit.weights import is_finite, parameter_count

SIZES = ((64, 64), (128, 128), (256, 256), (448, 256))  # width, height
ORACLE_SIZES, CLIP_FRAMES = (64, 128), 8
CHUNK_PIXELS = 1 << 23


def psnr(predicted: Tensor, target: Tensor) -> Tensor:
    """Return PSNR in dB, `(B,)`, of `(B, 3, H, W)` in [0, 1]; an exact copy counts as 100 dB."""
    return -10 * torch.log10((predicted - target).square().mean((1, 2, 3)).clamp(min=1e-10))


@torch.no_grad()
def reconstruct(model: VTPModel, pixels: Tensor) -> Tensor:
    """Encode and decode `(B, 3, H, W)` in [0, 1], in float32, a few pictures at a time; return the
    result."""
    chunk = max(1, CHUNK_PIXELS // (pixels.shape[-1] * pixels.shape[-2]))
    parts = []
    for part in pixels.split(chunk):
        latents = model.get_reconstruction_latents(normalize(part.to(model.device)))
        parts.append(denormalize(model.get_latents_decoded_images(latents)))
    return torch.cat(parts)


def held_out_shapes(
    count: int, width: int, height: int, video: bool = False
) -> list[moving_shapes.Facts]:
    """Return facts that no training run sees: half with `train` pairs under another seed, half with
    held-out pairs."""
    seed = key("vtp evaluation")
    size: dict[str, Any] = {"width": width, "height": height, "video": video}
    seen = moving_shapes.draw(seed, range(count - count // 2), split="train", **size)
    return seen + moving_shapes.draw(seed, range(count // 2), split="held_out", **size)


def shapes_psnr(
    model: VTPModel, count: int, sizes: tuple[tuple[int, int], ...] = SIZES
) -> dict[str, float]:
    """Return the mean PSNR of still moving shapes, by size."""
    scores = {}
    for width, height in sizes:
        facts = held_out_shapes(count, width, height)
        pixels = to_unit(moving_shapes.render(facts, width, height, device=model.device)[:, 0])
        value = float(psnr(reconstruct(model, pixels), pixels).mean())
        scores[f"{width}x{height}"] = round(value, 2)
    return scores


def oracle_scores(model: VTPModel, count: int) -> dict[str, dict]:
    """Return how often the oracle recognises decoded pictures and clips, by size: accuracies of the
    attributes, and of all together."""
    scores = {}
    for side in ORACLE_SIZES:
        for media, frames in (("image", 1), ("video", CLIP_FRAMES)):
            facts = held_out_shapes(count, side, side, video=media == "video")
            pixels = to_unit(moving_shapes.render(facts, side, side, frames, model.device))
            decoded = reconstruct(model, pixels.flatten(0, 1))
            decoded = rearrange(decoded, "(b f) c h w -> b f c h w", f=frames)
            scores[f"{media}_{side}"] = moving_shapes.accuracy(moving_shapes.oracle(decoded), facts)
    return scores


def folder_scores(model: VTPModel, folder: Path, side: int = 256) -> dict:
    """Return the mean, lowest and highest PSNR over the pictures in a folder, of which the middle
    squares are used."""
    pictures = (picture[None].to(model.device) for picture in folder_pictures(folder, side, side))
    values = [float(psnr(reconstruct(model, pixels), pixels)) for pixels in pictures]
    return {
        "folder": folder.name,
        "size": side,
        "pictures": len(values),
        "psnr": round(sum(values) / len(values), 2),
        "lowest": round(min(values), 2),
        "highest": round(max(values), 2),
    }


def tokenizer_scores(model: VTPModel, count: int = 512, images: Path | None = None) -> dict:
    """Return all scores, ready for JSON. ValueError if a weight is not finite."""
    # first, so that the error comes before the minutes that the scores take
    for name, weight in model.state_dict().items():
        if not is_finite(weight):
            raise ValueError(f"the tokenizer's weight {name} holds nan or infinity: take another")
    pictures = {} if images is None else {"images": folder_scores(model, images)}
    return {
        "moving_shapes_psnr": shapes_psnr(model, count),
        "oracle_after_round_trip": oracle_scores(model, count),
        "samples": count,
        "parameters": parameter_count(model),
        **pictures,
    }
