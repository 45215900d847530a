"""The README.md of a checkpoint folder, made from what was recorded and measured: training.json and scores.json."""

from __future__ import annotations

import json
from pathlib import Path

TRAINING_FILE, SCORES_FILE = "training.json", "scores.json"


def write_json(path: Path, values: dict) -> None:
    """Whole or not at all."""
    aside = path.with_name(f".writing-{path.name}")
    aside.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
    aside.replace(path)


def write_card(folder: Path) -> None:
    """Write README.md; a folder without training.json (a checkpoint from elsewhere) is left alone."""
    if (folder / TRAINING_FILE).is_file():
        training, scores = (json.loads((folder / name).read_text()) for name in (TRAINING_FILE, SCORES_FILE))
        (folder / "README.md").write_text(card(training, scores, (folder / "model.safetensors").stat().st_size))


def card(training: dict, scores: dict, size: int) -> str:
    """Markdown; `size` is that of model.safetensors in bytes."""
    config = training["config"]
    name = Path(config["output_dir"]).name
    parts = ("reconstruction", "adversarial", "contrast", "self_supervision")
    losses = ", ".join(f"{part.replace('_', '-')} {config[part]['weight']:g}" for part in parts)
    rows = [f"| PSNR of held-out moving shapes, {key} | {value:.2f} dB |" for key, value in scores["moving_shapes_psnr"].items()]
    rows += [
        f"| oracle: all attributes right after the round trip, {key.replace('_', ', ')} px | {value['prompt_accuracy']['value']:.3f} |"
        for key, value in scores["oracle_after_round_trip"].items()
    ]
    if "images" in scores:
        real = scores["images"]
        rows.append(f"| PSNR of {real['pictures']} real pictures, {real['size']} px (lowest, highest) | "
                    f"{real['psnr']:.2f} dB ({real['lowest']:.2f}, {real['highest']:.2f}) |")  # fmt: skip
    return f"""# {name}

A small VTP tokenizer: 16x downsampling, {config['model']['vision_feature_bottleneck']} channels, {scores['parameters']:,} parameters
stored as {training['stored_as']} ({size / 1e6:.1f} MB; that storage costs {training['cost_of_storage_db']:.4f} dB).

Trained for {training['steps']:,} steps in {training['minutes']} minutes on one {training['device']}, from the root of the repository:

    PYTHONPATH=VTP python -m vtp.train --config VTP/configs/{name}.yaml

Loss weights: {losses}. Noise on the latents in training: up to {config['latent_noise']:g} of their standard deviation.
`training.json` holds the whole config.

| measured with `python -m vtp.evaluate`, {scores['samples']} samples each | |
|---|---|
{chr(10).join(rows)}

**Data.** Only pictures that the training code generates: moving shapes, gradients, noise, patterns, piles of flat objects, and
letters of Pillow's built-in font. No photograph, no downloaded picture and no other model's weights took part; photographs lose detail.

**Licence.** MIT.

`latent_stats.json` holds the mean and the standard deviation of every latent channel, and says how they were measured.
"""
