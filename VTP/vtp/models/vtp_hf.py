"""The whole VTP model: encoder, pixel decoder and text tower, under the names and in the checkpoint
format of the public release.

Images are ImageNet-normalised (b, 3, H, W); latents (b, C, h, w) with h = ⌊H / 16⌋. The model
behaves the same in train() and eval().
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtp.models.config import VTPConfig
from vtp.models.decoder import DinoV3PixelDecoder
from vtp.models.layers import init_linear
from vtp.models.pretrained import (
    CONFIG_FILE,
    assign_weights,
    checkpoint_folder,
    read_weights,
    write_checkpoint,
)
from vtp.models.text import TextTransformer, text_features
from vtp.models.vision import DinoVisionTransformerWithBottleneck

M = TypeVar("M", bound="VTPPreTrainedModel")


class VTPPreTrainedModel(nn.Module):
    """Loads and saves a model that is built from a `VTPConfig` alone."""

    def __init__(self, config: VTPConfig):
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(
        cls: type[M], name_or_path: str | os.PathLike, dtype: torch.dtype = torch.float32
    ) -> M:
        """Return the model of a checkpoint folder (or hub name), in eval mode, its parameters as
        `dtype` whatever the file holds.

        FileNotFoundError: no such folder or file. ValueError: damaged files, or weights that do not
        fit config.json.
        """
        folder = checkpoint_folder(name_or_path)
        config = VTPConfig.from_pretrained(folder)
        try:
            with torch.device("meta"):  # every tensor comes from the file: nothing to initialise
                model = cls(config)
        except Exception as error:  # widths and heads that do not fit together, in any layer
            raise ValueError(
                f"{folder / CONFIG_FILE} describes no network that can be built: {error}"
            ) from error
        assign_weights(model, read_weights(folder), dtype, str(folder))
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write config.json and model.safetensors into `folder`, each whole or not at all."""
        write_checkpoint(folder, self.config.to_dict(), self.state_dict())

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def _sizes(config: VTPConfig, part: str) -> dict[str, Any]:
    """Return the arguments that the encoder ("vision") and the decoder have in common, read from
    the keys of `part`."""
    names = ("embed_dim", "depth", "num_heads", "ffn_layer", "norm_layer", "init_values")
    values = {name: getattr(config, f"{part}_{name}") for name in names}
    return {**values, "qk_norm": getattr(config, f"{part}_use_qk_norm")}


class VTPModel(VTPPreTrainedModel):
    """A freshly initialised model; `VTPModel.from_pretrained(folder)` loads a checkpoint.
    ValueError for a config from which no model can be built."""

    def __init__(self, config: VTPConfig):
        super().__init__(config)
        channels, vision = config.vision_feature_bottleneck, _sizes(config, "vision")
        self.trunk = DinoVisionTransformerWithBottleneck(
            channels,
            patch_size=config.vision_patch_size,
            mlp_ratio=config.vision_mlp_ratio,
            **vision,
        )
        self.pixel_decoder = None
        if config.train_reconstruction:
            self.pixel_decoder = DinoV3PixelDecoder(channels, **_sizes(config, "decoder"))
        if config.train_clip:
            self._build_contrast(config)

    def _build_contrast(self, config: VTPConfig) -> None:
        names = inspect.signature(TextTransformer).parameters
        tower = TextTransformer(**{name: getattr(config, f"text_{name}") for name in names})
        # the released weights name the parts without a common prefix
        for name, part in [*tower.named_children(), *tower.named_parameters(recurse=False)]:
            setattr(self, name, part)
        self.text_projection, self.text_pool_type = tower.text_projection, tower.text_pool_type
        full = config.vision_bottleneck_ae_only
        width = config.vision_embed_dim if full else config.vision_feature_bottleneck
        self.visual_proj = nn.Linear(width, config.text_embed_dim, bias=False)
        init_linear(self.visual_proj)
        shape = [1] if config.nonscalar_logit_scale else []
        self.logit_scale = nn.Parameter(
            torch.full(shape, config.init_logit_scale or math.log(1 / 0.07))
        )
        self.logit_bias = None
        if config.init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.full(shape, float(config.init_logit_bias)))

    # ── reconstruction ────────────────────────────────────────────────────────────────────────────
    def get_reconstruction_latents(self, image: Tensor) -> Tensor:
        """Return the latents (b, C, h, w) of (b, 3, H, W)."""
        return self.trunk.encode(image)

    def get_latents_decoded_images(self, latents: Tensor) -> Tensor:
        """Return the normalised pixels (b, 3, 16 h, 16 w) of latents (b, C, h, w); RuntimeError
        without a decoder."""
        if self.pixel_decoder is None:
            raise RuntimeError(
                "this checkpoint has no pixel decoder (train_reconstruction is false): it can"
                " encode only"
            )
        return self.pixel_decoder(latents)

    # ── features ──────────────────────────────────────────────────────────────────────────────────
    def get_last_layer_feature(
        self, image: Tensor, use_bottleneck: bool = False
    ) -> dict[str, Tensor]:
        """Return the tokens after the final norm: {"cls_token": (b, D), "patch_tokens": (b, n, D)};
        of width C with the bottleneck."""
        tokens = self.trunk(image, is_training=True, use_bottleneck=use_bottleneck)
        return {
            "cls_token": tokens["x_norm_clstoken"],
            "patch_tokens": tokens["x_norm_patchtokens"],
        }

    def get_intermediate_layers_feature(
        self,
        image: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple:
        """See `DinoVisionTransformer.get_intermediate_layers`."""
        return self.trunk.get_intermediate_layers(image, n, reshape, return_class_token, norm)

    # ── contrast ──────────────────────────────────────────────────────────────────────────────────
    def get_clip_image_feature(self, image: Tensor, normalize: bool = True) -> Tensor:
        """Return features (b, text_embed_dim) of (b, 3, H, W); RuntimeError without a text
        tower."""
        self._need_contrast()
        bottleneck = not self.config.vision_bottleneck_ae_only
        tokens = self.get_last_layer_feature(image, use_bottleneck=bottleneck)
        feature = tokens["cls_token"]
        if self.config.vision_clip_feat == "pooled":
            feature = tokens["patch_tokens"].mean(dim=1)
        feature = self.visual_proj(feature)
        return F.normalize(feature, dim=-1) if normalize else feature

    def get_clip_text_feature(self, text: Tensor, normalize: bool = True) -> Tensor:
        """Return features (b, text_embed_dim) of token ids (b, text_context_length); RuntimeError
        without a text tower."""
        self._need_contrast()
        feature = text_features(self, text)
        return F.normalize(feature, dim=-1) if normalize else feature

    def get_clip_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scaled similarities (images, texts), and their transpose."""
        images, texts = self.get_clip_image_feature(image), self.get_clip_text_feature(text)
        logits = self.logit_scale.exp() * images @ texts.T
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return logits, logits.T

    def _need_contrast(self) -> None:
        if not self.config.train_clip:
            raise RuntimeError(
                "this checkpoint has no text tower (train_clip is false): no contrastive features"
            )

    def forward(
        self, image: Tensor | None = None, text: Tensor | None = None, forward_type: str = "clip"
    ) -> dict:
        """Return the outputs that `forward_type` asks for, as a dict. "clip": image_features,
        text_features (None for an absent input), logit_scale, and logit_bias if there is one;
        "rec": latents, reconstructed_image, target_image; "feature": the last layer's tokens after
        the bottleneck."""
        match forward_type:
            case "clip":
                self._need_contrast()
                outputs = {
                    "image_features": None if image is None else self.get_clip_image_feature(image),
                    "text_features": None if text is None else self.get_clip_text_feature(text),
                    "logit_scale": self.logit_scale.exp(),
                }
                if self.logit_bias is not None:
                    outputs["logit_bias"] = self.logit_bias
                return outputs
            case "rec":
                latents = self.get_reconstruction_latents(image)
                decoded = self.get_latents_decoded_images(latents)
                return {"latents": latents, "reconstructed_image": decoded, "target_image": image}
            case "feature":
                return self.get_last_layer_feature(image, use_bottleneck=True)
        raise ValueError(f"forward_type is {forward_type!r}; must be clip, rec or feature")
