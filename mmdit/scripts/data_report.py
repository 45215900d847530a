"""What training will make of a cache, as JSON, without training: what is used, cropped, repeated, left out, and why.

    python -m mmdit.scripts.data_report --config configs/t2v_vtp_256_32f.yaml --train_cache_dir data/cache/my_clips
"""

import argparse
import json

from mmdit.data.cache import open_cache
from mmdit.data.manifest import CacheManifest
from mmdit.data.report import data_report
from mmdit.experiment import build_plan, load_experiment_config
from mmdit.scripts import friendly
from mmdit.tokenizers import build_tokenizer


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the YAML that training will use")
    parser.add_argument("--train_cache_dir", required=True)
    parser.add_argument("--processes", type=int, default=1, help="of torchrun; the global batch grows with them [1]")
    parser.add_argument("overrides", nargs="*", help="section.key=value over the config")
    args = parser.parse_args(argv)
    with friendly():
        if args.processes < 1:
            raise ValueError(f"--processes is {args.processes}, must be at least 1")
        config = load_experiment_config(args.config, args.overrides)
        wanted = CacheManifest.of(build_tokenizer(config.tokenizer), config.video, config.bucketing, config.preprocess)
        cache = open_cache(args.train_cache_dir, wanted)
        plan = build_plan(config, cache, args.processes)
        print(json.dumps(data_report(cache, plan, config.train.max_steps), indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
