"""Say whether the result of a recipe of the record log counts, and if not, why not; and how many
seconds it took, by the rules of records/README.md."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from mmdit.diagnostics.recipe import Recipe, Score, Stage, overridden, stage_hash
from mmdit.diagnostics.significance import mean_above, share_above
from mmdit.diagnostics.tracks import FEWEST_SEEDS, LEVEL, MOST_P, TRACKS, Track

CARD = re.compile(r"\bH[12]00\b")
TOKENIZER = "VTP/checkpoints/vtp_tiny_f16d64"
# Options that a score and a cache may set: how samples are drawn and how many, but not which task.
SCORE_OPTIONS = {"--count", "--batch_size", "--steps", "--solver", "--guidance", "--interval"}
SCORE_OPTIONS |= {"--shift", "--eta", "--offload"}
CACHE_OPTIONS = {"--complete_captions", "--count", "--frames", "--seed"}


class Seconds(NamedTuple):
    """The seconds of a seed. `counted`: the steps at their pace, with saving, and on some tracks
    also the caching. Listed separately: `first_steps`, their time beyond that pace (compiling,
    kernels, graphs), `start` (imports, loading, building, the last save) and `caching`."""

    counted: float
    first_steps: float
    start: float
    caching: float


def record_seconds(made: dict, track: Track) -> Seconds | None:
    """Return the seconds in a results file, averaged over the seeds that were timed and summed over
    all stages; None if a stage was timed for no seed. If a training has so few reports that its
    first steps are not known, all its time is counted."""
    if not all(row["seconds"] for row in made["stages"].values()):
        return None
    counted = first_steps = start = caching = 0.0
    for row in made["stages"].values():
        training, seconds = row["training"], row["seconds"]
        caching += seconds.get("caching", 0.0)
        if training:
            beyond = max(0.0, training.get("first_steps_extra_seconds", 0.0))
            counted += training["loop_seconds"] - beyond
            first_steps += beyond
            start += seconds["training"] - training["loop_seconds"]
    return Seconds(counted + caching * track.caching, first_steps, start, caching)


class Probability(NamedTuple):
    """The p-values of a rate, by the test over the seeds and by the test over the prompts: how
    probable such a rate is if the true one is LEVEL."""

    seeds: float
    prompts: float

    @property
    def larger(self) -> float:
        """Return the larger p-value, which decides."""
        return max(self)


def probability(rate: dict) -> Probability:
    """Return the p-values of a pooled rate of a results file."""
    seeds = mean_above(rate["per_seed"], LEVEL)
    return Probability(seeds, share_above(rate["correct"], rate["count"], LEVEL))


def scored(recipe: Recipe) -> tuple[Stage, Score | None]:
    """Return the stage and the score that decide: the last ones."""
    stage = recipe.stages[-1]
    return stage, stage.scores[-1] if stage.scores else None


def deciding_rates(made: dict, recipe: Recipe) -> dict:
    """Return, by name, the measured rates of the score that decides."""
    stage, score = scored(recipe)
    if score is None:
        return {}
    rates = made["stages"].get(stage.name, {}).get("scores", {}).get(score.name, {})
    return {key: rate for key, rate in rates.items() if rate["value"] is not None}


def recipe_faults(recipe: Recipe, seeds: Sequence[int]) -> list[str]:
    """Return the reasons why no result of a recipe with these seeds would count; empty if one
    may."""
    track, faults = TRACKS[recipe.track], []
    if list(seeds) != list(range(len(seeds))) or len(seeds) < FEWEST_SEEDS:
        fewest = f"0 to {FEWEST_SEEDS - 1}, or more from 0 on"
        faults.append(f"the seeds are {list(seeds)}, and must be {fewest}")
    if tuple(seeds) != recipe.seeds:
        faults.append(f"the seeds are {list(seeds)}, those of the recipe {list(recipe.seeds)}")
    stage, score = scored(recipe)
    if score is None:
        faults.append(f"{stage.name}, the last stage, has no score")
    else:
        faults += _options_beside(score.evaluate, SCORE_OPTIONS, f"the score {score.name}")
    for stage in recipe.stages:
        faults += _stage_faults(stage)
    asked = shown_size(track.frames, track.width, track.height)
    if stage.config and drawn_size(stage) != asked:
        faults.append(f"{stage.name} draws {drawn_size(stage)}, not {asked}")
    return faults


def _stage_faults(stage: Stage) -> list[str]:
    """Return the reasons why a stage does not start from nothing, or has another tokenizer or cache
    than allowed."""
    if stage.checkpoint:
        return [f"{stage.name} has weights that the record does not train: {stage.checkpoint}"]
    faults, mapping = [], overridden(stage)
    start = (mapping.get("train") or {}).get("init_from")
    if start and not stage.init_from:
        faults.append(f"{stage.name} starts from weights that the record does not train: {start}")
    tokenizer = (mapping.get("tokenizer") or {}).get("name_or_path")
    if stage.tokenizer or tokenizer != TOKENIZER:
        faults.append(f"{stage.name} has another tokenizer than {TOKENIZER}")
    if stage.cache:
        name, *words = shlex.split(stage.cache)
        if name != "cache-moving-shapes":
            faults.append(f"the cache of {stage.name} is made by {name}, not cache-moving-shapes")
        faults += _options_beside(shlex.join(words), CACHE_OPTIONS, f"the cache of {stage.name}")
    return faults


def _options_beside(text: str, known: set[str], where: str) -> list[str]:
    """Return a list with one fault if the words of a command set other options than the `known`
    ones."""
    options = [word for word in shlex.split(text) if word.startswith("--") or "=" in word]
    other = [word for word in options if word.partition("=")[0] not in known]
    return [f"{where} has {' '.join(other)}, and may have {sorted(known)}"] if other else []


def drawn_size(stage: Stage) -> str:
    """Return the size of the samples of a stage, as text; with buckets, that of the first one."""
    mapping = overridden(stage)
    video, bucketing = (mapping.get(key) or {} for key in ("video", "bucketing"))
    size = [video.get("width"), video.get("height")]
    if bucketing.get("enabled"):
        size = bucketing["buckets"][0]
    return shown_size(video.get("num_frames"), *size)


def shown_size(frames: int | None, width: int | None, height: int | None) -> str:
    """Return a size as text."""
    return f"{frames} frames of {width}x{height}"


def record_faults(made: dict, recipe: Recipe) -> list[str]:
    """Return the reasons why a results file of a record does not count; empty if it does."""
    changed = {stage.name: stage_hash(recipe, stage) for stage in recipe.stages}
    if {name: row.get("made_by") for name, row in made["stages"].items()} != changed:
        return ["the recipe or a config has changed since"]
    faults = recipe_faults(recipe, made["seeds"])
    machine = made["machine"]
    if not isinstance(machine, dict):
        faults.append("the seeds ran on different machines, or with different versions")
    elif not CARD.search(machine["device"]):
        faults.append(f"it ran on {machine['device']}, not on an H100 or H200")
    if made["commit"] is None:
        faults.append(
            "code, configs or recipe were not committed: commit, and run in another --out"
        )
    elif not isinstance(made["commit"], str) or not isinstance(made["code"], str):
        faults.append("the code has changed between its commands")
    for name, row in made["stages"].items():
        if row["training"] and set(row["attempts"]) != {1}:
            faults.append(f"a training of {name} was stopped and went on, so its time is not known")
    if record_seconds(made, TRACKS[recipe.track]) is None:
        faults.append("a stage was timed in no seed: run one without --untimed")
    return faults + _rate_faults(made, recipe)


def _rate_faults(made: dict, recipe: Recipe) -> list[str]:
    """Return the reasons why the rates of a record are not shown to lie above LEVEL."""
    track, rates, faults = TRACKS[recipe.track], deciding_rates(made, recipe), []
    for key in track.rates:
        if key not in rates:
            faults.append(f"{key} was not measured")
            continue
        p = probability(rates[key])
        if p.larger >= MOST_P:
            faults.append(f"{key} is not above {LEVEL} with p < {MOST_P}: {shown_p(p)}")
    needed = track.prompts * len(made["seeds"])
    if "held_out" in rates and rates["held_out"]["count"] < needed:
        count = rates["held_out"]["count"]
        faults.append(f"{count} held-out prompts were asked over all seeds, and {needed} must be")
    return faults


def shown_p(p: Probability) -> str:
    """Return the p-value that decides, followed by both, as text."""
    return f"p = {p.larger:.2g} (seeds {p.seeds:.2g}, prompts {p.prompts:.2g})"


def verdict(made: dict, recipe: Recipe) -> tuple[list[str], bool]:
    """Return lines that say whether a record counts, and if not, why not; and whether it does."""
    track, faults = TRACKS[recipe.track], record_faults(made, recipe)
    seconds, rates = record_seconds(made, track), deciding_rates(made, recipe)
    lines = [f"record of {recipe.track}: aim {track.aim:.0f} s"]
    if seconds:
        caching = "of it caching" if track.caching else "apart from it caching"
        lines += [
            f"{seconds.counted:.1f} s; {caching} {seconds.caching:.1f} s, apart from it first steps"
            f" {seconds.first_steps:.1f} s and start {seconds.start:.1f} s"
        ]
    for key in track.rates:
        if key in rates:
            lines.append(f"{key} above {LEVEL}: {shown_p(probability(rates[key]))}")
    if faults:
        return [*lines, "it does NOT count:", *(f"  {fault}" for fault in faults)], False
    return [*lines, "it counts"], True
