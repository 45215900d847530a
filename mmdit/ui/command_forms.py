"""Forms of commands, made from their argument parsers, and the command line that a form makes.

Nothing here lists the options of a command, so none can lag behind. What an option takes as text is
taken for a path unless it is listed as none: a new option is looked at rather than let through.
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
# Settings with paths in them, `PATH[,key=value…]`; any other text is one path, whatever it holds.
SETTINGS = {"features"}
# The configuration has a form of its own, and nobody sits before a job to answer it.
LEFT_OUT = {"help", "config", "overrides", "interactive"}


@dataclass(frozen=True)
class Option:
    """An option of a command as a field of a form. `shape`: flag, choice, lines (several values, a
    line each), number or text. `flag` is as on the command line; of a value that stands there
    without one it is the name that the help shows."""

    name: str  # as in a namespace
    flag: str
    shape: str
    about: str
    usual: str
    required: bool
    choices: tuple[str, ...] = ()
    is_path: bool = False
    repeats: bool = False  # the flag stands before each of several values
    bare: bool = False  # its value stands on the command line without a flag


def options_of(parser: argparse.ArgumentParser) -> list[Option]:
    """Return the options of a command in their order."""
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
    """Return the words of a command line that say what a form says; what is as usual is left out.
    ValueError: a value is missing, or names a file outside of the allowed folders."""
    words: list[str] = []
    for option in sorted(options, key=lambda option: not option.bare):  # before lists of values
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
    # one word each: what follows the sign is never taken for an option
    return [f"{option.flag}={value}" for value in values]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
