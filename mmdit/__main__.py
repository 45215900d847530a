"""The command `mmdit`: `mmdit train …` is `python -m mmdit.scripts.train_t2v …`, and so on."""

from __future__ import annotations

import difflib
import importlib
import os
import sys

from mmdit.scripts import run
from mmdit.scripts.listing import SHORT, commands, summary


def overview() -> str:
    """Return what `mmdit --help` prints: a line for each command."""
    rows = [f"  {name:20} {summary(module)}" for name, module in sorted(commands().items())]
    head = "usage: mmdit COMMAND [options]        (mmdit COMMAND --help says more)"
    return "\n".join([head, "", *rows])


def main() -> int:
    """Run the subcommand that the command line names; return its exit status."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    known = commands()
    name = words[0].replace("_", "-")
    module = known.get(name) or known.get(SHORT.get(words[0], ""))
    if module is None:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ";"
        print(
            f"error: mmdit has no command {words[0]!r}{hint} `mmdit --help` lists all",
            file=sys.stderr,
        )
        return 2
    sys.argv = [f"mmdit {name}", *words[1:]]
    return importlib.import_module(f"mmdit.scripts.{module}").main()


def start() -> None:
    """Start the command line, with output that suits any terminal."""
    try:
        run(main)
    except KeyboardInterrupt:  # while a command is loaded, for seconds; later, `run` reports it
        if os.environ.get("MMDIT_TRACE"):
            raise
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    start()
