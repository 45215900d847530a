"""Arguments that name a data set: a JSONL file, tars or parquet files."""

import argparse

from mmdit.data.dataset.inputs import read_input
from mmdit.data.dataset.records import Media, Record


def add_input_arguments(
    parser: argparse.ArgumentParser, default: str | None = None, purpose: str = ""
) -> None:
    """Add the arguments that name a data set, as `read_input` takes them. `--meta_jsonl` is
    required unless there is a `default` or `purpose`, the text that ends its help."""
    end = purpose or (f" [{default}]" if default else "")
    parser.add_argument(
        "--meta_jsonl",
        "--data",
        default=default,
        required=not (default or purpose),
        metavar="DATA",
        help=(
            "a JSONL file, WebDataset tars (.tar) or parquet files: one, a folder of them, or a"
            f" pattern like 'shards-{{000..127}}.tar', in quotes{end}"
        ),
    )
    parser.add_argument("--split", help="which files of a folder, by their names [train]")
    parser.add_argument(
        "--image_column",
        default="",
        help="of parquet files: the bytes of pictures or clips [guessed]",
    )
    parser.add_argument(
        "--caption_key",
        "--caption_column",
        default="",
        help="of parquet files: the column of captions; of tars: the key in .json files [guessed]",
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="take the first N pictures or clips only [0: all]"
    )


def input_records(args: argparse.Namespace, media: Media) -> list[Record]:
    """Return the records that the arguments name."""
    return read_input(
        args.meta_jsonl,
        media,
        getattr(args, "prefer", ""),
        split=args.split,
        image_column=args.image_column,
        caption_key=args.caption_key,
        limit=args.limit,
    )
