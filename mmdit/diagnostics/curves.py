"""Draw the curves of one or several runs: one panel for each quantity, one colour for each run, one
shade for each series."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmdit.files import read_text

LINE = {"linewidth": 1}  # style of curves that are thinned and named
POINTS = 400  # the most points of a curve that is sent to a browser or a tracker
EXPERT = re.compile(r"_(high|low)$")
PANELS = {  # title: names in metrics.jsonl; the first is drawn strongest
    "loss": ("loss_ema_100", "loss_ema_10"),
    "loss by noise level, clear to noisy": tuple(f"loss_level_{i}" for i in range(4)),
    "loss of each report": ("loss",),
    "validation loss, averaged weights and last": ("val_loss_ema", "val_loss"),
    "validation loss by noise quantile": tuple(f"val_loss_q{i}" for i in range(1, 10)),
    "held-out and seen prompts: accuracy": ("held_out_prompt_accuracy", "seen_prompt_accuracy"),
    "held-out and seen prompts: colour": ("held_out_color_match", "seen_color_match"),
    "reward of rollouts": ("reward_prompt_accuracy", "reward_noise"),
    "relative score: denoised, inverted": ("score_denoise", "score_invert"),
    "pairs ranked as wanted": ("implicit_accuracy",),
    "drift: squared change of the velocity": ("drift",),
    "share of clipped ratios": ("clip_share",),
    "losses of a tokenizer": ("reconstruction", "adversarial", "contrast", "self_supervision"),
    "PSNR of training pictures, dB": ("train_psnr",),
    "PSNR of held-out pictures, dB": ("held_out_psnr",),
    "gradient norm": ("grad_norm", "gradient_norm"),
    "learning rate": ("lr",),
    "agreement of the gradient's signs": ("grad_ema_100", "gradient_stability_avg"),
    "alpha": ("linear_alpha",),
    "phase of the alpha schedule": ("phase_idx",),
    "samples a second": ("samples_per_second",),
    "steps a second": ("steps_per_second",),
    "TFLOP/s of one process": ("tflops",),
    "share of the matmul rate": ("tflops_share",),
    "share of time waiting for data": ("data_wait",),
    "peak memory, GB": ("memory_gb", "memory_gib"),
    "skipped steps": ("skipped",),
}
NOT_ABOUT_THE_MODEL = (  # panels about how training went
    "gradient norm",
    "learning rate",
    "samples a second",
    "TFLOP/s of one process",
    "share of the matmul rate",
    "share of time waiting for data",
    "peak memory, GB",
    "skipped steps",
)

# title: the prefix of further names in metrics.jsonl that belong to a panel
PREFIXES = {"reward of rollouts": "reward_", "validation loss by source": "val_loss/"}
NO_CURVES = ("_std", "_seconds")


def panels_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the panels for the quantities `names`: by title, the quantities that are drawn in it.
    Those in `PANELS` come first, in its order, with the same quantities of each expert, then those
    in `PREFIXES`. A quantity that belongs to none of these gets a panel of its own at the end."""
    titles = {name: title for title, listed in PANELS.items() for name in listed}
    order = {name: place for place, name in enumerate(titles)}
    panels: dict[str, list[str]] = {}
    for name in names:
        plain = EXPERT.sub("", name)
        title = titles.get(name) or titles.get(plain)
        if title is None and not plain.endswith(NO_CURVES):
            begun = (title for title, prefix in PREFIXES.items() if name.startswith(prefix))
            title = next(begun, None)
        panels.setdefault(title or plain, []).append(name)
    place_of = {title: place for place, title in enumerate(PANELS | PREFIXES)}
    for listed in panels.values():
        listed.sort(key=lambda name: (order.get(EXPERT.sub("", name), len(order)), name))
    return dict(sorted(panels.items(), key=lambda pair: (place_of.get(pair[0], 99), pair[0])))


def is_main(title: str) -> bool:
    """Return whether a panel is among those that are drawn for every run."""
    return title in PANELS or title in PREFIXES


def read_metrics(run: Path) -> list[dict]:
    """Return the records of a run folder or of a metrics.jsonl file, without an incomplete last
    line. ValueError names a file that holds no records."""
    path = run / "metrics.jsonl" if run.is_dir() else run
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"no metrics at {run}: {error}; give a run folder or its metrics.jsonl"
        ) from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if isinstance(record["step"], dict) or number_of(record["step"]) is None:
                raise TypeError
            records.append(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not a record with a step") from None
    if not records:
        raise ValueError(f"{path} holds no record yet")
    return records


def points(records: list[dict], name: str) -> tuple[list[float], list[float]]:
    """Return the steps at which the value `name` is a finite number, and these numbers."""
    steps, values = [], []
    for record in records:
        value = number_of(record.get(name))
        if value is not None:
            steps.append(record["step"])
            values.append(value)
    return steps, values


def number_of(value: Any) -> float | None:
    """Return the number that a curve shows for a value: the value itself, or the mean if it is a
    dictionary of values, as for several sizes; None if it is not finite."""
    if isinstance(value, dict) and value:
        numbers = [part for part in map(number_of, value.values()) if part is not None]
        whole = len(numbers) == len(value)
        value = sum(part / len(numbers) for part in numbers) if whole else None
    # an integer from a file can be too large for a float, and a comparison with nan is false
    return value if isinstance(value, int | float) and abs(value) <= sys.float_info.max else None


def thinned(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Return at most POINTS points of a curve: the smallest and the largest value of each stretch,
    so that no peak is lost, and the last point."""
    if len(steps) <= POINTS:
        return steps, values
    array = np.asarray(values)
    edges = np.linspace(0, len(array) - 1, POINTS // 2).astype(int)
    chosen = {len(array) - 1}
    for first, end in pairwise(edges):
        part = array[first:end]
        chosen |= {first + int(part.argmin()), first + int(part.argmax())}
    places = sorted(chosen)
    return [steps[i] for i in places], [values[i] for i in places]


def draw_curves(runs: dict[str, list[dict]]) -> Image.Image:
    """Draw the records of all runs, which are given by name. Panels without data are left out.
    ValueError if matplotlib is missing or there is nothing to draw."""
    return _image(_figure(runs, {}))


def learning_curves(name: str, records: list[dict]) -> Image.Image:
    """Return the curves of one run as a picture, without those of its speed and its optimizer.
    ValueError if matplotlib is missing or there is nothing to draw."""
    return _image(_figure({name: records}, LINE, NOT_ABOUT_THE_MODEL))


def _image(figure: Any) -> Image.Image:
    canvas = figure.canvas
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def curves_svg(name: str, records: list[dict]) -> str:
    """Return the curves of one run as an SVG element, with a legend in each panel. ValueError if
    matplotlib is missing or there is nothing to draw."""
    figure, text = _figure({name: records}, LINE), io.StringIO()
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "mmdit"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _figure(
    runs: dict[str, list[dict]], line: dict[str, Any], left_out: tuple[str, ...] = ()
) -> Any:
    """Return a matplotlib figure of the records of all runs, without the panels `left_out`. If
    properties of a `line` are given, curves are thinned, and legends name them."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise ValueError("curves need matplotlib: pip install matplotlib") from None
    plotted = {
        name
        for records in runs.values()
        for name in set().union(*records)
        if points(records, name)[0]
    }
    everything = panels_of(plotted)
    panels = {
        title: names
        for title, names in everything.items()
        if is_main(title) and title not in left_out
    }
    if not panels:
        raise ValueError("the runs have no figure yet that is drawn")
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (4.6 * columns, 2.5 * rows + 0.2 * len(runs))  # inches, of 100 pixels each
    figure = Figure(size, dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, (title, names) in zip(axes, panels.items(), strict=False):
        panel.set_title(title, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(color="0.9")
        for number, records in enumerate(runs.values()):
            for shade, name in enumerate(names):
                steps, values = points(records, name)
                if line:
                    steps, values = thinned(steps, values)
                marker = "." if len(steps) == 1 else ""
                opacity = 1 - 0.75 * shade / max(1, len(names) - 1)
                look = {"color": f"C{number}", "alpha": opacity, "marker": marker}
                panel.plot(steps, values, label=name, **look, **line)
        if line:
            panel.legend(fontsize=6, frameon=False)
    for panel in axes[len(panels) :]:
        panel.remove()
    plain = {name: name.replace("$", r"\$") for name in runs}  # `$` would begin a formula
    labels = [f"{plain[name]}, step {records[-1]['step']}" for name, records in runs.items()]
    colours = [Line2D([], [], color=f"C{number}") for number in range(len(runs))]
    figure.legend(colours, labels, loc="outside upper left", fontsize=8)
    return figure
