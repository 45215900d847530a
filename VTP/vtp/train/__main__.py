"""`python -m vtp.train --config FILE [--device D] [--resume] [section.key=value ...]`, from the root of the repository."""

from __future__ import annotations

import argparse

from mmdit.config import ConfigError, load
from mmdit.scripts import run
from mmdit.training.distributed import choose_device
from vtp.train.config import PretrainConfig
from vtp.train.loop import train


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vtp.train", description="Pre-train a VTP tokenizer on generated pictures.")
    parser.add_argument("--config", required=True, help="a YAML file, for example VTP/configs/vtp_tiny_f16d64.yaml")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of output_dir")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = load(PretrainConfig, options.config, options.overrides)
        train(config, choose_device(options.device), options.resume)
    except (ConfigError, ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith(("could not save", "training stopped")):
            raise
        raise SystemExit(f"vtp.train: {error}") from None


if __name__ == "__main__":
    run(main)
