"""Write docs/configuration.md from the dataclasses of the sections and the comments above their
fields: `python docs/make_configuration.py`. A test compares the page with what this makes."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from functools import cache
from pathlib import Path

import yaml

from mmdit.config import FilePath, encode
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.vtp_training.pretrain_config import PretrainConfig

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """\
<!-- Made by docs/make_configuration.py from the code: change the comments above the fields of the
dataclasses there, then run it. -->
# Configuration

A config is one YAML file of sections. Every key has a default but `experiment_name`; unknown keys,
wrong types and combinations that cannot be are refused with file, line and what to do. Words at the
end of a command override the file: `train.lr=2e-4 lora.enabled=true`. Where a section has a `type`,
it decides which other keys there are.

Types: *path* is a text in which `~` is the home folder; *a or b* lists the words that may stand
there. Times and noise levels run from 0 (clean) to 1 (noise).
"""
SECOND = """\
# Training a tokenizer

What `mmdit train-vtp --config VTP/configs/vtp_tiny_f16d64.yaml` reads.
"""
WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", FilePath: "path"}


@cache
def comments(cls: type) -> dict[str, str]:
    """Return the comment above every field that the body of `cls` itself defines."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines, found = source.split("\n"), {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            first = node.lineno - 1
            while lines[first - 1].strip().startswith("#"):
                first -= 1
            above = (line.strip().removeprefix("#") for line in lines[first : node.lineno - 1])
            found[node.target.id] = " ".join(" ".join(above).split())
    return found


def comment(cls: type, name: str) -> str:
    """Return what the key does. ValueError for a field that nobody has described."""
    for base in cls.__mro__:
        text = comments(base).get(name) if dataclasses.is_dataclass(base) else None
        if text:
            return text
    raise ValueError(f"{cls.__name__}.{name} has no comment above it: say what the key does")


def keys(cls: type) -> list[str]:
    """Return the keys of a section, without the `type` that tells it from other sections."""
    names = [field.name for field in dataclasses.fields(cls)]
    if "type" in names and len(typing.get_args(typing.get_type_hints(cls)["type"])) == 1:
        names.remove("type")
    return names


def options(hint: object) -> list:
    """Return the parts of a union; what is no union is its own only part."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return list(typing.get_args(hint)) if union else [hint]


def sections(hint: object) -> list[type]:
    """Return the dataclasses that a value of this type may be, or hold as items of a list."""
    parts = []
    for option in options(hint):
        if dataclasses.is_dataclass(option):
            parts.append(option)
        elif typing.get_origin(option) is tuple:
            parts += sections(typing.get_args(option)[0])
    return parts


def in_words(hint: object) -> str:
    """Return a type as a reader of YAML would say it."""
    if hint in WORDS:
        return WORDS[hint]
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(f"`{shown(word)}`" for word in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        first, *others = typing.get_args(hint)
        if others == [...]:
            return "list of sections" if sections(hint) else f"list of: {in_words(first)}"
        return f"[{', '.join(in_words(part) for part in (first, *others))}]"
    if len(options(hint)) > 1:
        words = [in_words(option) for option in options(hint)]
        return " or ".join(dict.fromkeys(words))
    return "section"


def short(value: object) -> object:
    """Return `value` as plain data; of a section its type, and what differs from the defaults."""
    if isinstance(value, tuple):
        return [short(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return encode(value)
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    usual = {f.name: f.default for f in dataclasses.fields(value) if f.name != "type"}
    return {name: short(part) for name, part in fields.items() if usual.get(name) != part}


def shown(value: object) -> str:
    """Return a value as YAML in one line."""
    text = yaml.safe_dump(short(value), default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def default(field: dataclasses.Field) -> str:
    """Return what a key is when it is left out."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        chosen = hasattr(value, "type") and "type" not in keys(type(value))
        return f"`type: {value.type}`" if chosen else ""
    return "must be given" if field.default is dataclasses.MISSING else f"`{shown(field.default)}`"


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


def origin(cls: type, name: str) -> type | None:
    """Return the class whose body defines the field `name` of `cls`."""
    for base in cls.__mro__:
        if name in vars(base).get("__annotations__", {}):
            return base
    return None


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
