"""A recipe: the stages by which a published figure is made, read from `results/NAME.yaml`, or from
`FOLDER/recipe.yaml` of a record (records/README.md).

    title: what is made
    seeds: [0, 1, 2]
    stages:
      - name: pictures
        config: configs/moving_shapes_t2i_128.yaml
        cache: cache-moving-shapes --count 30000
        scores:
          - {name: pictures 128 px, evaluate: --count 256, at_least: {seen: 0.95}}

A stage makes its cache, trains from it and is scored. A later one may take the cache (`cache_of`)
and the weights (`init_from`) of an earlier one, or train from its cache as well (`beside`). A stage
with `tokenizer` pre-trains the tokenizer of its cache first; one with `checkpoint` is only scored.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

from mmdit.config import ConfigError, FilePath, apply_overrides, load, parse_yaml
from mmdit.data.moving_shapes.facts import TASKS
from mmdit.diagnostics.tracks import TRACKS
from mmdit.shipped import find

DRIVER = re.compile(r"tests\.drivers\.\w+")


@dataclass(frozen=True)
class Floors:
    """Rates that a score must reach; None sets no floor."""

    seen: float | None = None
    held_out: float | None = None
    left_right: float | None = None
    # For `--variant many`: the rate that the seen prompts of each task must reach.
    each_task: float | None = None

    def __post_init__(self):
        for field in fields(self):
            floor = getattr(self, field.name)
            if floor is not None and not 0 <= floor <= 1:
                raise ConfigError(field.name, f"is {floor}, must be a rate from 0 to 1")

    def of(self, rate: str) -> float | None:
        """Return the floor of a rate, which is given by its name in a results file."""
        return self.each_task if rate in TASKS else getattr(self, rate)


@dataclass(frozen=True)
class Score:
    """One call of `mmdit evaluate` on the checkpoint of a stage."""

    name: str
    # Further words of the command; overrides of the stored config come last.
    evaluate: str = ""
    at_least: Floors = Floors()


@dataclass(frozen=True)
class Stage:
    """One training with its cache and its scores, or a `checkpoint` that is only scored."""

    # The name of its run folder.
    name: str
    config: FilePath = ""
    checkpoint: FilePath = ""
    # The command that pre-trains the tokenizer of the cache, with its words except output_dir and
    # --device; if empty, the config names the tokenizer. All seeds share it, as they do the cache.
    tokenizer: str = ""
    # The caching command with its words, except --config, --out_dir and --device.
    cache: str = ""
    # The earlier stage whose cache this one trains from.
    cache_of: str = ""
    # Earlier stages whose caches this one also trains from; every item is drawn equally often.
    beside: tuple[str, ...] = ()
    # The earlier stage from whose weights this one starts; if empty, the config decides.
    init_from: str = ""
    overrides: tuple[str, ...] = ()
    scores: tuple[Score, ...] = ()

    def __post_init__(self):
        if bool(self.config) == bool(self.checkpoint):
            raise ConfigError("config", "is needed, or a checkpoint in place of it")
        if self.config and bool(self.cache) == bool(self.cache_of):
            raise ConfigError("cache", "is needed, or cache_of with an earlier stage")
        if self.cache and not self.cache.startswith("cache-"):
            raise ConfigError("cache", f"is {self.cache!r}, must begin with a caching command")
        if self.tokenizer and not self.tokenizer.startswith("train-vtp --config "):
            message = f"is {self.tokenizer!r}, must begin with train-vtp --config"
            raise ConfigError("tokenizer", message)
        if self.tokenizer and not self.cache:
            raise ConfigError(
                "tokenizer", "is that of a cache, but the stage makes none: add cache"
            )
        trains = self.cache or self.cache_of or self.beside or self.init_from or self.overrides
        if self.checkpoint and trains:
            raise ConfigError("checkpoint", "is only scored: remove cache, init_from, overrides")


@dataclass(frozen=True)
class Recipe:
    """The stages that make a figure from nothing."""

    title: str
    stages: tuple[Stage, ...]
    seeds: tuple[int, ...] = (0,)
    # The program that runs it, `python -m MODULE`, if it names a part that mmdit alone lacks. Only
    # our own drivers are allowed, because a recipe may be a file of others.
    module: str = "mmdit"
    # For a record: its track in the record log.
    track: str = ""

    def __post_init__(self):
        if self.track and self.track not in TRACKS:
            raise ConfigError("track", f"is {self.track!r}, must be one of {', '.join(TRACKS)}")
        check_names("stages", (stage.name for stage in self.stages))
        if not self.stages:
            raise ConfigError("stages", "is empty; list at least one")
        if self.module != "mmdit" and not DRIVER.fullmatch(self.module):
            raise ConfigError(
                "module", f"is {self.module!r}, must be mmdit or a driver, tests.drivers.NAME"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError("seeds", f"is {list(self.seeds)}, must list seeds, each once")
        trained: list[str] = []
        for i, stage in enumerate(self.stages):
            check_names(f"stages[{i}].scores", (score.name for score in stage.scores))
            named = [("cache_of", stage.cache_of), ("init_from", stage.init_from)]
            for key, name in named + [("beside", name) for name in stage.beside]:
                if name and name not in trained:
                    raise ConfigError(
                        f"stages[{i}].{key}",
                        f"is {name!r}, must be an earlier stage that trains, of {trained}",
                    )
            if stage.config:
                trained.append(stage.name)

    @property
    def program(self) -> str:
        """Return the words that a user types in place of `mmdit`."""
        return "mmdit" if self.module == "mmdit" else f"python -m {self.module}"

    def stage(self, name: str) -> Stage:
        """Return the stage with this name."""
        return next(stage for stage in self.stages if stage.name == name)

    def tokenizer_of(self, stage: Stage, folder: str | Path) -> list[str]:
        """Return the override that names the tokenizer of the cache of `stage`, if a stage
        pre-trains it in `folder`; empty if the config names it."""
        maker = self._cached_by(stage)
        if not maker.tokenizer:
            return []
        return [f"tokenizer.name_or_path={Path(folder) / maker.name / 'export'}"]

    def cached_by(self, stage: Stage) -> list[Stage]:
        """Return the stages that make the caches of `stage`: its own, then those beside it."""
        makers = [stage, *map(self.stage, stage.beside)]
        return [self._cached_by(maker) for maker in makers]

    def _cached_by(self, stage: Stage) -> Stage:
        while stage.cache_of:
            stage = self.stage(stage.cache_of)
        return stage


def check_names(path: str, names: Iterable[str]) -> None:
    """Raise ConfigError unless the names differ from each other, and can be names of files."""
    seen: set[str] = set()
    for name in names:
        if not name or Path(name).name != name or name.startswith(".") or name in seen:
            raise ConfigError(path, f"has the name {name!r} twice, or it is no name of a file")
        seen.add(name)


def recipe_path(folder: str | Path, name: str) -> Path:
    """Return the file of a recipe, beside which its results lie: `NAME/recipe.yaml` if NAME is the
    folder of a record, else `folder/NAME.yaml`."""
    record = Path(name) / "recipe.yaml"
    return record if record.is_file() else Path(folder) / f"{name}.yaml"


def read_recipe(folder: str | Path, name: str) -> Recipe:
    """Return the recipe with this name. ValueError if there is none, or it is wrong."""
    path = recipe_path(folder, name)
    if not path.is_file():
        known = ", ".join(recipe_names(folder)) or "none"
        raise ValueError(f"there is no recipe {path}; in {folder} there are: {known}")
    return load(Recipe, path)


def recipe_names(folder: str | Path) -> list[str]:
    """Return the names of the recipes in a folder."""
    return sorted(path.stem for path in Path(folder).glob("*.yaml"))


def short_hash(value: object) -> str:
    """Return a hash of plain data."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def overridden(stage: Stage) -> dict:
    """Return the present config of a stage with its overrides, as plain data, which callers must
    not change."""
    path = find(stage.config)
    return _overridden(path.read_text(encoding="utf-8"), str(path), stage.overrides)


@lru_cache(maxsize=512)  # every seed asks for each stage, and parsing takes 25 ms
def _overridden(text: str, name: str, overrides: tuple[str, ...]) -> dict:
    mapping, _ = parse_yaml(text, name)
    return apply_overrides(mapping, list(overrides))


def config_hash(stage: Stage) -> str:
    """Return a hash of the content of a stage's config, without comments and defaults, and of
    `init_from`; for a checkpoint that is only scored, a hash of its bytes."""
    if stage.checkpoint:
        path = find(stage.checkpoint)
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else str(path)
        return short_hash([content])
    return short_hash([overridden(stage), stage.init_from])


def stage_hash(recipe: Recipe, stage: Stage) -> str:
    """Return a hash of everything that determines the results of a stage: its config, its caches,
    its scores, and the stages before it. The floors of its scores do not count."""
    names = [stage.cache_of, stage.init_from, *stage.beside]
    before = [stage_hash(recipe, other) for other in recipe.stages if other.name in names]
    scores = [[score.name, score.evaluate] for score in stage.scores]
    cached = [] if stage.checkpoint else list(map(cache_identity, recipe.cached_by(stage)))
    return short_hash([config_hash(stage), cached, scores, before])


def cache_identity(stage: Stage) -> list:
    """Return everything on which the cache that `stage` makes depends: the command, the sections of
    the config that it reads, and the tokenizer."""
    mapping = overridden(stage)
    read = {key: mapping.get(key) for key in ("video", "tokenizer", "bucketing", "preprocess")}
    return [stage.cache, read, *tokenizer_identity(stage)]


def tokenizer_identity(stage: Stage) -> list:
    """Return everything on which the tokenizer depends that `stage` pre-trains; empty if it trains
    none."""
    if not stage.tokenizer:
        return []
    config = find(shlex.split(stage.tokenizer)[2])
    mapping, _ = parse_yaml(config.read_text(encoding="utf-8"), str(config))
    return [stage.tokenizer, mapping]


def documented_commands(recipe: Recipe, stage: Stage) -> list[str]:
    """Return the commands of a stage as a user types them, with runs in `runs/`."""
    lines, checkpoint, program = [], stage.checkpoint, recipe.program
    if stage.config:
        caches = [f"data/cache/{maker.name}" for maker in recipe.cached_by(stage)]
        tokenizer = recipe.tokenizer_of(stage, "runs/tokenizers")
        checkpoint = f"runs/{stage.name}"
        if stage.tokenizer:
            lines.append(f"{program} {stage.tokenizer} output_dir=runs/tokenizers/{stage.name}")
        if stage.cache:
            line = f"{program} {stage.cache} --config {stage.config} --out_dir {caches[0]}"
            lines.append(" ".join([line, *tokenizer]))
        words = [*stage.overrides, *tokenizer, f"experiment_name={stage.name}"]
        if stage.init_from:
            words.append(f"train.init_from=runs/{stage.init_from}")
        data = " ".join(f"--train_cache_dir {cache}" for cache in caches)
        lines.append(f"{program} train --config {stage.config} {data} {shlex.join(words)}")
    for score in stage.scores:
        lines.append(f"{program} evaluate --checkpoint {checkpoint} {score.evaluate}".strip())
    return lines
