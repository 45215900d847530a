"""Put what a fine-tuning changed into a LoRA: the difference of two models, by its largest singular
values.

    mmdit extract-lora --base Wan2.1-T2V-1.3B --tuned my_transformer \\
        --rank 32 --out style.safetensors
    mmdit extract-lora --base runs/base --tuned runs/tuned --rank 16 \\
        --targets "blocks.*.cross.[kv]" --format peft --out style
    mmdit extract-lora --base Wan2.2-T2V-A14B --tuned tuned_low.safetensors \\
        --expert low --out low.safetensors --device cuda

--base and --tuned: Wan weights of any layout, which are read layer by layer, or runs, checkpoints
or exports of ours; the adapters of a run are merged. Where --tuned is stored in 16 bits, or as
float8, --base is rounded in the same way before they are compared. The table says, for each type of
layer, how far it moved, and which share of the squared change the LoRA holds, over all its layers
and in the worst one; a higher --rank holds more. Changes outside of the chosen layers (norms,
biases) are named; with --whole they go into the file, too. A text encoder that was also trained is
reported.
"""

from pathlib import Path

from mmdit.commands.export import DTYPES
from mmdit.scripts import command_parser, friendly, run
from mmdit.scripts.parsers import at_least


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--base", required=True, help="the model before")
    parser.add_argument("--tuned", required=True, help="the model after")
    parser.add_argument("--out", type=Path, required=True, help="file to write; of peft a folder")
    parser.add_argument("--rank", type=at_least(1), default=32, help="of each layer [32]")
    parser.add_argument(
        "--targets",
        nargs="+",
        default=[],
        metavar="LAYER",
        help="the layers, as in lora.target_modules [all linear layers of the blocks]",
    )
    parser.add_argument(
        "--format", choices=["comfy", "diffusers", "kohya", "peft"], default="comfy", help="[comfy]"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="[fp32]")
    parser.add_argument("--expert", choices=["high", "low"], help="of a pair of experts")
    parser.add_argument(
        "--whole",
        action="store_true",
        help="write the changes of all other parameters, too, as whole differences (comfy, kohya)",
    )
    parser.add_argument("--device", default="auto", help="of the decompositions [auto]")
    args = parser.parse_intermixed_args(argv)
    with friendly():
        from mmdit.commands.extract_lora import (
            encoder_changes,
            extract,
            place_of,
            side_of,
            table,
        )
        from mmdit.files import check_creatable
        from mmdit.interop.lora_formats import save_lora
        from mmdit.interop.lora_writing import check_place
        from mmdit.training.distributed import choose_device

        check_place(args.out, args.format)
        check_creatable(args.out)
        if args.whole and args.format not in ("comfy", "kohya"):
            raise ValueError(
                f"--whole writes whole differences, which {args.format} files do not hold: choose"
                " --format comfy or kohya, or leave it out"
            )
        device = choose_device(args.device)
        tuned = side_of(args.tuned, args.expert)
        base = side_of(args.base, args.expert, merged_like=tuned)
        networks, targets = (base.network, tuned.network), tuple(args.targets)
        extracted = extract(*networks, targets, args.rank, device, args.whole)
        save_lora(base.network, args.out, args.format, DTYPES[args.dtype])
        print("\n".join(table(extracted)))
        said = tuned.said or base.said
        print(place_of(args.out) + (f": {said}" if said else ""))
        if extracted.others and not args.whole:
            print(
                f"  not in it: the changes of further parameters ({len(extracted.others)}, first"
                f" {extracted.others[0]}); --targets chooses layers, --whole takes all"
            )
        if changed := encoder_changes(base, tuned):
            print(
                f"  not in it: the text encoder of --tuned, which is another one ({len(changed)}"
                " parameters): laid over --base the LoRA is given other embeddings of the same"
                " words"
            )
    return 0


if __name__ == "__main__":
    run(main)
