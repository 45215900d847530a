"""Ways of guidance side by side on moving shapes: prompt accuracy against calls of the network.

    python -m tests.drivers.gpu_guidance --checkpoint runs/shapes --weak_step 200 --out report.json
    python -m tests.drivers.gpu_guidance --checkpoint runs/shapes_routed --steps 6 12 25

Each way leads away from another estimate of the clean latents, `with text + (scale - 1) · (with
text - other)`, at each of --scales:

    text      the same network without the caption (classifier-free guidance)
    interval  the same, where t lies in --interval alone
    early     the same network as it was after --weak_step steps, with the caption (autoguidance,
              Karras et al. 2406.02507, whose weak network is a smaller one trained for less time)
    early-no-text   the same without the caption
    routed    the same network, told the caption, whose tokens pass by the routed blocks (for one
              that was trained with tread.enabled)

The calls are those of one sample, a step's two estimates being two; a routed one counts as the
operations that it needs, by `Denoiser.train_flops`. A scale of 1 is no guidance, one call a step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path

from torch import Tensor

from mmdit.diagnostics.prompt_accuracy import prompt_accuracy_report
from mmdit.diffusion import Denoise, sampling_times
from mmdit.experiment.load import load_pipeline
from mmdit.files import write_atomically
from mmdit.interfaces import TextTokens
from mmdit.models.routing import draw_keep
from mmdit.models.video_mmdit import VideoMMDiT
from mmdit.training.checkpoint import at_steps
from mmdit.training.pipeline import Pipeline, SampleSettings

Other = Callable[[TextTokens, list[str]], Denoise]
ROUTED_SEED = 0  # one set of kept places serves all samples
ALWAYS = (0.0, 1.0)


@dataclass(frozen=True)
class Way:
    """A way of guidance: the estimate that it leads away from, made of a batch's text tokens and
    captions; the times at which it does; and what that estimate costs, in calls of the network."""

    name: str
    other: Other
    interval: tuple[float, float] = ALWAYS
    cost: float = 1.0


@dataclass
class Guided(Pipeline):
    """A pipeline that is guided in the `way` and by the `scale` that were set last."""

    way: Way | None = None
    scale: float = 1.0
    asked: list[str] = field(default_factory=list)

    def latents(self, captions: list[str], *rest, **options) -> Tensor:
        self.asked = captions
        return super().latents(captions, *rest, **options)

    def _denoiser(self, text, *rest) -> Denoise:
        ask = self.learner.objective.denoiser(self.learner.model, text)
        if self.way is None or self.scale == 1:
            return ask
        other, (low, high) = self.way.other(text, self.asked), self.way.interval

        def denoise(x: Tensor, t) -> Tensor:
            here = ask(x, t)
            if not low <= float(t) <= high:
                return here
            return here + (self.scale - 1) * (here - other(x, t))

        return denoise


def without_text(pipeline: Pipeline, text: TextTokens, captions: list[str]) -> Denoise:
    """Return the estimate of a network that is not told the caption."""
    return pipeline.learner.objective.denoiser(pipeline.learner.model, text.null())


def reads_itself(
    pipeline: Pipeline, captioned: bool, text: TextTokens, captions: list[str]
) -> Denoise:
    """Return the estimate of a network that reads captions by its own text encoder."""
    tokens = pipeline.learner.text_encoder(captions)
    tokens = tokens if captioned else tokens.null()
    return pipeline.learner.objective.denoiser(pipeline.learner.model, tokens)


def routed(pipeline: Pipeline, keep: Tensor, text: TextTokens, captions: list[str]) -> Denoise:
    """Return the estimate of a network that routes all tokens but those at the places `keep`."""
    return pipeline.learner.objective.denoiser(pipeline.learner.model, text, keep=keep)


def ways_of(
    pipeline: Pipeline, early: Pipeline | None, size: tuple[int, int], interval: Sequence[float]
) -> list[Way]:
    """Return the ways that a network allows, with the same network `early` in its training."""
    low, high = interval
    plain = partial(without_text, pipeline)
    ways = [Way("text", plain), Way("interval", plain, (low, high))]
    if early:
        ways.append(Way("early", partial(reads_itself, early, True)))
        ways.append(Way("early-no-text", partial(reads_itself, early, False)))
    model = pipeline.learner.model
    if isinstance(model, VideoMMDiT) and model.tread is not None:
        rows, columns = pipeline.learner.spec.grid(*size, model.patch)
        window = model.windows(rows, columns)
        keep = draw_keep(model.tread, (window.height, window.width), ROUTED_SEED, 0)
        grid, tokens = (1, rows, columns), 20  # of a caption
        cost = model.train_flops(grid, tokens, len(keep)) / model.train_flops(grid, tokens)
        ways.append(Way("routed", partial(routed, pipeline, keep), cost=cost))
    return ways


def calls(guided: Guided, settings: SampleSettings, frames: int) -> float:
    """Return the calls of the network for one sample."""
    objective, sampler = guided.learner.objective, settings.sampler
    if guided.way is None or guided.scale == 1:
        return sampler.steps
    shift = sampler.shift * objective.clip_shift(guided.learner.spec.frames(frames))
    times = sampling_times(objective, sampler.steps, shift, grid=sampler.grid)[: sampler.steps]
    low, high = guided.way.interval
    return sampler.steps + guided.way.cost * sum(low <= float(t) <= high for t in times)


def measure(args: argparse.Namespace) -> list[dict]:
    """Return a row for each way, scale and number of steps."""
    pipeline, config = load_pipeline(args.checkpoint, args.device)
    size, frames = (config.video.width, config.video.height), config.video.num_frames
    early = None
    if args.weak_step:
        (folder,) = at_steps(args.checkpoint, [args.weak_step])
        early, _ = load_pipeline(folder, args.device)
    guided = Guided(
        pipeline.learner, pipeline.tokenizer, pipeline.precision, pipeline.captions, None
    )
    ways = ways_of(pipeline, early, size, args.interval)
    settings = SampleSettings.of(config.train)
    rows = []
    for way, scale, steps in product(ways, args.scales, args.steps):
        if scale == 1 and way is not ways[0]:
            continue  # no guidance is the same in every way
        guided.way, guided.scale = way, scale
        some = replace(settings, sampler=replace(settings.sampler, steps=steps))
        report = prompt_accuracy_report(
            lambda captions, first, some=some: guided(
                captions, *size, frames, some, first, args.batch_size
            ),
            pipeline.tokenizer,
            width=size[0],
            height=size[1],
            frames=frames,
            count=args.count,
            batch=args.batch_size,
            device=pipeline.device,
        )
        row = {
            "way": way.name,
            "scale": scale,
            "steps": steps,
            "calls": calls(guided, some, frames),
        }
        row |= {"seen": report["prompt_accuracy"], "held_out": report["held_out_accuracy"]}
        print(shown(row), flush=True)
        rows.append(row)
    return rows


def shown(row: dict) -> str:
    """Return a row as a line of a table."""
    rates = [
        f"{row[key]['value']:.3f} [{row[key]['low']:.3f}, {row[key]['high']:.3f}]"
        for key in ("seen", "held_out")
    ]
    cells = (row["way"], f"{row['scale']:g}", str(row["steps"]), f"{row['calls']:.1f}", *rates)
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a run folder, or an export")
    parser.add_argument("--weak_step", type=int, help="of the run's checkpoint to lead away from")
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 1.5, 2.5, 4])
    parser.add_argument("--steps", type=int, nargs="+", default=[6, 12, 25])
    parser.add_argument("--interval", type=float, nargs=2, default=[0.3, 0.95])
    parser.add_argument("--count", type=int, default=256, help="prompts of each list")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="write the rows as JSON")
    args = parser.parse_args(argv)
    print(
        "| leads away from | scale | steps | calls | seen | held out |\n|---|---|---|---|---|---|"
    )
    rows = measure(args)
    if args.out:
        write_atomically(Path(args.out), json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    main()
