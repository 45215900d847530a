"""Tell what a checkpoint or adapter is, from its headers alone: names, shapes, types, blocks,
variant, experts, prefix, shards.

    mmdit inspect-weights PATH [--expert high] [--json]

PATH: a file or folder in any layout: Wan (official, Diffusers, repacked), LoRA, VTP, ours; of a run
its latest checkpoint. Nothing is loaded.
"""

import json
from pathlib import Path

from mmdit.interop.inspection import format_inspection, inspect_weights
from mmdit.scripts import command_parser, friendly, run
from mmdit.training.checkpoint import Meta, latest


def inspect_checkpoint(path: str, expert: str | None = None) -> dict | None:
    """Return what each file of a checkpoint of ours is, of a run its latest; None: it is neither.
    ValueError: no checkpoint is whole, or an `expert` is asked for, which a release has."""
    folder = Path(path)
    if (folder / "checkpoints").is_dir():
        checkpoint = latest(folder)
        if checkpoint is None:
            raise ValueError(f"{folder} is a run without a whole checkpoint")
        folder = checkpoint
    if not (folder / "checkpoint.json").is_file():
        return None
    if expert:
        raise ValueError(
            f"--expert is {expert}, but {folder} is a checkpoint, and all its files are told: leave"
            " it out, or name one of them"
        )
    step = Meta.read(folder).step
    parts = {file.stem: inspect_weights(file) for file in sorted(folder.glob("*.safetensors"))}
    return {"kind": f"checkpoint of step {step}", "path": str(folder), "parts": parts}


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("path")
    parser.add_argument(
        "--expert", choices=("high", "low"), help="of a pair of experts only this one"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_intermixed_args(argv)
    with friendly():
        path, expert = args.path, args.expert
        report = inspect_checkpoint(path, expert) or inspect_weights(path, expert)
        print(json.dumps(report, indent=1) if args.json else format_inspection(report))
    return 0


if __name__ == "__main__":
    run(main)
