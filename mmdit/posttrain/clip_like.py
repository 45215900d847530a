"""CLIP-like scorers from local weights: CLIP and PickScore folders in the transformers layout, HPS
v2 as an OpenCLIP state dict over the CLIP ViT-H folder. Similarities are cosines; weights are read
without executing anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.config import ConfigError, FilePath
from mmdit.foreign import explain_errors
from mmdit.interop.feature_encoder import square
from mmdit.pixels import CLIP, Standard
from mmdit.posttrain.rewards import Reward, Samples
from mmdit.text_encoders.transformers_loading import check_folder
from mmdit.weights import Checkpoint, check_numbers


class Similarity(nn.Module):
    """`similarity(pixels (B, F, 3, H, W), texts) -> (B,)`: cosines of picture and text features,
    mean over frames. Differentiable in the pixels; the network is frozen."""

    def __init__(self, folder: str, weights: FilePath | None = None):
        super().__init__()
        if not (Path(folder) / "config.json").is_file():
            raise ConfigError(
                "posttrain.rewards",
                f"name the folder {folder!r}, which holds no config.json; give a local CLIP "
                "in the transformers layout (config.json, model.safetensors, tokenizer files)",
            )
        from transformers import AutoTokenizer, CLIPModel

        with explain_errors(folder, "CLIP in the transformers layout"):
            check_folder(Path(folder))
            attention = "sdpa" if getattr(CLIPModel, "_supports_sdpa", False) else "eager"
            self.clip = CLIPModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, attn_implementation=attention
            )
            self.tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        if weights is not None:
            with explain_errors(weights, "HPS state dict of OpenCLIP"):
                stored = dict(Checkpoint(weights).tensors())
                self.clip.load_state_dict(from_open_clip(stored, self.clip.state_dict()))
        for name, value in self.clip.named_parameters():
            check_numbers(name, value.detach(), weights or folder)
        self.requires_grad_(False).eval()

    def forward(self, pixels: Tensor, texts: list[str]) -> Tensor:
        clip, size = self.clip, self.clip.config.vision_config.image_size
        images = square(pixels.flatten(0, 1).float(), size)
        standard = Standard(CLIP, images.device).to_standard(images)
        seen = clip.visual_projection(clip.vision_model(pixel_values=standard).pooler_output)
        unique = list(dict.fromkeys(texts))
        longest = clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            unique, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        tokens = tokens.to(images.device)
        read = clip.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        said = clip.text_projection(read.pooler_output)
        said = said[[unique.index(text) for text in texts]]
        seen = F.normalize(seen, dim=-1).unflatten(0, (len(pixels), -1))
        return (seen * F.normalize(said, dim=-1)[:, None]).sum(-1).mean(1)


@dataclass(frozen=True)
class ClipReward(Reward):
    """The similarity of picture and caption by CLIP, from a folder, as a reward or as the scorer of
    SRPO."""

    limits: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    # Chooses this reward.
    type: Literal["clip"] = "clip"
    # The folder of a CLIP in the transformers layout.
    path: FilePath = ""
    # hps: the file of its OpenCLIP weights, .safetensors or .pt.
    weights: str | None = None

    def prepare(self, device: torch.device) -> None:
        object.__setattr__(self, "similarity", Similarity(self.path, self.weights).to(device))

    def __call__(self, pixels: Tensor, texts: list[str]) -> Tensor:
        return self.similarity(pixels, texts)

    def call(self, samples: Samples) -> Tensor:
        return self.similarity(samples.pixels, samples.captions)


@dataclass(frozen=True)
class PickScore(ClipReward):
    """PickScore, from a folder, as a reward or as the scorer of SRPO."""

    # Chooses this reward.
    type: Literal["pickscore"] = "pickscore"


@dataclass(frozen=True)
class HPS(ClipReward):
    """HPS v2, from the folder of the CLIP ViT-H and its own weights, as a reward or as the scorer
    of SRPO."""

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


# parts of names in OpenCLIP, and what they are in transformers
OPEN_CLIP = (
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.", "vision_model."),
    (r"^(token|positional|transformer|ln_final)", r"text_model.\1"),
    (r"conv1\.", "embeddings.patch_embedding."),
    (r"(class|token)_embedding", r"embeddings.\1_embedding"),
    (r"positional_embedding", "embeddings.position_embedding.weight"),
    (r"ln_pre", "pre_layrnorm"),
    (r"ln_post", "post_layernorm"),
    (r"ln_final", "final_layer_norm"),
    (r"transformer\.resblocks", "encoder.layers"),
    (r"ln_(\d)", r"layer_norm\1"),
    (r"mlp\.c_fc", "mlp.fc1"),
    (r"mlp\.c_proj", "mlp.fc2"),
    (r"\.attn\.", ".self_attn."),
)


def from_open_clip(state: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return OpenCLIP weights under the names of transformers, which `expected` has. ValueError
    names a tensor that no OpenCLIP model has."""
    result = {name: value for name, value in expected.items() if name.endswith("position_ids")}
    for name, value in state.items():
        new = name
        for pattern, replacement in OPEN_CLIP:
            new = re.sub(pattern, replacement, new)
        if "projection" in new:
            value = value.T
        parts = {new: value}
        if "in_proj_" in new:  # one matrix of queries, keys and values
            names = [new.replace("in_proj_", f"{letter}_proj.") for letter in "qkv"]
            parts = dict(zip(names, value.chunk(3)))
        if name != "attn_mask":
            if not parts.keys() <= expected.keys():
                raise ValueError(f"the HPS file holds {name!r}, which no OpenCLIP model has")
            result |= parts
    return result
