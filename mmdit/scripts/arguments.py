"""Arguments that several commands share."""

import argparse
import math
from dataclasses import replace
from typing import get_args

from mmdit.diffusion import Solver
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.scripts.parsers import at_least
from mmdit.terminal import typed_text
from mmdit.training.memory.sampling_offload import Offload
from mmdit.training.pipeline import SampleSettings
from mmdit.training.requests import MOST_PIXELS


def number(text: str) -> float:
    """Return the value of an option as a finite number. `float` alone would take nan and inf, for
    which no limit holds."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"is {text}, must be a finite number")
    return value


def add_sampling_arguments(parser: argparse.ArgumentParser, needs_checkpoint: bool = True) -> None:
    parser.add_argument(
        "--checkpoint",
        required=needs_checkpoint,
        help="run folder, checkpoint folder or exported .safetensors",
    )
    parser.add_argument(
        "--width", type=at_least(1, MOST_PIXELS), help="pixels; default: the config's"
    )
    parser.add_argument("--height", type=at_least(1, MOST_PIXELS))
    parser.add_argument(
        "--frames",
        type=at_least(1, MOST_PIXELS),
        help="1 draws pictures; default: the config's video.num_frames",
    )
    parser.add_argument("--steps", type=int, help="sampling steps; default: train.sample_num_steps")
    parser.add_argument("--solver", choices=get_args(Solver))
    parser.add_argument(
        "--guidance", type=number, help="guidance scale; 1 = off; default: train.sample_cfg_scale"
    )
    parser.add_argument(
        "--guidance_low",
        type=number,
        help="of the low-noise expert of a pair; default: --guidance, without it the config's",
    )
    parser.add_argument(
        "--negative",
        help="what guidance leads away from; default: the empty prompt, or a release's own",
    )
    parser.add_argument(
        "--interval", type=number, nargs=2, help="t range in which guidance acts; t = 1 is noise"
    )
    parser.add_argument("--shift", type=number, help="time shift of the sampling grid")
    parser.add_argument("--eta", type=number, help="noise added by ddim; 0 = deterministic")
    parser.add_argument("--seed", type=int, help="default: train.sample_seed")
    parser.add_argument("--batch_size", type=at_least(1), default=64)
    parser.add_argument(
        "--raw_weights", action="store_true", help="the last weights instead of their average"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--offload",
        choices=get_args(Offload),
        default="none",
        help=(
            "weights wait in CPU memory: model = each network visits the GPU in its turn,"
            " sequential = block by block; the same samples [none]"
        ),
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        help="section.key=value over the stored config (for example tokenizer.name_or_path=…)",
    )


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that only the command `sample` takes: prompts, files, pictures, a second
    model."""
    parser.add_argument("--prompts", nargs="+", default=[], help="one picture or clip each")
    parser.add_argument(
        "--prompts_file",
        help=(
            "one prompt a line; or JSON objects (.jsonl) or a YAML list `prompts:` with prompt and,"
            " where they differ, seed, width, height, frames, negative, guidance"
        ),
    )
    parser.add_argument(
        "--interactive",
        action="store_true",
        help="read prompts from the keyboard, or a pipe, while the model stays loaded",
    )
    parser.add_argument(
        "--first",
        type=int,
        default=0,
        help="number of the first prompt: it names files and, with the seed, decides the noise [0]",
    )
    parser.add_argument("--read", metavar="FILE", help="print how a sample was drawn, and end")
    parser.add_argument("--out", default="samples", help="folder to write into")
    parser.add_argument(
        "--replace",
        action="store_true",
        help="replace samples in --out that were drawn otherwise; those drawn so are kept",
    )
    parser.add_argument(
        "--image",
        action="append",
        help="picture that a clip begins with (Wan); a second one ends it (FLF2V)",
    )
    parser.add_argument(
        "--lora",
        help="LoRA file of any format, laid over the model (of a pair: over the high-noise expert)",
    )
    parser.add_argument("--lora_low", help="LoRA file for the low-noise expert of a pair")
    parser.add_argument(
        "--lora_strength",
        type=number,
        help="share of what the LoRA changes: 0 draws without it, 1 as it was trained [1]",
    )
    parser.add_argument(
        "--columns", type=at_least(1), help="columns of grid.png [4 for pictures, 1 for clips]"
    )
    parser.add_argument(
        "--refine",
        help=(
            "super-resolution: a second checkpoint that redraws the enlarged samples at its own"
            " size"
        ),
    )
    parser.add_argument(
        "--strength",
        type=number,
        help=(
            "noise level at which --refine is given the enlarged samples [0.5 where it starts from"
            " them, 0.1 where the model is conditioned on them]"
        ),
    )


def sample_settings(args: argparse.Namespace, config: ExperimentConfig) -> SampleSettings:
    """Return the sampling settings: the `train.sample_*` keys with which the model was trained,
    replaced by arguments that are given."""
    base = SampleSettings.of(config.train)
    if args.guidance is not None:  # one number holds for both experts
        base = replace(base, cfg_scale_low=None)
    given = lambda **values: {name: value for name, value in values.items() if value is not None}  # noqa: E731
    sampler = replace(
        base.sampler, **given(steps=args.steps, solver=args.solver, shift=args.shift, eta=args.eta)
    )
    interval = tuple(args.interval) if args.interval else None
    negative = args.negative and typed_text(args.negative)
    scales = given(cfg_scale=args.guidance, cfg_scale_low=args.guidance_low, cfg_interval=interval)
    return replace(
        base, sampler=sampler, **scales, **given(negative_prompt=negative, seed=args.seed)
    )


def sample_size(args: argparse.Namespace, config: ExperimentConfig) -> tuple[int, int, int, int]:
    """Return `(width, height, frames, fps)`; with buckets, the first one is the default size."""
    width, height, frames, fps = config.sample_size
    return args.width or width, args.height or height, args.frames or frames, fps
