"""Reproduce a published figure from nothing, and say whether it lies inside its interval.

    mmdit reproduce --list
    mmdit reproduce moving_shapes_t2i_128 [--seeds 0 1 2] [--device cuda:1]
    mmdit reproduce road --record
    mmdit reproduce records/pictures_128/001_muon --record
    mmdit reproduce arms_448 --share --device cuda:0
    python -m tests.drivers.gpu_arms reproduce arms_128 --share --in_process --device cuda:0

The recipe is results/NAME.yaml, or NAME/recipe.yaml of a record (records/README.md): it names the
stages, their configs, seeds and scores. What is done is kept in --out and not done again, so that a
stopped command continues when it is given once more. On several GPUs, give the same command once
for each, with --share and its --device: it takes the stages on which no other works; a last one
without --share waits for them and pools. --in_process saves the start of every command, if stages
take seconds; two or three such commands keep a GPU busy that one would leave idle, but make its
steps longer: --untimed then keeps their seconds out of the results. --record writes the results
beside the recipe (results/NAME.json, or recipe.json of a record), from which the tables of the
documents are made (docs/reproducing.md). The exit status is 1 if a score is outside its interval,
or a record does not count.
"""

import json
import os
from pathlib import Path

from mmdit.diagnostics.recipe import read_recipe, recipe_path
from mmdit.diagnostics.results_file import comparison, overview
from mmdit.diagnostics.speed_record import recipe_faults, verdict
from mmdit.files import write_atomically
from mmdit.scripts import call, command_parser, friendly, run


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("name", nargs="?", help="of a recipe, or the folder of a record")
    parser.add_argument(
        "--list", action="store_true", help="say what there is, and the time needed"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of the recipe")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--share",
        action="store_true",
        help="run only the stages that no other command with the same --out works on, go past those"
        " that fail, and pool nothing",
    )
    parser.add_argument(
        "--in_process",
        action="store_true",
        help="run the commands in this process, one after another: for recipes of many short"
        " stages, where each would take longer to start (10 to 15 s on a GPU) than to work; the"
        " seconds of the results are then without that",
    )
    parser.add_argument(
        "--discard_checkpoints",
        action="store_true",
        help="remove the checkpoints of a stage once it is scored, unless a stage starts from it:"
        " of many arms with many steps they would fill a disk",
    )
    parser.add_argument(
        "--untimed",
        action="store_true",
        help="keep no seconds of what is trained now: others use the device, too. A stage is timed"
        " by its other seeds",
    )
    parser.add_argument("--out", type=Path, help="work folder [runs/reproduce/NAME]")
    parser.add_argument("--record", action="store_true", help="write NAME.json beside the recipe")
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="folder of recipes and results"
    )
    args = parser.parse_intermixed_args(argv)
    with friendly():
        if args.list or not args.name:
            reason = "no recipe is run: give its NAME, and no --list, or leave it out"
            parser.refuse_all_but(["list", "name", "results"], args, reason)
            print(overview(args.results))
            return 0
        from mmdit.commands.reproduce import Chain, finished_results, read_json, tell_failures

        name = Path(os.path.relpath(args.name)).as_posix()  # a folder can be written in many ways
        recipe = read_recipe(args.results, name)
        if args.share and args.record:
            raise ValueError(
                "--record writes what all seeds reached together, and --share pools nothing: give"
                " the one after all commands with the other have ended"
            )
        if args.seeds and len(set(args.seeds)) < len(args.seeds):
            raise ValueError(f"--seeds is {args.seeds}: a seed that is there twice counts twice")
        out = args.out or Path("runs/reproduce") / name
        seeds = args.seeds or recipe.seeds
        for fault in recipe_faults(recipe, seeds) if recipe.track else []:
            print(f"this will not count as a record: {fault}", flush=True)
        how = {"share": args.share, "in_process": args.in_process, "untimed": args.untimed}
        how["discard"] = args.discard_checkpoints
        if args.in_process:
            from mmdit.commands.in_process import InProcess

            how["execute"] = InProcess(call, recipe.module)
        chains = [Chain(recipe, seed, out, args.device, **how) for seed in seeds]
        records = [chain.run() for chain in chains]
        if args.share:
            tell_failures(chains)
            print(f"nothing is left that nobody works on; without --share {out} is pooled")
            return 0
        new = finished_results(name, recipe, records)
        path = recipe_path(args.results, name).with_suffix(".json")
        lines, holds = comparison(new, read_json(path), recipe)
        if recipe.track:
            said, counts = verdict(new, recipe)
            lines, holds = [*lines, *said], holds and counts
        for place in (out / "results.json", *([path] if args.record else [])):
            write_atomically(place, json.dumps(new, indent=1) + "\n")
            print(f"written: {place}")
        print("\n".join(lines))
    return 0 if holds else 1


if __name__ == "__main__":
    run(main)
