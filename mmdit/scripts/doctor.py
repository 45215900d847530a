"""Say what this machine offers to mmdit: versions, GPUs, fast paths, memory and disk, a line each.

mmdit doctor
"""

from mmdit.scripts import command_parser, friendly, run


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_intermixed_args(argv)
    with friendly():
        from mmdit.commands.doctor import report
        from mmdit.training.distributed import choose_device

        for name, text in report(choose_device(args.device)):
            print(f"{name:18} {text}")
    return 0


if __name__ == "__main__":
    run(main)
