"""edges2shoes (Isola et al. 2017) from local parquet files to PNG images and JSONL, ready to be
cached.

    mmdit prepare-edges2shoes-t2i --source data/edges2shoes --max_samples 5000

Reads every `*.parquet` below `--source` (those named `<split>*`, if there are any). Columns:
`imageB` (the photo; `imageA` holds the edges), or one `image` that is the photo alone or twice as
wide as high (edges left, photo right); bytes, or a struct with `bytes` as the Hugging Face hub
stores images. A `caption`, `text` or `prompt` column is used if there is one.
"""

from pathlib import Path

from examples.edges2shoes.unpack import unpack
from mmdit.scripts import command_parser, friendly


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--source", type=Path, default=Path("data/edges2shoes"), help="folder of parquet files"
    )
    parser.add_argument("--out_dir", type=Path, default=Path("data/edges2shoes_t2i"))
    parser.add_argument(
        "--split", default="train", help="reads <split>*.parquet, writes <split>_images.jsonl"
    )
    parser.add_argument("--caption", default="a photo of a shoe", help="for rows without a caption")
    parser.add_argument("--max_samples", type=int, help="stop after so many; default: all")
    args = parser.parse_intermixed_args(argv)
    with friendly():
        if args.max_samples is not None and args.max_samples < 1:
            raise ValueError(f"--max_samples is {args.max_samples}, must be at least 1")
        written, bad = unpack(args.source, args.out_dir, args.split, args.caption, args.max_samples)
    print(
        f"{written} images and {args.out_dir / f'{args.split}_images.jsonl'} written, {bad}"
        " unreadable rows skipped"
    )
    return 0
