"""Read every file of a latent cache and list what is damaged. Exit code 0: nothing is, 1: something
is.

    mmdit verify-cache --cache_dir data/cache/my_images [--delete] [--json]

`--delete` removes the damaged files; the caching command then makes exactly these again.
"""

import json
from pathlib import Path

from mmdit.data.cache.verify import verify_cache
from mmdit.scripts import command_parser, friendly, run


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--cache_dir", type=Path, required=True)
    parser.add_argument(
        "--delete",
        action="store_true",
        help="delete damaged files, so that caching again makes them anew",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    args = parser.parse_intermixed_args(argv)
    with friendly():
        count, damage = verify_cache(args.cache_dir)
        doomed = [finding.file for finding in damage if finding.delete]
        if args.delete:
            for file in doomed:
                (args.cache_dir / file).unlink(missing_ok=True)
    if args.json:
        rows = [
            {"file": finding.file, "problem": str(finding), "delete": finding.delete}
            for finding in damage
        ]
        print(json.dumps({"files": count, "damage": rows}, indent=1, ensure_ascii=False))
    else:
        lines = [f"{finding.file}: {finding}" for finding in damage]
        print("\n".join([*lines, f"{count} files read, {len(damage)} findings"]))
        if doomed:
            print(
                f"{len(doomed)} files deleted; run the caching command again"
                if args.delete
                else "add --delete to remove damaged files, then run the caching command again"
            )
    return 1 if damage else 0


if __name__ == "__main__":
    run(main)
