"""The commands. Each turns arguments into a call; errors that the user can fix are reported in one
line, without a stack trace."""

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable

from mmdit import terminal
from mmdit.scripts.listing import commands
from mmdit.scripts.parsers import CommandParser


def run(main: Callable[[], int | None]) -> None:
    """Run a command and exit with its status. Everything that it prints, help and errors included,
    is made to suit any terminal and any encoding."""
    terminal.install()
    sys.argv[1:] = map(with_home, sys.argv[1:])
    raise SystemExit(main())


def call(words: list[str]) -> int:
    """Run `mmdit WORDS` in this process; return its exit status."""
    name, *rest = words
    sys.argv[:] = [f"mmdit {name}", *map(with_home, rest)]
    return importlib.import_module(f"mmdit.scripts.{commands()[name]}").main()


def command_parser(doc: str | None) -> CommandParser:
    """Return a parser whose help begins with the docstring of a command, printed as it is."""
    return CommandParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def config_parser(
    doc: str | None, config_help: str = "the YAML that training will use"
) -> CommandParser:
    """Return a parser for a command that takes the config of a training."""
    parser = command_parser(doc)
    parser.add_argument("--config", required=True, help=config_help)
    parser.add_argument("overrides", nargs="*", help="section.key=value over the config")
    return parser


def training_parser(doc: str | None, config_help: str) -> CommandParser:
    """Return a parser for a command that trains, and can continue a run that was stopped."""
    parser = config_parser(doc, config_help)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint of the run"
    )
    return parser


def main_outside(module: str) -> Callable[[list[str] | None], int]:
    """Return `main` of a module that lies beside the package, in a clone of the repository.

    If only the package is installed, this prints a one-line error and exits with 2.
    """
    try:
        return importlib.import_module(module).main
    except ModuleNotFoundError as error:
        folder = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != folder:
            raise
        print(
            f"error: {folder}/ is not part of the installed package; run this command from the top"
            " level of a clone of the repository",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


def with_home(word: str) -> str:
    """Return a word of the command line with the home folder in place of `~`, also where a shell
    does not expand it: in `--out_dir=~/x`, or between quotes."""
    option, equals, value = word.partition("=")
    if equals and option.startswith("--") and value.startswith("~/"):
        return option + equals + os.path.expanduser(value)
    return os.path.expanduser(word) if word.startswith("~/") else word


@contextlib.contextmanager
def friendly():
    """Print a ValueError (ConfigError included), a RunError, a file error or a full memory as one
    message and exit with 2. Anything else is a bug of ours and keeps its stack trace.
    `MMDIT_TRACE=1` shows every trace."""
    import torch

    from mmdit.training.errors import RunError

    with terminal.plain_output(), _reported(torch.OutOfMemoryError, RunError):
        yield


@contextlib.contextmanager
def _reported(*errors: type[Exception]):
    """Print one message and exit with a status for errors that the user can fix; `errors` are
    further types of these."""
    try:
        yield
    except (ValueError, OSError, MemoryError, RuntimeError, *errors) as error:
        known = isinstance(error, (ValueError, OSError, *errors)) or terminal.is_memory_full(error)
        if not known or os.environ.get("MMDIT_TRACE"):
            raise
        print(f"error: {terminal.message_of(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
