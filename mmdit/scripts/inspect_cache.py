"""Inspect a cache before training: sizes, counts, what is cropped, repeated and left out, captions;
decoded samples as PNG.

    mmdit inspect-cache --config my.yaml --cache_dir data/cache/mine [--sheet sheet.png] [--json]
"""

import json
from pathlib import Path

from PIL import Image

from mmdit.data.batches.data_report import cache_report, compared_with, report_text
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.dataset.inputs import media_of_input
from mmdit.diagnostics.cache_sheet import cache_sheet
from mmdit.experiment.build import build_plan
from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.scripts import config_parser, friendly, run
from mmdit.scripts.data_arguments import add_input_arguments, input_records
from mmdit.tokenizers import build_tokenizer
from mmdit.training.distributed import choose_device
from mmdit.training.media import save_image
from mmdit.training.samples import check_files


def main(argv: list[str] | None = None) -> int:
    parser = config_parser(__doc__)
    parser.add_argument("--cache_dir", type=Path, required=True, help="packed or not")
    add_input_arguments(
        parser,
        purpose=": tell which items are not in it, and which of its records not in the cache",
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="of torchrun; the global batch grows with them [1]"
    )
    parser.add_argument(
        "--sheet", type=Path, help="the contact sheet, a PNG [sheet.png in the cache folder]"
    )
    parser.add_argument(
        "--samples", type=int, default=32, help="on the sheet, of every size; 0: no sheet [32]"
    )
    parser.add_argument("--device", default="auto", help="that decodes: auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_intermixed_args(argv)
    with friendly():
        if not args.meta_jsonl:
            of_data = ("split", "image_column", "caption_key", "limit")
            reason = "no data set is compared with the cache: give --meta_jsonl, or leave it out"
            parser.refuse_idle(args, of_data, reason)
        if args.processes < 1:
            raise ValueError(f"--processes is {args.processes}, must be at least 1")
        sheet = args.sheet or args.cache_dir / "sheet.png"
        if sheet.suffix.lower() != ".png" or args.samples < 0:
            raise ValueError(
                f"--sheet is {sheet} and --samples {args.samples}; must end with .png, and be at"
                " least 0"
            )
        check_files(sheet=args.sheet)
        config = load_experiment_config(args.config, args.overrides)
        tokenizer = build_tokenizer(config.tokenizer, choose_device(args.device))
        wanted = CacheManifest.of(tokenizer, config.video, config.bucketing, config.preprocess)
        cache = open_cache(args.cache_dir, wanted)
        plan = build_plan(config, cache, args.processes)
        report = cache_report(cache, plan, config.train.max_steps)
        if args.meta_jsonl:
            medium = media_of_input(args.meta_jsonl)
            records = input_records(args, medium)
            fps = config.video.fps if medium == "video" else 0.0
            report["metadata"] = compared_with(cache, records, config.preprocess, fps)
        failure: Exception | None = None
        if args.samples:
            try:
                report["sheet"] = saved(
                    cache_sheet(cache, tokenizer, args.samples), sheet, elsewhere=not args.sheet
                )
            except (OSError, ValueError) as error:  # the path, or a damaged item
                failure = error
        print(
            json.dumps(report, indent=1, ensure_ascii=False) if args.json else report_text(report)
        )
        if failure:
            raise failure  # only after the report, which needs no sheet
    return 0


def saved(image: Image.Image, path: Path, elsewhere: bool) -> str:
    """Save the sheet and return its path. If `elsewhere` is allowed and the cache's folder cannot
    be written to, it goes into the working directory."""
    try:
        return str(save_image(image, path))
    except OSError:
        if not elsewhere:
            raise
    return str(save_image(image, Path(f"{path.parent.resolve().name}_sheet.png")))


if __name__ == "__main__":
    run(main)
