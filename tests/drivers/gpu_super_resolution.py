"""Both kinds of second stage side by side on moving shapes: prompt accuracy, sharpness, seams, time
and memory. One clip is drawn at a time.

    python -m tests.drivers.gpu_super_resolution --base runs/t2v_vtp_256_80f \\
        --conditioned runs/t2v_vtp_720_super_resolution --redraw runs/t2v_vtp_720_refine
    python -m tests.drivers.gpu_super_resolution --oracle_base --conditioned RUN --out report.json

`--oracle_base` redraws true small clips (after the tokenizer's round trip) in place of drawn ones.
A row for each second stage, and one for the small clips enlarged without any:

    accuracy    prompts that are right at the large size, and of the small clips
    edge width  10 to 90 %, pixels; and over that of the true clips after the tokenizer
    seams       error along the borders of tiles over that of like pixels elsewhere, in space and
                in time; against the true clips, or without --oracle_base the enlarged ones.
                Of the true clips against enlarged true ones: what it is without any tiles
    s, GB       seconds and peak memory of one clip, of at most --memory_gb in all
"""

import argparse
import json
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from mmdit.commands.sample import REDRAWN, TOLD
from mmdit.data.moving_shapes.oracle import Predictions, accuracy, oracle
from mmdit.data.moving_shapes.render import render
from mmdit.data.moving_shapes.sentences import prompts
from mmdit.diffusion.tiling import Tiling
from mmdit.experiment.load import load_pipeline
from mmdit.files import write_atomically
from mmdit.pixels import resized, to_unit
from mmdit.training.distributed import choose_device
from mmdit.training.media import contact_sheet, save_image, sheet_strip
from mmdit.training.pipeline import Pipeline, SampleSettings
from tests.helpers.edges import edge_width, near_borders, seam_ratio

LOOKED_AT = 3  # frames of a clip whose edges are measured
ON_SHEET = 2  # clips


@dataclass
class Row:
    """What is measured of one way to the large size, clip by clip."""

    predictions: list[Predictions] = field(default_factory=list)
    widths: list[float] = field(default_factory=list)
    seams: list[float] = field(default_factory=list)
    seams_in_time: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak: float = math.nan
    strips: list[Tensor] = field(default_factory=list)

    def look(self, pixels: Tensor) -> None:
        """Read a clip `(1, f, 3, h, w)`."""
        self.predictions.append(oracle(pixels).map(Tensor.cpu))
        self.widths += widths(pixels)
        if len(self.strips) < ON_SHEET:
            self.strips.append(sheet_strip(pixels[0].cpu()))


def widths(pixels: Tensor) -> list[float]:
    frames = torch.linspace(0, pixels.shape[1] - 1, LOOKED_AT).long().tolist()
    measured = [edge_width(pixels[0, frame]) for frame in frames]
    return [width for width in measured if not math.isnan(width)]


def mean(values: list[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return round(sum(known) / len(known), 3) if known else None


class Comparison:
    """The base, the second stages and the prompts of one run of this program."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, choose_device(args.device)
        self.on_gpu = self.device.type == "cuda"
        if self.on_gpu:
            total = torch.cuda.get_device_properties(self.device).total_memory
            share = min(1.0, args.memory_gb * 1e9 / total)
            torch.cuda.set_per_process_memory_fraction(share)
        paths = {"conditioned": args.conditioned, "redraw": args.redraw}
        self.stages = {
            name: load_pipeline(path, args.device) for name, path in paths.items() if path
        }
        self.base = load_pipeline(args.base, args.device) if args.base else None
        _, self.config = next(iter(self.stages.values()))
        self.large = (self.config.video.width, self.config.video.height)
        self.small = self.config.tokenizer.low_resolution or (448, 256)
        self.tokenizer = next(iter(self.stages.values()))[0].tokenizer
        listed = prompts("seen", args.frames > 1, *self.large)[: args.count]
        self.facts = [prompt.facts for prompt in listed]
        self.captions = [prompt.caption for prompt in listed]
        self.rows = {name: Row() for name in ("true", "enlarged", *self.stages)}
        self.of_small: list[Predictions] = []

    def true_clip(self, number: int, width: int, height: int) -> Tensor:
        facts = self.facts[number : number + 1]
        return to_unit(render(facts, width, height, self.args.frames, self.device))

    @torch.no_grad()
    def round_trip(self, pixels: Tensor) -> Tensor:
        return self.tokenizer.decode(self.tokenizer.encode(pixels))

    def small_clip(self, number: int) -> Tensor:
        if self.base is None:
            return self.round_trip(resized(self.true_clip(number, *self.large), *self.small))
        pipeline, config = self.base
        settings = SampleSettings.of(config.train)
        caption = self.captions[number : number + 1]
        return pipeline(caption, *self.small, self.args.frames, settings, number).to(self.device)

    def settings(self, name: str) -> SampleSettings:
        settings = SampleSettings.of(self.stages[name][1].train)
        if self.args.steps:
            settings = replace(settings, sampler=replace(settings.sampler, steps=self.args.steps))
        return settings

    def refined(self, name: str, small: Tensor, number: int) -> Tensor:
        """Return the clip as a second stage draws it, timed, with the most memory that it took."""
        pipeline, row = self.stages[name][0], self.rows[name]
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        caption = self.captions[number : number + 1]
        given = vars(self.args)[f"{name}_strength"]
        pixels = pipeline.refine(small, caption, *self.large, given, self.settings(name), number)
        row.seconds.append(time.perf_counter() - begin)
        if self.on_gpu:
            peak = torch.cuda.max_memory_allocated() / 1e9
            row.peak = max(peak, 0.0 if math.isnan(row.peak) else row.peak)
        return pixels.to(self.device)

    def one(self, number: int) -> None:
        small = self.small_clip(number)
        self.of_small.append(oracle(small).map(Tensor.cpu))
        enlarged = resized(small, *self.large)
        true = self.round_trip(self.true_clip(number, *self.large))
        self.rows["true"].look(true)
        blurred = resized(self.true_clip(number, *self.small), *self.large)
        self.compare(self.rows["true"], true[0], blurred[0], next(iter(self.stages.values()))[0])
        self.rows["enlarged"].look(enlarged)
        reference = true if self.base is None else enlarged
        del true, enlarged, blurred
        for name, (pipeline, _) in self.stages.items():
            pixels = self.refined(name, small, number)
            self.rows[name].look(pixels)
            self.compare(self.rows[name], pixels[0], reference[0], pipeline)

    def compare(self, row: Row, pixels: Tensor, reference: Tensor, pipeline: Pipeline) -> None:
        if pipeline.tile is None:
            return
        spec = self.tokenizer.spec
        whole = (spec.frames(self.args.frames), *spec.grid(*self.large))
        near, frames = near_borders(Tiling.fit(whole, pipeline.tile), spec.spatial)
        error = (pixels - reference).abs().mean(1)
        row.seams.append(seam_ratio(error, reference, near.to(self.device)))
        of_frames = frames.to(self.device)[:, None, None]
        row.seams_in_time.append(seam_ratio(error, reference, of_frames))

    def draw_sheet(self, path: Path) -> None:
        """Write the first clips of all rows, one below the other."""
        strips, titles = [], []
        for number in range(min(ON_SHEET, self.args.count)):
            for name, row in self.rows.items():
                strips.append(row.strips[number])
                titles.append(f"{name}: {self.captions[number]}")
        save_image(contact_sheet(torch.stack(strips), titles, 1), path)

    def report(self) -> dict:
        of_small = accuracy(Predictions.cat(self.of_small), self.facts)["prompt_accuracy"]
        sharp = mean(self.rows["true"].widths)
        lines = {}
        for name, row in self.rows.items():
            result = accuracy(Predictions.cat(row.predictions), self.facts)
            width = mean(row.widths)
            lines[name] = {
                "accuracy": result["prompt_accuracy"],
                "edge_width": width,
                "edge_ratio": round(width / sharp, 3) if width and sharp else None,
                "seam_ratio": mean(row.seams),
                "seam_ratio_in_time": mean(row.seams_in_time),
                "seconds": mean(row.seconds[1:] or row.seconds),
                "peak_gb": mean([row.peak]),
            }
        return {"small": of_small, "rows": lines, **vars(self.args)}


def table(report: dict) -> str:
    small = report["small"]
    head = f"{'':12} {'accuracy':>9} {'edge px':>8} {'over true':>9} {'seams':>6} {'in time':>7}"
    lines = [
        f"{report['count']} clips of {report['frames']} frames; small clips: prompt accuracy"
        f" {small['value']:.3f} ({small['correct']} of {small['count']})",
        f"{head} {'s':>7} {'GB':>6}",
    ]
    for name, row in report["rows"].items():
        cells = [row["accuracy"]["value"], *(row[key] for key in list(row)[1:])]
        shown = ["-" if cell is None else f"{cell:.3f}" for cell in cells]
        sizes = (9, 8, 9, 6, 7, 7, 6)
        columns = " ".join(f"{cell:>{size}}" for cell, size in zip(shown, sizes, strict=True))
        lines.append(f"{name:12} {columns}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", help="the run that draws the small clips")
    parser.add_argument("--oracle_base", action="store_true", help="true small clips instead")
    parser.add_argument("--conditioned", help="a second stage that is given the small clip")
    parser.add_argument("--redraw", help="a second stage that starts from it")
    parser.add_argument("--conditioned_strength", type=float, default=TOLD)
    parser.add_argument("--redraw_strength", type=float, default=REDRAWN)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--frames", type=int, default=80)
    parser.add_argument("--steps", type=int, help="default: train.sample_num_steps of each")
    parser.add_argument("--memory_gb", type=float, default=24.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="write the report as JSON")
    parser.add_argument("--sheet", help="write a PNG of the first clips of all rows")
    args = parser.parse_args(argv)
    if bool(args.base) == args.oracle_base:
        parser.error("give one of --base and --oracle_base")
    if not (args.conditioned or args.redraw):
        parser.error("give --conditioned, --redraw or both")
    comparison = Comparison(args)
    for number in range(args.count):
        comparison.one(number)
    report = comparison.report()
    print(table(report))
    if args.out:
        write_atomically(Path(args.out), json.dumps(report, indent=1) + "\n")
    if args.sheet:
        comparison.draw_sheet(Path(args.sheet))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
