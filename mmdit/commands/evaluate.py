"""Draw the samples of a loaded model, and score them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mmdit.data.dataset.media_sets import Shape
from mmdit.diagnostics.feature_distance import FEWEST
from mmdit.diagnostics.results_file import machine, peak_memory
from mmdit.diagnostics.sample_scores import SampleScores, build_scores, sample_in_turn
from mmdit.diagnostics.task_accuracy import score_variant
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.experiment.load import Loader
from mmdit.posttrain.prompt_lists import read_prompt_list
from mmdit.training.expert_choice import describe_pair
from mmdit.training.memory.host import keep_freed_memory
from mmdit.training.memory.sampling_offload import offload_pipeline
from mmdit.training.origin import identity
from mmdit.training.pipeline import Pipeline, SampleSettings
from mmdit.weights import parameter_count

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
    known: dict | None = None,
) -> tuple[dict, Shown]:
    """Return the report of a model, and samples to show. With the file `prompts`, samples are drawn
    for its prompts; without it, for a variant of moving shapes, and the table of its scores is
    printed. `count`: prompts of each list, or samples; None is the default. `known`: the report of
    other weights in this pipeline with the same arguments; everything that does not depend on
    weights is taken from it."""
    assert shape.size is not None, "samples have a size"
    (width, height), frames = shape.size, shape.frames
    drawn: Shown = []
    shown, most = (32, 32) if variant == "one" else (2, 48)  # shown of a call, and in all

    def sample(captions: list[str], first: int) -> Tensor:
        pixels = pipeline(captions, width, height, frames, settings, first, batch_size)
        drawn.extend(list(zip(pixels, captions))[: min(shown, most - len(drawn))])
        scores.add(pixels, captions)
        return pixels

    start = time.perf_counter()
    report: dict = {}
    if prompts:
        samples = FEWEST if count is None else count
        sample_in_turn(sample, read_prompt_list(prompts, "--prompts"), samples, batch_size)
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
            known=known,
        )
        print(table)
    scores.finish(report)
    report |= {
        "settings": asdict(settings),
        "step": pipeline.step,
        "parameters": parameter_count(pipeline.learner),
        "machine": machine(pipeline.device),
        "memory_gb": peak_memory(pipeline.device),
        "seconds": time.perf_counter() - start,
    }
    return report, drawn


@dataclass
class Scorer:
    """Scores checkpoints one after another. For those that share a pipeline, everything that does
    not depend on their weights is built and measured once. `settings` and `size` (width, height,
    frames, rate) are functions of a config; for `metrics` see `build_scores`, for the rest
    `evaluate`."""

    loader: Loader
    settings: Callable[[ExperimentConfig], SampleSettings]
    size: Callable[[ExperimentConfig], tuple[int, int, int, float]]
    variant: str
    prompts: Path | None
    count: int | None
    batch_size: int
    metrics: dict[str, Any]
    scores: SampleScores | None = field(default=None, init=False)
    known: dict | None = field(default=None, init=False)

    def score(self, path: str | Path) -> tuple[dict, Shown]:
        """Return the report of a checkpoint, and samples to show."""
        pipeline, config, again = self.loader.load(path)
        settings, (width, height, frames, _) = self.settings(config), self.size(config)
        video = config.video
        paces = (video.frame_stride, video.fps, video.shrink_video_to_frames)
        shape = Shape((width, height), frames, *paces)
        if again:
            assert self.scores is not None, "made with the pipeline"
            self.scores = self.scores.anew()
        else:
            if pair := describe_pair(pipeline, config):
                print(pair)
            pipeline.check(width, height, frames, settings)
            offload_pipeline(pipeline, self.loader.offload)
            keep_freed_memory(pipeline.device)
            self.known = None
            self.scores = build_scores(
                shape, pipeline.device, **self.metrics, tokenizer=pipeline.tokenizer
            )
        report, drawn = evaluate(
            pipeline,
            shape,
            settings,
            self.scores,
            variant=self.variant,
            prompts=self.prompts,
            count=self.count,
            batch_size=self.batch_size,
            known=self.known,
        )
        self.known = report
        source = pipeline.checkpoint
        origin = {
            "checkpoint": str(path),
            "checkpoint_crc32": identity(source) if source else None,
            "raw_weights": not self.loader.use_ema,
        }
        return report | origin, drawn
