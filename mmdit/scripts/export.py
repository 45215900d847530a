"""Write the weights of a run as one safetensors file, with its config inside: for sampling, sharing
or train.init_from.

    mmdit export --checkpoint runs/my_run \\
        --out my_model.safetensors [--dtype bf16] [--raw_weights]
    mmdit export --checkpoint runs/my_run --out my_lora.safetensors --lora comfy
    mmdit export --checkpoint runs/my_run --out merged.safetensors --merge
    mmdit export --checkpoint runs/my_wan --out transformer --layout diffusers
    mmdit export --checkpoint runs/my_run --out my_pipeline --layout diffusers_pipeline

Two bytes a weight are enough: bf16 has the range of fp32, and fp16 is eight times as precise as
bf16 (a weight that it cannot hold is an error), so samples with fp16 are nearer to those of the
run.

A model card is written beside it: NAME.md, or README.md in a folder. card.license=… and the like
state what only you know. Paths of this machine are left out of both.

The file of a run holds its adapters beside the base, as checkpoints do; --merge and --layout merge
them into the weights.
"""

from mmdit.commands.export import DTYPES, write_export
from mmdit.scripts import command_parser, friendly, run
from mmdit.terminal import typed


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="run folder or checkpoint folder")
    parser.add_argument("--out", required=True, help="file to write")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="of what is written [bf16; with --lora fp32; with --layout as it is]",
    )
    parser.add_argument(
        "--raw_weights", action="store_true", help="the last weights instead of their average"
    )
    parser.add_argument(
        "--lora",
        choices=["diffusers", "kohya", "comfy", "peft"],
        help="only the adapters, in this format (for Diffusers: diffusers)",
    )
    parser.add_argument(
        "--layout",
        choices=["official", "diffusers", "diffusers_pipeline"],
        help=(
            "a Wan transformer as such a folder, or a model of our own as a pipeline of Diffusers,"
            " adapters merged"
        ),
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="fold the adapters into the weights: a model without lora:, for init_from",
    )
    parser.add_argument(
        "--expert",
        choices=["high", "low"],
        help="of a pair, for --lora and --layout [the trained one, or high]",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        help=(
            "card.license=mit and other card.… keys; tokenizer.name_or_path=… and the like; with"
            " --layout model.dtype=bfloat16, of a base that was kept in fewer bits"
        ),
    )
    args = parser.parse_intermixed_args(argv)
    with friendly():
        print("\n".join(write_export(args, typed("export", argv))))
    return 0


if __name__ == "__main__":
    run(main)
