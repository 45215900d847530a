"""Command-line parsers that the browser's forms can inspect; readers of whole numbers."""

import argparse
import sys
from collections.abc import Callable, Iterable

from mmdit.config import MOST_INT
from mmdit.terminal import with_whole_names

MAY_BE_EMPTY = ("--negative", "--prompts")  # an empty prompt is a valid one
ONCE = (  # options that name an input: only the last of two would be used
    *("config", "meta_jsonl", "folder", "cache_dir", "checkpoint", "prompts", "prompts_file"),
    *("runs", "samples", "real", "held_out", "base", "tuned", "adapter"),
    *("lora", "lora_low", "refine"),
)


class ParserShown(Exception):
    """Carries the parser of a command to the caller of `parser_of`."""

    def __init__(self, parser: argparse.ArgumentParser):
        super().__init__()
        self.parser = parser


class CommandParser(argparse.ArgumentParser):
    """A parser that can be inspected: see `parser_of`. It refuses numbers beyond 64 bits, options
    that are given twice if one would be lost, and empty values, as an unset shell variable leaves:
    with these, a command would read or write the working directory, or ignore what was asked
    for. `words`: the command line that was parsed, with every option by its whole name."""

    SHOW: list[str] = []  # this very list as arguments asks for the parser
    words: list[str]

    def __init__(self, *args, **values):
        super().__init__(*args, **values)
        self.register("type", int, at_least(-MOST_INT, MOST_INT))

    def parse_intermixed_args(self, args=None, namespace=None):
        if args is self.SHOW:
            raise ParserShown(self)
        words = sys.argv[1:] if args is None else [str(word) for word in args]
        words = self.words = with_whole_names(words, self._option_string_actions)
        known, names = self._option_string_actions, [word.partition("=")[0] for word in words]
        given = [known[name].dest for name in names if name in known]
        for name in ONCE:
            if given.count(name) > 1:
                self.error(f"argument --{name}: is given twice, and the first would be lost")
        for before, word in zip(["", *words], words, strict=False):
            option = word.removesuffix("=") if word else before
            empty = option != word and option.startswith("--") and "=" not in option
            if empty and option not in MAY_BE_EMPTY:
                self.error(f"argument {option}: is empty; give a value, or leave it out")
        return super().parse_intermixed_args(words, namespace)

    def refuse_idle(self, args: argparse.Namespace, names: Iterable[str], reason: str) -> None:
        """Raise ValueError for the first of the options `names` that has another value than its
        default. `reason` says why it would have no effect, and what to do."""
        for name in names:
            value = getattr(args, name)
            if value in (self.get_default(name), []):  # overrides are an empty list by default
                continue
            if name == "overrides":
                raise ValueError(f"{' '.join(value)} is given, but {reason}")
            said = "given" if value is True else self._shown(value)
            raise ValueError(f"--{name} is {said}, but {reason}")

    def refuse_all_but(self, kept: list[str], args: argparse.Namespace, reason: str) -> None:
        """Refuse all options except those in `kept`, as `refuse_idle` does."""
        self.refuse_idle(args, [name for name in vars(args) if name not in kept], reason)

    @staticmethod
    def _shown(value: object) -> str:
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def parser_of(main: Callable[[list[str] | None], int]) -> argparse.ArgumentParser:
    """Return the parser of a command. Its `main` is called, but does nothing else."""
    try:
        main(CommandParser.SHOW)
    except ParserShown as shown:
        return shown.parser
    raise AssertionError(f"{main.__module__} parsed nothing")


def at_least(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Return a function that reads an option's value as a whole number from `least` to `most`."""

    def read(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"is {text}, must be at least {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"is {text}, must be at most {most}")
        return value

    read.__name__ = "int"  # argparse's message on other text names it
    return read
