"""Refuse options that would have no effect together with the others of a command."""

import argparse

from mmdit.data.dataset.records import Media
from mmdit.scripts.parsers import CommandParser
from mmdit.training.pipeline import SampleSettings

OF_ADAPTERS = (
    "adapters are laid over as they were trained; export them (mmdit export --lora) and give --lora"
    " FILE --lora_strength beside the base"
)
# Keys of a config that have no effect on drawing from trained weights, and what to do instead.
MEANT = {
    "seed": "give --seed",
    "train.batch_size": "give --batch_size",
    "train.sample_num_images": "each of --prompts is drawn once",
    "train.sample_prompts": "give --prompts",
    "ema.enabled": "--raw_weights draws with the last weights",
    "ema.use_for_sampling": "--raw_weights draws with the last weights",
    "lora.alpha": OF_ADAPTERS,
    "lora.rslora": OF_ADAPTERS,
}


def refuse_idle_overrides(overrides: list[str]) -> None:
    """Raise ValueError for an override that has no effect on drawing, naming the option that
    has."""
    for word in overrides:
        if remedy := MEANT.get(word.partition("=")[0]):
            raise ValueError(f"{word} has no part in drawing from trained weights: {remedy}")


def refuse_without_guidance(args: argparse.Namespace, drawn: list[SampleSettings]) -> None:
    """Raise ValueError for options of guidance if none of the settings with which samples are
    `drawn` uses guidance. Without settings, nothing is known yet and nothing refused."""
    if not drawn or any(settings.guides for settings in drawn):
        return
    for name in ("negative", "interval"):
        value = getattr(args, name)
        if value not in (None, ""):
            raise ValueError(
                f"--{name} is {value!r}, but guidance is 1, which looks at the prompt alone: give"
                f" --guidance above 1, or leave --{name} out"
            )


def refuse_other_captioner(parser: CommandParser, args: argparse.Namespace, media: Media) -> None:
    """Raise ValueError for options that belong to the other type of model, or to the other type of
    data."""
    if args.server:
        idle, reason = ["device", "dtype"], "the model of --server runs there: leave it out"
    else:
        idle, reason = (
            ["parallel", "timeout"],
            "no --server is given: give it, or leave this out",
        )
    parser.refuse_idle(args, idle, reason)
    if not args.temperature:
        reason = "--temperature is 0, which draws nothing: raise it, or leave it out"
        parser.refuse_idle(args, ["seed"], reason)
    if media == "image":
        parser.refuse_idle(args, ["frames"], f"{args.meta_jsonl} is of pictures: leave it out")
