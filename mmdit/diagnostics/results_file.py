"""Results files: what the seeds of a recipe reached, pooled, with everything that is needed to
believe it.

A score has five rates: `seen`, `held_out`, `left_right` (clips), `ceiling` and `control`; with
`--variant many` also the rates of the seen prompts of each task, by its name. Each has `{value,
low, high, correct, count}` over the prompts of all seeds with its 95 % Wilson interval, the value
of every seed, and `accept`: from the lowest to the highest end of the seeds' intervals.
"""

from __future__ import annotations

import json
import platform
import statistics
from itertools import chain
from pathlib import Path

import torch

import mmdit
from mmdit.data.moving_shapes import wilson
from mmdit.data.moving_shapes.facts import TASKS
from mmdit.diagnostics.recipe import (
    Recipe,
    config_hash,
    documented_commands,
    read_recipe,
    recipe_names,
    stage_hash,
)
from mmdit.files import read_text, write_atomically
from mmdit.training.metrics import clock

RATES = {  # the name here: the name in a report of `mmdit evaluate`
    "seen": "prompt_accuracy",
    "held_out": "held_out_accuracy",
    "left_right": "left_right",
    "ceiling": "tokenizer_ceiling",
    "control": "control",
}
REACHED = 0.95  # the held-out accuracy for which the time is reported
TIMES = (  # facts of a training that depend on what else the device does
    "loop_seconds",
    "first_steps_extra_seconds",
    "step_seconds",
    "samples_per_second",
    "tflops",
    "tflops_share",
    "data_wait",
)
COMPARED = ("seen", "held_out", "left_right", *TASKS)


def machine(device: torch.device) -> dict:
    """Return what a measurement on `device` depends on: the card, and versions."""
    cuda = device.type == "cuda"
    cores = f"CPU, threads: {torch.get_num_threads()}"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cores,
        "torch": torch.__version__,
        "mmdit": mmdit.__version__,
        "python": platform.python_version(),
    }


def peak_memory(device: torch.device) -> float | None:
    """Return the peak GPU memory of the tensors of this process, in GB; None on other devices."""
    if device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 2)


def write_report(path: str | Path, report: dict) -> None:
    """Write the report of a command as JSON, and make the folders above it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(report, indent=1))


def pooled(rates: list[dict]) -> dict:
    """Return one rate, pooled over the prompts of all seeds."""
    correct = sum(rate["correct"] for rate in rates)
    count = sum(rate["count"] for rate in rates)
    low, high = wilson(correct, count)
    values = [rate["value"] for rate in rates if rate["count"]]
    if not values:
        return {"value": None, "low": low, "high": high, "correct": 0, "count": 0}
    result = {
        "value": correct / count,
        "low": low,
        "high": high,
        "correct": correct,
        "count": count,
        "per_seed": values,
        "spread": max(values) - min(values),
        "accept": [min(rate["low"] for rate in rates), max(rate["high"] for rate in rates)],
    }
    if "opposite" in rates[0]:
        result["opposite"] = pooled([rate["opposite"] for rate in rates])["value"]
    return result


def rates_of(report: dict) -> dict:
    """Return the rates of a report of `mmdit evaluate`, under the names of results files."""
    rates = {key: report[name] for key, name in RATES.items() if name in report}
    return rates | {task: row["seen"] for task, row in report.get("tasks", {}).items()}


def without_details(rate: dict) -> dict:
    """Return a rate without its `attributes` and `chance`."""
    return {key: value for key, value in rate.items() if key not in ("attributes", "chance")}


def curve_point(report: dict) -> dict:
    """Return the step and the rates of one of the reports of `mmdit evaluate --at_steps`."""
    rates = {key: without_details(rate) for key, rate in rates_of(report).items()}
    return {"step": report["step"], "rates": rates}


def pooled_score(seeds: list[dict]) -> dict:
    """Return the rates of a score by name, pooled over the prompts of all seeds."""
    score = {}
    for key in (*RATES, *TASKS):
        if key in seeds[0]:
            score[key] = pooled([rates[key] for rates in seeds])
    return score


def mean_of(rows: list[dict]) -> dict:
    """Return the mean of the numbers in `rows` for each key, over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    means = {}
    for name in names:
        values = [row[name] for row in rows if isinstance(row.get(name), (int, float))]
        if values:
            means[name] = round(statistics.fmean(values), 4)
    return means


def training_facts(run_dir: Path) -> dict:
    """Return what a training cost, from the metrics of its run. `first_steps_extra_seconds`: how
    much longer the steps of the first report took than they would at the pace of the later ones,
    through compiling and the like. It and `step_seconds` are missing if there are fewer than three
    reports."""
    lines = read_text(run_dir / "metrics.jsonl").splitlines()
    rows = [json.loads(line) for line in lines]
    last, later = rows[-1], rows[1:] or rows
    facts = {
        "steps": last["step"],
        "samples": last["images_seen"],
        "loop_seconds": round(last["wall_s"], 2),
        "loss": last["loss"],
    }
    if len(rows) > 2:
        paces = [
            (row["wall_s"] - before["wall_s"]) / (row["step"] - before["step"])
            for before, row in zip(rows, later)
        ]
        pace = statistics.median(paces)
        facts["first_steps_extra_seconds"] = round(rows[0]["wall_s"] - rows[0]["step"] * pace, 2)
        facts["step_seconds"] = round(pace, 5)
    for name in ("samples_per_second", "tflops", "tflops_share", "data_wait"):
        values = [row[name] for row in later if row.get(name) is not None]
        if values:
            facts[name] = round(statistics.median(values), 4)
    peaks = [row["memory_gb"] for row in rows if "memory_gb" in row]
    return facts | ({"memory_gb": round(max(peaks), 2)} if peaks else {})


def results(name: str, recipe: Recipe, records: list[dict]) -> dict:
    """Return the content of a results file, from the finished records of the seeds."""
    versions = list(chain.from_iterable(record["versions"] for record in records))
    stages = {}
    for stage in recipe.stages:
        rows = [without_times(record["stages"][stage.name]) for record in records]
        scores = {}
        for score in stage.scores:
            scores[score.name] = pooled_score([row["scores"][score.name] for row in rows])
        stages[stage.name] = {
            "config": stage.config or stage.checkpoint,
            "config_hash": config_hash(stage),
            "made_by": stage_hash(recipe, stage),
            "commands": documented_commands(recipe, stage),
            "parameters": one_of(row.get("parameters") for row in rows),
            "scoring_memory_gb": one_of(row.get("scoring_memory_gb") for row in rows),
            "attempts": [row["attempts"] for row in rows],
            "seconds": mean_of([row["seconds"] for row in rows]),
            "training": mean_of([row["training"] for row in rows if "training" in row]),
            "scores": scores,
        }
        curves = {score: curve(rows, score) for score in rows[0].get("curves", {})}
        if curves:
            stages[stage.name]["curves"] = curves
        if any(row.get("in_process") for row in rows):
            stages[stage.name]["in_process"] = True  # its seconds exclude the start of commands
        untimed = [record["seed"] for record, row in zip(records, rows) if row.get("untimed")]
        if untimed:
            stages[stage.name]["untimed"] = untimed
    return {
        "name": name,
        "title": recipe.title,
        "command": f"{recipe.program} reproduce {name}",
        "seeds": [record["seed"] for record in records],
        "seconds": seconds_of(stages),
        "machine": one_of(record["machine"] for record in records),
        "commit": one_of(version["commit"] for version in versions),
        "code": one_of(version["code"] for version in versions),
        "stages": stages,
    }


def without_times(row: dict) -> dict:
    """Return the record of a stage for one seed; without seconds if it is marked as untimed."""
    if not row.get("untimed"):
        return row
    training = {name: fact for name, fact in row["training"].items() if name not in TIMES}
    return row | {"seconds": {}, "training": training}


def curve(rows: list[dict], score: str) -> dict:
    """Return how a score grew during training, from the rows of a stage, one for each seed.

    `points`: at each step, the rates over the prompts of all seeds. `step_seconds`: for each seed
    the seconds of a step (the median, so that neither compiling nor a pause counts; None if it was
    not timed). `seconds_to`: for each seed the seconds until the held-out accuracy was REACHED,
    None if it never was. They are computed at the pace of the fastest seed, because other work on
    the machine makes steps longer.
    """
    points, reached = [], []
    for at, point in enumerate(rows[0]["curves"][score]):
        seeds = [row["curves"][score][at]["rates"] for row in rows]
        points.append({"step": point["step"]} | pooled_score(seeds))
    paces = [row["training"].get("step_seconds") for row in rows]
    pace = min((value for value in paces if value is not None), default=None)
    for row in rows:
        held_out = [(at["step"], at["rates"]["held_out"]["value"]) for at in row["curves"][score]]
        steps = first_reaching(held_out, REACHED)
        reached.append(None if steps is None or pace is None else round(steps * pace, 1))
    return {"points": points, "step_seconds": paces, "reached": REACHED, "seconds_to": reached}


def first_reaching(points: list[tuple[float, float]], level: float) -> float | None:
    """Return where the line through `points` (x, y), sorted by x, first reaches the level: the
    first x if it begins there; None if it never does."""
    before: tuple[float, float] | None = None
    for x, y in points:
        if y >= level:
            if before is None:
                return x
            return before[0] + (x - before[0]) * (level - before[1]) / (y - before[1])
        before = (x, y)
    return None


def one_of(values) -> object:
    """Return the value that all seeds share, or a list of the different values."""
    different: list = []
    for value in values:
        if value not in different:
            different.append(value)
    return different[0] if len(different) == 1 else different


def seconds_of(stages: dict) -> float | None:
    """Return the seconds of all commands of a seed, including those of its caches; None if a stage
    was timed for no seed."""
    if not all(stage["seconds"] for stage in stages.values()):
        return None
    return round(sum(sum(stage["seconds"].values()) for stage in stages.values()), 1)


def comparison(new: dict, published: dict | None, recipe: Recipe) -> tuple[list[str], bool]:
    """Return a line for each rate of `new`, and whether all rates hold: each reaches its floor, and
    lies inside the interval that `published` accepts, or its own interval overlaps that."""
    lines, holds = [], True
    accepted = published["stages"] if published else {}
    for stage in recipe.stages:
        for score in stage.scores:
            rates = new["stages"][stage.name]["scores"][score.name]
            known = accepted.get(stage.name, {}).get("scores", {}).get(score.name, {})
            for key in COMPARED:
                if key not in rates or rates[key]["value"] is None:
                    continue
                verdicts = [_beside_floor(rates[key]["value"], score.at_least.of(key))]
                verdicts.append(_beside_published(rates[key], known.get(key)))
                said = ", ".join(text for text, _ in verdicts if text)
                holds = holds and all(good for _, good in verdicts)
                title = f"{stage.name} · {score.name} · {key}"
                lines.append(f"{title:48} {shown_rate(rates[key])}  {said}".rstrip())
    return lines, holds


def _beside_floor(value: float, floor: float | None) -> tuple[str, bool]:
    if floor is None:
        return "", True
    if value >= floor:
        return f"reaches {floor:.3f}", True
    return f"IS BELOW {floor:.3f}", False


def _beside_published(rate: dict, known: dict | None) -> tuple[str, bool]:
    if known is None or known.get("accept") is None:
        return "nothing published to compare with", True
    low, high = known["accept"]
    where = f"[{low:.3f}, {high:.3f}] of the published {known['value']:.3f}"
    if low <= rate["value"] <= high:
        return f"inside {where}", True
    if rate["low"] <= high and rate["high"] >= low:
        return f"its interval overlaps {where}", True
    return f"OUTSIDE {where}", False


def shown_rate(rate: dict | None) -> str:
    """Return a rate with its interval, as text; with several seeds, also the lowest and the
    highest."""
    if rate is None or rate["value"] is None:
        return ""
    text = f"{rate['value']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"
    seeds = rate.get("per_seed", [])
    if len(seeds) > 1:
        text += f", seeds {min(seeds):.3f} … {max(seeds):.3f}"
    return text


def overview(folder: Path) -> str:
    """Return a line for each recipe: its title, and the seconds that it took. ValueError if there
    is no recipe."""
    rows = []
    if not recipe_names(folder):
        raise ValueError(
            f"{folder} holds no recipe: give this command in a clone of the repository, or name its"
            " folder results by --results"
        )
    for name in recipe_names(folder):
        recipe, path = read_recipe(folder, name), folder / f"{name}.json"
        text = "not measured yet"
        if path.is_file():
            known = json.loads(read_text(path))
            device = known["machine"]["device"] if isinstance(known["machine"], dict) else "several"
            text = f"{clock(known['seconds'])} a seed" if known["seconds"] else "not timed"
            text += f" on {device}"
            hashes = {stage: row["config_hash"] for stage, row in known["stages"].items()}
            if hashes != {stage.name: config_hash(stage) for stage in recipe.stages}:
                text += "; the recipe or a config has changed since"
        sizes = f"stages: {len(recipe.stages)}, seeds: {len(recipe.seeds)}"
        rows.append(f"{name:24} {recipe.title} ({sizes}; {text})")
    return "\n".join(rows)
