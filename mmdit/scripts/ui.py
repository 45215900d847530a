"""Show runs and start jobs in a browser: curves, previews, caching, training, sampling, reports.

    mmdit ui --runs runs/

Listens on this machine alone. With the environment variable MMDIT_UI_TOKEN set it asks for that
token, and --host may name an address that other machines reach. Jobs outlive the server.
"""

import os
from pathlib import Path

from mmdit.scripts import command_parser, friendly, run


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs [runs]")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [127.0.0.1]")
    parser.add_argument("--port", type=int, default=7861, help="0 takes a free one [7861]")
    parser.add_argument(
        "--name", action="append", default=[], help="a host name by which browsers reach it, too"
    )
    args = parser.parse_intermixed_args(argv)
    with friendly():
        try:
            from mmdit.ui import access, server
        except ImportError as error:
            raise ValueError(
                f"the browser interface needs {error.name}: pip install 'mmdit[ui]'"
            ) from None
        token = os.environ.get("MMDIT_UI_TOKEN", "")
        access.check_token(token, args.host)
        guard = access.guard_for(token, args.name)
        app = server.build_app(server.Settings(args.runs, guard))
        listening = server.listen(args.host, args.port)
        print(f"runs in {args.runs}: open {server.address_of(listening)} in a browser", flush=True)
        server.serve_pages(app, listening)
    return 0


if __name__ == "__main__":
    run(main)
