"""Parsers of command lines that can be looked at, for forms are made from them; whole numbers in
options."""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable


class ParserShown(Exception):
    """Carries the parser of a command to who asked for it."""

    def __init__(self, parser: argparse.ArgumentParser):
        super().__init__()
        self.parser = parser


class CommandParser(argparse.ArgumentParser):
    """A parser that can be looked at: see `parser_of`."""

    SHOW: list[str] = []  # this very list, given as arguments, asks for the parser

    def parse_intermixed_args(self, args=None, namespace=None):
        if args is self.SHOW:
            raise ParserShown(self)
        return super().parse_intermixed_args(args, namespace)

    def refuse_idle(self, args: argparse.Namespace, names: Iterable[str], reason: str) -> None:
        """Raise ValueError for the first of the options `names` that was given another value than
        its default: `reason` says why nothing would come of it, and what to do."""
        for name in names:
            value = getattr(args, name)
            if value in (self.get_default(name), []):  # no override is an empty list
                continue
            if name == "overrides":
                raise ValueError(f"{' '.join(value)} is given, but {reason}")
            said = "given" if value is True else self._shown(value)
            raise ValueError(f"--{name} is {said}, but {reason}")

    def refuse_all_but(self, kept: list[str], args: argparse.Namespace, reason: str) -> None:
        """Refuse all options but those `kept`, as `refuse_idle` does."""
        self.refuse_idle(args, [name for name in vars(args) if name not in kept], reason)

    @staticmethod
    def _shown(value: object) -> str:
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def parser_of(main: Callable[[list[str] | None], int]) -> argparse.ArgumentParser:
    """Return the parser of a command's `main`, which does nothing else."""
    try:
        main(CommandParser.SHOW)
    except ParserShown as shown:
        return shown.parser
    raise AssertionError(f"{main.__module__} parsed nothing")


def typed(name: str, argv: list[str] | None) -> str:
    """Return the command `mmdit NAME …` as it can be typed again; `argv` as `main` was given it."""
    return shlex.join(["mmdit", name, *(sys.argv[1:] if argv is None else argv)])


class Once(argparse.Action):
    """Stores the value of an option, and refuses a second one, of which the first would be lost."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        if before is not None:
            parser.error(
                f"argument {option_string}: is given twice, {before} and {values}; one can be used"
            )
        setattr(namespace, self.dest, values)


def at_least(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers that are `least` or more, as the value of an option."""

    def read(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"is {text}, must be at least {least}")
        return value

    read.__name__ = "int"  # in the message about what is no number
    return read
