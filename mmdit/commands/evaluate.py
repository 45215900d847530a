"""Draw the samples of a loaded model, and score them."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from mmdit.data.dataset.media_sets import Shape
from mmdit.diagnostics.feature_distance import FEWEST
from mmdit.diagnostics.results_file import machine, peak_memory
from mmdit.diagnostics.sample_scores import SampleScores, sample_in_turn
from mmdit.diagnostics.task_accuracy import score_variant
from mmdit.posttrain.prompt_lists import read_prompt_list
from mmdit.training.pipeline import Pipeline, SampleSettings

Shown = list[tuple[Tensor, str]]  # samples for a sheet, with their captions


def evaluate(
    pipeline: Pipeline,
    shape: Shape,
    settings: SampleSettings,
    scores: SampleScores,
    *,
    variant: str,
    prompts: Path | None,
    count: int | None,
    batch_size: int,
) -> tuple[dict, Shown]:
    """Return the report of a model, and samples to show. Without the file `prompts` the samples are
    of a variant of moving shapes, and the table of their score is printed. `count`: prompts of each
    list, or samples; None is the default."""
    assert shape.size is not None, "samples have a size"
    (width, height), frames = shape.size, shape.frames
    drawn: Shown = []
    shown, most = (32, 32) if variant == "one" else (2, 48)  # of a call, and of all

    def sample(captions: list[str], first: int) -> Tensor:
        pixels = pipeline(captions, width, height, frames, settings, first, batch_size)
        drawn.extend(list(zip(pixels, captions))[: min(shown, most - len(drawn))])
        scores.add(pixels, captions)
        return pixels

    start = time.perf_counter()
    report: dict = {}
    if prompts:
        samples = FEWEST if count is None else count
        sample_in_turn(sample, read_prompt_list(prompts), samples, batch_size)
    else:
        report, table = score_variant(
            variant,
            sample,
            pipeline.tokenizer,
            count,
            width=width,
            height=height,
            frames=frames,
            device=pipeline.device,
        )
        print(table)
    scores.finish(report)
    report |= {
        "settings": asdict(settings),
        "step": pipeline.step,
        "parameters": sum(weight.numel() for weight in pipeline.learner.parameters()),
        "machine": machine(pipeline.device),
        "memory_gb": peak_memory(pipeline.device),
        "seconds": time.perf_counter() - start,
    }
    return report, drawn
