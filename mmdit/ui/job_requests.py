"""Turn the fields of a form into a job: check them, write its files, start it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmdit.config import load
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.files import expanded, lines_of, read_bytes, real_path, write_atomically
from mmdit.training.checkpoint import complete
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
from mmdit.ui.job_files import Job, JobStore, command_line

# Default paths, beside the job, of options that name outputs: files, and folders (without a
# suffix).
BESIDE = {
    "sample": {"out": "out"},
    "inspect-adapter": {"out": "out"},
    "inspect-cache": {"sheet": "sheet.png"},
    "evaluate": {"out": "report.json", "sheet": "sheet.png"},
    "evaluate-vtp": {"out": "report.json"},
    "plot-run": {"out": "curves.png"},
}
CONFIG_WORD, PROMPTS_WORD = "--config=", "--prompts_file="
NEXT = "NUMBER"  # stands for the number of a job that does not exist yet
PROMPTS = "prompts.txt"
PROCESSES, MOST_PROCESSES = "nproc_per_node", 1024  # of torchrun, on this machine
FOLDERS = ("out", "out_dir")  # options that name a folder to be filled


@dataclass(frozen=True)
class Command:
    """What the pages know about a command. `parser` returns its parser; `about`: a sentence;
    `root`: the class of its config, if it has one; `is_report`: it changes nothing; `distributed`:
    torchrun may start several processes of it."""

    parser: Callable[[], argparse.ArgumentParser]
    about: str
    root: type = ExperimentConfig
    is_report: bool = False
    distributed: bool = False


@dataclass(frozen=True)
class Workplace:
    """Everything that jobs need: the commands by name, the folders that are allowed, and the device
    that `auto` means here."""

    store: JobStore
    allowed: AllowedFolders
    commands: Mapping[str, Command]
    automatic: str = "cpu"

    def command(self, name: str) -> Command:
        """Return a command. ValueError if it cannot be started from here."""
        if name not in self.commands:
            raise ValueError(f"{name!r} is not started from here")
        return self.commands[name]

    def named(self, reports: bool) -> dict[str, str]:
        """Return the names of the reports, or of the other commands, with their summaries."""
        return {
            name: command.about
            for name, command in self.commands.items()
            if command.is_report == reports
        }

    def device(self, parser: argparse.ArgumentParser, given: str, processes: int) -> str | None:
        """Return the devices for which a job waits, separated by commas; None for a command that
        uses none. ValueError if several processes would share a GPU."""
        if not takes(parser, "device"):
            return None
        device = self.automatic if given in ("", "auto") else given
        if processes > 1 and device.startswith("cuda"):
            if given.startswith("cuda:"):
                raise ValueError(
                    f"--device is {given} with {processes} processes, must be auto, cuda or cpu:"
                    " each process takes a GPU of its own"
                )
            return ",".join(f"cuda:{number}" for number in range(processes))
        return "cuda:0" if device == "cuda" else device


@dataclass
class JobRequest:
    """The content of a filled-in form. `fields`: texts by field name; those of the config begin
    with `set:`. A ValueError of any method says what is wrong, for the person who filled in the
    form."""

    place: Workplace
    command: str
    fields: Mapping[str, str]
    offer: Command = field(init=False)
    parser: argparse.ArgumentParser = field(init=False)

    def __post_init__(self):
        self.offer = self.place.command(self.command)
        self.parser = self.offer.parser()

    def options(self) -> list[Option]:
        """Return the options of the command."""
        return options_of(self.parser)

    @property
    def beside(self) -> dict[str, str]:
        """Return the options whose files lie beside the job if no path is given, with their default
        paths."""
        return BESIDE.get(self.command, {})

    @property
    def has_config(self) -> bool:
        """Return whether the command reads a config."""
        return takes(self.parser, "config")

    @property
    def has_overrides(self) -> bool:
        """Return whether the command takes overrides of a config that a checkpoint holds."""
        return not self.has_config and takes(self.parser, "overrides")

    @property
    def config_path(self) -> str:
        """Return the YAML file on which the config is based; "" if none is chosen yet."""
        return self.fields.get("config", "")

    @property
    def processes(self) -> int:
        """Return how many processes torchrun starts; 1 means without torchrun."""
        text = self.fields.get(PROCESSES, "").strip() or "1"
        if not text.isdecimal() or not 1 <= int(text) <= MOST_PROCESSES:
            raise ValueError(f"processes is {text!r}, must be a number from 1 to {MOST_PROCESSES}")
        if int(text) > 1 and not self.offer.distributed:
            raise ValueError(f"{self.command} is one process, not {text}")
        return int(text)

    def base(self) -> Any:
        """Return the config in the chosen YAML file."""
        path = self.place.allowed.check(self.config_path, "--config")
        return load(self.offer.root, path)

    def form(self) -> SectionForm:
        """Return the form of the config, with the chosen types of sections."""
        return with_types(form_of(self.base()), current_fields(self.fields))

    def config(self) -> Any:
        """Return the config that was filled in, after checking every path in it."""
        config = config_of(form_of(self.base()), self.fields)
        self.place.allowed.check_config(config)
        return config

    def words(self, folder: Path) -> list[str]:
        """Return the command line, after `mmdit`, of a job in `folder`."""
        words = [self.command]
        if self.has_config:
            words += [CONFIG_WORD + (str(self._copy(folder) or self.config_path))]
            words += overrides(self.config_path, self.base(), self.config())
        elif self.has_overrides:
            words += self._free_overrides()
        return words + words_of(self.options(), self._values(folder), self.place.allowed)

    def _copy(self, folder: Path) -> Path | None:
        """Return where a job in `folder` keeps a copy of its YAML file, which a user may edit while
        the job waits. None if the file ships with the package and does not change."""
        path = expanded(self.config_path)
        return folder / f"config-{path.name}" if path.exists() else None

    def _free_overrides(self) -> list[str]:
        """Return the overrides of a config that is stored in a checkpoint, one for each line of the
        field."""
        lines = [line.strip() for line in self.fields.get("overrides", "").split("\n")]
        words = [line for line in lines if line]
        for word in words:
            self.place.allowed.check_override(word)
        return words

    def _values(self, folder: Path) -> Callable[[str], str]:
        """Return a function that gives the value of an option: outputs of a job lie beside it, and
        prompts are put into a file, in which no letter is special."""
        prompts = self._prompts()

        def value_of(name: str) -> str:
            text = self.fields.get(name, "").replace("\r\n", "\n").strip()
            if name == "prompts" and prompts:
                return ""
            if name == "prompts_file" and prompts:
                return str(folder / PROMPTS)
            if name in self.beside and not text:
                return str(folder / self.beside[name])
            return text

        return value_of

    def _prompts(self) -> list[str]:
        """Return the prompts that were typed, if the command can read them from a file as well."""
        if not (takes(self.parser, "prompts") and takes(self.parser, "prompts_file")):
            return []
        lines = [line.strip() for line in lines_of(self.fields.get("prompts", ""))]
        prompts = [line for line in lines if line]
        if prompts and self.fields.get("prompts_file", "").strip():
            raise ValueError("--prompts and --prompts_file are both given: empty one of them")
        return prompts

    def preview(self) -> str:
        """Return the command line that `start` would run."""
        return command_line(self.words(self.place.store.folder / NEXT), self.processes)

    def start(self) -> Job:
        """Write the files of the job and start it."""
        self.preview()  # any fault must be found before a folder is made
        device = self.place.device(self.parser, self.fields.get("device", ""), self.processes)
        folder = self.place.store.reserve()
        words = self.words(folder)
        copy = self._copy(folder) if self.has_config else None
        if copy:
            write_atomically(copy, read_bytes(expanded(self.config_path)))
        prompts = self._prompts()
        if prompts:
            write_atomically(folder / PROMPTS, "\n".join(prompts) + "\n")
        run = None
        if takes(self.parser, "resume"):
            run = str(real_path(self.config().run_dir))
        return self.place.store.add(folder, words, device, run, self._out(folder), self.processes)

    def _out(self, folder: Path) -> str | None:
        """Return the folder whose pictures and skipped items the page of the job will show; None if
        there is none."""
        for name in FOLDERS:
            given = self.fields.get(name, "").strip()
            if given and takes(self.parser, name):
                return str(real_path(expanded(given)))
        for file in self.beside.values():
            return str(real_path(folder if Path(file).suffix else folder / file))
        return None


def again(place: Workplace, old: Job) -> Job:
    """Start a job again, to continue where it was stopped: a training from its newest checkpoint,
    other commands with what is missing."""
    parser, words = place.command(old.command).parser(), list(old.words)
    has_checkpoint = old.run is not None and bool(complete(Path(old.run)))
    if takes(parser, "resume") and has_checkpoint and "--resume" not in words:
        words.append("--resume")
    folder = place.store.reserve()
    for number, word in enumerate(words):
        for option in (CONFIG_WORD, PROMPTS_WORD):
            file = Path(word.removeprefix(option))
            if word.startswith(option) and file.parent.name == old.id:
                copy = real_path(folder) / file.name  # the old job may be removed
                write_atomically(copy, read_bytes(place.store.path(old.id) / file.name))
                words[number] = f"{option}{copy}"
    return place.store.add(folder, words, old.device, old.run, old.out, old.processes, old.cwd)
