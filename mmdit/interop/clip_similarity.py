"""CLIP from local weights: a folder in the transformers layout, or HPS v2 as an OpenCLIP state dict
over the folder of the CLIP ViT-H. Similarities are cosines. Weights are read without executing
anything."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.foreign import explain_errors
from mmdit.interop.picture_resizing import square
from mmdit.pixels import CLIP, Standard
from mmdit.text_encoders.transformers_loading import check_folder
from mmdit.weights import Checkpoint, check_numbers

logger = logging.getLogger(__name__)


class Similarity(nn.Module):
    """`similarity(pixels (B, F, 3, H, W), texts)` returns `(B,)`: the cosines of picture and text
    features, averaged over frames. It is differentiable in the pixels; the network is frozen.
    ValueError if `folder` holds no CLIP in the transformers layout."""

    def __init__(self, folder: str | Path, weights: str | Path | None = None):
        super().__init__()
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(
                f"{folder} holds no config.json; give the folder of a local CLIP in the"
                " transformers layout (config.json, model.safetensors, tokenizer files)"
            )
        from transformers import AutoTokenizer, CLIPModel

        with explain_errors(folder, "CLIP in the transformers layout"):
            check_folder(Path(folder))
            attention = "sdpa" if getattr(CLIPModel, "_supports_sdpa", False) else "eager"
            clip, report = CLIPModel.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                attn_implementation=attention,
                output_loading_info=True,
            )
            self.tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        missing = sorted(report["missing_keys"])
        if missing and weights is None:  # the library would draw random ones
            raise ValueError(
                f"{folder} lacks {len(missing)} tensors of CLIP, first {missing[0]}: it is"
                " incomplete; fetch it again"
            )
        self.clip = clip.float()  # half-precision files stay in half precision when read
        if weights is not None:
            with explain_errors(weights, "HPS state dict of OpenCLIP"):
                stored = dict(Checkpoint(weights).tensors())
                self.clip.load_state_dict(from_open_clip(stored, self.clip.state_dict()))
        for name, value in self.clip.named_parameters():
            check_numbers(name, value.detach(), weights or folder)
        self.reported = False
        self.requires_grad_(False).eval()

    @property
    def size(self) -> int:
        """Return the side, in pixels, of the square pictures that the network takes."""
        return self.clip.config.vision_config.image_size

    def picture_features(self, pixels: Tensor) -> Tensor:
        """Return the features `(N, D)` of `pixels (N, 3, H, W)` in [0, 1], in the space that they
        share with texts."""
        images = square(pixels.float(), self.size)
        standard = Standard(CLIP, images.device).to_standard(images)
        return self.clip.visual_projection(
            self.clip.vision_model(pixel_values=standard).pooler_output
        )

    def text_features(self, texts: list[str]) -> Tensor:
        """Return the features `(N, D)` of texts. Texts longer than CLIP's context are cut, with one
        warning."""
        clip = self.clip
        unique = list(dict.fromkeys(texts))
        longest = clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            unique, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        self._report_length(unique, tokens.attention_mask.sum(1).tolist(), longest)
        tokens = tokens.to(clip.visual_projection.weight.device)
        read = clip.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        features = clip.text_projection(read.pooler_output)
        return features[[unique.index(text) for text in texts]]

    def _report_length(self, texts: list[str], lengths: list[int], longest: int) -> None:
        for text, length in zip(texts, lengths, strict=True):
            if self.reported or length < longest:
                continue
            whole = len(self.tokenizer(text, verbose=False)["input_ids"])
            if whole > longest:
                logger.warning(
                    "a text has %d tokens, CLIP reads %d: the rest is not judged (said once)"
                    ": %.80s",
                    whole,
                    longest,
                    text,
                )
                self.reported = True

    def forward(self, pixels: Tensor, texts: list[str]) -> Tensor:
        seen = F.normalize(self.picture_features(pixels.flatten(0, 1)), dim=-1)
        said = F.normalize(self.text_features(texts), dim=-1)
        return (seen.unflatten(0, (len(pixels), -1)) * said[:, None]).sum(-1).mean(1)


# parts of names in OpenCLIP, and the corresponding parts in transformers
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
    names a tensor that does not belong to an OpenCLIP model."""
    result = {name: value for name, value in expected.items() if name.endswith("position_ids")}
    for name, value in state.items():
        new = name
        for pattern, replacement in OPEN_CLIP:
            new = re.sub(pattern, replacement, new)
        if "projection" in new:
            value = value.T
        parts = {new: value}
        if "in_proj_" in new:  # one matrix for queries, keys and values
            names = [new.replace("in_proj_", f"{letter}_proj.") for letter in "qkv"]
            parts = dict(zip(names, value.chunk(3)))
        if name != "attn_mask":
            if not parts.keys() <= expected.keys():
                raise ValueError(f"the HPS file holds {name!r}, which no OpenCLIP model has")
            result |= parts
    return result
