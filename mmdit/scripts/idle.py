"""Refuse options that would do nothing beside the others of a command."""

import argparse

from mmdit.data.dataset.records import Media
from mmdit.scripts.parsers import CommandParser
from mmdit.training.pipeline import SampleSettings

OF_ADAPTERS = (
    "adapters are laid over as they were trained; export them (mmdit export --lora) and give --lora"
    " FILE --lora_strength beside the base"
)
# Keys of a config that have no part in drawing from trained weights, and what a person means by
# them.
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
    """Raise ValueError for an override that has no part in drawing, where an option has."""
    for word in overrides:
        if remedy := MEANT.get(word.partition("=")[0]):
            raise ValueError(f"{word} has no part in drawing from trained weights: {remedy}")


def refuse_without_guidance(args: argparse.Namespace, drawn: list[SampleSettings]) -> None:
    """Raise ValueError for options of guidance where none of the settings that samples are `drawn`
    with has any. Without settings nothing is known yet."""
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
    """Raise ValueError for options of the other kind of model, or of the other kind of data."""
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
