"""A command of ours on several processes, which share the imports of this one. Gloo on a CPU.

    python -m tests.drivers.ranks_of_command PROCESSES MODULE WORDS...

MODULE is that of the command (`mmdit.scripts.posttrain`), WORDS are its arguments. Whatever a
process prints is shown when one of them fails.
"""

import importlib
import sys
import tempfile
from pathlib import Path

from tests.helpers.forked_runs import must, start_ranks, wait


def main(count: str, module: str, *words: str) -> int:
    command = importlib.import_module(module).main
    with tempfile.TemporaryDirectory() as logs:
        ranks = start_ranks(lambda: command(list(words)), Path(logs), int(count))
        must([wait(rank) for rank in ranks], Path(logs))
    print("{}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
