"""Measure a step of each stage of a recipe, forward and backward, in milliseconds, replayed as CUDA
graphs and as it is launched, on random latents of 128 px; and how far the losses lie apart.

    python -m tests.drivers.gpu_arms_steps [arms_128] [--only u-skips sprint-0.75] [--batch 512]

One line a stage; the exit code is 1 if one is not replayed or has other losses. The teacher of
self-alignment is replayed in both. On a CPU nothing is replayed: that the script works is shown by
`--steps 1 --batch 2`.
"""

import argparse
import statistics
import time

import torch

from mmdit.data.moving_shapes.prepare import Recipe
from mmdit.diagnostics.recipe import read_recipe
from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.rng import Draws
from mmdit.tokenizers import build_tokenizer
from mmdit.training.graphs.common import try_again
from mmdit.training.learner import Learner
from tests.drivers.gpu_arms import arms, training_learner
from tests.test_arms import ROOT

WARM = 3  # steps before the clock: the first of a shape is launched, the second recorded


def awake(model: torch.nn.Module) -> None:
    """Open the gates of a new network, whose prediction is zero."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data.add_(torch.randn(weight.shape, generator=generator), alpha=0.02)


def one_step(learner: Learner, seen: torch.Tensor, captions: list[str], step: int):
    """Make forward and backward pass of one batch; return its losses."""
    device = seen.device
    keep = learner.model.draw_keep(*seen.shape[2:4], 0, step)
    with torch.autocast(device.type, torch.bfloat16):
        draws = Draws.of(0, step, len(seen), device)
        losses, _ = learner(seen, captions, draws, keep=keep)
    losses.mean().backward()
    learner.zero_grad()
    return losses.detach()


def measured(config, device: torch.device, batch: int, steps: int) -> dict:
    """Return what a stage takes, milliseconds by `replayed` and `launched`, and what they share."""
    row: dict = {}
    losses = []
    recipe = Recipe(128, 128)
    captions = [recipe.words(i, fact)[0] for i, fact in enumerate(recipe.draw(range(batch)))]
    for name in ("replayed", "launched"):
        try_again()
        learner = training_learner(config, build_tokenizer(config.tokenizer, "cpu").spec)
        awake(learner.model)
        learner.to(device).train()
        if name == "replayed":
            learner.replay_model()
        generator = torch.Generator().manual_seed(0)
        seen = torch.randn(batch, 1, 8, 8, 64, generator=generator).half().to(device)
        times = []
        for step in range(WARM + steps):
            start = time.perf_counter()
            last = one_step(learner, seen, captions, step)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(1000 * (time.perf_counter() - start))
        losses.append(last)
        row[name] = round(statistics.median(times[WARM:]), 1)
        if name == "replayed":
            row["graphs"] = bool(learner.replays) and any(learner.replays.made.values())
    row["apart"] = float((losses[0] - losses[1]).abs().max())
    return row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", default="arms_128")
    parser.add_argument("--only", nargs="+", help="names of stages")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    good = True
    with arms():
        for stage in read_recipe(ROOT / "results", args.recipe).stages:
            if args.only and stage.name not in args.only:
                continue
            config = load_experiment_config(ROOT / stage.config, list(stage.overrides))
            row = measured(config, device, args.batch, args.steps)
            good = good and row["graphs"] and row["apart"] < 0.01
            print(stage.name, row, flush=True)
    return 0 if good or device.type == "cpu" else 1


if __name__ == "__main__":
    raise SystemExit(main())
