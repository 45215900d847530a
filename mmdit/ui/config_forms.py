"""Make the form of a config from the dataclasses of its sections, and turn a filled-in form into
overrides of a YAML file."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmdit.config import ConfigError, decode, hints_of, in_one_line, load, parse_value
from mmdit.experiment.config_keys import (
    comment,
    default,
    in_words,
    keys,
    options,
    sections,
)

NONE = "none"  # the type of a section that is left out
GIVEN = "given"  # the only type of a section that is optional
# Prefixes of field names: the value of a key, the type of a section, and the type with which the
# section was shown.
VALUE, TYPE, SHOWN_TYPE = "set:", "type:", "was:"
REQUIRED = "must be given"  # shown in place of a default


@dataclass(frozen=True)
class Key:
    """One key of a section, with its value as YAML. `choices`: the values that are allowed, if they
    can be listed."""

    path: str
    name: str
    about: str
    words: str
    usual: str
    value: str
    choices: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()  # for a list of sections: the keys of each type


@dataclass(frozen=True)
class SectionForm:
    """A section: its keys and inner sections. `types`: the types that it can have, if there is a
    choice."""

    path: str
    about: str
    chosen: str = ""
    types: tuple[str, ...] = ()
    classes: tuple[type, ...] = ()  # of all types but `none`; for the whole form, its root
    keys: list[Key] = field(default_factory=list)
    sections: list[SectionForm] = field(default_factory=list)


def form_of(config: Any) -> SectionForm:
    """Return the form of a whole config."""
    return _section(type(config), config, "", "", classes=(type(config),))


def _section(cls: type, config: Any, path: str, about: str, **choice: Any) -> SectionForm:
    """Return the form of a section with the values of `config`, or with the defaults if that is
    None."""
    form = SectionForm(path, about, **choice)
    hints = hints_of(cls)
    fields = {one.name: one for one in dataclasses.fields(cls)}
    for name in keys(cls):
        place = f"{path}.{name}".lstrip(".")
        value = default_of(fields[name]) if config is None else getattr(config, name)
        parts = [part for part in options(hints[name]) if dataclasses.is_dataclass(part)]
        if parts:
            form.sections.append(_inner(hints[name], parts, value, place, comment(cls, name)))
        else:
            usual = default(fields[name]).strip("`")
            form.keys.append(_key(hints[name], value, place, comment(cls, name), usual))
    return form


def default_of(one: dataclasses.Field) -> Any:
    """Return the default of a field; MISSING if it has none."""
    if one.default_factory is not dataclasses.MISSING:
        return one.default_factory()
    return one.default


def _inner(hint: Any, parts: list[type], value: Any, path: str, about: str) -> SectionForm:
    """Return the form of an inner section, whichever type it now has."""
    types = tuple(part.type if len(parts) > 1 else GIVEN for part in parts)
    if type(None) in options(hint):
        types = (NONE, *types)
    choice: dict = {"types": types if len(types) > 1 else (), "classes": tuple(parts)}
    if value is None:
        return SectionForm(path, about, chosen=NONE, **choice)
    chosen = value.type if len(parts) > 1 else GIVEN
    return _section(type(value), value, path, about, chosen=chosen, **choice)


def _key(hint: Any, value: Any, path: str, about: str, usual: str) -> Key:
    choices: list[str] = []
    for option in options(hint):
        if option is bool:
            choices += ["true", "false"]
        elif option is type(None):
            choices.append("null")
        elif typing.get_origin(option) is typing.Literal:
            choices += map(in_one_line, typing.get_args(option))
        else:
            choices = []
            break
    inside = tuple(
        f"{getattr(part, 'type', part.__name__)}: {', '.join(keys(part))}"
        f" ({' '.join(inspect.cleandoc(part.__doc__ or '').split())})"
        for part in sections(hint)
    )
    name = path.rpartition(".")[2]
    text = "" if value is dataclasses.MISSING else in_one_line(value)
    return Key(path, name, about, in_words(hint), usual, text, tuple(choices), inside)


# ── back ──────────────────────────────────────────────────────────────────────────────────────────
def current_fields(fields: Mapping[str, str]) -> dict[str, str]:
    """Return the fields without those inside sections whose type was changed: these belong to the
    old type."""
    changed = [
        name.removeprefix(SHOWN_TYPE)
        for name, shown in fields.items()
        if name.startswith(SHOWN_TYPE)
        and fields.get(TYPE + name.removeprefix(SHOWN_TYPE), shown) != shown
    ]
    prefixes = tuple(f"{path}." for path in changed)
    return {
        name: text
        for name, text in fields.items()
        if not name.partition(":")[2].startswith(prefixes)
    }


def with_types(form: SectionForm, fields: Mapping[str, str]) -> SectionForm:
    """Return the form with the types that `fields` choose; a section whose type changed has its
    defaults. ConfigError if there is no such type."""
    inner = [with_types(_chosen(section, fields), fields) for section in form.sections]
    return dataclasses.replace(form, sections=inner)


def _chosen(form: SectionForm, fields: Mapping[str, str]) -> SectionForm:
    """Return a section with the type that `fields` choose for it."""
    chosen = fields.get(TYPE + form.path, form.chosen)
    if not form.types or chosen == form.chosen:
        return form
    if chosen not in form.types:
        raise ConfigError(f"{form.path}.type", f"is {chosen!r}, must be one of {form.types}")
    choice: dict = {"chosen": chosen, "types": form.types, "classes": form.classes}
    if chosen == NONE:
        return SectionForm(form.path, form.about, **choice)
    cls = next(one for one in form.classes if chosen in (GIVEN, getattr(one, "type", None)))
    return _section(cls, None, form.path, form.about, **choice)


def config_of(form: SectionForm, fields: Mapping[str, str]) -> Any:
    """Return the config that the fields of a form describe; keys without a field have the value in
    `form`. A section whose type was changed has the defaults of its new type. ConfigError if it is
    invalid."""
    fields, (root,) = current_fields(fields), form.classes
    return decode(root, _mapping(with_types(form, fields), fields))


def _mapping(form: SectionForm, fields: Mapping[str, str]) -> dict:
    result: dict = {}
    for key in form.keys:
        text = fields.get(VALUE + key.path, key.value)
        if text or key.usual != REQUIRED:
            result[key.name] = _value(key.path, text)
    for inner in form.sections:
        name = inner.path.rpartition(".")[2]
        tag = {} if inner.chosen in (NONE, GIVEN) else {"type": inner.chosen}
        result[name] = None if inner.chosen == NONE else tag | _mapping(inner, fields)
    return result


def _value(path: str, text: str) -> Any:
    """Return the value of a field's text, read as YAML; line ends count as spaces."""
    text = " ".join(text.split("\n")).strip()
    try:
        return parse_value(text, "value")
    except ConfigError as error:
        raise ConfigError(path, f"is {text!r}, which cannot be read: {error.message}") from None


def overrides(path: str, old: Any, new: Any) -> list[str]:
    """Return the overrides that turn the YAML file `path`, whose content is `old`, into `new`."""
    words, root = _words("", old, new), type(new)
    # a section's default may be of another type than in the file
    if _loads(root, path, words) != new:
        words = []
        for name in keys(root):
            if getattr(old, name) != getattr(new, name):
                words.append(f"{name}={in_one_line(getattr(new, name))}")
    return words


def _loads(root: type, path: str, words: list[str]) -> Any:
    try:
        return load(root, path, words)
    except ConfigError:
        return None


def _words(path: str, old: Any, new: Any) -> list[str]:
    if old == new:
        return []
    if type(old) is not type(new) or not dataclasses.is_dataclass(new):
        return [f"{path}={in_one_line(new)}"]
    return [
        word
        for name in keys(type(new))
        for word in _words(f"{path}.{name}".lstrip("."), getattr(old, name), getattr(new, name))
    ]
