"""Score samples, whatever drew them: distances from real items, CLIP score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mmdit.data.dataset.media_sets import Shape, media_records, read_media
from mmdit.data.dataset.records import Record
from mmdit.diagnostics.clip_score import ClipScore, format_clip_score
from mmdit.diagnostics.feature_distance import BATCH, FeatureDistance, format_features
from mmdit.files import expanded, real_path
from mmdit.interfaces import Tokenizer
from mmdit.pixels import to_unit
from mmdit.training.media import read_facts, save_image


class SampleScores:
    """Measures samples as they arrive: with an encoder, with CLIP, with both or with neither."""

    def __init__(
        self,
        distance: FeatureDistance | None,
        clip_score: ClipScore | None,
        copies: str | None = None,
        nearest: str | None = None,
    ):
        self.distance, self.clip_score = distance, clip_score
        self.copies, self.nearest = copies, nearest

    def anew(self) -> SampleScores:
        """Return an object for other samples, with the same networks and real items."""
        distance = self.distance.anew() if self.distance else None
        clip_score = self.clip_score.anew() if self.clip_score else None
        return SampleScores(distance, clip_score, self.copies, self.nearest)

    def add(
        self, pixels: Tensor, captions: list[str] | None, names: list[str] | None = None
    ) -> None:
        """Add samples `(B, F, 3, H, W)`, in [0, 1] or as uint8."""
        if self.distance:
            self.distance.add(pixels, names, captions)
        if self.clip_score:
            unit = pixels if pixels.is_floating_point() else to_unit(pixels)
            self.clip_score.add(unit, captions or [])

    def report(self) -> dict:
        """Return the scores, ready for JSON, by the measure that made them."""
        report = {}
        if self.distance:
            report["features"] = self.distance.report()
        if self.clip_score:
            report["clip_score"] = self.clip_score.report()
        return report

    def finish(self, report: dict) -> None:
        """Add the scores to `report` and print them. Write the sheets, if asked for: `copies`, with
        the samples that are nearest to a real item, and `nearest`, with the first samples, each
        beside its nearest real item."""
        scores = self.report()
        report |= scores
        if scores:
            print(format_scores(scores))
        if self.distance and self.copies:
            save_image(self.distance.copies_sheet(), Path(self.copies))
        if self.distance and self.nearest:
            save_image(self.distance.nearest_sheet(), Path(self.nearest))


def build_scores(
    shape: Shape,
    device: torch.device,
    *,
    features: str | None,
    real: str | None,
    held_out: str | None,
    clip_score: str | None,
    copies: str | None,
    nearest: str | None,
    num_workers: int,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> SampleScores:
    """Return the scores for which the options of a command ask; real items are read and encoded.
    `copies` and `nearest`: paths of the sheets to write. ValueError if an option has no effect
    without another one."""
    needing = {"real": real, "held_out": held_out, "copies": copies, "nearest": nearest}
    for name, value in needing.items():
        if value and not features:
            raise ValueError(f"--{name} needs --features, an encoder to compare items with")
    if real and held_out and real_path(expanded(real)) == real_path(expanded(held_out)):
        raise ValueError(
            f"--real and --held_out both are {real}: of items that were trained on each is its own"
            " nearest; give others as --held_out, or leave it out"
        )
    if num_workers < 0:
        raise ValueError(f"--num_workers is {num_workers}, must be at least 0")
    score = ClipScore(clip_score, device) if clip_score else None
    distance = None
    if features:
        distance = FeatureDistance(
            features, shape, device, real, held_out, tokenizer, num_workers, seed
        )
    return SampleScores(distance, score, copies, nearest)


def format_scores(report: dict) -> str:
    """Return the result of `SampleScores.report` as lines for people."""
    lines = []
    if "features" in report:
        lines.append(format_features(report["features"]))
    if "clip_score" in report:
        lines.append(format_clip_score(report["clip_score"]))
    return "\n".join(lines)


def sample_in_turn(
    sample: Callable[[list[str], int], Tensor], prompts: list[str], count: int, batch: int
) -> None:
    """Call `sample(captions, first)` until `count` samples are drawn, with the prompts one after
    the other, again and again from the beginning."""
    if count < 2:
        raise ValueError(f"--count is {count}, must be at least 2")
    captions = [prompts[i % len(prompts)] for i in range(count)]
    for first in range(0, count, batch):
        sample(captions[first : first + batch], first)


def caption_of(record: Record) -> str:
    """Return what a sample should show: the caption in its record, or else the prompt that `mmdit
    sample` wrote into the file. ValueError if there is neither."""
    if record.caption:
        return record.caption
    try:
        return str(read_facts(record.path)["prompt"])
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{record.path} has no caption for the CLIP score ({error}); give --samples FILE.jsonl"
            " with captions (`mmdit prepare-folder` writes one), or samples of `mmdit sample`"
        ) from None


def _caption(record: Record, needed: bool) -> str:
    """Return `caption_of` a sample; "" if there is no caption and none is `needed`."""
    try:
        return caption_of(record)
    except ValueError:
        if needed:
            raise
        return ""


def score_files(
    scores: SampleScores, samples: str, shape: Shape, num_workers: int = 0
) -> SampleScores:
    """Add to `scores` all samples in `samples`, a folder or a JSONL file, and return it. `shape`:
    that of the real items; samples get the same size and number of frames, but neighbouring
    frames."""
    shape = replace(shape, stride=1, fps=None)
    records = media_records(samples, shape.frames)
    for part, pixels in read_media(records, shape, BATCH, num_workers):
        captions = [_caption(record, needed=bool(scores.clip_score)) for record in part]
        scores.add(pixels, captions, [record.id for record in part])
    return scores
