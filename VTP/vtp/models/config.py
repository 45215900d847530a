"""The configuration of a VTP model, key for key the config.json of the public release."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from vtp.models.pretrained import CONFIG_FILE, checkpoint_folder, read_json, write_config

MOST = {"depth": 1024, "image_size": 1 << 20}  # by the end of a key; other integers: 2**24
TYPES = {
    "int": "a positive whole number that is not absurdly large",
    "float": "a number",
    "bool": "true or false",
    "str": "a word",
    "float | None": "a number or null",
}


def fits(name: str, value: Any) -> bool:
    """Return whether `value` has the type of the key `name`; unknown keys may hold anything."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    match VTPConfig.__annotations__.get(name):
        case "int":
            least = 0 if name.endswith(("pad_id", "depth")) else 1
            most = next((most for end, most in MOST.items() if name.endswith(end)), 1 << 24)
            return number and isinstance(value, int) and least <= value <= most
        case "float":
            return number
        case "float | None":
            return number or value is None
        case "bool":
            return isinstance(value, bool)
        case "str":
            return isinstance(value, str)
    return True


class VTPConfig:
    """The keys of config.json with their defaults; unknown keys are kept, and written back by
    `save_pretrained`.

    `image_size` and `text_output_tokens` are recorded only: they change no computation.
    """

    model_type: str = "vtp"
    image_size: int = 256
    train_clip: bool = True  # text tower and visual_proj
    train_reconstruction: bool = True  # pixel decoder

    vision_patch_size: int = 16  # of the encoder; the decoder always upsamples by 16
    vision_embed_dim: int = 768
    vision_depth: int = 12
    vision_num_heads: int = 12
    vision_mlp_ratio: float = 4.0
    vision_ffn_layer: str = "swiglu"  # mlp, swiglu, swiglu32, swiglu64, swiglu128
    vision_norm_layer: str = "rmsnorm"  # layernorm, layernormbf16, rmsnorm
    vision_init_values: float | None = None  # LayerScale start; None or 0: no LayerScale
    vision_use_qk_norm: bool = False
    vision_feature_bottleneck: int = 64  # latent channels; equal to vision_embed_dim: no bottleneck
    vision_bottleneck_ae_only: bool = True  # contrast sees the features before the bottleneck
    vision_clip_feat: str = "cls"  # cls or pooled (mean of the patch tokens)

    text_context_length: int = 77
    text_vocab_size: int = 49408
    text_embed_dim: int = 768  # also the width of the joint embedding
    text_num_heads: int = 12
    text_depth: int = 12
    text_mlp_ratio: float = 4.0
    text_ls_init_value: float | None = None  # LayerScale start; None: no LayerScale
    text_embed_cls: bool = False
    text_pad_id: int = 0
    text_no_causal_mask: bool = False
    text_pool_type: str = "argmax"  # argmax, first, last, none
    text_proj_type: str = "linear"  # none: no projection
    text_proj_bias: bool = False
    text_output_tokens: bool = False
    text_quick_gelu: bool = False

    decoder_embed_dim: int = 768
    decoder_num_heads: int = 12
    decoder_depth: int = 12
    decoder_ffn_layer: str = "swiglu"
    decoder_norm_layer: str = "layernorm"
    decoder_init_values: float | None = None
    decoder_use_qk_norm: bool = False

    init_logit_scale: float | None = None  # None or 0: ln(1 / 0.07)
    init_logit_bias: float | None = None
    nonscalar_logit_scale: bool = False

    def __init__(self, /, **values: Any):
        types = VTPConfig.__annotations__
        for name, value in values.items():
            if hasattr(VTPConfig, name) and name not in types:
                raise ValueError(f"{name!r} is a name of this class, and cannot be a key")
            if not fits(name, value):
                raise ValueError(f"{name} is {value!r}; must be {TYPES[types[name]]}")
        defaults = {name: getattr(VTPConfig, name) for name in types}
        self.__dict__.update({**defaults, "architectures": ["VTPModel"], **values})
        if self.vision_clip_feat not in ("cls", "pooled"):
            raise ValueError(
                f"vision_clip_feat is {self.vision_clip_feat!r}; must be cls or pooled"
            )
        if self.text_embed_cls and self.train_clip:
            raise ValueError(
                "text_embed_cls is true; the public release cannot run such a model either (its"
                " position table is one longer than its input): set it to false, or train_clip to"
                " false to use the images alone"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return all keys, unknown ones included, as plain JSON values."""
        return dict(self.__dict__)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VTPConfig:
        if values.get("model_type", "vtp") != "vtp":
            raise ValueError(
                f"model_type is {values['model_type']!r}; must be 'vtp': this is a checkpoint of"
                " another model"
            )
        return cls(**values)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike) -> VTPConfig:
        """Read the config of a checkpoint, given by its folder or hub name. FileNotFoundError if
        config.json is missing, ValueError if it is damaged."""
        return cls.from_dict(read_json(checkpoint_folder(name_or_path) / CONFIG_FILE))

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_config(Path(folder), self.to_dict())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VTPConfig) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        keys = ", ".join(f"{name}={value!r}" for name, value in self.to_dict().items())
        return f"VTPConfig({keys})"
