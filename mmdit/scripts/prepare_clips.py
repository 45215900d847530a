"""Cut long videos into clips of one scene each, without encoding anything: a clip is a line that
names some frames of its film.

    mmdit prepare-clips --meta_jsonl data/films/train_videos.jsonl --out_dir data/clips

Hard cuts, dissolves and fades are found by how much frames differ. Stop it at any time: the same
command continues. Run again with other settings, it cuts what it has measured anew, in seconds.
Exit code 2: no clip is left.
"""

from pathlib import Path

from mmdit.data.dataset.records import read_records
from mmdit.data.preparing.clip_preparation import ClipPreparation
from mmdit.data.preparing.shots import ShotSettings
from mmdit.files import real_path
from mmdit.scripts import command_parser, friendly, run
from mmdit.scripts.arguments import number
from mmdit.scripts.listing import advised

SETTINGS = {
    "min_seconds": "shorter shots are left out",
    "max_seconds": "longer shots are cut into equal clips",
    "cut": "least difference of two frames at a cut, of 255: less finds more",
    "black": "frames darker than this share of white are left out; 0 keeps all",
    "still": (
        "clips whose frames, 32 apart, never differ by more, of 255, are left out; 0 keeps all"
    ),
}


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--meta_jsonl", type=Path, required=True, help="lines with video_path (prepare-folder)"
    )
    parser.add_argument("--out_dir", type=Path, required=True, help="where the lines of clips go")
    for name, about in SETTINGS.items():
        usual = getattr(ShotSettings, name)
        parser.add_argument(f"--{name}", type=number, default=usual, help=f"{about} [{usual:g}]")
    args = parser.parse_intermixed_args(argv)
    with friendly():
        settings = ShotSettings(**{name: getattr(args, name) for name in SETTINGS})
        out = args.out_dir / args.meta_jsonl.name
        if real_path(out) == real_path(args.meta_jsonl):
            raise ValueError(f"--out_dir is the folder of {out}, which would be replaced by clips")
        records = read_records(args.meta_jsonl, "video", prefer="video_path")
        report = ClipPreparation(records, args.out_dir, out.name, settings).run()
    print(report.text())
    if report.skipped:
        print(f"skipped ones, with reasons: {args.out_dir / 'skipped.jsonl'}")
    if report.interrupted:
        print("interrupted: what is measured stays; the same command goes on from there")
        return 130
    if not report.clips:
        return 2
    words = ["prepare-captions", "--meta_jsonl", out, "--model", "FOLDER", "--out_dir", "…"]
    print(f"next: {advised(*words)}")
    return 0


if __name__ == "__main__":
    run(main)
