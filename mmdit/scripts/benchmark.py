"""Measure how fast this machine is, part by part (from a clone of the repository: `benchmarks/`).

mmdit benchmark --parts cache encode loader --compile
"""

from mmdit.scripts import main_outside, run


def main(argv: list[str] | None = None) -> int:
    return main_outside("benchmarks.command")(argv)


if __name__ == "__main__":
    run(main)
