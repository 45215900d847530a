"""Curves of one or several runs as a PNG: a panel a quantity, a colour a run, a shade a series."""

from __future__ import annotations

import json
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PANELS = {  # title: names in metrics.jsonl; the first is drawn strongest
    "loss": ("loss_ema_100", "loss_ema_10"),
    "loss by noise level, clear to noisy": (
        "loss_level_0",
        "loss_level_1",
        "loss_level_2",
        "loss_level_3",
    ),
    "validation loss, averaged weights and last": ("val_loss_ema", "val_loss"),
    "validation loss by noise quantile": tuple(f"val_loss_q{i}" for i in range(1, 10)),
    "held-out and seen prompts: accuracy": ("held_out_prompt_accuracy", "seen_prompt_accuracy"),
    "held-out and seen prompts: colour": ("held_out_color_match", "seen_color_match"),
    "reward of rollouts": ("reward_prompt_accuracy", "reward_noise"),
    "relative score: denoised, inverted": ("score_denoise", "score_invert"),
    "pairs ranked as wanted": ("implicit_accuracy",),
    "drift: squared change of the velocity": ("drift",),
    "share of clipped ratios": ("clip_share",),
    "gradient norm": ("grad_norm",),
    "learning rate": ("lr",),
    "agreement of the gradient's signs": ("grad_ema_100", "gradient_stability_avg"),
    "alpha": ("linear_alpha",),
    "samples a second": ("samples_per_second",),
    "TFLOP/s of one process": ("tflops",),
    "share of the matmul rate": ("tflops_share",),
    "share of time waiting for data": ("data_wait",),
    "peak memory, GB": ("memory_gb",),
    "skipped steps": ("skipped",),
}
COLOURS = [(31, 98, 180), (214, 84, 20), (20, 140, 70), (150, 60, 160), (190, 30, 60), (90, 90, 90)]
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 460, 250, 62, 24, 22


def read_metrics(run: Path) -> list[dict]:
    """The records of a run folder or a metrics.jsonl file, without a torn last line; ValueError
    names a file that is none."""
    path = run / "metrics.jsonl" if run.is_dir() else run
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"no metrics at {run}: {error}; give a run folder or its metrics.jsonl"
        ) from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record["step"], (int, float)):
                raise KeyError("step")
            records.append(record)
        except (ValueError, KeyError, RecursionError):
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not a record with a step") from None
    if not records:
        raise ValueError(f"{path} holds no record yet")
    return records


def points(records: list[dict], name: str) -> list[tuple[float, float]]:
    """`(step, value)` where the value is a finite number."""
    pairs = ((record["step"], record.get(name)) for record in records)
    return [
        (step, value)
        for step, value in pairs
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers inside."""
    unit = 10 ** math.floor(math.log10(high - low))
    step = next(unit * part for part in (0.2, 0.5, 1, 2) if (high - low) / (unit * part) <= 6)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def draw_curves(runs: dict[str, list[dict]]) -> Image.Image:
    """`runs`: records by name. Panels without any data are left out."""
    panels = [
        (title, names)
        for title, names in PANELS.items()
        if any(points(r, n) for r in runs.values() for n in names)
    ]
    columns = min(2, len(panels))
    legend = 18 * len(runs) + 8
    sheet = Image.new(
        "RGB", (columns * WIDTH, legend + math.ceil(len(panels) / columns) * HEIGHT), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for i, (name, records) in enumerate(runs.items()):
        draw.line((10, 13 + 18 * i, 34, 13 + 18 * i), COLOURS[i % len(COLOURS)], 3)
        draw.text((42, 6 + 18 * i), f"{name}, step {records[-1]['step']}", "black", font)
    for i, (title, names) in enumerate(panels):
        _panel(
            draw,
            font,
            (i % columns * WIDTH, legend + i // columns * HEIGHT),
            title,
            names,
            list(runs.values()),
        )
    return sheet


def _panel(
    draw: ImageDraw.ImageDraw,
    font,
    corner: tuple[int, int],
    title: str,
    names: tuple[str, ...],
    runs: list[list[dict]],
) -> None:
    series = [
        (run, shade, points(records, name))
        for run, records in enumerate(runs)
        for shade, name in enumerate(names)
    ]
    everything = [point for *_, line in series for point in line]
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*everything))
    right = max(right, left + 1)
    room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room
    x0, y0, x1, y1 = (
        corner[0] + LEFT,
        corner[1] + TOP,
        corner[0] + WIDTH - 14,
        corner[1] + HEIGHT - BOTTOM,
    )

    def place(step: float, value: float) -> tuple[float, float]:
        return x0 + (step - left) / (right - left) * (x1 - x0), y1 - (value - low) / (
            high - low
        ) * (y1 - y0)

    draw.text((x0, y0 - 20), title, "black", font)
    for value in ticks(low, high):
        y = place(left, value)[1]
        draw.line((x0, y, x1, y), (225, 225, 225))
        draw.text((x0 - 6, y), f"{value:.4g}", "black", font, anchor="rm")
    for step in ticks(left, right):
        draw.text((place(step, low)[0], y1 + 4), f"{step:g}", "black", font, anchor="mt")
    draw.rectangle((x0, y0, x1, y1), outline=(120, 120, 120))
    for run, shade, line in series:
        fade = 0.75 * shade / max(1, len(names) - 1)
        colour = tuple(round(part + (255 - part) * fade) for part in COLOURS[run % len(COLOURS)])
        line = [place(*point) for point in line]
        if len(line) > 1:
            draw.line(line, colour, 2)
        elif line:
            ((x, y),) = line
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
