"""The README.md of a checkpoint folder, written from what was recorded and measured: training.json
and scores.json."""

from __future__ import annotations

import json
from pathlib import Path

from mmdit.files import write_atomically
from mmdit.foreign import read_json

TRAINING_FILE, SCORES_FILE = "training.json", "scores.json"


def write_json(path: Path, values: dict) -> None:
    """Write a JSON file, completely or not at all."""
    write_atomically(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def write_card(folder: Path) -> None:
    """Write README.md; a folder without training.json (a checkpoint from elsewhere) stays as it
    is."""
    if (folder / TRAINING_FILE).is_file():
        training = read_json(folder / TRAINING_FILE, "record of a training")
        scores = read_json(folder / SCORES_FILE, "scores of a tokenizer")
        size = (folder / "model.safetensors").stat().st_size
        text = card(folder.resolve().name, training, scores, size)
        write_atomically(folder / "README.md", text)


def stage_of(training: dict) -> dict:
    """Return the part of a training's record that later stages keep."""
    kept = {key: training[key] for key in ("steps", "minutes", "device")}
    return {"config": Path(training["config"]["output_dir"]).name, **kept}


def card(title: str, training: dict, scores: dict, file_bytes: int) -> str:
    """Return the page as Markdown; `file_bytes` is the size of model.safetensors."""
    config = training["config"]
    parts = ("reconstruction", "adversarial", "contrast", "self_supervision")
    losses = ", ".join(f"{part.replace('_', '-')} {config[part]['weight']:g}" for part in parts)
    shapes = scores["moving_shapes_psnr"].items()
    measured = [
        (f"PSNR of held-out moving shapes, {size}", f"{value:.2f} dB") for size, value in shapes
    ]
    for sort, value in scores["oracle_after_round_trip"].items():
        what = f"oracle: all attributes right after the round trip, {sort.replace('_', ', ')} px"
        measured.append((what, f"{value['prompt_accuracy']['value']:.3f}"))
    if "images" in scores:
        real = scores["images"]
        what = f"PSNR of {real['pictures']} real pictures, {real['size']} px (lowest, highest)"
        measured.append(
            (what, f"{real['psnr']:.2f} dB ({real['lowest']:.2f}, {real['highest']:.2f})")
        )
    channels = config["model"]["vision_feature_bottleneck"]
    stages = [*training.get("earlier_stages", []), stage_of(training)]
    trained = ", then ".join(
        f"{s['steps']:,} steps in {s['minutes']} minutes on one {s['device']}" for s in stages
    )
    commands = "\n".join(
        f"    mmdit train-vtp --config VTP/configs/{s['config']}.yaml" for s in stages
    )
    return f"""# {title}

A small VTP tokenizer: 16x downsampling, {channels} channels, {scores["parameters"]:,} parameters
stored as {training["stored_as"]} ({file_bytes / 1e6:.1f} MB; that \
storage costs {training["cost_of_storage_db"]:.4f} dB).

Trained for {trained}, from the root of the repository:

{commands}

Loss weights: {losses}. Noise on the latents in training: up to
{config["latent_noise"]:g} of their standard deviation. `training.json` holds the whole config.

| measured with `mmdit evaluate-vtp`, {scores["samples"]} samples each | |
|---|---|
{chr(10).join(f"| {what} | {value} |" for what, value in measured)}

**Data.** Only pictures that the training code generates: moving shapes, gradients, noise, \
patterns, piles of flat objects, and
letters of Pillow's built-in font. No photograph, no downloaded picture and no other model's \
weights took part: photographs lose
detail.

**Licence.** MIT.

`latent_stats.json` holds the mean and the standard deviation of every latent channel, and says \
how they were measured.
"""
