"""A reward for samples that resemble a folder of pictures, by features of a local timm model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.config import ConfigError, FilePath
from mmdit.data.dataset.picture_folder import folder_pictures
from mmdit.interop.feature_encoder import FeatureEncoder
from mmdit.posttrain.rewards import Reward, Samples, given


@dataclass(frozen=True)
class FeatureSimilarity(Reward):
    """The cosine between the features of a sample and those of a folder of pictures, averaged over
    frames."""

    limits: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    # Chooses this reward.
    type: Literal["features"] = "features"
    # The name of a timm model.
    model: str = ""
    # The .safetensors file of its weights.
    weights: FilePath = FilePath("")
    # A folder of pictures.
    reference: FilePath = FilePath("")
    # Compare with the mean direction of the folder's features, or with the nearest picture.
    compare: Literal["mean", "nearest"] = "mean"

    def __post_init__(self):
        super().__post_init__()
        for name in ("model", "weights", "reference"):
            if not getattr(self, name):
                raise ConfigError(
                    name,
                    "is empty; a reward of features needs model (a name of timm), weights (its"
                    " .safetensors file) and reference (a folder of pictures)",
                )

    @torch.no_grad()
    def prepare(self, device: torch.device) -> None:
        try:
            encoder = FeatureEncoder(self.model, self.weights).to(device)
            pictures = folder_pictures(self.reference, encoder.size, encoder.size)
            rows = [encoder(picture[None].to(device))[0] for picture in pictures]
        except ValueError as error:
            raise ConfigError("posttrain.rewards", f"has features that fail: {error}") from None
        known = F.normalize(torch.stack(rows), dim=-1)
        if self.compare == "mean":
            known = F.normalize(known.mean(0, keepdim=True), dim=-1)
        vars(self)["loaded"] = encoder, known

    @property
    def loaded(self) -> tuple[FeatureEncoder, Tensor]:
        """Return the encoder, and the normalised features with which samples are compared."""
        return vars(self)["loaded"]

    def call(self, samples: Samples) -> Tensor:
        pixels, (encoder, known) = given(samples.pixels), self.loaded
        features = F.normalize(encoder(pixels.flatten(0, 1)), dim=-1)
        nearest = (features @ known.T).amax(1)
        return nearest.reshape(len(pixels), -1).mean(1)
