"""Write the tables between `<!-- results: NAME … -->` and `<!-- end of results -->` in README and
in docs/ from `results/NAME.json`: `python docs/make_results.py`. A test compares."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

from mmdit.data.moving_shapes.facts import TASKS
from mmdit.diagnostics.results_file import shown_rate

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RESULTS = ROOT / "results"
PLACE = re.compile(
    r"(?P<head><!-- results: (?P<names>[\w ]+) -->\n).*?(?P<end><!-- end of results -->)",
    re.DOTALL,
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
            for name, curve in row.get("curves", {}).items():
                arms.append((f"{stage}, {name}", row, curve))
    return arms


def arm_lines(files: list[dict]) -> list[str]:
    """Return the table of all arms, compared at the seconds after which the first of them ends."""
    arms = [arm for arm in curves_of(files) if None not in arm[2]["step_seconds"]]
    if not arms:
        return []
    ends = [curve["points"][-1]["step"] * pace_of(curve) for _, _, curve in arms]
    level, common = arms[0][2]["reached"], min(ends)
    heads = [f"held out after {common:.0f} s", f"seconds to {level} held out"]
    titles = ["arm", "parameters", "step", "at the end", "seen", "held-out pairs", *heads]
    lines = ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for (name, row, curve), end in zip(arms, ends, strict=True):
        last = curve["points"][-1]
        parameters = row["parameters"]
        size = f"{parameters / 1e6:.1f} M" if isinstance(parameters, int) else "several"
        pace = f"{pace_of(curve) * 1000:.1f} ms"
        cells = [name, size, pace, f"{last['step']:,} steps, {end:.0f} s"]
        cells += [shown_rate(last["seen"]), shown_rate(last["held_out"])]
        cells += [held_out_at(curve, common), shown_seconds(curve["seconds_to"])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def pace_of(curve: dict) -> float:
    """Return the seconds of a step of the fastest seed."""
    return min(curve["step_seconds"])


def held_out_at(curve: dict, seconds: float) -> str:
    """Return the held-out accuracy after so many seconds, on the line between two points; nothing
    where that is before the first of them."""
    points = [(at["step"] * pace_of(curve), at["held_out"]["value"]) for at in curve["points"]]
    if seconds < points[0][0]:
        return "not scored yet"
    for (start, low), (end, high) in zip(points, points[1:]):
        if start <= seconds <= end:
            return f"{low + (high - low) * (seconds - start) / (end - start):.3f}"
    return f"{points[-1][1]:.3f}"  # its end, to rounding


def shown_seconds(seconds: list[float | None]) -> str:
    """Return the median over the seeds, with the least and the greatest; if a seed never came
    there, how many did."""
    reached = [value for value in seconds if value is not None]
    if len(reached) < len(seconds):
        text = f"{len(reached)} of {len(seconds)} seeds"
        return f"{text}: {', '.join(f'{value:.0f}' for value in reached)}" if reached else text
    text = f"{statistics.median(reached):.0f}"
    if len(reached) > 1:
        text += f", seeds {min(reached):.0f} … {max(reached):.0f}"
    return text


def training(row: dict) -> str:
    """Return what the training of a stage cost."""
    facts, seconds = row["training"], row["seconds"]
    if not facts:
        return ""
    parts = [f"{facts['steps']:,.0f} steps", f"{seconds['training']:.0f} s"]
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
    if tasks:
        lines += ["", f"| seen prompts of | {' | '.join(TASKS)} |", "|---" * 7 + "|", *tasks]
    lines += arm_lines(files)
    said = "\n".join(f"- {origin(results)}" for results in files)
    return f"\n{HEAD}" + "\n".join(lines) + f"\n\n{said}\n\n"


def renewed(text: str, folder: Path = RESULTS) -> str:
    """Return a page with its tables made anew."""

    def place(match: re.Match) -> str:
        return match["head"] + table(match["names"].split(), folder) + match["end"]

    return PLACE.sub(place, text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
