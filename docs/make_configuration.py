"""Write docs/configuration.md from the dataclasses of the sections and the comments above their
fields: `python docs/make_configuration.py`. A test compares the page with what this makes."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from pathlib import Path

from mmdit.experiment.config_keys import comment, default, in_words, keys, sections
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.vtp_training.pretrain_config import PretrainConfig

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """\
<!-- Made by docs/make_configuration.py from the code: change the comments above the fields of the
dataclasses there, then run it. -->
# Configuration

A config is one YAML file of sections. Every key has a default but `experiment_name`; unknown keys,
wrong types and combinations that cannot be are refused with file, line and what to do. Words at the
end of a command override the file: `train.lr=2e-4 lora.enabled=true`; a section as a whole,
`"model={size: B}"`, takes the place of the one in the file, whose other keys are gone. Where a
section has a `type`, it decides which other keys there are.

Types: *path* is a text in which `~` is the home folder; *a or b* lists the words that may stand
there. Times and noise levels run from 0 (clean) to 1 (noise).
"""
SECOND = """\
# Training a tokenizer

What `mmdit train-vtp --config VTP/configs/vtp_tiny_f16d64.yaml` reads.
"""


def origin(cls: type, name: str) -> type | None:
    """Return the class whose body defines the field `name` of `cls`."""
    for base in cls.__mro__:
        if name in vars(base).get("__annotations__", {}):
            return base
    return None


class Page:
    """The page as it is written, section by section; each dataclass is described once.

    `note` stands behind every heading, where another file has sections of the same names.
    """

    def __init__(self, note: str = "", final: dict[type, str] | None = None):
        self.note = note
        self.lines: list[str] = []
        self.places: dict[type, str] = {}  # dataclass → the heading that describes it
        self.final = final or {}  # the same of the whole page, for links to what comes later

    @classmethod
    def of(cls, config: type, head: str, note: str = "") -> list[str]:
        """Return the lines that describe a whole file."""
        draft = cls(note)
        draft.root(config, head)
        page = cls(note, draft.places)
        page.root(config, head)
        return page.lines

    def root(self, cls: type, head: str) -> None:
        """Describe a whole file: its keys, then every section."""
        self.lines += [head]
        self.table(cls, "", keys(cls))
        self.inner(cls, "", level=2)

    def inner(self, cls: type, path: str, level: int) -> None:
        """Describe the sections inside a section."""
        hints = typing.get_type_hints(cls)
        lists = [name for name in keys(cls) if typing.get_origin(hints[name]) is tuple]
        for name in sorted(keys(cls), key=lambda name: name not in lists):
            parts = sections(hints[name])
            if not set(parts) <= set(self.places):
                self.section(parts, f"{path}{name}", level)

    def section(self, parts: list[type], path: str, level: int) -> None:
        """Describe a section; of a union what all members have, then each of them."""
        self.lines += ["#" * level + f" {path}{self.note}\n"]
        known = [part for part in parts if part in self.places]
        for place in dict.fromkeys(self.places[part] for part in known):
            types_there = ", ".join(part.type for part in known if self.places[part] == place)
            self.lines += [f"Of the types of {link(place, self.note)}: {types_there}; and:\n"]
        parts = [part for part in parts if part not in known]
        self.places |= dict.fromkeys(parts, path)
        if len(parts) == 1 and not known:
            self.table(parts[0], path)
        else:
            first, *others = parts
            shared = [
                f.name
                for f in dataclasses.fields(first)
                if others and all(origin(part, f.name) is origin(first, f.name) for part in others)
            ]
            if shared:
                self.lines += ["Every type has these keys:\n"]
                self.table(first, path, shared, docstring=False)
            for part in parts:
                self.lines += ["#" * (level + 1) + f" {path}: {part.type}{self.note}\n"]
                self.table(part, path, [name for name in keys(part) if name not in shared])
        for part in parts:
            self.inner(part, f"{path}.", level + 1)

    def table(
        self, cls: type, path: str, names: list[str] | None = None, docstring: bool = True
    ) -> None:
        """Describe the keys `names` of a section; without, all of them."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls)
        if path and docstring:
            self.lines += [" ".join(inspect.cleandoc(cls.__doc__).split()) + "\n"]
        names = keys(cls) if names is None else names
        if not names:
            return
        self.lines += ["| key | type | default | what it does |", "|---|---|---|---|"]
        for name in names:
            kinds, text = in_words(hints[name]), comment(cls, name)
            inside = sections(hints[name])
            place = f"{path}.{name}" if path else name
            if inside:
                places = {self.final.get(part, place) for part in inside}
                where = places.pop() if len(places) == 1 else place
                kinds = f"{kinds}: {link(where, self.note)}"
            self.lines += [f"| `{name}` | {kinds} | {default(fields[name])} | {text} |"]
        self.lines += [""]


def link(place: str, note: str = "") -> str:
    """Return a link to the heading of a section."""
    anchor = "".join(letter for letter in place + note if letter not in ".,()").lower()
    return f"[{place}](#{anchor.replace(' ', '-')})"


def page() -> str:
    """Return the whole page."""
    lines = Page.of(ExperimentConfig, HEAD)
    lines += Page.of(PretrainConfig, SECOND, " (of a tokenizer)")
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
