"""Pre-train a VTP tokenizer on generated pictures.

mmdit train-vtp --config VTP/configs/vtp_tiny_f16d64_stage1.yaml [--resume] [section.key=value …]
"""

from mmdit.config import load
from mmdit.scripts import command_parser, friendly, run
from mmdit.training.distributed import choose_device
from mmdit.vtp_training.pretrain_config import PretrainConfig
from mmdit.vtp_training.pretrain_loop import pretrain


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--config", required=True, help="a YAML file, for example VTP/configs/vtp_tiny_f16d64.yaml"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint of output_dir"
    )
    parser.add_argument("overrides", nargs="*", help="section.key=value over the config")
    args = parser.parse_intermixed_args(argv)
    with friendly():
        config = load(PretrainConfig, args.config, args.overrides)
        pretrain(config, choose_device(args.device), args.resume)
    return 0


if __name__ == "__main__":
    run(main)
