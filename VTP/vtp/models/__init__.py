"""The networks under the names of the public VTP release; `vtp.models.vtp_hf` holds the whole
model."""

from vtp.models.decoder import DinoV3PixelDecoder
from vtp.models.dino_head import DINOHead
from vtp.models.text import TextTransformer
from vtp.models.vision import DinoVisionTransformer, DinoVisionTransformerWithBottleneck
from vtp.models.vtp_hf import VTPConfig, VTPModel, VTPPreTrainedModel

__all__ = [
    "DINOHead",
    "DinoV3PixelDecoder",
    "DinoVisionTransformer",
    "DinoVisionTransformerWithBottleneck",
    "TextTransformer",
    "VTPConfig",
    "VTPModel",
    "VTPPreTrainedModel",
]
