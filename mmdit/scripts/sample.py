"""Draw pictures or clips from prompts with a trained model.

    python -m mmdit.scripts.sample --checkpoint runs/my_run --prompts "a red circle on black" "a blue star" --out samples
    python -m mmdit.scripts.sample --checkpoint assets/moving_shapes_128.safetensors --frames 16 --prompts_file prompts.txt

Writes grid.png (captioned), one PNG or MP4 per prompt, and samples.json with everything needed to draw them again.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from mmdit.experiment import load_pipeline
from mmdit.scripts import friendly
from mmdit.scripts.arguments import add_sampling_arguments, sample_settings, sample_size
from mmdit.training.media import contact_sheet, save_image, save_video


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sampling_arguments(parser)
    parser.add_argument("--prompts", nargs="+", default=[], help="one picture or clip each")
    parser.add_argument("--prompts_file", help="text file, one prompt a line")
    parser.add_argument("--out", default="samples", help="folder to write into")
    parser.add_argument("--columns", type=int, default=0, help="columns of grid.png (0: 4 for pictures, 1 for clips)")
    args = parser.parse_args(argv)
    with friendly():
        lines = Path(args.prompts_file).read_text(encoding="utf-8").splitlines() if args.prompts_file else []
        prompts = [*args.prompts, *(line.strip() for line in lines if line.strip())]
        if not prompts:
            raise ValueError("no prompt: give --prompts \"…\" or --prompts_file FILE")
        pipeline, config = load_pipeline(args.checkpoint, args.device, use_ema=not args.raw_weights, overrides=args.overrides)
        settings = sample_settings(args, config)
        width, height, frames, fps = sample_size(args, config)
        bar = tqdm(total=settings.sampler.steps, desc="sampling", unit="step")
        pixels = pipeline(prompts, width, height, frames, settings, batch_size=args.batch_size,
                          progress=lambda done, total: (bar.reset(total) if done == 1 else None, bar.update()))
        bar.close()
        out = Path(args.out)
        files = []
        for i, clip in enumerate(pixels):
            name = out / f"{i:04d}"
            picture = frames == 1
            path = save_image(contact_sheet(clip[None], [prompts[i]], 1, min(width, height)), name.with_suffix(".png")) if picture else \
                save_video(clip, name.with_suffix(".mp4"), fps)
            files.append(path.name)
        save_image(contact_sheet(pixels, prompts, args.columns or (4 if frames == 1 else 1)), out / "grid.png")
        story = {"checkpoint": str(args.checkpoint), "size": [width, height, frames], "settings": asdict(settings), "torch": torch.__version__,
                 "samples": [{"file": f, "prompt": p} for f, p in zip(files, prompts)]}
        (out / "samples.json").write_text(json.dumps(story, indent=1, ensure_ascii=False))
        print(f"wrote {len(files)} samples and {out / 'grid.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
