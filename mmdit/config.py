"""YAML ↔ frozen dataclasses. A config is decoded once, at the edge of the program; any mistake
stops the run with file, line and dotted path.

A config class is a frozen dataclass beside the code that it configures, and holds the defaults.
Supported field types: bool, int, float, str, Literal, `X | None`, `tuple[X, ...]`, `tuple[X, Y]`,
dataclasses, and unions of dataclasses told apart by their `type: Literal[...]` field. Checks
between fields of one class belong in its `__post_init__`, checks between sections in
`Section.check`; both raise `ConfigError`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mmdit.shipped import find

if typing.TYPE_CHECKING:
    FilePath = str
else:  # the name of a file or folder, which may begin with `~`
    FilePath = typing.NewType("FilePath", str)
MAX_BYTES, MAX_NODES, MAX_DEPTH, MAX_DIGITS = 1 << 20, 100_000, 32, 4000


class ConfigError(ValueError):
    """A mistake in what a person wrote: `path` (dotted), and a `message` that says what is wrong,
    with both values, and what to do."""

    def __init__(self, path: str, message: str):
        self.path, self.message = shortened(path, 400), shortened(message, 4000)
        super().__init__(f"{self.path}: {self.message}" if path else self.message)

    def under(self, prefix: str) -> ConfigError:
        return ConfigError(_join(prefix, self.path), self.message)


class Section:
    """The base of the dataclasses that are sections of a configuration."""

    def check(self, run: Any) -> None:
        """Raise ConfigError if this section contradicts another section of `run`.

        `run` is the whole configuration, an `experiment.experiment_config.ExperimentConfig`: its
        attributes are the sections, named as in the YAML file. (Its type belongs to a higher layer,
        so sections cannot import it.) Paths are dotted from the root. When all sections are
        decoded, the root calls this method of each.
        """


def check_sections(run: Any) -> None:
    """Call `check` of every section of `run`, in the order of its fields."""
    for field in dataclasses.fields(run):
        section = getattr(run, field.name)
        if isinstance(section, Section):
            section.check(run)


MOST_INT = 2**63 - 1  # the most that arrays and files can hold
MOST_BLOCKS = 10_000  # of a network: a guard against configs that would exhaust the memory


def least(section: object, bound: float, *names: str, above: bool = False) -> None:
    """Raise ConfigError if a named field of `section` is below `bound` (or, with `above`, not above
    it). None is accepted."""
    for name in names:
        value = getattr(section, name)
        if value is not None and (value < bound or (above and value == bound)):
            limit = "above" if above else "at least"
            raise ConfigError(name, f"is {value}; must be {limit} {bound:g}")


def most(section: object, bound: int, *names: str) -> None:
    """Raise ConfigError if a named field of `section` is above `bound`, which no machine could
    hold. None is accepted."""
    for name in names:
        value = getattr(section, name)
        if value is not None and value > bound:
            raise ConfigError(name, f"is {value}; must be at most {bound}")


def changed_keys(section: Any, names: Sequence[str] = ()) -> dict[str, Any]:
    """Return, with their defaults, the keys of a section that differ from their default; only keys
    in `names`, or, if that is empty, all except `enabled`."""
    changed = {}
    for field in dataclasses.fields(section):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        asked = field.name in names or (not names and field.name != "enabled")
        if asked and getattr(section, field.name) != default:
            changed[field.name] = default
    return changed


def shortened(text: str, most: int) -> str:
    """Return the text itself if it is short, otherwise its beginning and its end, where the remedy
    is."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


# ── reading ───────────────────────────────────────────────────────────────────────────────────────
_NUMBER = re.compile(
    r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII
)  # YAML 1.1 reads 1e-4 as a string, but people mean a number


def holds_half_a_pair(text: str) -> bool:
    """Return whether a text holds half a surrogate pair, which is no character."""
    return not text.isascii() and any(0xD800 <= ord(letter) < 0xE000 for letter in text)


def joined_pairs(text: str) -> str:
    """Return a text with its surrogate pairs joined to characters (JSON writes characters beyond 16
    bits as such pairs, and YAML reads two characters). ValueError if it holds half a pair."""
    if not holds_half_a_pair(text):
        return text
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise ValueError(
            f"{shortened(ascii(text), 80)} holds half a surrogate pair, which is no character: the"
            " text was cut within one; remove it"
        ) from None


SCALARS = ("str", "int", "float", "bool", "null")
TAGS = {yaml.MappingNode: ("map",), yaml.SequenceNode: ("seq",), yaml.ScalarNode: SCALARS}
_OCTAL = re.compile(r"[-+]?0[\d_]+")


def parse_yaml(text: str, name: str = "config") -> tuple[dict, dict[str, int]]:
    """Return the mapping in `text`, and the line of every dotted path. This is safe: no tags are
    constructed, and size and aliases are limited."""
    if holds_half_a_pair(text):
        raise ConfigError("", f"{name} is not UTF-8 text: {shortened(ascii(text), 200)}")
    if len(text.encode()) > MAX_BYTES:
        raise ConfigError(
            "", f"{name} is larger than {MAX_BYTES} bytes; a config is a page of text"
        )
    lines: dict[str, int] = {}
    loader, count = None, 0

    def build(node: yaml.Node, path: str, depth: int) -> Any:
        nonlocal count
        count += 1
        line = node.start_mark.line + 1
        if count > MAX_NODES or depth > MAX_DEPTH:
            raise ConfigError(
                "",
                f"{name}:{line}: too many or too deeply nested values (aliases that expand?); write"
                " them out",
            )
        lines.setdefault(path, line)
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        if tag not in TAGS[type(node)]:
            raise ConfigError(
                path,
                f"{name}:{line}: the tag {node.tag!r} is not allowed; write plain values (quote"
                " dates)",
            )
        if isinstance(node, yaml.MappingNode):
            result: dict[str, Any] = {}
            for key_node, value_node in node.value:
                where = f"{name}:{key_node.start_mark.line + 1}"
                if not isinstance(key_node, yaml.ScalarNode):
                    raise ConfigError(path, f"{where}: a key must be a word")
                key = key_node.value
                if key in result:
                    raise ConfigError(
                        _join(path, key),
                        f"{where}: written twice (first in line {lines[_join(path, key)]});"
                        " keep one",
                    )
                lines[_join(path, key)] = key_node.start_mark.line + 1
                result[key] = build(value_node, _join(path, key), depth + 1)
            return result
        if isinstance(node, yaml.SequenceNode):
            return [build(child, f"{path}[{i}]", depth + 1) for i, child in enumerate(node.value)]
        if tag == "str":
            plain = node.style is None
            if plain and _NUMBER.fullmatch(node.value):
                return float(node.value)
            try:
                return joined_pairs(node.value)
            except ValueError as error:
                raise ConfigError(path, f"{name}:{line}: {error}") from None
        if tag in ("int", "float") and (":" in node.value or len(node.value) > MAX_DIGITS):
            raise ConfigError(
                path,
                f"{name}:{line}: {shortened(node.value, 40)!r} is read as a number to the base of "
                "60, or has too "
                "many digits; write a plain number, or quote a text",
            )
        if tag == "int" and _OCTAL.fullmatch(node.value):
            raise ConfigError(
                path,
                f"{name}:{line}: {node.value} begins with 0, by which YAML reads it to the base of"
                " 8; leave the zeros out, or quote a text",
            )
        return getattr(loader, f"construct_yaml_{tag}")(node)

    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        mapping = build(node, "", 0) if node is not None else {}
    except (
        yaml.YAMLError,
        UnicodeError,
        RecursionError,
        ValueError,
        OverflowError,
        LookupError,
    ) as error:
        if isinstance(error, ConfigError):
            raise
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(
            "", f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}"
        ) from None
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(mapping, dict):
        raise ConfigError(
            "", f"{name}: the file must hold sections, not a {type(mapping).__name__}"
        )
    return mapping, lines


def apply_overrides(mapping: dict, overrides: list[str]) -> dict:
    """Return a copy of `mapping` with `section.key=value` words from a command line applied.
    `section={key: value}` replaces a whole section."""
    result = {
        key: dict(value) if isinstance(value, dict) else value for key, value in mapping.items()
    }
    for number, word in enumerate(overrides):
        path, equals, text = word.partition("=")
        if not equals or not path:
            raise ConfigError("", f"override {word!r} is not of the form section.key=value")
        if lost := [earlier for earlier in overrides[:number] if earlier.startswith(f"{path}.")]:
            raise ConfigError(
                "",
                f"override {word!r} takes the place of all of {path}:, and {lost[0]!r} before it"
                " would be lost; write the whole section first",
            )
        value = parse_value(text, f"override {word!r}")
        target = result
        *parents, last = path.split(".")
        for parent in parents:
            if target.get(parent) is None:  # the section is left out
                target[parent] = {}
            if not isinstance(target[parent], dict):
                raise ConfigError(
                    path, f"{parent!r} holds a single value, so {word!r} cannot set a key inside it"
                )
            target[parent] = dict(target[parent])
            target = target[parent]
        target[last] = value
    return result


def parse_value(text: str, name: str) -> Any:
    """Return the value that a text means in YAML; the empty text is null. ConfigError if it is not
    a value, or if YAML would leave a part of it out, as a comment or an anchor."""
    value = parse_yaml(f"value: {text}" if text else "value: null", name)[0]["value"]
    comment = text if text.startswith("&") else ""
    if "#" in text or "\n" in text:
        node = yaml.compose(f"value: {text}").value[0][1]
        comment = text[max(0, node.end_mark.index - len("value: ")) :].strip()
    if comment:
        what = "a name (anchor)" if comment.startswith("&") else "a comment"
        raise ConfigError(
            "",
            f"{name}: YAML reads {comment!r} as {what} and leaves it out; put quotes around the"
            " value (on a command line within those of the shell)",
        )
    return value


def load(cls: type, path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Decode the YAML file `path`, a person's own or one that is shipped, into `cls`.

    ConfigError messages begin with `file:line`, or with `command line` for an override."""
    path = find(path)
    if path.is_dir():
        raise ConfigError(
            "", f"the config {path} is a folder: name a YAML file, such as its own config.yaml"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError("", f"cannot read the config {path}: {error}") from None
    mapping, lines = parse_yaml(text, str(path))
    mapping = apply_overrides(mapping, list(overrides))
    try:
        return decode(cls, mapping)
    except ConfigError as error:
        overridden = any(error.path.startswith(word.partition("=")[0]) for word in overrides)
        known = error.path
        while known and known not in lines:
            known = known.rpartition(".")[0]
        where = "command line" if overridden else f"{path}:{lines[known]}" if known else str(path)
        raise ConfigError("", f"{where}: {error}") from None


# ── decoding ──────────────────────────────────────────────────────────────────────────────────────
@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """Return the types of the attributes of `cls`; they are kept, since finding them takes a
    while."""
    return typing.get_type_hints(cls)


def decode(hint: Any, value: Any, path: str = "") -> Any:
    """Return `value` (plain YAML data) as the type `hint`. Nothing is guessed; only int → float,
    and floats without a fraction → int, are converted. ConfigError if it does not fit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _decode_dataclass(hint, value, path)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(arguments, value, path)
    if origin is typing.Literal:
        if value not in arguments or isinstance(value, bool) != any(
            isinstance(a, bool) and a == value for a in arguments
        ):
            note = (
                " (YAML reads on/off/yes/no as true/false: quote the word)"
                if isinstance(value, bool)
                else ""
            )
            raise ConfigError(
                path,
                f"is {value!r}, must be one of"
                f" {', '.join(map(repr, arguments))}{_near(value, arguments)}{note}",
            )
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            example = "a list, for example [a, b]"
            if dataclasses.is_dataclass(arguments[0]):
                keys = ", ".join(field.name for field in dataclasses.fields(arguments[0]))
                example = f"a list of sections, each with {keys}"
            raise ConfigError(path, f"is {value!r}, must be {example}")
        if arguments[-1] is Ellipsis:
            return tuple(decode(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
        if len(value) != len(arguments):
            raise ConfigError(path, f"has {len(value)} values, must have {len(arguments)}")
        return tuple(
            decode(part, item, f"{path}[{i}]")
            for i, (part, item) in enumerate(zip(arguments, value, strict=True))
        )
    if hint is FilePath:
        return os.path.expanduser(decode(str, value, path))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(path, "is too large for a floating-point number") from None
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e5 steps
    if hint is int and isinstance(value, int) and abs(value) > MOST_INT:
        number = value if value.bit_length() < 256 else "too large"
        raise ConfigError(path, f"is {number}; must be at most {MOST_INT}, a number of 64 bits")
    if hint is type(None):
        fits = value is None
    else:
        fits = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if not fits:
        words = {
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            str: "text",
            type(None): "null",
            dict: "a section of keys",
        }
        raise ConfigError(path, f"is {value!r} ({_yaml_type(value)}), must be {words[hint]}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(path, "is infinite" if value == value else "is not a number (nan)")
    return value


def _decode_dataclass(hint: type, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(path, f"is {value!r}, must be a section of keys")
    fields = {f.name: f for f in dataclasses.fields(hint) if f.init}
    # those of the root are read each time, because a program may extend the types that it names
    hints = hints_of(hint) if path else typing.get_type_hints(hint)
    for name in value:
        if name not in fields:
            known = ", ".join(fields)
            raise ConfigError(
                _join(path, str(name)), f"unknown key{_near(name, fields)}; known here: {known}"
            )
    for name, spec in fields.items():
        required = (
            spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        )
        if required and name not in value:
            raise ConfigError(_join(path, name), f"is missing; it has no default ({hint.__name__})")
    decoded = {name: decode(hints[name], item, _join(path, name)) for name, item in value.items()}
    try:
        return hint(**decoded)
    except ConfigError as error:
        raise error.under(path) from None


def _decode_union(options: tuple, value: Any, path: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    if all(dataclasses.is_dataclass(option) for option in options) and len(options) > 1:
        tags = {typing.get_args(hints_of(option)["type"])[0]: option for option in options}
        if not isinstance(value, dict):
            raise ConfigError(
                path, f"is {value!r}, must be a section with a type: {', '.join(tags)}"
            )
        tag = value.get("type", next(iter(tags)))
        if not isinstance(tag, str) or tag not in tags:
            raise ConfigError(
                _join(path, "type"),
                f"is {tag!r}, must be one of {', '.join(tags)}{_near(tag, tags)}",
            )
        return _decode_dataclass(tags[tag], value, path)
    errors = []
    for option in options:
        try:
            return decode(option, value, path)
        except ConfigError as error:
            errors.append(error)
    raise (
        errors[0]
        if len(errors) == 1
        else ConfigError(path, " and ".join(e.message for e in errors))
    )


def _near(word: Any, known) -> str:
    close = difflib.get_close_matches(str(word), [str(k) for k in known], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _yaml_type(value: Any) -> str:
    return {
        dict: "a section",
        list: "a list",
        str: "text",
        bool: "true/false",
        type(None): "empty",
    }.get(type(value), "a number")


# ── writing ───────────────────────────────────────────────────────────────────────────────────────
def encode(value: Any) -> Any:
    """Return a dataclass as plain YAML data; `decode(type(x), encode(x)) == x`."""
    if dataclasses.is_dataclass(value):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [encode(item) for item in value] if isinstance(value, (tuple, list)) else value


def completed(cls: type, mapping: dict) -> dict:
    """Return a stored config completed with the defaults of keys that an older version did not
    have; unchanged if it no longer fits the class."""
    try:
        return encode(decode(cls, mapping))
    except ConfigError:
        return mapping


class _Dumper(yaml.SafeDumper):
    """Writes texts in such a way that `parse_yaml` reads the same texts."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Quote texts that would be read as numbers, and texts with characters that YAML takes for
        line ends; in values on one line, write these as escapes."""
        style = "'" if _NUMBER.fullmatch(text) else None
        if "\x85" in text or (self.best_width >= ONE_LINE and not text.isprintable()):
            style = '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)
ONE_LINE = 10**9


def to_yaml(value: Any) -> str:
    """Return a config, or plain data, as YAML that `parse_yaml` reads back."""
    return yaml.dump(encode(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def in_one_line(value: Any) -> str:
    """Return a value as YAML in one line."""
    text = yaml.dump(
        encode(value),
        Dumper=_Dumper,
        default_flow_style=True,
        width=ONE_LINE,
        sort_keys=False,
        allow_unicode=True,
    )
    return text.removesuffix("\n").removesuffix("\n...")


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return readable `path: old → new` lines for the differences between two configs (or their
    encoded forms)."""
    old, new = encode(old), encode(new)
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        return [
            line
            for name in names
            for line in differences(old.get(name), new.get(name), _join(path, name))
        ]
    return [] if old == new else [f"{path}: {old!r} → {new!r}"]
