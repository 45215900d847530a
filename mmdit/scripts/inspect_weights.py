"""Tell what a checkpoint or adapter is, from its headers alone: names, shapes, types, blocks,
variant, experts, prefix, shards.

    mmdit inspect-weights PATH [--expert high] [--json]

PATH: a file or folder in any layout: Wan (official, Diffusers, repacked), LoRA, VTP, ours; for a
run, its latest checkpoint is read. No weights are loaded.
"""

import json
from pathlib import Path

from mmdit.interop.inspection import format_inspection, inspect_weights, report_of
from mmdit.scripts import command_parser, friendly, run
from mmdit.training.checkpoint import Meta, latest
from mmdit.training.memory.shards import SHAPES, Stored


def inspect_parts(folder: Path) -> dict:
    """Return the report on the parts that the processes of a sharded training wrote into a
    folder."""
    stored = Stored(folder.with_suffix(".safetensors"))
    return report_of(folder, stored.entries(), stored.files)


def inspect_checkpoint(path: str, expert: str | None = None) -> dict | None:
    """Return the report on each file of a checkpoint of ours (for a run, of its latest), or on a
    folder of parts that processes wrote; None if it is neither. ValueError if no checkpoint is
    complete, or if an `expert` is asked for, which only releases have."""
    folder = Path(path)
    if (folder / "checkpoints").is_dir():
        checkpoint = latest(folder)
        if checkpoint is None:
            raise ValueError(f"{folder} is a run without a whole checkpoint")
        folder = checkpoint
    if (folder / SHAPES).is_file():
        return inspect_parts(folder)
    if not (folder / "checkpoint.json").is_file():
        return None
    if expert:
        raise ValueError(
            f"--expert is {expert}, but {folder} is a checkpoint, and all its files are told: leave"
            " it out, or name one of them"
        )
    step = Meta.read(folder).step
    files = {file.stem: inspect_weights(file) for file in folder.glob("*.safetensors")}
    cut = {file.parent.name: inspect_parts(file.parent) for file in folder.glob(f"*/{SHAPES}")}
    parts = dict(sorted((files | cut).items()))
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
