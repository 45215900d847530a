"""Encode images once: JSONL, WebDataset tars or parquet → latent cache. Resumable; under `torchrun`
the processes share the work.

    mmdit cache-images --config configs/t2i_vtp_256_smoke.yaml \\
        --meta_jsonl data/train_images.jsonl \\
        --out_dir data/cache/my_images
    mmdit cache-images --config my.yaml --data 'shards-{000000..000127}.tar' --out_dir data/cache/x
    mmdit cache-images --config my.yaml --data hub/data --caption_key text --out_dir data/cache/y
"""

import argparse
import os
from pathlib import Path

import torch

from mmdit.data.cache.caching import Caching
from mmdit.data.dataset.inputs import NAMES
from mmdit.data.dataset.records import PATH_KEYS, Media
from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.scripts import config_parser, friendly, run, verify_cache
from mmdit.scripts.data_arguments import add_input_arguments, input_records
from mmdit.scripts.listing import advised
from mmdit.scripts.parsers import at_least
from mmdit.tokenizers import build_tokenizer
from mmdit.training.distributed import choose_device, place_in_job


def parse(argv: list[str] | None, media: Media, doc: str | None) -> argparse.Namespace:
    names = NAMES[media]
    parser = config_parser(doc)
    add_input_arguments(parser, default="data")
    parser.add_argument(
        "--out_dir", help=f"cache folder [data/cache/<experiment_name>/<split>_{names}]"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--num_workers", type=at_least(0), help="processes that decode [the config's num_workers]"
    )
    parser.add_argument(
        "--batch_size", type=at_least(1), default=64, help="images encoded at once [64]"
    )
    parser.add_argument(
        "--prune",
        action="store_true",
        help="remove items from the cache that are not in the metadata",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help=(
            "cache nothing: read every file of out_dir, list what is damaged "
            "(as mmdit verify-cache)"
        ),
    )
    if media == "video":
        parser.add_argument(
            "--prefer",
            choices=PATH_KEYS[media],
            default="frames_dir",
            help="if a line has both [frames_dir]",
        )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None, media: Media = "image", doc: str | None = __doc__) -> int:
    args = parse(argv, media, doc)
    with friendly():
        rank, world = place_in_job()  # no process group, as processes do not communicate
        if args.prune and args.verify:
            raise ValueError("--verify only reads the cache, and --prune removes items: choose one")
        if args.prune and args.limit:
            raise ValueError("--prune with --limit would remove all that is behind the limit")
        config = load_experiment_config(args.config, args.overrides)
        out_dir = Path(
            args.out_dir
            or f"data/cache/{config.experiment_name}/{args.split or 'train'}_{NAMES[media]}"
        )
        if args.verify:
            return verify_cache.main(["--cache_dir", str(out_dir)])
        records = input_records(args, media)
        device = choose_device(args.device)
        if device == torch.device("cuda"):
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        tokenizer = build_tokenizer(config.tokenizer, device)
        if rank == 0:
            print(f"{len(records)} records of {args.meta_jsonl} → {out_dir} on {device}")
        report = Caching(
            records,
            media,
            tokenizer,
            out_dir,
            config.video,
            config.bucketing,
            config.preprocess,
            source=args.meta_jsonl,
            device=device,
            batch_size=args.batch_size,
            rank=rank,
            world=world,
            progress=rank == 0,
            prune=args.prune,
            num_workers=config.num_workers if args.num_workers is None else args.num_workers,
        ).run()
    who, suffix = (f"process {rank}: ", f"-{rank}") if world > 1 else ("", "")
    print(who + report.text())
    if report.skipped:
        print(f"skipped ones, with reasons: {out_dir}/skipped{suffix}.jsonl")
    if report.interrupted:
        print("interrupted: what is written stays; the same command goes on from there")
        return 130
    if rank == 0:
        words = ["train", "--config", args.config, "--train_cache_dir", out_dir, *args.overrides]
        print(f"next: {advised(*words)}")
    return 0


if __name__ == "__main__":
    run(main)
