"""Scores for a model card: the reports of `mmdit evaluate` that lie in the folder of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmdit.commands.card_text import table
from mmdit.commands.exported import Exported
from mmdit.foreign import read_json
from mmdit.privacy import is_local, last_part, without_paths
from mmdit.training.origin import identity
from mmdit.training.run_folder import modified

LARGEST_REPORT, MOST_SCORES = 1 << 20, 60
# Keys in a report of `mmdit evaluate` that are no scores.
ABOUT = {"settings", "checkpoint", "step", "raw_weights", "parameters", "machine", "memory_gb"}
ABOUT |= {"checkpoint_crc32", "seconds", "attributes", "held_out_attributes"}


def score_tables(run: Path, exported: Exported) -> tuple[list[str], list[str]]:
    """Return a table for each report about exactly the weights that were exported, and a note for
    each report about others."""
    tables, notes = [], []
    for path in sorted(run.glob("*.json")):
        try:
            report = read_json(path, "report of mmdit evaluate", LARGEST_REPORT)
        except ValueError:
            continue
        parts = (report.get("settings"), report.get("machine"))
        if "checkpoint" not in report or not all(isinstance(part, dict) for part in parts):
            continue
        if _is_about(report, path, exported):
            tables.append(_table(path.name, report))
        else:
            notes.append(
                f"the scores in {path} are of other weights (another run or step, or --raw_weights)"
                " and are left out: evaluate anew"
            )
    return tables, notes


def _is_about(report: dict, path: Path, exported: Exported) -> bool:
    if exported.checkpoint is None:
        return False
    if "step" not in report:  # from an older version
        return modified(path) >= modified(exported.checkpoint / "checkpoint.json")
    crc = report.get("checkpoint_crc32")  # tells a baseline's report from the run's
    same = crc is None or crc == identity(exported.checkpoint)
    alike = report["step"] == exported.step and bool(report.get("raw_weights")) == exported.raw
    return same and alike


def _table(name: str, report: dict) -> str:
    rows = [["measured by mmdit evaluate", name]]
    rows += [[title, value] for title, value in score_rows(report)][:MOST_SCORES]
    machine = report.get("machine") or {}
    rows.append(["drawn with", settings_in_words(report.get("settings") or {})])
    rows.append(["on", str(machine.get("device", "not stated"))])
    return table(rows)


def settings_in_words(settings: dict) -> str:
    """Return a text on how the samples of a report were drawn."""
    sampler = settings.get("sampler")
    sampler = sampler if isinstance(sampler, dict) else {}
    return (
        f"{sampler.get('solver')}, {sampler.get('steps')} steps, guidance"
        f" {settings.get('cfg_scale')}, seed {settings.get('seed')}"
    )


def score_rows(report: dict) -> Iterator[tuple[str, str]]:
    """Yield each score of a report as a title and a text, which names what the score is based
    on."""
    for key, value in report.items():
        if key not in ABOUT:
            yield from _rows(key.replace("_", " "), value)


def _rows(title: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and isinstance(value.get("value"), int | float):
        text = f"{value['value']:.6g}"
        if all(isinstance(value.get(bound), int | float) for bound in ("low", "high")):
            text = f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
        if isinstance(value.get("deviation"), int | float):
            text += f" ± {value['deviation']:.3g}"
        yield title, f"{text} of {value['count']}" if "count" in value else text
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _rows(f"{title}: {key.replace('_', ' ')}", item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield title, f"{value:.6g}"
    elif isinstance(value, str) and value:
        yield title, last_part(value) if is_local(value) else without_paths(value)
    elif isinstance(value, list) and all(isinstance(item, str) for item in value):
        yield title, without_paths("; ".join(value))
