"""Send an export to a private repository of the Hugging Face hub, with its model card.

    mmdit push my_model.safetensors OWNER/NAME [--public]
    mmdit push transformer OWNER/NAME --dry_run

Needs the extra `hf`, and the login of `hf auth login` or HF_TOKEN. Pickles, caches, checkpoints
with the state of a training, and files that hold paths of this machine or a token are not sent.
"""

from pathlib import Path

from mmdit.commands.push import push
from mmdit.scripts import command_parser, friendly, run


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("target", help="file or folder that mmdit export wrote")
    parser.add_argument("repository", help="OWNER/NAME; it is made where there is none")
    parser.add_argument("--public", action="store_true", help="everybody may see it [private]")
    parser.add_argument("--message", default="Sent by mmdit push", help="of the commit")
    parser.add_argument("--dry_run", action="store_true", help="show what would be sent")
    args = parser.parse_intermixed_args(argv)
    with friendly():
        target = Path(args.target)
        for line in push(target, args.repository, args.public, args.message, args.dry_run):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    run(main)
