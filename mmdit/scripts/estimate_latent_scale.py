"""Measure the latents of a cache and print the YAML that brings them to mean 0 and standard
deviation 1, for tokenizers that have no statistics of their own.

    mmdit estimate-latent-scale --cache_dir data/cache/mine [--max_items 2000]
    mmdit estimate-latent-scale --cache_dir data/cache/mine --save latent_stats.json
"""

import json
from pathlib import Path

from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.statistics import latent_statistics
from mmdit.files import write_atomically
from mmdit.scripts import command_parser, friendly, run
from mmdit.scripts.parsers import at_least
from mmdit.training.samples import check_files

PUBLISHED = "WanVAETokenizer"  # its statistics are no keys of its config


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--cache_dir", required=True)
    parser.add_argument(
        "--max_items",
        type=at_least(0),
        default=2000,
        help="items read, evenly spread over the cache; 0: all [2000]",
    )
    parser.add_argument(
        "--save", help="write the per-channel statistics as JSON, for tokenizer.latent_stats"
    )
    args = parser.parse_intermixed_args(argv)
    with friendly():
        check_files(save=args.save)
        cache = open_cache(args.cache_dir)
        maker = cache.manifest.tokenizer_name.partition(" with ")[0]
        if args.save and maker == PUBLISHED:
            raise ValueError(
                f"--save is for tokenizer.latent_stats, and {maker}, which made {args.cache_dir},"
                " has no such key: leave it out"
            )
        stats = latent_statistics(cache, args.max_items)
        print(
            f"# {stats['items']} items, {stats['values']} values a channel; "
            f"channel std {min(stats['std']):.4f} … {max(stats['std']):.4f}"
        )
        still = [number for number, std in enumerate(stats["std"]) if not std]
        if args.save and still:
            raise ValueError(
                f"channel {still[0]} ({len(still)} in all) is the same in all items, and nothing"
                " can be divided by its deviation: leave out --save, or look at the tokenizer"
            )
        if args.save:
            Path(args.save).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(args.save, json.dumps({k: stats[k] for k in ("mean", "std", "items")}))
            print(f"tokenizer:\n  latent_stats: {args.save}\n  latent_scale: 1.0")
        elif maker == PUBLISHED:
            print(f"# nothing to set: {maker} has statistics of its own, which are applied")
        else:
            print(
                "# per-channel statistics are better: --save latent_stats.json\n"
                f"tokenizer:\n  latent_stats: none\n  latent_scale: {stats['scale']:.5g}"
            )
    return 0


if __name__ == "__main__":
    run(main)
