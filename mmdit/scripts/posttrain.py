"""Improve a trained model with a reward: GRPO, GRPO-Guard, NFT, AWM, SRPO or DPO, as the config's
section posttrain: says.

    mmdit posttrain --config configs/posttrain/grpo.yaml [--dry-run] [--resume] [train.lr=1e-4 …]
"""

from mmdit.commands.posttrain import posttrain
from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.scripts import friendly, run, training_parser
from mmdit.terminal import typed


def main(argv: list[str] | None = None) -> int:
    parser = training_parser(__doc__, "YAML file with a posttrain: section, see configs/posttrain/")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would happen: geometry, memory, noise levels",
    )
    args = parser.parse_intermixed_args(argv)
    with friendly():
        config = load_experiment_config(args.config, args.overrides)
        posttrain(config, args.device, args.resume, args.dry_run, typed("posttrain", argv))
    return 0


if __name__ == "__main__":
    run(main)
