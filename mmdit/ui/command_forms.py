"""Make forms of commands from their argument parsers, and command lines from filled-in forms.

No list here repeats the options of a command, so none can become outdated. The text of an option is
taken for a path unless the option is listed as having none: so the path in a new option is checked
rather than let through.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmdit.ui.allowed_folders import AllowedFolders

NO_PATHS = {
    *(
        "image_column",
        "caption_key",
        "device",
        "negative",
        "prefer",
        "split",
        "source",
        "variant",
        "sizes",
    ),
    *("kind", "offload", "prompts", "solver", "expert", "targets"),
}
# Options of the form `PATH[,key=value…]`; the text of any other option is a single path.
SETTINGS = {"features"}
# The config has a form of its own, and nobody could answer an interactive job.
LEFT_OUT = {"help", "config", "overrides", "interactive"}


@dataclass(frozen=True)
class Option:
    """An option of a command as a field of a form. `shape`: flag, choice, lines (several values,
    one per line), number or text. `flag` is the option as on the command line; for a positional
    argument, the name that the help shows."""

    name: str  # in the parsed namespace
    flag: str
    shape: str
    about: str
    usual: str
    required: bool
    choices: tuple[str, ...] = ()
    is_path: bool = False
    repeats: bool = False  # the flag is repeated before each of several values
    bare: bool = False  # a positional argument


def options_of(parser: argparse.ArgumentParser) -> list[Option]:
    """Return the options of a command in order."""
    return [_option(action) for action in parser._actions if action.dest not in LEFT_OUT]


def takes(parser: argparse.ArgumentParser, name: str) -> bool:
    """Return whether a command has the argument `name`."""
    return any(action.dest == name for action in parser._actions)


def _option(action: argparse.Action) -> Option:
    shape = "text"
    if isinstance(action, argparse._StoreTrueAction):
        shape = "flag"
    elif action.choices:
        shape = "choice"
    elif action.nargs or isinstance(action, argparse._AppendAction):
        shape = "lines"
    elif action.type not in (None, str, Path):
        shape = "number"
    is_text = shape in ("text", "lines") and action.type in (None, str)
    usual = "" if action.default in (None, False) else action.default
    return Option(
        action.dest,
        next(iter(action.option_strings), action.metavar or action.dest),
        shape,
        (action.help or "").replace("%%", "%"),
        "\n".join(map(str, usual)) if isinstance(usual, list) else str(usual),
        action.required,
        tuple(map(str, action.choices or ())),
        action.type is Path or (is_text and action.dest not in NO_PATHS),
        isinstance(action, argparse._AppendAction),
        not action.option_strings,
    )


def words_of(
    options: list[Option], value_of: Callable[[str], str], allowed: AllowedFolders
) -> list[str]:
    """Return the words of a command line for a filled-in form; values that equal the default are
    left out. ValueError if a value is missing, or names a file outside of the allowed folders."""
    words: list[str] = []
    for option in sorted(options, key=lambda option: not option.bare):  # positional ones first
        text = value_of(option.name)
        if option.required and not text:
            raise ValueError(f"{option.flag} is missing: {option.about}")
        if not text or (text == option.usual and not option.required):
            continue
        if "\0" in text:
            raise ValueError(f"{option.flag} holds a character that no command line can")
        values = text.split("\n") if option.shape == "lines" else [text]
        values = [value.strip() for value in values if value.strip()]
        if option.is_path:
            look = allowed.check_text if option.name in SETTINGS else allowed.check
            for value in values:
                look(value, option.flag)
        words += _words(option, values)
    return words


def _words(option: Option, values: list[str]) -> list[str]:
    if option.shape == "flag":
        return [option.flag]
    if option.shape == "choice" and values[0] not in option.choices:
        raise ValueError(f"{option.flag} is {values[0]!r}, must be one of {option.choices}")
    if option.bare or (option.shape == "lines" and not option.repeats):
        for value in values:
            if value.startswith("-") and not _is_number(value):
                raise ValueError(f"{option.flag}: {value!r} begins with a dash, as options do")
        return values if option.bare else [option.flag, *values]
    # in one word with the flag, so that a value is never taken for an option
    return [f"{option.flag}={value}" for value in values]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
