"""Draw pictures or clips from prompts with a trained model.

    mmdit sample --checkpoint runs/my_run \\
        --prompts "a red circle on black" "a blue star" --out samples
    mmdit sample --checkpoint assets/moving_shapes_64.safetensors --frames 16 \\
        --prompts_file prompts.txt
    mmdit sample --checkpoint runs/my_run --interactive

Writes one PNG or MP4 per prompt, batch by batch, samples.json with everything needed to draw them
again, and grid.png (captioned). Given once more, the same command continues where it was stopped;
samples that were drawn in another way are replaced only with --replace. Each file records how it
was drawn: `mmdit sample --read FILE` prints that.
"""

import argparse
import json
import sys
from pathlib import Path

from mmdit.commands.sample import (
    Drawing,
    all_processes,
    alone_in,
    check_arguments,
    first_frames,
    lay_over,
    refines_averaged,
    size_for,
    whole_story,
    with_published_shift,
)
from mmdit.experiment.load import load_pipeline
from mmdit.scripts import command_parser, friendly, run
from mmdit.scripts.arguments import (
    add_sample_arguments,
    add_sampling_arguments,
    sample_settings,
    sample_size,
)
from mmdit.scripts.idle import refuse_idle_overrides, refuse_without_guidance
from mmdit.scripts.prompts import asked_for
from mmdit.training.distributed import World
from mmdit.training.expert_choice import describe_pair
from mmdit.training.media import read_facts
from mmdit.training.memory.host import keep_freed_memory
from mmdit.training.memory.sampling_offload import offload_pipeline
from mmdit.training.samples import stored_requests

HELP = (
    'ready: a prompt a line, or {"prompt": "…", "seed": 1, "width": …, "height": …, "frames": …,'
    ' "negative": "…", "guidance": …}; Ctrl-D ends'
)


def open_drawing(
    args: argparse.Namespace, words: list[str], world: World
) -> tuple[Drawing, dict, int]:
    """Load what the command names. Return the drawing, its story (everything that determines the
    samples), and the frames per second. `words` are those of the command."""
    pipeline, config = load_pipeline(
        args.checkpoint,
        args.device,
        not args.raw_weights,
        overrides=args.overrides,
        offload=args.offload,
    )
    strength = 1.0 if args.lora_strength is None else args.lora_strength
    lay_over(pipeline, args.lora, args.lora_low, strength)
    if pair := describe_pair(pipeline, config):
        print(pair)
    width, height, frames, fps = sample_size(args, config)
    if args.image:
        given = (args.width, args.height)
        width, height = size_for(pipeline, args.image[0], (width, height), given)
    image = first_frames(args.image or [], (width, height))
    settings = with_published_shift(sample_settings(args, config), args, width, height)
    size = (width, height, frames)
    alone = bool(args.interactive or args.prompts_file)
    drawing = Drawing(pipeline, size, settings, image, args.strength, words, alone, world)
    if args.refine:
        second = load_pipeline(
            args.refine, args.device, refines_averaged(args), offload=args.offload
        )
        drawing.refine_with(*second, args.negative and settings.negative_prompt)
    return drawing, whole_story(args, drawing), fps


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    add_sampling_arguments(parser, needs_checkpoint=False)
    add_sample_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    with friendly(), all_processes(args) as world:
        if args.read:
            reason = "--read says how a file was drawn: give one of the two"
            parser.refuse_all_but(["read", "out"], args, reason)  # a browser form always sets --out
            print(json.dumps(read_facts(args.read), indent=1, ensure_ascii=False))
            return 0
        check_arguments(args)
        refuse_idle_overrides(args.overrides)
        requests = {} if args.interactive else dict(enumerate(asked_for(args), args.first))
        drawing, story, fps = open_drawing(args, parser.words, world)
        refuse_without_guidance(args, drawing.settings_of(requests))
        drawing.check(requests)
        with alone_in(Path(args.out), world):
            if args.interactive:
                requests = stored_requests(Path(args.out))
            folder = drawing.open_folder(args, story, requests, fps)
            keep_freed_memory(drawing.pipeline.device)
            for network in filter(None, (drawing.pipeline, drawing.refiner)):
                offload_pipeline(network, args.offload)
            if args.interactive:
                print(HELP, flush=True)
                drawing.converse(folder, sys.stdin)
            else:
                drawing.fill(folder, args.batch_size)
            drawing.finish(folder)
    return 0


if __name__ == "__main__":
    run(main)
