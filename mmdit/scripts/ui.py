"""Show runs and start jobs in a browser: curves, previews, caching, training, sampling, reports.

    mmdit ui --runs runs/

Listens on this machine alone. With the environment variable MMDIT_UI_TOKEN set it asks for that
token, and --host may name an address that other machines reach. Jobs outlive the server.
"""

import argparse
import importlib
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from mmdit.scripts import command_parser, friendly, run
from mmdit.scripts.parsers import parser_of

JOBS = {  # what may be started, by name and module
    "prepare-moving-shapes": "prepare_moving_shapes",
    "prepare-folder": "prepare_folder",
    "prepare-frames": "prepare_frames",
    "prepare-clips": "prepare_clips",
    "cache-images": "cache_vtp_images",
    "cache-latents": "cache_vtp_latents",
    "cache-moving-shapes": "cache_moving_shapes",
    "cache-text": "cache_text",
    "train": "train_t2v",
    "posttrain": "posttrain",
    "sample": "sample",
}
REPORTS = {
    "inspect-data": "inspect_data",
    "inspect-cache": "inspect_cache",
    "verify-cache": "verify_cache",
    "plan-memory": "plan_memory",
    "inspect-adapter": "inspect_adapter",
}


@cache
def parser_of_command(module: str) -> argparse.ArgumentParser:
    """Return the parser of a command, by its module."""
    return parser_of(importlib.import_module(f"mmdit.scripts.{module}").main)


def parsers() -> dict[str, Callable[[], argparse.ArgumentParser]]:
    """Return what returns the parser of each command that may be started."""
    return {name: partial(parser_of_command, module) for name, module in (JOBS | REPORTS).items()}


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
        place = job_requests.Workplace(store, allowed, parsers(), automatic)
        guard = access.guard_for(token, args.name)
        app = server.build_app(server.Settings(args.runs, guard, place, tuple(REPORTS)))
        listening = server.listen(args.host, args.port)
        print(f"runs in {args.runs}: open {server.address_of(listening)} in a browser", flush=True)
        server.serve_pages(app, listening)
    return 0


if __name__ == "__main__":
    run(main)
