"""Turn video files into folders of frames at a chosen rate, with the JSONL that describes them.

    mmdit prepare-frames --meta_jsonl data/pets/train_videos.jsonl \\
        --out_dir data/pets_frames --fps 16

Reads the lines' `video_path`, writes `frames_<fps>fps/<id>/000000.png …` and a JSONL of the same
name. The same command continues what was interrupted. Training does not need this, as the caching
command reads video files itself; it helps to look at frames, or to clean them by hand.
"""

import json
from pathlib import Path

from tqdm import tqdm

from mmdit.data.dataset.records import Record, read_records
from mmdit.data.dataset.sources import extract_frames, is_of_another_video
from mmdit.data.dataset.written_lines import write_lines
from mmdit.files import clean, held_folder, is_full, objects_in, read_text, real_path
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
    with friendly():
        if args.fps <= 0:
            raise ValueError(f"--fps is {args.fps}, must be greater than 0")
        out = args.out_dir / args.meta_jsonl.name
        if real_path(out) == real_path(args.meta_jsonl):
            raise ValueError(f"--out_dir is the folder of {out}, which would be replaced by frames")
        records = read_records(args.meta_jsonl, "video", prefer="video_path")
        refusal = f"another process is writing frames into {args.out_dir}; wait for it"
        with held_folder(args.out_dir, refusal):
            refuse_shared_ids(records, out, args.fps)
            lines, skipped = write_frames(records, args.out_dir, args.fps, args.format)
            if not lines:
                raise ValueError(
                    "\n".join([f"none of the {len(skipped)} clips could be used:", *skipped[:5]])
                )
            edited = write_lines(out, "".join(lines))
    summary = f"{len(lines)} clips in {out}"
    said = [f"{summary}, {len(skipped)} skipped", *skipped, edited]
    print("\n".join(filter(None, said)))
    return 0


def refuse_shared_ids(records: list[Record], out: Path, fps: float) -> None:
    """Raise ValueError if frames would be replaced by those of another video, and another file of
    lines beside `out` names them."""
    named = {
        str(row.get("frames_dir")): path
        for path in sorted(out.parent.glob("*.jsonl"))
        for row in objects_in(read_text(path, "replace"))
        if path != out and ".before-" not in path.name
    }
    for record in records:
        place = frames_of(record.id, fps)
        if place in named and is_of_another_video(record, out.parent / place, fps):
            raise ValueError(
                f"{out.parent / place} holds the frames of another video with the id {record.id!r},"
                f" which {named[place]} names, and would be replaced by those of {record.path}:"
                " name another --out_dir"
            )


def frames_of(id: str, fps: float) -> str:
    """Return the folder of a clip's frames, relative to the folder of its line."""
    return f"frames_{fps:g}fps/{id}"


def write_frames(
    records: list[Record], out_dir: Path, fps: float, suffix: str
) -> tuple[list[str], list[str]]:
    """Write the frames of each clip. Return the lines of the clips that could be used, and the
    reasons why others could not. OSError if the disk is full."""
    lines, skipped = [], []
    clean(out_dir / frames_of("", fps))
    for record in tqdm(records, desc=f"writing {out_dir}", unit="clip"):
        folder = out_dir / frames_of(record.id, fps)
        try:
            frames = extract_frames(record, folder, fps, suffix)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and is_full(error):  # the clips after it would fail, too
                raise OSError(error.errno, error.strerror, str(folder)) from None
            skipped.append(f"{record.id}: {error}")
            continue
        facts = {
            name: value
            for name, value in record.facts.items()
            if name not in ("frames_dir", "video_path")
        }
        row = {
            "id": record.id,
            "frames_dir": folder.relative_to(out_dir).as_posix(),
            "caption": record.caption,
            **facts,
            "num_frames": frames,
            "frames_fps": fps,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return lines, skipped


if __name__ == "__main__":
    run(main)
