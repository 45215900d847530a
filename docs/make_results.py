"""Write the tables between `<!-- results: NAME … -->` and `<!-- end of results -->` in README and
in docs/ from `results/NAME.json`, and those between `<!-- records: TRACK -->` and
`<!-- end of records -->` from `records/TRACK/*/recipe.json`: `python docs/make_results.py`. A test
compares."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from mmdit.config import load
from mmdit.data.moving_shapes.facts import TASKS
from mmdit.diagnostics.recipe import Recipe
from mmdit.diagnostics.results_file import first_reaching, shown_rate
from mmdit.diagnostics.significance import student_tail
from mmdit.diagnostics.speed_record import (
    deciding_rates,
    probability,
    record_faults,
    record_seconds,
)
from mmdit.diagnostics.tracks import TRACKS

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "records/README.md")
RESULTS, RECORDS = ROOT / "results", ROOT / "records"
PLACE = re.compile(
    r"(?P<head><!-- (?P<what>results|records): (?P<names>[\w ]+) -->\n).*?"
    r"(?P<end><!-- end of (?P=what) -->)",
    re.DOTALL,
)
RECORD_HEAD = (
    "| record | seconds | first steps | start | caching | held-out pairs | left or right | p |"
)
HEAD = """\
| score | config | training | seen | held-out pairs | left or right | ceiling | control |
|---|---|---|---|---|---|---|---|
"""


def rows(results: dict) -> list[str]:
    """Return a row of the table for each score."""
    lines = []
    for stage, row in results["stages"].items():
        for name, rates in row["scores"].items():
            if name in row.get("curves", {}):
                continue  # the table of arms has it
            cells = [f"{stage}, {name}", f"`{row['config']}`", training(row)]
            cells += [shown_rate(rates.get(key)) for key in ("seen", "held_out", "left_right")]
            cells += [f"{rates[key]['value']:.3f}" for key in ("ceiling", "control")]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def task_rows(results: dict) -> list[str]:
    """Return a row of the table of tasks for each score that has them."""
    lines = []
    for stage, row in results["stages"].items():
        for name, rates in row["scores"].items():
            if rates.keys() >= TASKS.keys():
                cells = [f"{stage}, {name}", *(shown_rate(rates[task]) for task in TASKS)]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def curves_of(files: list[dict]) -> list[tuple[str, dict, dict]]:
    """Return name, row and curve of each arm: of every score that was taken at several steps."""
    arms = []
    for results in files:
        for stage, row in results["stages"].items():
            curves = row.get("curves", {})
            for name, curve in curves.items():
                arms.append((stage if len(curves) == 1 else f"{stage}, {name}", row, curve))
    return arms


def arm_tables(files: list[dict]) -> list[str]:
    """Return the table of all arms, and the sentence that explains it. Their accuracies over the
    checkpoints are compared with those of the first arm; where arms were timed, also at the seconds
    after which the first of them ends."""
    arms = curves_of(files)
    if not arms:
        return []
    ends = [curve["points"][-1]["step"] * pace_of(curve) for *_, curve in arms if pace_of(curve)]
    first, level, common = arms[0], arms[0][2]["reached"], min(ends, default=0.0)
    titles = ["arm", "parameters", "steps", "seen", "held-out pairs", "beside the first"]
    titles += [f"samples to {level} held out"]
    moving = any("left_right" in curve["points"][-1] for *_, curve in arms)
    if moving:
        titles += ["left or right at each checkpoint"]
    bounded = has_own_ceilings([curve["points"][-1] for *_, curve in arms])
    if bounded:
        titles += ["ceiling"]
    if ends:
        titles += ["step", f"held out after {common:.0f} s", f"seconds to {level}"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, row, curve in arms:
        last, batch = curve["points"][-1], batch_of(row)
        parameters = row["parameters"]
        cells = [name, f"{parameters / 1e6:.1f} M" if isinstance(parameters, int) else "several"]
        cells += [f"{last['step']:,} of {batch:.0f}"]
        cells += [shown_rate(last[key] | {"per_seed": []}) for key in ("seen", "held_out")]
        cells += [beside(first, (name, row, curve))]
        samples = [None if steps is None else steps * batch for steps in steps_to(curve, level)]
        cells += [shown_values(samples)]
        if moving:
            rates = (point["left_right"]["value"] for point in curve["points"])
            cells += [", ".join(f"{rate:.2f}" for rate in rates)]
        if bounded:
            cells += [f"{last['ceiling']['value']:.3f}"]
        pace = pace_of(curve)
        if pace:
            seconds = shown_values(curve["seconds_to"])
            cells += [f"{pace * 1000:.1f} ms", held_out_at(curve, pace, common), seconds]
        elif ends:
            cells += ["not timed", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return ["\n".join(lines), explanation([curve["points"][-1] for *_, curve in arms])]


def has_own_ceilings(ends: list[dict]) -> bool:
    """Return whether the arms differ in their ceilings, as those of several tokenizers do: then a
    score stands beside its own."""
    values = [point["ceiling"]["value"] for point in ends]
    return max(values) - min(values) > 0.05


def batch_of(row: dict) -> float:
    """Return the samples of a step."""
    return row["training"]["samples"] / row["training"]["steps"]


def explanation(ends: list[dict]) -> str:
    """Return the sentences that say how sure the judge is at the last checkpoint of each arm, and
    what the columns compare."""
    said = (
        f"Ceiling {shown_range(ends, 'ceiling')}, shuffled control {shown_range(ends, 'control')}."
    )
    return (
        f"{said} *Beside the first*: the accuracy over all checkpoints, seen and held out, less"
        " that of the first arm of the same seed, with its 95 % interval over the seeds (Student's"
        " t)."
    )


def shown_range(points: list[dict], key: str) -> str:
    """Return the least and the greatest value of a rate."""
    values = [point[key]["value"] for point in points]
    return f"{min(values):.3f} … {max(values):.3f}"


def samples_of(row: dict, curve: dict) -> list[float]:
    """Return the samples seen at each checkpoint."""
    return [point["step"] * batch_of(row) for point in curve["points"]]


def growth(curve: dict) -> list[float]:
    """Return for each seed the mean accuracy over the checkpoints, of both lists of prompts."""
    rates = [point[key]["per_seed"] for point in curve["points"] for key in ("seen", "held_out")]
    return [statistics.fmean(values) for values in zip(*rates, strict=True)]


def mean_reach(values: Sequence[float]) -> float:
    """Return how far the true mean may lie from that of at least two `values`, on either side: the
    half of the 95 % interval by Student's t."""
    low, high = 0.0, 100.0  # the quantile is 12.7 for two values, and less for more
    for _ in range(60):
        middle = (low + high) / 2
        if student_tail(middle, len(values) - 1) > 0.025:
            low = middle
        else:
            high = middle
    return high * statistics.stdev(values) / math.sqrt(len(values))


def beside(first: tuple[str, dict, dict], arm: tuple[str, dict, dict]) -> str:
    """Return the difference of an arm's growth to the first's, seed by seed, with its 95 %
    interval; nothing where they were scored after other numbers of samples."""
    curve, its_curve = first[2], arm[2]
    if curve is its_curve or samples_of(*first[1:]) != samples_of(*arm[1:]):
        return ""
    differences = [b - a for a, b in zip(growth(curve), growth(its_curve))]
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return f"{mean:+.3f}"
    reach = mean_reach(differences)
    return f"{mean:+.3f} [{mean - reach:+.3f}, {mean + reach:+.3f}]"


def steps_to(curve: dict, level: float) -> list[float | None]:
    """Return for each seed the steps until the held-out accuracy was reached, None where it never
    was."""
    values = zip(*(point["held_out"]["per_seed"] for point in curve["points"]), strict=True)
    steps = [point["step"] for point in curve["points"]]
    return [first_reaching(list(zip(steps, seed)), level) for seed in values]


def pace_of(curve: dict) -> float | None:
    """Return the seconds of a step of the fastest seed; None: no seed was timed."""
    return min((pace for pace in curve["step_seconds"] if pace is not None), default=None)


def held_out_at(curve: dict, pace: float, seconds: float) -> str:
    """Return the held-out accuracy after so many seconds, on the line between two points; nothing
    where that is before the first of them."""
    points = [(at["step"] * pace, at["held_out"]["value"]) for at in curve["points"]]
    if seconds < points[0][0]:
        return "not scored yet"
    for (start, low), (end, high) in zip(points, points[1:]):
        if start <= seconds <= end:
            return f"{low + (high - low) * (seconds - start) / (end - start):.3f}"
    return f"{points[-1][1]:.3f}"  # its end, to rounding


def shown_values(values: list[float | None]) -> str:
    """Return the median over the seeds, with the least and the greatest; if a seed never came
    there, how many did."""
    reached = [value for value in values if value is not None]
    if len(reached) < len(values):
        text = f"{len(reached)} of {len(values)} seeds"
        return f"{text}: {', '.join(f'{value:,.0f}' for value in reached)}" if reached else text
    text = f"{statistics.median(reached):,.0f}"
    if len(reached) > 1:
        text += f", seeds {min(reached):,.0f} … {max(reached):,.0f}"
    return text


def training(row: dict) -> str:
    """Return what the training of a stage cost; without seconds where it was not timed."""
    facts, seconds = row["training"], row["seconds"]
    if not facts:
        return ""
    parts = [f"{facts['steps']:,.0f} steps"]
    if "training" in seconds:
        parts.append(f"{seconds['training']:.0f} s")
    if "memory_gb" in facts:
        parts.append(f"{facts['memory_gb']:.1f} GB")
    if "tflops_share" in facts:
        parts.append(f"{facts['tflops_share']:.0%} of the matmul rate")
    return ", ".join(parts)


def origin(results: dict) -> str:
    """Return the sentences that say what a table stands on."""
    machine, seeds = results["machine"], results["seeds"]
    where = f"{machine['device']}, torch {machine['torch']}" if isinstance(machine, dict) else ""
    commit = results["commit"] if isinstance(results["commit"], str) else ""
    words = [f"`{results['command']}`", where or "several machines"]
    words.append(f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds")
    if results["seconds"]:
        words.append(f"{results['seconds']:.0f} s a seed in all")
    if commit:
        words.append(f"commit {commit[:10]}")
    if any(row.get("in_process") for row in results["stages"].values()):
        words.append("without the start of commands (`--in_process`)")
    return "; ".join(words)


def table(names: list[str], folder: Path = RESULTS) -> str:
    """Return the table of these results files, and a line for each that says how it was made."""
    files = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names]
    lines = [line for results in files for line in rows(results)]
    tasks = [line for results in files for line in task_rows(results)]
    tables = [HEAD + "\n".join(lines)] if lines else []
    if tasks:
        heads = [f"| seen prompts of | {' | '.join(TASKS)} |", "|---" * 7 + "|"]
        tables.append("\n".join([*heads, *tasks]))
    tables += arm_tables(files)
    tables.append("\n".join(f"- {origin(results)}" for results in files))
    return "\n" + "\n\n".join(tables) + "\n\n"


def record_row(name: str, made: dict, recipe: Recipe, counts: bool) -> str:
    """Return the row of the table of a track for a record."""
    track, rates = TRACKS[recipe.track], deciding_rates(made, recipe)
    seconds = record_seconds(made, track)
    cells = [name, *([f"{value:.1f}" for value in seconds] if seconds else ["not timed"] * 4)]
    if counts:
        cells[1] = f"**{cells[1]}**"
    cells += [shown_rate(rates.get(key)) for key in ("held_out", "left_right")]
    measured = [key for key in track.rates if key in rates]
    cells.append(", ".join(f"{probability(rates[key]).larger:.2g}" for key in measured))
    return f"| {' | '.join(cells)} |"


def record_table(name: str, folder: Path = RECORDS) -> str:
    """Return the table of a track, the fastest record first, with what does not count and why, and
    the recipes that were not run yet."""
    track, rows, notes, waiting = TRACKS[name], [], [], []
    for path in sorted((folder / name).glob("*/recipe.yaml")):
        recipe, title = load(Recipe, path), path.parent.name
        if not path.with_suffix(".json").is_file():
            waiting.append(f"- `{title}`: {recipe.title}")
            continue
        made = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        faults = record_faults(made, recipe)
        place = (bool(faults), record_seconds(made, track) or (0.0,))
        rows.append((place, record_row(title, made, recipe, counts=not faults)))
        notes.append(f"- `{title}`: {origin(made)}")
        for stage, row in made["stages"].items():
            if "untimed" in row:
                notes.append(f"- `{title}`: {stage} was not timed with the seeds {row['untimed']}")
        notes += [f"- `{title}` does not count: {fault}" for fault in faults]
    lines = ["", f"Aim: {track.title}, in at most {track.aim:.0f} s."]
    if rows:
        lines += ["", RECORD_HEAD, "|---" * 8 + "|", *(row for _, row in sorted(rows)), "", *notes]
    if not any(not faulty for (faulty, _), _ in rows):
        lines += ["", "There is no record yet."]
    if waiting:
        lines += ["", "Recipes that were not run yet:", "", *waiting]
    return "\n".join([*lines, "", ""])


def renewed(text: str, folder: Path = RESULTS, records: Path = RECORDS) -> str:
    """Return a page with its tables made anew."""

    def place(match: re.Match) -> str:
        names = match["names"].split()
        if match["what"] == "records":
            made = "".join(record_table(name, records) for name in names)
        else:
            made = table(names, folder)
        return match["head"] + made + match["end"]

    return PLACE.sub(place, text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
