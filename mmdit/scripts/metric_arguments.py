"""Arguments of the commands that score samples."""

import argparse
from typing import Any


def add_metric_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say by which metrics samples are measured, and with what they are
    compared."""
    parser.add_argument(
        "--features",
        metavar="PATH[,key=value…]",
        help=(
            "measure distances, precision, recall and copies in the features of a local encoder:"
            " the words tokenizer or pixels, a folder of transformers (CLIP, DINOv2, VideoMAE), a"
            " weight file of Inception V3 or I3D, or name=TIMM_MODEL,weights=FILE; behind it"
            " perhaps resize=tensorflow|pytorch|clean, clips=middle|halves, reference=SOURCE"
        ),
    )
    parser.add_argument(
        "--real",
        help="real items: a folder, a JSONL file or a cache; the training set, to look for copies",
    )
    parser.add_argument("--held_out", help="real items that were not trained on, for comparison")
    parser.add_argument(
        "--clip_score", metavar="FOLDER", help="a CLIP of transformers that compares with captions"
    )
    parser.add_argument(
        "--copies", metavar="PNG", help="draw the samples nearest to a real item beside that item"
    )
    parser.add_argument(
        "--nearest",
        metavar="PNG",
        help="draw the first 32 samples, each beside its nearest real item",
    )
    parser.add_argument(
        "--num_workers", type=int, default=4, help="processes that decode real items [4]"
    )


def metric_values(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the arguments of `add_metric_arguments`, for `build_scores`."""
    names = ("features", "real", "held_out", "clip_score", "copies", "nearest", "num_workers")
    return {name: getattr(args, name) for name in names}
