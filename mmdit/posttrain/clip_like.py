"""CLIP-like scorers from local weights: CLIP, PickScore and HPS v2, as rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmdit.config import ConfigError, FilePath
from mmdit.interop.clip_similarity import Similarity
from mmdit.posttrain.rewards import Reward, Samples, given


@dataclass(frozen=True)
class ClipLike(Reward):
    """The similarity of picture and caption by a network with CLIP's architecture."""

    limits: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    # The folder of a CLIP in the transformers layout.
    path: FilePath = ""
    # hps: the file of its OpenCLIP weights, .safetensors or .pt.
    weights: str | None = None

    def prepare(self, device: torch.device) -> None:
        try:
            similarity = Similarity(self.path, self.weights).to(device)
        except ValueError as error:
            raise ConfigError("posttrain.rewards", f"has a CLIP that fails: {error}") from None
        vars(self)["similarity"] = similarity

    @property
    def similarity(self) -> Similarity:
        """Return the network that `prepare` loaded."""
        return vars(self)["similarity"]

    def __call__(self, pixels: Tensor, texts: list[str]) -> Tensor:
        return self.similarity(pixels, texts)

    def call(self, samples: Samples) -> Tensor:
        return self.similarity(given(samples.pixels), samples.captions)


@dataclass(frozen=True)
class ClipReward(ClipLike):
    """The similarity of picture and caption by a CLIP from a folder, as a reward or as the scorer
    of SRPO."""

    # Chooses this reward.
    type: Literal["clip"] = "clip"


@dataclass(frozen=True)
class PickScore(ClipLike):
    """The score of a PickScore network from a folder, as a reward or as the scorer of SRPO."""

    # Chooses this reward.
    type: Literal["pickscore"] = "pickscore"


@dataclass(frozen=True)
class HPS(ClipLike):
    """The score of HPS v2, from the folder of the CLIP ViT-H and its own weights, as a reward or as
    the scorer of SRPO."""

    # Chooses this reward.
    type: Literal["hps"] = "hps"

    def __post_init__(self):
        super().__post_init__()
        if self.weights is None:
            raise ConfigError(
                "weights",
                "is empty; must name the HPS v2 file; path is the folder of the CLIP ViT-H it is "
                "made of",
            )
