"""Describe a folder of pictures and videos, with captions in text files of the same name, as JSONL
that is ready to be cached.

    mmdit prepare-folder --folder data/pets  # cat.jpg and cat.txt, walk.mp4 …

Writes train_images.jsonl and train_videos.jsonl. A missing caption is empty (trained as
unconditional) and counted.
"""

from pathlib import Path

from mmdit.data.dataset.sources import prepare_folder
from mmdit.scripts import command_parser, friendly, run
from mmdit.scripts.listing import advised_caching


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--out_dir", help="where the JSONL goes [the folder itself]")
    parser.add_argument(
        "--split", default="train", help="writes <split>_images.jsonl and <split>_videos.jsonl"
    )
    parser.add_argument(
        "--caption_per_line",
        action="store_true",
        help=(
            "each line of a text file is a caption of its own, one "
            "of which is drawn at each training step [the whole file is one caption]"
        ),
    )
    args = parser.parse_intermixed_args(argv)
    with friendly():
        if Path(args.split).name != args.split:
            raise ValueError(
                f"--split is {args.split!r}, must be a name without folders: files begin with it"
            )
        report = prepare_folder(args.folder, args.out_dir, args.split, args.caption_per_line)
        print(report.text())
    for path in report.written:
        print("next:", advised_caching(path, path.stem.endswith("images")))
    return 0


if __name__ == "__main__":
    run(main)
