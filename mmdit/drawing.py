"""Drawing with a loaded model, batch by batch, perhaps again at a larger size by a second one:
see `mmdit.scripts.sample`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.adapters import merge
from mmdit.experiment import ExperimentConfig
from mmdit.interop.lora_formats import load_lora
from mmdit.training.pipeline import Pipeline, SampleSettings
from mmdit.training.samples import SampleFolder, weights_digest


def lay_over(pipeline: Pipeline, lora: str | None, lora_low: str | None) -> None:
    """Merge LoRA files into the network, or into the experts of a pair."""
    high, low = pipeline.learner.model, pipeline.low
    for model, file, expert in ((high, lora, "high"), (low, lora_low, "low")):
        if file and model is None:
            raise ValueError("--lora_low is given, but this model is no pair of experts")
        if file:
            load_lora(model, file, expert if low is not None else None)
            merge(model)


@dataclass
class Drawing:
    """`size`: width, height and frames. `strength`: the noise level that refining starts from.
    ValueError: the size or the settings cannot be drawn with."""

    pipeline: Pipeline
    size: tuple[int, int, int]
    settings: SampleSettings
    image: Tensor | None = None
    strength: float = 0.5
    refiner: Pipeline | None = field(default=None, init=False)
    large: ExperimentConfig | None = field(default=None, init=False)

    def __post_init__(self):
        self.pipeline.check(*self.size, self.settings)

    def refine_with(self, refiner: Pipeline, config: ExperimentConfig) -> None:
        """Draw the samples again with a second model, at the size of its config."""
        refiner.check(config.video.width, config.video.height, self.size[2], self.redrawn(config))
        self.refiner, self.large = refiner, config

    @staticmethod
    def redrawn(config: ExperimentConfig) -> SampleSettings:
        return SampleSettings.of(config.train)

    @property
    def written_size(self) -> tuple[int, int, int]:
        video = self.large.video if self.large else None
        return (video.width, video.height, self.size[2]) if video else self.size

    def story(self) -> dict:
        """Return what decides the samples, besides prompts and numbers."""
        networks, more = self.pipeline.networks(), {}
        if self.refiner:
            again = self.refiner.networks()
            networks |= {f"refiner.{name}": network for name, network in again.items()}
            more = {"strength": self.strength, "drawn_size": list(self.size),
                    "refine_settings": asdict(self.redrawn(self.large))}  # fmt: skip
        return more | {"size": list(self.written_size), "settings": asdict(self.settings),
                       "torch": torch.__version__, "precision": self.pipeline.precision,
                       "weights": weights_digest(networks, self.image)}  # fmt: skip

    def fill(self, folder: SampleFolder, batch_size: int) -> None:
        """Draw what `folder` lacks, and write each batch as it comes."""
        left = list(folder.missing(batch_size))
        total = sum(len(prompts) for _, prompts in left)
        with tqdm(total=total, desc="sampling", unit="sample") as bar:
            for first, prompts in left:
                pixels = self.pipeline(
                    prompts, *self.size, self.settings, first, batch_size, image=self.image
                )
                if self.refiner:
                    width, height, _ = self.written_size
                    settings = self.redrawn(self.large)
                    pixels = self.refiner.refine(
                        pixels, prompts, width, height, self.strength, settings, first
                    )
                folder.add(first, pixels)
                bar.update(len(prompts))
