"""Improve a trained model with a reward: GRPO, GRPO-Guard, NFT, AWM, SRPO or DPO, as the config's
section posttrain: says.

    mmdit posttrain --config configs/posttrain/grpo.yaml [--dry-run] [--resume] [train.lr=1e-4 …]
"""

from mmdit.commands.posttrain import posttrain
from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.scripts import command_parser, friendly, run


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--config",
        required=True,
        help="YAML file with a posttrain: section, see configs/posttrain/",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint of the run"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would happen: geometry, memory, noise levels",
    )
    parser.add_argument("overrides", nargs="*", help="section.key=value over the config")
    args = parser.parse_intermixed_args(argv)
    with friendly():
        posttrain(
            load_experiment_config(args.config, args.overrides),
            args.device,
            args.resume,
            args.dry_run,
        )
    return 0


if __name__ == "__main__":
    run(main)
