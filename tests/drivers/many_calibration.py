"""How far the oracle of several objects is to be believed, without any model.

    python -m tests.drivers.many_calibration [--size 128x128] [--frames 16] [--count 32]

True pictures of the fixed prompts, seen and held out, are read as they are drawn, after the
tokenizer's round trip, against other prompts, and against prompts that they miss in one thing. A
table, then one JSON object.
"""

import argparse
import json
import time

from mmdit.data.moving_shapes.facts import TASKS
from mmdit.data.moving_shapes.sentences import MANY_PROMPTS, prompts
from mmdit.diagnostics.task_accuracy import calibration, format_tasks
from mmdit.tokenizers import VTPTokenizerConfig, build_tokenizer

TOKENIZER = "VTP/checkpoints/vtp_tiny_f16d64"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="128x128", help="width x height")
    parser.add_argument("--frames", type=int, default=1)
    parser.add_argument("--count", type=int, default=MANY_PROMPTS, help="prompts of each list")
    parser.add_argument("--tokenizer", default=TOKENIZER)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    tokenizer = build_tokenizer(VTPTokenizerConfig(name_or_path=args.tokenizer), args.device)
    start, tasks = time.perf_counter(), {}
    for task in TASKS:
        listed = []
        for split in ("seen", "held_out"):
            listed += prompts(split, args.frames > 1, width, height, task)[: args.count]
        facts = [prompt.facts for prompt in listed]
        shape = (args.frames, 3, height, width)
        tasks[task] = calibration(tokenizer, facts, 16, shape, args.device)
    seconds = round(time.perf_counter() - start, 1)
    print(format_tasks({"tasks": tasks}))
    print(json.dumps(vars(args) | {"seconds": seconds, "tasks": tasks}))


if __name__ == "__main__":
    main()
