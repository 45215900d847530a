"""torchrun whose processes share the imports of this one, instead of taking 2.5 s each for them.

    python -m tests.drivers.forked_torchrun OPTIONS SCRIPT WORDS...

OPTIONS are those of torchrun, whose agent it is that starts the processes, ends all of them when
one fails, and starts them again.
"""

import runpy
import sys

from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from tests.helpers import forked_runs  # noqa: F401 what else each process would import


def start(script: str, *words: str) -> None:
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")


def main(words: list[str]) -> None:
    meeting = ["--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    args = parse_args([*meeting, *words])
    config = config_from_args(args)[0]
    config.start_method = "fork"
    elastic_launch(config, start)(args.training_script, *args.training_script_args)


if __name__ == "__main__":
    main(sys.argv[1:])
