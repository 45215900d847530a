"""Pre-train a VTP tokenizer on generated pictures.

mmdit train-vtp --config VTP/configs/vtp_tiny_f16d64_stage1.yaml [--resume] [section.key=value …]
"""

from mmdit.config import load
from mmdit.scripts import friendly, run, training_parser
from mmdit.training.distributed import choose_device
from mmdit.vtp_training.pretrain_config import PretrainConfig
from mmdit.vtp_training.pretrain_loop import pretrain


def main(argv: list[str] | None = None) -> int:
    parser = training_parser(__doc__, "a YAML file, for example VTP/configs/vtp_tiny_f16d64.yaml")
    args = parser.parse_intermixed_args(argv)
    with friendly():
        config = load(PretrainConfig, args.config, args.overrides)
        pretrain(config, choose_device(args.device), args.resume)
    return 0


if __name__ == "__main__":
    run(main)
