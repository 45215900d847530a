"""How fast this machine is, part by part, a JSON line a figure.

    mmdit benchmark --parts cache encode loader  # on a GPU: add --compile
    mmdit benchmark --parts train --compile --profile \\
        --shapes 128x1x16x16 8x16x16x16
    torchrun --nproc_per_node=4 -m mmdit.scripts.benchmark --parts train --compile \\
        --parallel reduce=bfloat16
    mmdit benchmark --parts wan --compile --wan 5B --wan_model checkpointing=true
    mmdit benchmark --parts peers --compile --peers FOLDER  # clones

`benchmarks/model.py` says what each part measures. Shapes are samples (of a process) x frames x
rows x columns of latent cells; 16 pixels a cell.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch

from benchmarks.data import VTP_SIZES
from benchmarks.model import PARTS, WAN
from mmdit.scripts import command_parser, friendly
from mmdit.scripts.arguments import number
from mmdit.training.distributed import process_group

# The parts that an option is of, where it is not of all.
OF_PARTS = {
    "compile": ("cache", "encode", "train", "wan", "peers"),
    "shapes": ("train", "sample"),
    "model": ("train", "sample"),
    "train": ("train",),
    "parallel": ("train",),
    "tread": ("train",),
    "wan": ("wan",),
    "wan_model": ("wan",),
    "lora": ("wan",),
    "repeats": ("train", "wan", "peers"),
    "profile": ("train", "wan"),
    "steps": ("sample",),
    "peers": ("peers",),
    "workers": ("cache", "loader"),
    "pictures": ("cache",),
    "items": ("loader",),
    "batch_size": ("cache", "encode"),
    "seconds": ("encode", "loader"),
    "vtp": ("cache", "encode"),
    "folder": ("cache", "encode", "loader"),
}


def shape(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) if part.isdigit() else 0 for part in text.split("x"))
    if len(numbers) != 4 or not all(numbers):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape; must be samples x frames x rows x columns, like 8x16x16x16"
        )
    return numbers


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["cache", "encode", "loader"])
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--compile", action="store_true", help="compile what is measured (encode: both ways)"
    )
    parser.add_argument(
        "--shapes", nargs="+", type=shape, default=[shape("128x1x16x16"), shape("8x16x16x16")]
    )
    parser.add_argument(
        "--model",
        nargs="+",
        default=["dim=1152", "depth=25", "num_heads=18"],
        metavar="KEY=VALUE",
        help="keys of the section model: [the parameters of SiT-XL/2 and Latte-XL/2]",
    )
    parser.add_argument(
        "--train",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="keys of the section train, as replays=false",
    )
    parser.add_argument(
        "--parallel",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="keys of the section parallel",
    )
    parser.add_argument(
        "--tread",
        type=number,
        default=0.0,
        metavar="RATE",
        help="route this part of the tokens [0]",
    )
    parser.add_argument("--wan", choices=WAN, default="5B", help="for wan: the size [5B]")
    parser.add_argument(
        "--wan_model",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="for wan: keys of the section model",
    )
    parser.add_argument(
        "--lora",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help=(
            "for wan: keys of the section lora [rank=16, alpha=16, target_modules=[cross_attn.k,"
            " cross_attn.v]]"
        ),
    )
    parser.add_argument(
        "--repeats", type=int, default=8, help="steps measured, for train, wan and peers [8]"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="train, wan: also the time of a step by family of kernels",
    )
    parser.add_argument("--steps", type=int, default=50, help="of sample [50]")
    parser.add_argument(
        "--peers", metavar="FOLDER", help="holds SiT/ and Latte/; their code is run"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=16,
        help="processes that decode or load, at most one a core [16]",
    )
    parser.add_argument("--pictures", type=int, default=8000, help="for cache [8000]")
    parser.add_argument("--items", type=int, default=20000, help="for loader [20000]")
    parser.add_argument("--batch_size", type=int, default=256, help="for encode and decode [256]")
    parser.add_argument(
        "--seconds",
        type=number,
        default=4.0,
        help="for each figure of encode, decode and loader [4]",
    )
    parser.add_argument(
        "--vtp",
        choices=VTP_SIZES,
        help="a VTP of this size, of random weights, instead of the shipped tokenizer",
    )
    parser.add_argument(
        "--folder",
        help="scratch folder that is kept, so that a second run makes less [a temporary one]",
    )
    args = parser.parse_intermixed_args(argv)
    torch.set_float32_matmul_precision("high")
    with friendly(), tempfile.TemporaryDirectory() as scratch:
        for name, parts in OF_PARTS.items():
            if not set(parts) & set(args.parts):
                reason = f"--parts is {' '.join(args.parts)}: it is of {', '.join(parts)}"
                parser.refuse_idle(args, [name], reason)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and (
            others := [part for part in args.parts if part != "train"]
        ):
            raise ValueError(
                f"--parts has {', '.join(others)} under torchrun, where only train is measured; use"
                " python -m"
            )
        with process_group(args.device) as world:
            machine = (
                torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
            )
            for part in args.parts:
                for row in PARTS[part](args, world, Path(args.folder or scratch)):
                    world.print(json.dumps(row | {"device": machine}))
    return 0
