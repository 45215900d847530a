"""Show runs and start jobs in a browser: curves, previews, caching, training, sampling, reports.

    mmdit ui --runs runs/

Listens on this machine alone. With the environment variable MMDIT_UI_TOKEN set it asks for that
token, and --host may name an address that other machines reach. Jobs outlive the server.
"""

import argparse
import importlib
import os
from functools import cache, partial
from pathlib import Path

from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.scripts import command_parser, friendly, run
from mmdit.scripts.listing import commands, summary
from mmdit.scripts.parsers import parser_of
from mmdit.ui.job_requests import Command
from mmdit.vtp_training.pretrain_config import PretrainConfig

REPORTS = (  # commands on the page about data
    *("inspect-data", "inspect-cache", "verify-cache", "plan-memory"),
    *("inspect-adapter", "inspect-levels", "inspect-weights", "estimate-latent-scale"),
)
DISTRIBUTED = ("train", "posttrain", "cache-images", "cache-latents")  # can run under torchrun
# All other commands can be started from the browser, new ones included.
NOT_OFFERED = {
    "ui": "it is running",
    "quickstart": "the first look, in a terminal",
    "doctor": "looks at the machine of who installs",
    "benchmark": "needs a clone of the repository, and the machine for itself",
    "reproduce": "takes hours and writes results/ of a clone",
    "prepare-edges2shoes-t2i": "needs a clone of the repository",
    "push": "sends files to another machine in its user's name",
    "pull": "brings files of another machine",
    "prepare-captions": "sends pictures, and the key in the environment, to the server it is told",
}


@cache
def parser_of_command(module: str) -> argparse.ArgumentParser:
    """Return the parser of a command, by its module."""
    return parser_of(importlib.import_module(f"mmdit.scripts.{module}").main)


def offers() -> dict[str, Command]:
    """Return, by name, what the pages need to know about each command that can be started."""
    roots = {"train-vtp": PretrainConfig}
    return {
        name: Command(
            partial(parser_of_command, module),
            summary(module),
            roots.get(name, ExperimentConfig),
            name in REPORTS,
            name in DISTRIBUTED,
        )
        for name, module in commands().items()
        if name not in NOT_OFFERED
    }


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs [runs]")
    parser.add_argument(
        "--allow",
        type=Path,
        action="append",
        help="folder that jobs may read and write [the working directory]; --runs always is one",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [127.0.0.1]")
    parser.add_argument("--port", type=int, default=7861, help="0 takes a free one [7861]")
    parser.add_argument(
        "--name", action="append", default=[], help="a host name by which browsers reach it, too"
    )
    args = parser.parse_intermixed_args(argv)
    with friendly():
        try:
            from mmdit.ui import access, allowed_folders, job_files, job_requests, server
        except ImportError as error:
            raise ValueError(
                f"the browser interface needs {error.name}: pip install 'mmdit[ui]'"
            ) from None
        import torch

        token = os.environ.get("MMDIT_UI_TOKEN", "")
        access.check_token(token, args.host)
        allowed = allowed_folders.AllowedFolders([args.runs, *(args.allow or [Path.cwd()])])
        automatic = "cuda:0" if torch.cuda.is_available() else "cpu"
        store = job_files.JobStore(args.runs)
        place = job_requests.Workplace(store, allowed, offers(), automatic)
        guard = access.guard_for(token, args.name)
        app = server.build_app(server.Settings(args.runs, guard, place))
        listening = server.listen(args.host, args.port)
        print(f"runs in {args.runs}: open {server.address_of(listening)} in a browser", flush=True)
        server.serve_pages(app, listening)
    return 0


if __name__ == "__main__":
    run(main)
