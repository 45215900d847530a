"""Measure how good a tokenizer checkpoint is.

    mmdit evaluate-vtp --checkpoint DIR [--images FOLDER]

Prints JSON, writes it to scores.json and renews the README of a checkpoint that this repository
trained.
"""

import json
from pathlib import Path

from mmdit.scripts import command_parser, friendly, run
from mmdit.scripts.parsers import at_least


def main(argv: list[str] | None = None) -> int:
    from vtp.models import VTPModel

    from mmdit.training.distributed import choose_device
    from mmdit.training.samples import check_writable
    from mmdit.vtp_training.model_card import SCORES_FILE, write_card, write_json
    from mmdit.vtp_training.tokenizer_scores import tokenizer_scores

    parser = command_parser(__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        help="folder with config.json and model.safetensors",
    )
    parser.add_argument("--images", type=Path, help="folder of pictures to reconstruct as well")
    parser.add_argument("--count", type=at_least(1), default=512, help="moving shapes per score")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--out",
        type=Path,
        help="where to write the JSON; default scores.json in the checkpoint folder",
    )
    args = parser.parse_intermixed_args(argv)
    with friendly():
        if args.count < 2:
            raise ValueError(f"--count is {args.count}, must be at least 2")
        out = args.out or args.checkpoint / SCORES_FILE
        check_writable(out, folder=False)
        model = VTPModel.from_pretrained(args.checkpoint).to(choose_device(args.device))
        report = tokenizer_scores(model, args.count, args.images)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, report)
        if args.out is None:
            write_card(args.checkpoint)
        print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    run(main)
