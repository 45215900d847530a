"""How fast this machine is, part by part, a JSON line a figure.

    python -m mmdit.scripts.benchmark --parts cache encode loader            # on a GPU: add --compile

`cache`: pictures a second from JPEG files to cached latents, beside decoding alone by the same workers. `encode`: pictures a
second through the tokenizer alone, from pixels on the device; `--vtp_small` encodes with the network of VTP-S (random weights).
`loader`: cached 256x256 items a second to the training loop.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from mmdit.diagnostics import data_speed
from mmdit.scripts import friendly
from mmdit.tokenizers import VTPTokenizerConfig, build_tokenizer
from mmdit.training.distributed import choose_device

Part = Callable[[argparse.Namespace, torch.device, Path], Iterator[dict]]


def tokenizer_of(args: argparse.Namespace, device: torch.device, folder: Path, compile: bool):
    path, name = VTPTokenizerConfig.name_or_path, "vtp_tiny"
    if args.vtp_small:
        path, name = data_speed.make_vtp_small(folder / "vtp_small"), "vtp_small"
    config = VTPTokenizerConfig(name_or_path=str(path), chunk_size=args.batch_size, compile=compile)
    return build_tokenizer(config, device), name


def cache(args: argparse.Namespace, device: torch.device, folder: Path) -> Iterator[dict]:
    tokenizer, name = tokenizer_of(args, device, folder, args.compile)
    for row in data_speed.caching_speed(tokenizer, folder, device, args.workers, args.pictures, min(args.batch_size, 64)):
        yield row | {"tokenizer": name}


def encode(args: argparse.Namespace, device: torch.device, folder: Path) -> Iterator[dict]:
    for compile in (False, True) if args.compile else (False,):
        tokenizer, name = tokenizer_of(args, device, folder, compile)
        row = data_speed.encoding_speed(tokenizer, device, args.batch_size, args.seconds)
        yield {"part": "encode", "tokenizer": name, "compile": compile, **row}


def loader(args: argparse.Namespace, device: torch.device, folder: Path) -> Iterator[dict]:
    yield from data_speed.loading_speed(folder, args.items, args.workers, seconds=args.seconds)


PARTS: dict[str, Part] = {"cache": cache, "encode": encode, "loader": loader}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=16, help="processes that decode or load, at most one a core [16]")
    parser.add_argument("--pictures", type=int, default=8000, help="for cache [8000]")
    parser.add_argument("--items", type=int, default=20000, help="for loader [20000]")
    parser.add_argument("--batch_size", type=int, default=256, help="for encode [256]")
    parser.add_argument("--seconds", type=float, default=4.0, help="measured for each figure of encode and loader [4]")
    parser.add_argument("--vtp_small", action="store_true", help="a network of VTP-S size instead of the shipped tokenizer")
    parser.add_argument("--compile", action="store_true", help="tokenizer.compile: true (encode: both)")
    parser.add_argument("--folder", help="scratch folder that is kept, so that a second run makes less [a temporary one]")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    with friendly(), tempfile.TemporaryDirectory() as scratch:
        for part in args.parts:
            for row in PARTS[part](args, device, Path(args.folder or scratch)):
                print(json.dumps(row | {"device": machine}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
