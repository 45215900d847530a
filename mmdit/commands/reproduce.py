"""Run the stages of a recipe, seed by seed, and record the time and the result of each command.

OUT/cache/<stage>/        latents, shared by the seeds; <stage>.json says how they were made
OUT/tokenizers/<stage>/   likewise, of stages that pre-train one
OUT/seed_<k>/<stage>/     runs; OUT/seed_<k>/<stage>-<score>.json the reports of evaluate
OUT/seed_<k>.json         the record: what is done, written after every command
OUT/results.json          all seeds pooled

Every command runs in a process of its own, so that its memory is freed, unless the chain is given
another way to run commands.

What the record calls done is not run again; a training that was stopped continues from its
checkpoint. Several processes may work on one folder: each stage of a seed has a lock.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mmdit.commands.code_version import code_hash, commit
from mmdit.config import ConfigError
from mmdit.diagnostics.recipe import (
    Recipe,
    Stage,
    cache_identity,
    short_hash,
    stage_hash,
    tokenizer_identity,
)
from mmdit.diagnostics.results_file import (
    curve_point,
    rates_of,
    results,
    training_facts,
    without_details,
)
from mmdit.experiment.experiment_config import ExperimentConfig, load_experiment_config
from mmdit.files import lock, read_text, remove, write_atomically
from mmdit.signals import handling
from mmdit.training import checkpoint
from mmdit.training.errors import RunError


def run_command(words: list[str], module: str = "mmdit") -> None:
    """Run `mmdit WORDS`, or another `module` in place of mmdit, and wait. RunError if it failed. A
    signal that asks this process to stop is passed on, so that the command ends as it would alone:
    a training saves first."""
    process = subprocess.Popen([sys.executable, "-m", module, *words])

    def stop(signum, frame):
        if signum != signal.SIGINT:  # the terminal has sent SIGINT to the command, too
            process.send_signal(signum)
        raise KeyboardInterrupt

    with handling(stop, signal.SIGTERM, signal.SIGINT):
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
    if status:
        raise RunError(f"`{module} {shlex.join(words)}` ended with status {status}; see above")


@contextmanager
def held(path: Path, wait: bool) -> Iterator[None]:
    """Hold a lock file while the block runs. If another process holds it, wait for that; ValueError
    if `wait` is false."""
    path.parent.mkdir(parents=True, exist_ok=True)
    refusal = f"another process works on {path.with_suffix('')}: wait for it, or choose --out"
    said = False
    with path.open("ab") as file:
        while True:
            try:
                lock(file, refusal)
                break
            except ValueError:
                if not wait:
                    raise
            if not said:
                print(f"waiting: another process makes {path.with_suffix('')}", flush=True)
                said = True
            time.sleep(1)
        yield


def read_json(path: Path) -> dict | None:
    """Return the content of a JSON file, or None if there is no file. ValueError if it is
    damaged."""
    if not path.is_file():
        return None
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove it, and its part is made anew"
        ) from None


@dataclass
class Chain:
    """Runs the stages of one seed.

    `share`: skip stages on which another process works, and go on after stages that fail
    (`failures` names these); otherwise wait for the other process, and end if a stage fails.
    `execute`: runs the words of one command; `in_process`: it does so in this process, so that the
    seconds of commands exclude their start. `discard`: remove the checkpoints of a stage once it is
    scored, unless a stage starts from it. `untimed`: other work uses the device meanwhile, so that
    the seconds of stages run now do not count.
    """

    recipe: Recipe
    seed: int
    out: Path
    device: str = "auto"
    execute: Callable[[list[str]], None] | None = None
    share: bool = False
    in_process: bool = False
    discard: bool = False
    untimed: bool = False
    record: dict = field(init=False)
    failures: list[str] = field(default_factory=list, init=False)

    def __post_init__(self):
        self.record = self._read()
        self.execute = self.execute or partial(run_command, module=self.recipe.module)

    @property
    def path(self) -> Path:
        return self.out / f"seed_{self.seed}.json"

    @property
    def folder(self) -> Path:
        return self.out / f"seed_{self.seed}"

    def run(self) -> dict:
        """Run what is not done, and return the record. ValueError, before anything is run, if the
        config of a stage is invalid. RunError if a stage fails."""
        for stage in self.recipe.stages:
            if stage.config:
                self._config(stage, self._overrides(stage))
        for stage in self.recipe.stages:
            try:
                self._visit(stage, wait=not self.share)
            except RunError as error:
                if not self.share:
                    raise
                self.failures.append(f"{stage.name} of seed {self.seed}")
                print(f"{self.failures[-1]} fails: {error}", flush=True)
        return self.record

    def _visit(self, stage: Stage, wait: bool) -> None:
        """Run what is not done of a stage. If another process works on it, wait for that one and
        then do what it left undone, or without `wait` skip the stage."""
        if stage.init_from:
            self._have_weights(self.recipe.stage(stage.init_from))
        number = self.recipe.stages.index(stage) + 1
        place = f"[seed {self.seed}, stage {number}/{len(self.recipe.stages)}: {stage.name}]"
        with ExitStack() as stack:
            try:
                stack.enter_context(held(self._lock(stage.name), wait))
            except ValueError:
                print(f"{place} is left to the process that works on it", flush=True)
                return
            self.record = self._read()
            self._check(stage)
            if self.share and self._has_failed(stage):
                print(f"{place} has failed: a command without --share tries it again", flush=True)
                return
            try:
                self._stage(stage, place)
            except RunError as error:
                if self.share:
                    self.record["stages"][stage.name]["failed"] = str(error)
                    self._write(stage)
                raise

    def _has_failed(self, stage: Stage) -> bool:
        return "failed" in self.record["stages"].get(stage.name, {})

    def _have_weights(self, stage: Stage) -> None:
        """Return once a stage is completely trained. A process that was stopped or failed leaves a
        checkpoint of some step, from which nothing may start; this one then continues its
        training."""
        self.record = self._read()
        row = self.record["stages"].get(stage.name, {})
        if "training" not in row or not self._has_weights(stage):
            self._visit(stage, wait=True)
        if self.share and self._has_failed(stage):
            raise RunError(f"there are no weights of {stage.name} to start from: it has failed")

    def _lock(self, stage: str) -> Path:
        return self.folder / f"{stage}.lock"

    def _read(self) -> dict:
        new = {"seed": self.seed, "versions": [], "machine": None, "stages": {}}
        return read_json(self.path) or new

    def _check(self, stage: Stage) -> None:
        """Raise ValueError if a stage was done with another recipe or config, and record the code
        with which it will be done."""
        made_by = stage_hash(self.recipe, stage)
        row = self.record["stages"].setdefault(
            stage.name, {"made_by": made_by, "seconds": {}, "attempts": 0, "scores": {}}
        )
        if row["made_by"] != made_by:
            raise ValueError(
                f"{self.path}: {stage.name} was made by {row['made_by']}, and recipe and config are"
                f" now {made_by}: choose another --out, or remove {self.out}"
            )
        if self._is_done(stage):
            return
        versions, now = self.record["versions"], {"code": code_hash(), "commit": commit()}
        if now not in versions:
            if versions:
                print("the code has changed since this was begun; the results will name both")
            versions.append(now)

    def _is_done(self, stage: Stage) -> bool:
        row = self.record["stages"][stage.name]
        trained = bool(stage.checkpoint) or "training" in row
        return (
            trained
            and all(score.name in row["scores"] for score in stage.scores)
            and not self._misses_weights(stage)
        )

    def _misses_weights(self, stage: Stage) -> bool:
        """Return whether weights are gone that are still to be scored or started from, as when the
        record was brought from another machine without them."""
        if stage.checkpoint or self._has_weights(stage):
            return False
        rows = self.record["stages"]
        unscored = any(score.name not in rows[stage.name]["scores"] for score in stage.scores)
        followers = [other for other in self.recipe.stages if other.init_from == stage.name]
        return unscored or any(
            "training" not in rows.get(follower.name, {}) or self._misses_weights(follower)
            for follower in followers
        )

    def _has_weights(self, stage: Stage) -> bool:
        return checkpoint.latest(self.folder / stage.name) is not None

    def _stage(self, stage: Stage, place: str) -> None:
        row = self.record["stages"][stage.name]
        if self._is_done(stage):
            print(f"{place} done", flush=True)
            self._discard(stage)
            return
        row.pop("failed", None)
        if self.in_process:
            row["in_process"] = True
        if self.untimed:
            row["untimed"] = True
        if "training" in row and self._misses_weights(stage):
            print(f"{place} was trained, but its weights are gone: it is trained anew", flush=True)
            del row["training"]
            row["seconds"].pop("training", None)
            row["attempts"] = 0
        if stage.config and "training" not in row:
            row["seconds"] |= self._cache(stage, place)
            self._train(stage, row, place)
        for score in stage.scores:
            if score.name in row["scores"]:
                continue
            report_path = self.folder / f"{stage.name}-{score.name}.json"
            words = ["evaluate", "--checkpoint", self._checkpoint(stage)]
            words += ["--out", str(report_path), "--device", self.device]
            words += ["--seed", str(self.seed), *shlex.split(score.evaluate)]
            seconds = self._timed(words, f"{place} scoring {score.name}")
            report = read_json(report_path)
            assert report is not None
            row["seconds"][f"scoring {score.name}"] = seconds
            rates = rates_of(report)
            row["scores"][score.name] = {key: without_details(rates[key]) for key in rates}
            if "at_steps" in report:
                points = [curve_point(part) for part in report["at_steps"]]
                row.setdefault("curves", {})[score.name] = points
            row["parameters"] = report["parameters"]
            row["scoring_memory_gb"] = report["memory_gb"]
            self.record["machine"] = report["machine"]
            self._write(stage)
        self._discard(stage)

    def _discard(self, stage: Stage) -> None:
        """Remove the checkpoints of a stage that is scored, if they are no longer needed."""
        starts = [other.init_from for other in self.recipe.stages]
        if not self.discard or not stage.config or not stage.scores or stage.name in starts:
            return
        for folder in checkpoint.complete(self.folder / stage.name):
            remove(folder)

    def _checkpoint(self, stage: Stage) -> str:
        return stage.checkpoint or str(self.folder / stage.name)

    def _cache(self, stage: Stage, place: str) -> dict:
        """Make the caches of a stage unless they exist; return the seconds of its own cache and
        tokenizer, which count for every seed, whichever seed made them."""
        makers = self.recipe.cached_by(stage)
        tokenizers = [self._tokenizer_by(maker, place) for maker in makers if maker.tokenizer]
        seconds = [self._cache_by(maker, place) for maker in makers]
        spent = {"caching": seconds[0]} if stage.cache else {}
        return spent | ({"tokenizer": tokenizers[0]} if stage.tokenizer else {})

    def _tokenizer_by(self, maker: Stage, place: str) -> float:
        """Pre-train the tokenizer of a cache unless it exists; return the seconds that it took."""
        folder = self.out / "tokenizers" / maker.name
        words = [*shlex.split(maker.tokenizer), "--device", self.device, f"output_dir={folder}"]
        return self._shared(folder, tokenizer_identity(maker), words, f"{place} the tokenizer")

    def _cache_by(self, maker: Stage, place: str) -> float:
        """Make a cache unless it exists; return the seconds that it took."""
        folder = self._cache_folder(maker)
        words = [*shlex.split(maker.cache), "--config", maker.config]
        words += ["--out_dir", str(folder), "--device", self.device]
        words += [word for word in maker.overrides if not word.startswith("train.")]
        words += self.recipe.tokenizer_of(maker, self.out / "tokenizers")
        return self._shared(folder, cache_identity(maker), words, f"{place} caching")

    def _shared(self, folder: Path, identity: list, words: list[str], title: str) -> float:
        """Run the command that makes a folder that all seeds share, unless this is done; return the
        seconds that it took. `identity`: everything on which the folder depends."""
        facts_path = folder.with_name(f"{folder.name}.json")
        made_by = short_hash(identity)
        with held(folder.with_name(f"{folder.name}.lock"), wait=True):
            facts = read_json(facts_path)
            if facts and facts["made_by"] != made_by:
                raise ValueError(
                    f"{folder} was made otherwise than {folder.name} asks: choose another --out, or"
                    f" remove {folder} and {facts_path}"
                )
            if facts and not folder.exists():
                facts = None  # the record was brought from another machine
            if not facts or not facts.get("done", True):
                # a pre-training that was stopped continues; caching does so by itself
                resume = ["--resume"] if checkpoint.latest(folder) else []
                facts = {"made_by": made_by, "done": False, **(facts or {"seconds": 0.0})}
                begin = time.perf_counter()
                try:
                    self._timed([*words, *resume], title)
                    facts["done"] = True
                finally:  # the time of an interrupted attempt counts, too
                    spent = facts["seconds"] + time.perf_counter() - begin
                    facts["seconds"] = round(spent, 2)
                    if folder.exists():
                        write_atomically(facts_path, json.dumps(facts, indent=1))
        return facts["seconds"]

    def _cache_folder(self, maker: Stage) -> Path:
        return self.out / "cache" / maker.name

    def _overrides(self, stage: Stage) -> list[str]:
        overrides = [
            *stage.overrides,
            f"experiment_name={stage.name}",
            f"seed={self.seed}",
            f"output_dir={self.folder}",
            *self.recipe.tokenizer_of(stage, self.out / "tokenizers"),
        ]
        if stage.init_from:
            overrides += [f"train.init_from={self.folder / stage.init_from}"]
        return overrides

    def _config(self, stage: Stage, overrides: list[str]) -> ExperimentConfig:
        try:
            config = load_experiment_config(stage.config, overrides)
        except ConfigError as error:
            remedy = ""
            if self.recipe.module != "mmdit":
                remedy = f"; this recipe is made by `{self.recipe.program} reproduce …`"
            raise ValueError(f"stage {stage.name}: {error}{remedy}") from None
        start = str(config.train.init_from or "")
        if start.startswith("runs/") and not stage.init_from:
            raise ValueError(
                f"{stage.name}: {stage.config} starts from {start}; name the stage that makes it,"
                " as init_from of this stage"
            )
        return config

    def _train(self, stage: Stage, row: dict, place: str) -> None:
        overrides = self._overrides(stage)
        config = self._config(stage, overrides)
        newest = checkpoint.latest(config.run_dir)
        words = ["train", "--config", stage.config]
        for maker in self.recipe.cached_by(stage):
            words += ["--train_cache_dir", str(self._cache_folder(maker))]
        words += ["--device", self.device, *(["--resume"] if newest else []), *overrides]
        row["attempts"] += 1
        self._write(stage)
        begin = time.perf_counter()
        try:
            if newest is None or checkpoint.step_of(newest) < config.train.max_steps:
                self._timed(words, f"{place} training")
        finally:
            spent = round(time.perf_counter() - begin, 2)
            row["seconds"]["training"] = row["seconds"].get("training", 0.0) + spent
            self._write(stage)
        newest = checkpoint.latest(config.run_dir)
        step = checkpoint.step_of(newest) if newest else 0
        if step < config.train.max_steps:
            raise RunError(
                f"{stage.name} stopped at step {step} of {config.train.max_steps}; run the same"
                " command again to go on"
            )
        row["training"] = training_facts(config.run_dir)
        self._write(stage)

    def _timed(self, words: list[str], title: str) -> float:
        """Run a command; return the seconds that it took."""
        print(f"\n{title}: mmdit {shlex.join(words)}", flush=True)
        begin = time.perf_counter()
        assert self.execute is not None, "made with the chain"
        self.execute(words)
        return round(time.perf_counter() - begin, 2)

    def _write(self, stage: Stage) -> None:
        """Write what is known about a stage into the record, to which other processes may have
        added their stages."""
        with held(self.out / f"seed_{self.seed}.lock", wait=True):
            mine, self.record = self.record, self._read()
            self.record["stages"][stage.name] = mine["stages"][stage.name]
            versions = self.record["versions"]
            versions += [version for version in mine["versions"] if version not in versions]
            self.record["machine"] = mine["machine"] or self.record["machine"]
            write_atomically(self.path, json.dumps(self.record, indent=1))


def tell_failures(chains: Iterable[Chain]) -> None:
    """Raise RunError that names the stages that failed, if there are any."""
    failures = [line for chain in chains for line in chain.failures]
    if failures:
        raise RunError(f"these stages failed, see above: {', '.join(failures)}")


def finished_results(name: str, recipe: Recipe, records: list[dict]) -> dict:
    """Return the content of a results file. A record that was made without git gets the commit of
    this clone, if the code is identical."""
    now = {"code": code_hash(), "commit": commit()}
    for record in records:
        for version in record["versions"]:
            if version["commit"] is None and version["code"] == now["code"]:
                version["commit"] = now["commit"]
    return results(name, recipe, records)
