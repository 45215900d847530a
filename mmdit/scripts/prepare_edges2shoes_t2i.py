"""Turn parquet files of edges2shoes into images and JSONL (from a clone: `examples/edges2shoes/`).

mmdit prepare-edges2shoes-t2i --source data/edges2shoes --max_samples 5000
"""

from mmdit.scripts import main_outside, run


def main(argv: list[str] | None = None) -> int:
    return main_outside("examples.edges2shoes.command")(argv)


if __name__ == "__main__":
    run(main)
