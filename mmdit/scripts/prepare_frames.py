"""Video files to folders of frames at a chosen rate, with the JSONL that describes them.

    mmdit prepare-frames --meta_jsonl data/pets/train_videos.jsonl \\
        --out_dir data/pets_frames --fps 16

Reads the lines' `video_path`, writes `frames_<fps>fps/<id>/000000.png …` and a JSONL of the same
name. Run again, it goes on. Not needed for training: the caching command reads video files itself.
It helps to look at frames, or to clean them by hand.
"""

import json
from pathlib import Path

from tqdm import tqdm

from mmdit.data.dataset.records import read_records
from mmdit.data.dataset.sources import extract_frames
from mmdit.files import clean, write_atomically
from mmdit.scripts import command_parser, friendly, run
from mmdit.scripts.arguments import number


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--meta_jsonl", type=Path, required=True)
    parser.add_argument("--out_dir", type=Path, required=True)
    parser.add_argument(
        "--fps", type=number, default=16.0, help="frames a second; video.fps of the config [16]"
    )
    parser.add_argument("--format", choices=["png", "jpg"], default="png")
    args = parser.parse_intermixed_args(argv)
    lines, skipped = [], []
    with friendly():
        if args.fps <= 0:
            raise ValueError(f"--fps is {args.fps}, must be greater than 0")
        records = read_records(args.meta_jsonl, "video", prefer="video_path")
        top = args.out_dir / f"frames_{args.fps:g}fps"
        clean(top)
        for record in tqdm(records, desc=f"writing {args.out_dir}", unit="clip"):
            folder = top / record.id
            try:
                frames = extract_frames(record, folder, args.fps, args.format)
            except (OSError, ValueError) as error:
                skipped.append(f"{record.id}: {error}")
                continue
            facts = {
                name: value
                for name, value in record.facts.items()
                if name not in ("frames_dir", "video_path")
            }
            row = {
                "id": record.id,
                "frames_dir": folder.relative_to(args.out_dir).as_posix(),
                "caption": record.caption,
                **facts,
                "num_frames": frames,
                "frames_fps": args.fps,
            }
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        if not lines:
            raise ValueError(
                "\n".join([f"none of the {len(skipped)} clips could be used:", *skipped[:5]])
            )
        write_atomically(args.out_dir / args.meta_jsonl.name, "".join(lines))
    summary = f"{len(lines)} clips in {args.out_dir / args.meta_jsonl.name}"
    print("\n".join([f"{summary}, {len(skipped)} skipped", *skipped]))
    return 0


if __name__ == "__main__":
    run(main)
