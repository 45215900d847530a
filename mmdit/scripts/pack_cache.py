"""Pack a latent cache into few large files, which every command reads as it reads the cache itself.
Interrupt it whenever you like: the same command continues; after the cache has grown, it writes
only what changed.

    mmdit pack-cache --cache_dir data/cache/my_images \\
        --out_dir data/cache/my_images_packed
    mmdit pack-cache --cache_dir data/cache/my_images --format webdataset \\
        --out_dir data/cache/my_images_tars

The tars of `--format webdataset` can be read by other programs, too: latents (.latents.npy),
captions (.txt) and facts about each item (.json), and with `--config` the embeddings of the
captions (.text.npy).
"""

import shlex
from typing import get_args

from mmdit.config import ConfigError
from mmdit.data.cache.packing import Format, pack_cache
from mmdit.data.cache.tar_shards import Embeddings
from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.scripts import command_parser, friendly, run
from mmdit.scripts.listing import advised
from mmdit.scripts.parsers import at_least
from mmdit.text_encoders import build_text_encoder
from mmdit.text_encoders.huggingface import HuggingFaceEncoder
from mmdit.training.distributed import choose_device


def embeddings_of(config_path: str, overrides: list[str], device: str) -> Embeddings:
    """Return the embeddings in `text_encoder.cache_dir` of a config; missing ones are computed.
    ConfigError if the config keeps none."""
    config = load_experiment_config(config_path, overrides)
    encoder = build_text_encoder(config.text_encoder).to(choose_device(device))
    stored = encoder.stored() if isinstance(encoder, HuggingFaceEncoder) else None
    if stored is None:
        raise ConfigError(
            "text_encoder.cache_dir",
            "is empty or no key of this encoder; name the folder that cache-text fills",
        )
    (example,) = encoder.rows(["a"])
    dtype = str(example.dtype).removeprefix("torch.")
    return Embeddings(stored.key, dtype, encoder.rows, stored.settings)


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--cache_dir", required=True, help="the cache; it stays as it is")
    parser.add_argument("--out_dir", required=True, help="folder for the shards, new or begun")
    parser.add_argument(
        "--shard_megabytes", type=at_least(1), default=1024, help="size of a shard [1024]"
    )
    parser.add_argument(
        "--format",
        choices=get_args(Format),
        default="safetensors",
        help="of the shards; webdataset: tars [safetensors]",
    )
    parser.add_argument(
        "--config", help="into tars: also the embeddings of its text_encoder, which is frozen"
    )
    parser.add_argument("--device", default="auto", help="that computes missing embeddings")
    parser.add_argument("overrides", nargs="*", help="section.key=value over the config")
    args = parser.parse_intermixed_args(argv)
    with friendly():
        if args.format != "webdataset" and args.config:
            raise ValueError("--config is for --format webdataset, whose tars can hold embeddings")
        embeddings = None
        if not args.config:
            reason = "no embeddings are packed: give --config (of --format webdataset) with it"
            parser.refuse_idle(args, ["overrides", "device"], reason)
        if args.config:
            embeddings = embeddings_of(args.config, args.overrides, args.device)
        size = args.shard_megabytes << 20
        made = pack_cache(args.cache_dir, args.out_dir, size, args.format, embeddings)
        print(
            f"{made['items']} items ({made['gigabytes']} GB) in {made['shards']} shards,"
            f" {made['written']} written now"
        )
        if made["removed"]:
            print(f"{made['removed']} packed items removed, which {args.cache_dir} no longer has")
        check = advised("verify-cache", "--cache_dir", args.out_dir)
        print(f"next: --train_cache_dir {shlex.quote(args.out_dir)}; {check}")
    return 0


if __name__ == "__main__":
    run(main)
