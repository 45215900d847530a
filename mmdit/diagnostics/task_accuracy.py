"""Measure how often a model shows what its prompt says about several objects: GenEval's six tasks
on moving shapes of variant `many`, judged by the oracle, with calibrations beside each score.

The oracle is calibrated on true pictures: as they are drawn (`truth`), after the tokenizer's round
trip (`ceiling`), and by how often it accepts one for a prompt that it misses in one thing
(`one_off`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from mmdit.data.moving_shapes.facts import (
    BACKGROUNDS,
    COLORS,
    MOTIONS,
    SHAPES,
    TASKS,
    Facts,
    Object,
)
from mmdit.data.moving_shapes.oracle import (
    Predictions,
    accuracy,
    rate,
    score_samples,
)
from mmdit.data.moving_shapes.sentences import MANY_PROMPTS, PROMPTS, prompts
from mmdit.diagnostics.prompt_accuracy import (
    Sample,
    check_counts,
    format_report,
    prompt_accuracy_report,
    read_round_trip,
    read_samples,
    shuffled,
)
from mmdit.diagnostics.results_file import shown_rate
from mmdit.interfaces import Tokenizer

CALIBRATION = ("truth", "ceiling", "ceiling_control", "one_off")  # keys of `calibration`
RATES = ("seen", "held_out", "ceiling", "control")


def task_accuracy_report(
    sample: Sample,
    tokenizer: Tokenizer,
    *,
    width: int,
    height: int,
    frames: int,
    count: int = MANY_PROMPTS,
    batch: int = 64,
    device: torch.device | str = "cpu",
    known: dict | None = None,
) -> dict:
    """Return the score of a model, ready for JSON. `tasks` has, for each of the six tasks, the
    rates `seen`, `held_out`, `control` (the samples of the seen prompts against other prompts of
    the task), those of `calibration`, the `attributes` of the seen prompts, and their rate
    `by_objects`. Rates with the names of `prompt_accuracy_report` are over all tasks.

    `sample` is as in `prompt_accuracy_report`, with the place of a caption among all 1,536 prompts.
    `count`: how many of the 128 seen and of the 128 held-out prompts of each task. `known`: such a
    report for other weights, with the same tokenizer and options, whose calibration is reused.
    """
    check_counts(count, MANY_PROMPTS, batch)
    tasks, shape = {}, (frames, 3, height, width)
    for number, task in enumerate(TASKS):
        seen, held_out = (
            prompts(split, frames > 1, width, height, task)[:count]
            for split in ("seen", "held_out")
        )
        facts = [prompt.facts for prompt in seen]
        first = 2 * number * MANY_PROMPTS
        shown = read_samples(sample, seen, first, batch, shape, device, "many")
        unseen = read_samples(sample, held_out, first + MANY_PROMPTS, batch, shape, device, "many")
        on_seen = accuracy(shown, facts)
        if known is None:
            calibrated = calibration(tokenizer, facts, batch, shape, device)
        else:
            calibrated = {name: known["tasks"][task][name] for name in CALIBRATION}
        tasks[task] = {
            "seen": on_seen["prompt_accuracy"],
            "held_out": accuracy(unseen, [p.facts for p in held_out])["prompt_accuracy"],
            "control": shuffled(shown, facts)["prompt_accuracy"],
            "attributes": on_seen["attributes"],
            "by_objects": _by_objects(shown, facts),
        } | calibrated
    names = ("prompt_accuracy", "held_out_accuracy", "tokenizer_ceiling", "control")
    report = {name: _over_all(tasks, key) for name, key in zip(names, RATES, strict=True)}
    return report | {"variant": "many", "tasks": tasks, "count": count}


def calibration(
    tokenizer: Tokenizer,
    facts: list[Facts],
    batch: int,
    shape: tuple[int, int, int, int],
    device: torch.device | str,
) -> dict:
    """Return how far the oracle can be trusted on scenes of one task: `truth`, `ceiling`,
    `ceiling_control` (these pictures against other prompts), and `one_off`: for each thing that may
    be wrong, how often such a picture is accepted after the round trip."""
    drawn = read_round_trip(None, facts, batch, shape, device, "many")
    decoded = read_round_trip(tokenizer, facts, batch, shape, device, "many")
    wrong = {}
    for name, change in CHANGES.items():
        asked = [change(item, i) for i, item in enumerate(facts)]
        there = torch.tensor([item is not None for item in asked])
        if there.any():
            listed = [item or facts[i] for i, item in enumerate(asked)]
            wrong[name] = rate(score_samples(decoded, listed)["all"][there])
    return {
        "truth": accuracy(drawn, facts)["prompt_accuracy"],
        "ceiling": accuracy(decoded, facts)["prompt_accuracy"],
        "ceiling_control": shuffled(decoded, facts)["prompt_accuracy"],
        "one_off": wrong,
    }


def _over_all(tasks: dict, key: str) -> dict:
    """Return one rate, over the prompts of all tasks."""
    rates = [task[key] for task in tasks.values()]
    correct, count = sum(r["correct"] for r in rates), sum(r["count"] for r in rates)
    return rate(torch.arange(count) < correct)


def _by_objects(predictions: Predictions, facts: list[Facts]) -> dict[str, dict]:
    right = score_samples(predictions, facts)["all"]
    counts = torch.tensor([len(item.objects) for item in facts])
    return {str(n): rate(right[counts == n]) for n in sorted(set(counts.tolist()))}


# ── prompts that a true picture misses in one thing; None if the prompt does not state that ───────
def _other_count(facts: Facts, index: int) -> Facts:
    """Return the facts with one object fewer, or one more."""
    objects = facts.objects
    if len(objects) > 1 and index % 2:
        return replace(facts, objects=objects[:-1])
    return replace(facts, objects=(*objects, objects[-1]))


def _other_shape(facts: Facts, index: int) -> Facts:
    absent = _absent(SHAPES, {item.shape for item in facts.objects}, index)
    return _changed(facts, index, lambda item: replace(item, shape=absent))


def _other_color(facts: Facts, index: int) -> Facts | None:
    if "color" not in facts.attributes:
        return None
    absent = _absent(COLORS, {item.color for item in facts.objects}, index)
    return _changed(facts, index, lambda item: replace(item, color=absent))


def _swapped_colors(facts: Facts, index: int) -> Facts | None:
    """Return the facts with the same colours and shapes, but with the colours of two objects
    swapped; None unless the task is attribution."""
    if facts.task != "attribution":
        return None
    first, second, *rest = facts.objects
    pair = (replace(first, color=second.color), replace(second, color=first.color))
    return replace(facts, objects=(*pair, *rest))


def _other_place(facts: Facts, index: int) -> Facts | None:
    """Return the facts with the first object on the opposite side of the second, or turned by 90°
    around it; None if no place is stated."""
    if facts.task != "position":
        return None
    first, second, *rest = facts.objects
    x, y = first.offset(second, 0)
    turned = (-x, -y) if index % 2 else (-y, x)
    moved = replace(first, x=second.x + turned[0], y=second.y + turned[1])
    return replace(facts, objects=(moved, second, *rest))


def _other_background(facts: Facts, index: int) -> Facts:
    return replace(facts, background=_absent(BACKGROUNDS, {facts.background}, index))


def _other_motion(facts: Facts, index: int) -> Facts | None:
    if facts.objects[0].motion is None:
        return None
    names = list(MOTIONS)

    def change(item: Object) -> Object:
        step = 1 + index % (len(names) - 1)
        return replace(item, motion=names[(names.index(str(item.motion)) + step) % len(names)])

    return _changed(facts, index, change)


def _absent(words, there: set[str], index: int) -> str:
    absent = [word for word in words if word not in there]
    return absent[index % len(absent)]


def _changed(facts: Facts, index: int, change: Callable[[Object], Object]) -> Facts:
    """Return the facts with one object changed, or with all of those that are counted together."""
    chosen = index % len(facts.objects)
    objects = []
    for i, item in enumerate(facts.objects):
        objects.append(change(item) if i == chosen or facts.task == "counting" else item)
    return replace(facts, objects=tuple(objects))


CHANGES: dict[str, Callable[[Facts, int], Facts | None]] = {
    "one more or fewer": _other_count,
    "shape": _other_shape,
    "color": _other_color,
    "swapped colors": _swapped_colors,
    "position": _other_place,
    "background": _other_background,
    "motion": _other_motion,
}


def format_tasks(report: dict) -> str:
    """Return a table for people with one row for each task: rates with their intervals, how many
    pictures that miss one thing were accepted, and for a model what is right in the samples of seen
    prompts."""
    tasks = report["tasks"]
    columns = [*RATES[:2], "truth", *RATES[2:], "ceiling_control"]
    columns = [name for name in columns if name in next(iter(tasks.values()))]
    titles = (*(name.replace("_", " ") for name in columns), "one off")
    lines = [f"{'':12}" + "".join(f"{title:>23}" for title in titles)]
    for name, task in tasks.items():
        wrong = task["one_off"].values()
        accepted = f"{sum(r['correct'] for r in wrong)} of {sum(r['count'] for r in wrong)}"
        cells = [shown_rate(task[column]) for column in columns]
        lines.append(f"{name:12}" + "".join(f"{cell:>23}" for cell in (*cells, accepted)))
    for name, task in tasks.items():
        if "attributes" in task:
            parts = [f"{key} {r['value']:.3f}" for key, r in task["attributes"].items()]
            counts = [f"of {n} {r['value']:.3f}" for n, r in task["by_objects"].items()]
            lines.append(f"{name:12} {', '.join(parts)}; objects: {', '.join(counts)}")
    return "\n".join(lines)


SCORES = {  # for each variant: report, prompts per list, table
    "one": (prompt_accuracy_report, PROMPTS, format_report),
    "many": (task_accuracy_report, MANY_PROMPTS, format_tasks),
}


def score_variant(
    variant: str, sample: Sample, tokenizer: Tokenizer, count: int | None, **options
) -> tuple[dict, str]:
    """Return the report of a model on a variant of moving shapes, and its table. `count`: prompts
    of each list, None for all; `options`: size, frames, device, and a report `known` for the
    tokenizer."""
    report_of, most, table = SCORES[variant]
    report = report_of(sample, tokenizer, count=most if count is None else count, **options)
    return report, table(report)
