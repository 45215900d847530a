"""Tell what an adapter does to its base: how far it moves the weights, how attention changes, and
the same samples with and without it.

    mmdit inspect-adapter --base runs/my_run  # the adapter that the run holds
    mmdit inspect-adapter --base Wan2.1-T2V-1.3B --adapter style.safetensors \\
        --max_ratio 0.3
    mmdit inspect-adapter --base runs/base --adapter new.safetensors \\
        --prompts_file prompts.txt --out looked

--base: Wan weights (any layout; read layer by layer), or a run, checkpoint or export of ours.
--adapter: LoRA, DoRA or LoKr in any format. With prompts (a base of ours, or a whole Wan release)
it samples without and with the adapter from the same noise, measures the attention meanwhile, and
writes before_after.png and report.json into --out. Exit code 1: a limit is exceeded.
"""

import json
from pathlib import Path

from mmdit.commands.inspect_adapter import changes, compare, is_ours
from mmdit.diagnostics.adapter_norms import format_budget, summarise
from mmdit.diagnostics.attention_statistics import format_attention
from mmdit.files import write_atomically
from mmdit.interop.wan_release import release_config
from mmdit.scripts import command_parser, friendly, run
from mmdit.scripts.arguments import number
from mmdit.scripts.parsers import at_least
from mmdit.scripts.prompts import read_prompts
from mmdit.training.samples import check_writable

LIMITS = {
    "max_ratio": "of ‖ΔW‖/‖W‖ over all adapted layers",
    "max_layer_ratio": "of it in one layer",
    "max_spectral_ratio": "of the spectral norms in one layer",
    "max_logit": "of an attention logit with the adapter",
}


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter")
    parser.add_argument(
        "--expert", choices=("high", "low"), help="of a pair of experts [the trained one, or high]"
    )
    parser.add_argument("--prompts_file", help="one prompt a line")
    parser.add_argument("--frames", type=at_least(1), help="default: the config's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder for report.json and before_after.png")
    for name, what in LIMITS.items():
        parser.add_argument(f"--{name}", type=number, help=f"limit {what}")
    args = parser.parse_intermixed_args(argv)
    with friendly():
        if args.out:
            check_writable(args.out, folder=True)
        if not args.prompts_file:
            reason = (
                "nothing is drawn, nor measured on the way: give --prompts_file, or leave it out"
            )
            parser.refuse_idle(args, ["frames", "device", "max_logit"], reason)
        if args.prompts_file and not args.out:
            raise ValueError("--prompts_file needs --out, a folder for what is drawn")
        if args.prompts_file and not (
            not args.adapter or is_ours(args.base) or release_config(args.base)
        ):
            raise ValueError(
                f"--prompts_file draws, but {args.base} is a transformer without text encoder and"
                " VAE; name the release's folder"
            )
        report = {"budget": summarise(changes(args.base, args.adapter, args.expert))}
        print(format_budget(report["budget"]))
        if args.prompts_file:
            prompts = read_prompts(args.prompts_file)
            report |= compare(
                args.base,
                args.adapter,
                prompts,
                args.out / "before_after.png",
                args.frames,
                args.device,
                args.expert,
            )
            print(format_attention(report["before"], report["after"]))
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            write_atomically(
                args.out / "report.json", json.dumps(report, indent=1, ensure_ascii=False)
            )
        total = report["budget"]["total"]
        logits = [row["max_abs_logit"] for row in report.get("after", {}).values()]
        figures = {
            "max_ratio": total["ratio"],
            "max_layer_ratio": total["max_ratio"],
            "max_spectral_ratio": total["max_spectral_ratio"],
            "max_logit": max(logits, default=None),
        }
        beyond = False
        for name, figure in figures.items():
            limit = getattr(args, name)
            if limit is not None and figure is not None and not figure <= limit:
                beyond = True
                print(f"beyond the limit: {name} is {figure:.4g}, the limit {limit}")
    return 1 if beyond else 0


if __name__ == "__main__":
    run(main)
