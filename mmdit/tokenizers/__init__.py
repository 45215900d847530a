"""Tokenizers: pixels in [0, 1] `(B, F, 3, H, W)` ↔ raw latents `(B, F, h, w, C)`.

To add one, write a file with its config and class, list the config in the union, and add a case
below.
"""

from __future__ import annotations

import torch

from mmdit.interfaces import Tokenizer
from mmdit.tokenizers.dummy import DummyTokenizer, DummyTokenizerConfig
from mmdit.tokenizers.vtp import VTPTokenizer, VTPTokenizerConfig
from mmdit.tokenizers.wan_vae import WanVAETokenizer, WanVAETokenizerConfig
from mmdit.tokenizers.with_low_resolution import WithLowResolution
from mmdit.tokenizers.with_picture import WithPicture

TokenizerConfig = VTPTokenizerConfig | DummyTokenizerConfig | WanVAETokenizerConfig

__all__ = [
    "DummyTokenizerConfig",
    "TokenizerConfig",
    "VTPTokenizerConfig",
    "WanVAETokenizerConfig",
    "build_tokenizer",
]


def build_tokenizer(
    config: TokenizerConfig, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Tokenizer:
    """Return the tokenizer that `config` describes, on `device`. dtype: the precision of its
    arithmetic; None is float32 on a CPU and bfloat16 autocast on a GPU (the dummy is always
    float32, and for the Wan VAE None takes the config's `dtype`).

    ConfigError: there is no such checkpoint, weights or latent statistics do not fit, or code
    cannot be imported.
    """
    match config:
        case VTPTokenizerConfig():
            return _for_caches(VTPTokenizer(config, device, dtype), config.low_resolution)
        case DummyTokenizerConfig():
            return _for_caches(DummyTokenizer(config, device), config.low_resolution)
        case WanVAETokenizerConfig():
            tokenizer = WanVAETokenizer(config, device, dtype)
            return tokenizer if config.picture == "none" else WithPicture(tokenizer, config.picture)
    raise TypeError(f"{type(config).__name__} is not a tokenizer config")


def _for_caches(tokenizer: Tokenizer, small: tuple[int, int] | None) -> Tokenizer:
    return tokenizer if small is None else WithLowResolution(tokenizer, small)
