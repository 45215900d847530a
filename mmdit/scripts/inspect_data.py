"""Inspect sources before anything is encoded: the size, crop and frames that each gets, or why it
will be skipped; totals. Exit code 2: none of them can be used.

    mmdit inspect-data --config my.yaml --meta_jsonl my_images.jsonl [--json]
    mmdit inspect-data --config my.yaml --meta_jsonl my_clips.jsonl
"""

import json
from typing import get_args

from mmdit.data.cache.look import look_at, look_text, other_rates, totals
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.dataset.problems import Skip
from mmdit.data.dataset.records import PATH_KEYS, Media, media_of
from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.scripts import config_parser, friendly, run
from mmdit.scripts.data_arguments import add_input_arguments, input_records
from mmdit.scripts.parsers import at_least
from mmdit.tokenizers import build_tokenizer


def main(argv: list[str] | None = None) -> int:
    parser = config_parser(__doc__)
    add_input_arguments(parser)
    parser.add_argument(
        "--kind",
        choices=get_args(Media),
        help="what the data describe [what a JSONL file says; of archives image]",
    )
    parser.add_argument(
        "--prefer",
        choices=PATH_KEYS["video"],
        default="frames_dir",
        help="if a clip has both [frames_dir]",
    )
    parser.add_argument(
        "--num_workers", type=at_least(0), help="processes that look [the config's num_workers]"
    )
    parser.add_argument("--json", action="store_true", help='print {"totals", "items"} as JSON')
    args = parser.parse_intermixed_args(argv)
    with friendly():
        config = load_experiment_config(args.config, args.overrides)
        medium = args.kind or media_of(args.meta_jsonl)
        if medium == "image":
            reason = "these are pictures, each with one path: leave it out, or give --kind video"
            parser.refuse_idle(args, ["prefer"], reason)
        records = input_records(args, medium)
        manifest = CacheManifest.of(
            build_tokenizer(config.tokenizer), config.video, config.bucketing, config.preprocess
        )
        workers = config.num_workers if args.num_workers is None else args.num_workers
        rows = look_at(records, medium, manifest.choose, config.preprocess, config.video, workers)
        sums = totals(rows)
        if args.json:
            items = [row.to_json() if isinstance(row, Skip) else row for row in rows]
            print(json.dumps({"totals": sums, "items": items}, indent=1, ensure_ascii=False))
        else:
            rates = other_rates(records, config.video.fps) if medium == "video" else ""
            print("\n".join(filter(None, (look_text(rows, sums), rates))))
    return 0 if sums["usable"] else 2


if __name__ == "__main__":
    run(main)
