"""Measure how good a tokenizer is: PSNR of pictures, and what an oracle still reads from them.

PSNR is per picture, after clamping to [0, 1], then the mean over pictures. Moving shapes are drawn
with a seed that training never uses; half of them show (colour, shape) pairs that training never
shows. Accuracies are read from the decoded pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from vtp.models import VTPModel
from vtp.pixels import denormalize, normalize

from mmdit.data import moving_shapes
from mmdit.data.dataset.frames import load_first_frame
from mmdit.data.dataset.pictures import SUFFIXES
from mmdit.pixels import to_unit
from mmdit.rng import key

SIZES = ((64, 64), (128, 128), (256, 256), (448, 256))  # width, height
ORACLE_SIZES, CLIP_FRAMES = (64, 128), 8
CHUNK_PIXELS = 1 << 23


def psnr(predicted: Tensor, target: Tensor) -> Tensor:
    """dB `(B,)` of `(B, 3, H, W)` in [0, 1]; an exact copy counts as 100 dB."""
    return -10 * torch.log10((predicted - target).square().mean((1, 2, 3)).clamp(min=1e-10))


@torch.no_grad()
def reconstruct(model: VTPModel, pixels: Tensor) -> Tensor:
    """`(B, 3, H, W)` in [0, 1] → latents → the same, in float32, a few pictures at a time."""
    chunk = max(1, CHUNK_PIXELS // (pixels.shape[-1] * pixels.shape[-2]))
    parts = []
    for part in pixels.split(chunk):
        latents = model.get_reconstruction_latents(normalize(part.to(model.device)))
        parts.append(denormalize(model.get_latents_decoded_images(latents)))
    return torch.cat(parts)


def held_out_shapes(
    count: int, width: int, height: int, video: bool = False
) -> list[moving_shapes.Facts]:
    """Facts that no training run sees: half `train` pairs under another seed, half held-out
    pairs."""
    seed, size = key("vtp evaluation"), {"width": width, "height": height, "video": video}
    seen = moving_shapes.draw(seed, range(count - count // 2), split="train", **size)
    return seen + moving_shapes.draw(seed, range(count // 2), split="held_out", **size)


def shapes_psnr(
    model: VTPModel, count: int, sizes: tuple[tuple[int, int], ...] = SIZES
) -> dict[str, float]:
    """Mean PSNR of still moving shapes, by size."""
    scores = {}
    for width, height in sizes:
        facts = held_out_shapes(count, width, height)
        pixels = to_unit(moving_shapes.render(facts, width, height, device=model.device)[:, 0])
        scores[f"{width}x{height}"] = round(
            float(psnr(reconstruct(model, pixels), pixels).mean()), 2
        )
    return scores


def oracle_scores(model: VTPModel, count: int) -> dict[str, dict]:
    """What the oracle reads from decoded pictures and clips, by size: accuracies of the attributes
    and of all together."""
    scores = {}
    for side in ORACLE_SIZES:
        for kind, frames in (("image", 1), ("video", CLIP_FRAMES)):
            facts = held_out_shapes(count, side, side, video=kind == "video")
            pixels = to_unit(
                moving_shapes.render(facts, side, side, frames=frames, device=model.device)
            )
            decoded = rearrange(
                reconstruct(model, pixels.flatten(0, 1)), "(b f) c h w -> b f c h w", f=frames
            )
            scores[f"{kind}_{side}"] = moving_shapes.accuracy(moving_shapes.oracle(decoded), facts)
    return scores


def folder_pictures(folder: Path, side: int = 256) -> Iterator[Tensor]:
    """`(1, 3, side, side)` of every readable picture under `folder`: cut to a square from its
    middle. An unreadable one is reported and skipped; ValueError when there is none at all."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"--images {folder} holds no picture ({', '.join(sorted(SUFFIXES))})")
    for file in files:
        try:
            yield load_first_frame(file, (side, side))[None]
        except (OSError, ValueError) as error:
            print(f"skipped: {error}", flush=True)


def folder_psnr(model: VTPModel, folder: Path) -> dict:
    """Mean, lowest and highest PSNR over a folder of pictures, centre-cropped to 256."""
    values = [
        float(psnr(reconstruct(model, pixels), pixels.to(model.device)))
        for pixels in folder_pictures(folder)
    ]
    if not values:
        raise ValueError(f"--images {folder}: no picture could be read")
    return {
        "pictures": len(values),
        "psnr": round(sum(values) / len(values), 2),
        "lowest": round(min(values), 2),
        "highest": round(max(values), 2),
    }


def evaluate(model: VTPModel, count: int = 512, images: Path | None = None) -> dict:
    """All scores as JSON-able data."""
    report = {
        "moving_shapes_psnr": shapes_psnr(model, count),
        "oracle_after_round_trip": oracle_scores(model, count),
        "samples": count,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if images is not None:
        report["images"] = {"folder": images.name, "size": 256, **folder_psnr(model, images)}
    return report
