"""Caption pictures or clips by a vision-language model: one in a local folder, or one of a server
that speaks OpenAI's protocol.

    mmdit prepare-captions --meta_jsonl data/clips/train_videos.jsonl \\
        --out_dir data/captioned --model models/my_captioner
    mmdit prepare-captions --meta_jsonl data/clips/train_videos.jsonl \\
        --out_dir data/captioned --server http://localhost:8000/v1 --model NAME

Records that have a caption keep it. A key for the server is read from MMDIT_CAPTION_KEY. Stop it at
any time: the same command goes on, and asks for nothing twice.
"""

import argparse
from pathlib import Path

from mmdit.data.dataset.records import media_of
from mmdit.data.preparing.caption_preparation import (
    CLIP_PROMPT,
    PROMPT,
    CaptionPreparation,
    CaptionSettings,
)
from mmdit.data.preparing.caption_server import ServerCaptioner
from mmdit.interop.vision_language import DTYPES, LocalCaptioner
from mmdit.scripts import command_parser, friendly, run
from mmdit.scripts.arguments import number
from mmdit.scripts.idle import refuse_other_captioner
from mmdit.scripts.listing import advised_caching
from mmdit.scripts.parsers import CommandParser, at_least
from mmdit.training.distributed import choose_device


def parser_of_captions() -> CommandParser:
    parser = command_parser(__doc__)
    parser.add_argument("--meta_jsonl", type=Path, required=True, help="pictures or clips")
    parser.add_argument("--out_dir", type=Path, required=True, help="where the new lines go")
    parser.add_argument(
        "--model", required=True, help="folder of a model; with --server its name there"
    )
    parser.add_argument("--server", default="", help="address, http://localhost:8000/v1")
    parser.add_argument(
        "--prompts", nargs="+", default=[], help="what is asked; one caption for each [one prompt]"
    )
    parser.add_argument(
        "--count", type=int, default=1, help="captions for each prompt, with --temperature [1]"
    )
    parser.add_argument(
        "--temperature", type=number, default=0.0, help="0 takes the most likely words [0]"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_tokens", type=int, default=256, help="of a caption [256]")
    parser.add_argument(
        "--max_characters", type=at_least(16), default=1000, help="longer captions are cut [1000]"
    )
    parser.add_argument("--frames", type=int, default=8, help="of a clip that are shown [8]")
    parser.add_argument(
        "--side", type=int, default=768, help="longest side of a picture that is shown [768]"
    )
    parser.add_argument(
        "--replace", action="store_true", help="caption records, too, that have a caption"
    )
    parser.add_argument(
        "--parallel", type=at_least(1, 1024), default=8, help="requests at a time [8]"
    )
    parser.add_argument(
        "--timeout", type=number, default=120.0, help="seconds for an answer of the server [120]"
    )
    parser.add_argument("--device", default="auto", help="of a local model")
    parser.add_argument("--dtype", choices=list(DTYPES), default="auto", help="of a local model")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for numbers that make no sense."""
    for name in ("max_tokens", "timeout"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name} is {getattr(args, name)}, must be greater than 0")
    if args.temperature < 0:
        raise ValueError(f"--temperature is {args.temperature}, must be at least 0")
    if args.count > 1 and not args.temperature:
        raise ValueError(
            f"--count is {args.count} and --temperature 0: all captions would be the same; set"
            " --temperature 0.7, or give several --prompts"
        )


def main(argv: list[str] | None = None) -> int:
    parser = parser_of_captions()
    args = parser.parse_intermixed_args(argv)
    with friendly():
        check(args)
        media = media_of(args.meta_jsonl)
        usual = PROMPT if media == "image" else CLIP_PROMPT
        settings = CaptionSettings(
            tuple(args.prompts) or (usual,),
            args.count,
            args.frames,
            args.side,
            args.max_characters,
            args.seed,
        )
        refuse_other_captioner(parser, args, media)
        writing = (args.max_tokens, args.temperature)
        if args.server:
            captioner = ServerCaptioner(args.server, args.model, *writing, args.timeout)
        else:
            device = choose_device(args.device)
            captioner = LocalCaptioner(Path(args.model), device, args.dtype, *writing)
        threads = args.parallel if args.server else 0
        preparation = CaptionPreparation(
            args.meta_jsonl, media, args.out_dir, captioner, settings, args.replace, threads
        )
        report = preparation.run()
    print(report.text())
    if report.skipped:
        print(f"skipped ones, with reasons: {args.out_dir / 'skipped.jsonl'}")
    if report.interrupted:
        print("interrupted: what is captioned stays; the same command goes on from there")
        return 130
    print("next:", advised_caching(preparation.out, media == "image"))
    return 0


if __name__ == "__main__":
    run(main)
