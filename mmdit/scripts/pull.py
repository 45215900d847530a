"""Fetch a model from the Hugging Face hub, at one commit: only files that other commands can read,
each checked against its check sum. Interrupt it whenever you like: the same command continues.

    mmdit pull OWNER/NAME [--out my_folder] [--revision COMMIT]

Needs the extra `hf`; for private repositories the login of `hf auth login` or HF_TOKEN. Nothing
that is fetched is executed. It is used like files that were here already; the last lines of the
output name the commands.
"""

from pathlib import Path

from mmdit.commands.pull import pull
from mmdit.scripts import command_parser, friendly, run


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("repository", help="OWNER/NAME")
    parser.add_argument("--out", help="folder [NAME]")
    parser.add_argument("--revision", default="main", help="branch, tag or commit [main]")
    parser.add_argument(
        "--replace", action="store_true", help="replace files of other content in --out"
    )
    args = parser.parse_intermixed_args(argv)
    with friendly():
        out = Path(args.out) if args.out else None
        for line in pull(args.repository, out, args.revision, args.replace):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    run(main)
