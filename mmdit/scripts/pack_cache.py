"""Pack a latent cache into few large files, which every command reads as it reads the cache itself.
Interrupt it whenever you like: the same command goes on; after the cache has grown it writes only
what changed.

    mmdit pack-cache --cache_dir data/cache/my_images \\
        --out_dir data/cache/my_images_packed
"""

from mmdit.data.cache.packing import pack_cache
from mmdit.scripts import command_parser, friendly, run


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--cache_dir", required=True, help="the cache; it stays as it is")
    parser.add_argument("--out_dir", required=True, help="folder for the shards, new or begun")
    parser.add_argument("--shard_megabytes", type=int, default=1024, help="size of a shard [1024]")
    args = parser.parse_intermixed_args(argv)
    with friendly():
        made = pack_cache(args.cache_dir, args.out_dir, args.shard_megabytes << 20)
        print(
            f"{made['items']} items ({made['gigabytes']} GB) in {made['shards']} shards,"
            f" {made['written']} written now"
        )
        print(
            f"next: --train_cache_dir {args.out_dir}; python -m mmdit.scripts.verify_cache"
            f" --cache_dir {args.out_dir}"
        )
    return 0


if __name__ == "__main__":
    run(main)
