"""Draw pictures or clips from prompts with a trained model.

    python -m mmdit.scripts.sample --checkpoint runs/my_run --prompts "a red circle on black" "a blue star" --out samples
    python -m mmdit.scripts.sample --checkpoint assets/moving_shapes_64.safetensors --frames 16 --prompts_file prompts.txt

Writes grid.png (captioned), one PNG or MP4 per prompt, and samples.json with everything needed to draw them again.
"""

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from mmdit.adapters import merge
from mmdit.data.frames import load_first_frame
from mmdit.experiment import load_pipeline
from mmdit.interop.lora_formats import load_lora
from mmdit.scripts import friendly, run
from mmdit.scripts.arguments import add_sampling_arguments, number, sample_settings, sample_size
from mmdit.training.media import save_samples
from mmdit.training.pipeline import SampleSettings


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sampling_arguments(parser)
    parser.add_argument("--prompts", nargs="+", default=[], help="one picture or clip each")
    parser.add_argument("--prompts_file", help="text file, one prompt a line")
    parser.add_argument("--out", default="samples", help="folder to write into")
    parser.add_argument("--image", action="append", help="picture that a clip begins with (Wan); a second one ends it (FLF2V)")
    parser.add_argument("--lora", help="LoRA file of any format, laid over the model (of a pair: over the high-noise expert)")
    parser.add_argument("--lora_low", help="LoRA file for the low-noise expert of a pair")
    parser.add_argument("--columns", type=int, help="columns of grid.png [4 for pictures, 1 for clips]")
    parser.add_argument("--refine", help="super-resolution: a second checkpoint that redraws the enlarged samples at its own size")
    parser.add_argument(
        "--strength", type=number, default=0.5, help="noise level t that --refine starts from [0.5]"
    )
    args = parser.parse_intermixed_args(argv)
    with friendly():
        lines = Path(args.prompts_file).read_text(encoding="utf-8").splitlines() if args.prompts_file else []
        prompts = [*args.prompts, *(line.strip() for line in lines if line.strip())]
        if not prompts:
            raise ValueError('no prompt: give --prompts "…" or --prompts_file FILE')
        if wrong := [prompt for prompt in args.prompts if re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+=\S*", prompt)]:
            raise ValueError(f"--prompts took {wrong[0]!r}, which reads like an override: write overrides before --prompts")
        pipeline, config = load_pipeline(args.checkpoint, args.device, use_ema=not args.raw_weights, overrides=args.overrides)
        for model, file, expert in ((pipeline.learner.model, args.lora, "high"), (pipeline.low, args.lora_low, "low")):
            if file and model is None:
                raise ValueError("--lora_low is given, but this model is no pair of experts")
            if file:
                load_lora(model, file, expert if pipeline.low is not None else None)
                merge(model)
        settings = sample_settings(args, config)
        width, height, frames, fps = sample_size(args, config)
        image = torch.stack([load_first_frame(path, (width, height)) for path in args.image]) if args.image else None
        with tqdm(total=len(prompts), desc="sampling", unit="sample") as bar:
            more = {"batch_size": args.batch_size, "done": bar.update, "image": image}
            pixels = pipeline(prompts, width, height, frames, settings, **more)
        if args.refine:
            refiner, large = load_pipeline(args.refine, args.device, use_ema=not args.raw_weights)
            width, height = large.video.width, large.video.height
            with tqdm(total=len(prompts), desc="refining", unit="sample") as bar:
                pixels = refiner.refine(pixels, prompts, width, height, args.strength, SampleSettings.of(large.train), done=bar.update)
        out = Path(args.out)
        files = save_samples(pixels, prompts, out, fps, args.columns)
        refined = {name: given for name in ("image", "lora", "lora_low") if (given := getattr(args, name))}
        refined |= {"refine": args.refine, "strength": args.strength} if args.refine else {}
        story = {"checkpoint": args.checkpoint, **refined, "size": [width, height, frames], "settings": asdict(settings),
                 "raw_weights": args.raw_weights, "overrides": args.overrides, "torch": torch.__version__,
                 "samples": [{"file": f, "prompt": p} for f, p in zip(files, prompts)]}
        (out / "samples.json").write_text(json.dumps(story, indent=1, ensure_ascii=False))
        print(f"wrote {len(files)} samples and {out / 'grid.png'}")
    return 0


if __name__ == "__main__":
    run(main)
