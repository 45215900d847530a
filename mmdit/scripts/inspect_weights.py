"""What a checkpoint or adapter is, from its headers alone: names, shapes, types, blocks, variant, experts, prefix, shards.

    python -m mmdit.scripts.inspect_weights PATH [--expert high] [--json]

PATH: a file or folder in any layout: Wan (official, Diffusers, repacked), LoRA, VTP, ours. Nothing is loaded.
"""

import argparse
import json

from mmdit.interop.inspection import format_inspection, inspect_weights
from mmdit.scripts import friendly, run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--expert", choices=("high", "low"), help="of a pair of experts only this one")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_intermixed_args(argv)
    with friendly():
        report = inspect_weights(args.path, args.expert)
        print(json.dumps(report, indent=1) if args.json else format_inspection(report))
    return 0


if __name__ == "__main__":
    run(main)
