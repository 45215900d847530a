"""Describe every key of a config in the terms of YAML: its type, default and meaning, read from the
dataclasses and the comments above their fields. The page docs/configuration.md and the forms of the
browser interface are made from this."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from functools import cache

from mmdit.config import FilePath, encode, in_one_line

WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", FilePath: "path"}


@cache
def comments(cls: type) -> dict[str, str]:
    """Return the comments above the fields that the body of `cls` itself defines, by field."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines, above_fields = source.split("\n"), {}
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno - 1
            while lines[first - 1].strip().startswith("#"):
                first -= 1
            above = (line.strip().removeprefix("#") for line in lines[first : node.lineno - 1])
            above_fields[node.target.id] = " ".join(" ".join(above).split())
    return above_fields


def comment(cls: type, name: str) -> str:
    """Return the description of a key. ValueError for a field without one."""
    for base in cls.__mro__:
        text = comments(base).get(name) if dataclasses.is_dataclass(base) else None
        if text:
            return text
    raise ValueError(f"{cls.__name__}.{name} has no comment above it: say what the key does")


def keys(cls: type) -> list[str]:
    """Return the keys of a section, without the `type` that only tells it from other sections."""
    names = [field.name for field in dataclasses.fields(cls)]
    if "type" in names and len(typing.get_args(typing.get_type_hints(cls)["type"])) == 1:
        names.remove("type")
    return names


def options(hint: object) -> list:
    """Return the parts of a union; any other type is its own only part."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return list(typing.get_args(hint)) if union else [hint]


def sections(hint: object) -> list[type]:
    """Return the dataclasses that a value of this type may be, or hold as items of a list."""
    parts: list[type] = []
    for option in options(hint):
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            parts.append(option)
        elif typing.get_origin(option) is tuple:
            parts += sections(typing.get_args(option)[0])
    return parts


def in_words(hint: object) -> str:
    """Return a type in the words of a YAML reader."""
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
    """Return `value` as plain data; a section is reduced to its type and what differs from the
    defaults."""
    if isinstance(value, tuple):
        return [short(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return encode(value)
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    usual = {f.name: f.default for f in dataclasses.fields(value) if f.name != "type"}
    return {name: short(part) for name, part in fields.items() if usual.get(name) != part}


def shown(value: object) -> str:
    """Return a value as YAML on one line."""
    return in_one_line(short(value))


def default(field: dataclasses.Field) -> str:
    """Return a key's default, as text."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        chosen = hasattr(value, "type") and "type" not in keys(type(value))
        return f"`type: {value.type}`" if chosen else ""
    return "must be given" if field.default is dataclasses.MISSING else f"`{shown(field.default)}`"
