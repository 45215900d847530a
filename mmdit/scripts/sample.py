"""Draw pictures or clips from prompts with a trained model.

    mmdit sample --checkpoint runs/my_run \\
        --prompts "a red circle on black" "a blue star" --out samples
    mmdit sample --checkpoint assets/moving_shapes_64.safetensors --frames 16 \\
        --prompts_file prompts.txt

Writes one PNG or MP4 per prompt, batch by batch, samples.json with everything needed to draw them
again, and grid.png (captioned). The same command again goes on where it was stopped.
"""

from dataclasses import replace
from pathlib import Path

from mmdit.commands.sample import Drawing, first_frames, lay_over, size_for
from mmdit.experiment.load import load_pipeline
from mmdit.interop.wan_release import published_shift
from mmdit.scripts import command_parser, friendly, run
from mmdit.scripts.arguments import (
    add_sampling_arguments,
    number,
    sample_settings,
    sample_size,
)
from mmdit.scripts.prompts import read_prompts
from mmdit.training.expert_choice import describe_pair
from mmdit.training.memory.sampling_offload import offload_pipeline
from mmdit.training.samples import SampleFolder, check_writable


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    add_sampling_arguments(parser)
    parser.add_argument("--prompts", nargs="+", default=[], help="one picture or clip each")
    parser.add_argument("--prompts_file", help="text file, one prompt a line")
    parser.add_argument("--out", default="samples", help="folder to write into")
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
        "--columns", type=int, help="columns of grid.png [4 for pictures, 1 for clips]"
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
    args = parser.parse_intermixed_args(argv)
    with friendly():
        prompts = read_prompts(args)
        check_writable(args.out, folder=True)
        raw = args.raw_weights
        if args.refine and args.strength is not None and not 0 < args.strength <= 1:
            raise ValueError(
                f"--strength is {args.strength}, must be above 0 (nothing is drawn anew) "
                "and at most 1 (everything is)"
            )
        pipeline, config = load_pipeline(
            args.checkpoint,
            args.device,
            not raw,
            overrides=args.overrides,
            offload=args.offload,
        )
        lay_over(pipeline, args.lora, args.lora_low)
        if pair := describe_pair(pipeline, config):
            print(pair)
        elif args.guidance_low is not None:
            raise ValueError("--guidance_low is given, but this model is no pair of experts")
        width, height, frames, fps = sample_size(args, config)
        if args.image:
            given = (args.width, args.height)
            width, height = size_for(pipeline, args.image[0], (width, height), given)
        image = first_frames(args.image or [], (width, height))
        settings = sample_settings(args, config)
        shift = published_shift(args.checkpoint, width, height)
        if (
            shift
            and args.shift is None
            and not any("sample_shift" in word for word in args.overrides)
        ):
            settings = replace(settings, sampler=replace(settings.sampler, shift=shift))
        drawing = Drawing(pipeline, (width, height, frames), settings, image, args.strength)
        if args.refine:
            drawing.refine_with(
                *load_pipeline(args.refine, args.device, not raw, offload=args.offload)
            )
        given = {name: getattr(args, name) for name in ("image", "lora", "lora_low", "refine")}
        story = {"checkpoint": args.checkpoint} | {
            key: value for key, value in given.items() if value
        }
        story |= drawing.story() | {"raw_weights": raw, "overrides": args.overrides}
        folder = SampleFolder(
            Path(args.out), story, prompts, drawing.written_size, fps, args.columns
        )
        for line in folder.said:
            print(line)
        for network in filter(None, (pipeline, drawing.refiner)):
            offload_pipeline(network, args.offload)
        drawing.fill(folder, args.batch_size)
        files = folder.finish()
        print(f"wrote {len(files)} samples and {folder.folder / 'grid.png'}{folder.grid_note}")
    return 0


if __name__ == "__main__":
    run(main)
