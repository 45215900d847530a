"""Measure how often a model shows what its prompt says, judged by the moving-shapes oracle, with
the controls that give the number a meaning.

Beside every score stand the ceiling (the score of the true pictures after the tokenizer's round
trip: no model can be expected to exceed it) and a control (the same samples scored against other
prompts: the score of a model that ignores its prompt).
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter

import torch
from torch import Tensor

from mmdit.data.moving_shapes.facts import Facts
from mmdit.data.moving_shapes.oracle import (
    VOCABULARY,
    Predictions,
    accuracy,
    oracle,
    rate,
    score_samples,
)
from mmdit.data.moving_shapes.render import render
from mmdit.data.moving_shapes.sentences import PROMPTS, Prompt, prompts
from mmdit.interfaces import Tokenizer
from mmdit.pixels import to_unit

Sample = Callable[[list[str], int], Tensor]


def prompt_accuracy_report(
    sample: Sample,
    tokenizer: Tokenizer,
    *,
    width: int,
    height: int,
    frames: int,
    count: int = PROMPTS,
    batch: int = 64,
    device: torch.device | str = "cpu",
    known: dict | None = None,
) -> dict:
    """Return the score of a model, ready for JSON; every rate is `{value, low, high, correct,
    count}` with its 95 % Wilson interval.

    `sample(captions, offset) -> pixels (B, frames, 3, height, width)` in [0, 1] is called for at
    most `batch` prompts at a time. `offset` is the place of the first caption among all 512
    prompts, whatever `count` and `batch` are: use it to key the noise. `count`: how many of the 256
    seen and of the 256 held-out prompts. `device`: where samples are judged, and where the true
    pictures for the ceiling are drawn and encoded. With `frames > 1` there are also `motion_moving`
    and `left_right` (see `motion_report`). `known`: such a report for other weights, with the same
    tokenizer and options, whose ceiling is reused.
    """
    check_counts(count, PROMPTS, batch)
    seen, held_out = (
        prompts(split, frames > 1, width, height)[:count] for split in ("seen", "held_out")
    )
    facts = [prompt.facts for prompt in seen]
    shape = (frames, 3, height, width)
    predictions = read_samples(sample, seen, 0, batch, shape, device)
    on_seen = accuracy(predictions, facts)
    on_held_out = accuracy(
        read_samples(sample, held_out, PROMPTS, batch, shape, device),
        [prompt.facts for prompt in held_out],
    )
    if known is None:
        ceiling = tokenizer_ceiling(tokenizer, facts, batch, shape, device)
    else:
        ceiling = known["tokenizer_ceiling"]
    report = {
        "prompt_accuracy": on_seen["prompt_accuracy"],
        "attributes": on_seen["attributes"],
        "held_out_accuracy": on_held_out["prompt_accuracy"],
        "held_out_attributes": on_held_out["attributes"],
        "tokenizer_ceiling": ceiling,
        "control": shuffled_control(predictions, facts),
        "count": count,
    }
    return report | (motion_report(predictions, facts) if frames > 1 else {})


def check_counts(count: int, most: int, batch: int) -> None:
    """Raise ValueError for a number of prompts below 2 or above `most`, and for an empty batch."""
    if not 2 <= count <= most:
        raise ValueError(f"count is {count}; must be from 2 to {most}, the number of fixed prompts")
    if batch < 1:
        raise ValueError(f"batch is {batch}; must be at least 1")


def read_samples(
    sample: Sample,
    listed: tuple[Prompt, ...],
    first: int,
    batch: int,
    shape: tuple[int, int, int, int],
    device: torch.device | str,
    variant: str = "one",
) -> Predictions:
    """Return what the oracle, on `device`, sees in the samples of the prompts `listed`; `first` is
    the place of the first of these among all prompts. `shape`: frames, channels, height, width of a
    sample."""
    parts = []
    for start in range(0, len(listed), batch):
        captions = [prompt.caption for prompt in listed[start : start + batch]]
        pixels = sample(captions, first + start)
        expected = (len(captions), *shape)
        if tuple(pixels.shape) != expected:
            raise ValueError(
                f"sample gave pixels of shape {tuple(pixels.shape)}; must be {expected}"
            )
        parts.append(oracle(pixels.to(device), variant).map(Tensor.cpu))
    return Predictions.cat(parts)


def tokenizer_ceiling(
    tokenizer: Tokenizer,
    facts: list[Facts],
    batch: int,
    shape: tuple[int, int, int, int],
    device: torch.device | str,
) -> dict:
    """Return the score of the true pictures after `tokenizer`'s round trip: a rate, with one for
    each of the `attributes`."""
    result = accuracy(read_round_trip(tokenizer, facts, batch, shape, device), facts)
    return result["prompt_accuracy"] | {"attributes": result["attributes"]}


@torch.no_grad()
def read_round_trip(
    tokenizer: Tokenizer | None,
    facts: list[Facts],
    batch: int,
    shape: tuple[int, int, int, int],
    device: torch.device | str,
    variant: str = "one",
) -> Predictions:
    """Return what the oracle sees in the true pictures, after the round trip of `tokenizer` if that
    is not None. `shape` is as in `read_samples`."""
    parts, (frames, _, height, width) = [], shape
    for start in range(0, len(facts), batch):
        pixels = to_unit(render(facts[start : start + batch], width, height, frames, device))
        if tokenizer is not None:
            pixels = tokenizer.decode(tokenizer.encode(pixels))
        parts.append(oracle(pixels, variant).map(Tensor.cpu))
    return Predictions.cat(parts)


def shuffled(predictions: Predictions, facts: list[Facts]) -> dict:
    """Return the `accuracy` of the predictions against the facts of other samples: up to 8 others
    for each, so that even a rate near 1 % is known well."""
    count, others = len(facts), min(8, len(facts) - 1)
    shifts = [round(count * k / (others + 1)) for k in range(1, others + 1)]
    return accuracy(
        Predictions.cat([predictions] * others),
        [item for s in shifts for item in facts[s:] + facts[:s]],
    )


def shuffled_control(predictions: Predictions, facts: list[Facts]) -> dict:
    """Return the scores of the same predictions against the prompts of other samples. `chance`: how
    often two different prompts agree."""
    result = shuffled(predictions, facts)
    stated = [vars(item) | vars(item.objects[0]) for item in facts]

    def chance(*names: str) -> float:
        values = list(map(itemgetter(*names), stated))
        agree = sum(values.count(value) - 1 for value in values)
        return agree / (len(values) * (len(values) - 1))

    attributes = {
        name: value | {"chance": chance(name)} for name, value in result["attributes"].items()
    }
    return result["prompt_accuracy"] | {"chance": chance(*attributes), "attributes": attributes}


def motion_report(predictions: Predictions, facts: list[Facts]) -> dict:
    """Return two rates. `motion_moving`: right motion, over the prompts that ask for motion.
    `left_right`: right motion, over the prompts that ask for left or right; its `opposite` is how
    often the opposite direction was shown. A model without positions in time cannot tell the two
    apart."""
    asked = [item.objects[0].motion for item in facts]
    right = score_samples(predictions, facts)["motion"]
    shown = [VOCABULARY["motion"][k] if k >= 0 else None for k in predictions.motion[:, 0].tolist()]
    opposite = torch.tensor(
        [{a, s} == {"left", "right"} for a, s in zip(asked, shown, strict=True)]
    )
    moving = torch.tensor([motion != "still" for motion in asked])
    sideways = torch.tensor([motion in ("left", "right") for motion in asked])
    return {
        "motion_moving": rate(right[moving]),
        "left_right": rate(right[sideways]) | {"opposite": rate(opposite[sideways])},
    }


def format_report(report: dict) -> str:
    """Return a table for people: one row for each prompt list or control, one column for each
    attribute."""
    names = list(report["attributes"])

    def row(title: str, whole: dict | None, attributes: dict) -> str:
        cells = [
            f"{attributes[name]['value']:12.3f}" if name in attributes else " " * 12
            for name in names
        ]
        interval = f"{whole['value']:.3f} [{whole['low']:.3f}, {whole['high']:.3f}]"
        return f"{title:18} {interval:22}" + "".join(cells)

    rows = [
        row("seen", report["prompt_accuracy"], report["attributes"]),
        row("held out", report["held_out_accuracy"], report["held_out_attributes"]),
        row(
            "tokenizer ceiling",
            report["tokenizer_ceiling"],
            report["tokenizer_ceiling"]["attributes"],
        ),
        row("shuffled control", report["control"], report["control"]["attributes"]),
    ]
    if "motion_moving" in report:
        moving, sideways = report["motion_moving"], report["left_right"]
        rows.append(
            f"motion on prompts that move {moving['value']:.3f}; left or right: right"
            f" {sideways['value']:.3f}, the opposite {sideways['opposite']['value']:.3f}"
        )
    head = f"{'':18} {'all, 95 % interval':22}" + "".join(f"{name:>12}" for name in names)
    return "\n".join([head, *rows])
