"""Models: networks that map tensors to tensors. To add one, write a file with its config and class,
list the config in the union, and add a case below."""

from __future__ import annotations

from mmdit.models.routing import TreadConfig, draw_keep
from mmdit.models.video_mmdit import VideoMMDiT, VideoMMDiTConfig
from mmdit.models.wan_denoiser import WanModelConfig

ModelConfig = VideoMMDiTConfig | WanModelConfig

__all__ = [
    "ModelConfig",
    "TreadConfig",
    "VideoMMDiT",
    "VideoMMDiTConfig",
    "WanModelConfig",
    "build_model",
    "draw_keep",
]


def build_model(
    config: ModelConfig, latent_channels: int, text_dim: int, tread: TreadConfig | None = None
) -> VideoMMDiT:
    """Return the network for latents of `latent_channels` and text tokens of width `text_dim`, with
    fresh weights from torch's generator. (`interop.wan_weights.load_denoiser` loads Wan's
    weights.)"""
    match config:
        case VideoMMDiTConfig():
            return VideoMMDiT(config, latent_channels, text_dim, tread)
    raise AssertionError(f"no model for {type(config).__name__}")
