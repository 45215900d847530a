"""From the fields of a form to a job: checked, written down, started."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmdit.experiment.experiment_config import ExperimentConfig, load_experiment_config
from mmdit.files import write_atomically
from mmdit.ui.allowed_folders import AllowedFolders
from mmdit.ui.command_forms import Option, options_of, takes, words_of
from mmdit.ui.config_forms import (
    SectionForm,
    config_of,
    current_fields,
    form_of,
    overrides,
    with_types,
)
from mmdit.ui.job_files import Job, JobStore

BESIDE = {"out": "out", "sheet": "sheet.png"}  # options whose files lie beside the job if left out
NEXT = "NUMBER"  # stands for the number of a job that is not there yet
PROMPTS = "prompts.txt"
FOLDERS = ("out", "out_dir")  # options that name a folder to be filled


@dataclass(frozen=True)
class Workplace:
    """What jobs are made of: the commands by name, each with what returns its parser; the folders
    that are allowed; and the device that `auto` means here."""

    store: JobStore
    allowed: AllowedFolders
    parsers: Mapping[str, Callable[[], argparse.ArgumentParser]]
    automatic: str = "cpu"

    def parser(self, command: str) -> argparse.ArgumentParser:
        """Return the parser of a command. ValueError: it is not offered here."""
        if command not in self.parsers:
            raise ValueError(f"{command!r} is not started from here")
        return self.parsers[command]()

    def device(self, parser: argparse.ArgumentParser, given: str) -> str | None:
        """Return the device for which a job waits; None for a command that uses none."""
        if not takes(parser, "device"):
            return None
        if given in ("", "auto"):
            return self.automatic
        return "cuda:0" if given == "cuda" else given


@dataclass
class JobRequest:
    """What a form asks for. `fields`: by name, `set:…` of the configuration apart. ValueError of
    each method: what is wrong, for the person who filled the form."""

    place: Workplace
    command: str
    fields: Mapping[str, str]
    parser: argparse.ArgumentParser = field(init=False)

    def __post_init__(self):
        self.parser = self.place.parser(self.command)

    def options(self) -> list[Option]:
        """Return the options of the command."""
        return options_of(self.parser)

    @property
    def has_config(self) -> bool:
        """Return whether the command reads a configuration."""
        return takes(self.parser, "config")

    @property
    def has_overrides(self) -> bool:
        """Return whether the command takes overrides of a config that a checkpoint holds."""
        return not self.has_config and takes(self.parser, "overrides")

    @property
    def config_path(self) -> str:
        """Return the YAML file that is the base of the configuration; it may not be chosen yet."""
        return self.fields.get("config", "")

    def base(self) -> ExperimentConfig:
        """Return what the chosen YAML file says."""
        path = self.place.allowed.check(self.config_path, "--config")
        return load_experiment_config(path)

    def form(self) -> SectionForm:
        """Return the form of the configuration, with the types of sections that were chosen."""
        return with_types(form_of(self.base()), current_fields(self.fields))

    def config(self) -> ExperimentConfig:
        """Return the configuration that was filled in, with every path in it looked at."""
        config = config_of(form_of(self.base()), self.fields)
        self.place.allowed.check_config(config)
        return config

    def words(self, folder: Path) -> list[str]:
        """Return the command line behind `mmdit` of a job in `folder`."""
        words = [self.command]
        if self.has_config:
            words += [f"--config={self.config_path}"]
            words += overrides(self.config_path, self.base(), self.config())
        elif self.has_overrides:
            words += self._free_overrides()
        return words + words_of(self.options(), self._values(folder), self.place.allowed)

    def _free_overrides(self) -> list[str]:
        """Return the overrides of a config that is stored in a checkpoint, a line each."""
        lines = [line.strip() for line in self.fields.get("overrides", "").split("\n")]
        words = [line for line in lines if line]
        for word in words:
            self.place.allowed.check_override(word)
        return words

    def _values(self, folder: Path) -> Callable[[str], str]:
        """Return what tells the value of an option: what a job writes lies beside it, and prompts
        are a file, for which no letter is special."""
        prompts = self._prompts()

        def value_of(name: str) -> str:
            text = self.fields.get(name, "").replace("\r\n", "\n").strip()
            if name == "prompts" and prompts:
                return ""
            if name == "prompts_file" and prompts:
                return str(folder / PROMPTS)
            if name in BESIDE and not text:
                return str(folder / BESIDE[name])
            return text

        return value_of

    def _prompts(self) -> list[str]:
        if not takes(self.parser, "prompts"):
            return []
        lines = [line.strip() for line in self.fields.get("prompts", "").splitlines()]
        return [line for line in lines if line]

    def preview(self) -> list[str]:
        """Return the command line that `start` would run."""
        return self.words(self.place.store.folder / NEXT)

    def start(self) -> Job:
        """Start the job."""
        self.preview()  # what is wrong leaves no folder behind
        folder = self.place.store.reserve()
        words = self.words(folder)
        prompts = self._prompts()
        if prompts:
            write_atomically(folder / PROMPTS, "\n".join(prompts) + "\n")
        run = None
        if takes(self.parser, "resume"):
            run = str(self.config().run_dir.resolve())
        device = self.place.device(self.parser, self.fields.get("device", ""))
        return self.place.store.add(folder, words, device, run, self._out(folder))

    def _out(self, folder: Path) -> str | None:
        """Return the folder of which the job's page shows pictures and skipped items."""
        for name in FOLDERS:
            if self.fields.get(name) and takes(self.parser, name):
                return str(Path(self.fields[name]).expanduser().resolve())
        if takes(self.parser, "out"):
            return str((folder / BESIDE["out"]).resolve())
        return str(folder.resolve()) if takes(self.parser, "sheet") else None


def again(place: Workplace, old: Job) -> Job:
    """Start a job once more; it goes on where it was stopped: a training from its newest
    checkpoint, and other commands with what is missing."""
    parser, words = place.parser(old.command), list(old.words)
    has_checkpoint = old.run is not None and any(Path(old.run, "checkpoints").glob("*"))
    if takes(parser, "resume") and has_checkpoint and "--resume" not in words:
        words.append("--resume")
    return place.store.add(place.store.reserve(), words, old.device, old.run, old.out)
