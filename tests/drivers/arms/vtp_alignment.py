"""Alignment to what the tokenizer sees (REPA, Yu et al. 2024, 2410.06940, without a foreign
encoder): the hidden tokens of an early block learn to tell those of a middle block of the frozen
VTP decoder for the clean latents. The projector is trained, and kept in checkpoints, beside the
model."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit.config import ConfigError
from mmdit.interfaces import LatentSpec
from mmdit.models import VideoMMDiT
from mmdit.tokenizers import build_tokenizer
from tests.drivers.arms.hidden import projector

MIDDLE = 2 / 3  # the part of the decoder's blocks below the tokens that are aligned with


class VTPAlignment(nn.Module):
    """Return `1 - cosine` of projected tokens and the decoder's, `(b,)`."""

    def __init__(self, model: VideoMMDiT, tokenizer_config, spec: LatentSpec):
        super().__init__()
        tokenizer = build_tokenizer(tokenizer_config, device="cpu").plain
        if not hasattr(tokenizer, "network"):
            raise ConfigError(
                "flow_matching.vtp_alignment",
                f"needs a tokenizer of the type vtp, not {tokenizer.name}; set it to 0",
            )
        decoder = tokenizer.network.pixel_decoder
        self.projector = projector(model.config.dim, decoder.embed_dim)
        self.outside = {"decoder": decoder, "spec": spec}  # frozen: no part of this module's state

    @torch.no_grad()
    def target(self, clean: Tensor) -> Tensor:
        decoder = self.outside["decoder"].to(clean.device)
        frames, rows, columns = clean.shape[1:4]
        latents = rearrange(self.outside["spec"].denormalize(clean), "b f r c d -> (b f) d r c")
        table = decoder.rope_embed(rows, columns)
        tokens = rearrange(decoder.proj_in(latents), "b d r c -> b (r c) d")
        for block in decoder.blocks[: max(1, round(MIDDLE * len(decoder.blocks)))]:
            tokens = block(tokens, table)
        tokens = F.layer_norm(tokens.float(), tokens.shape[-1:])
        return rearrange(tokens, "(b f) (r c) d -> b f r c d", f=frames, r=rows)

    def forward(self, hidden: Tensor, clean: Tensor, *_) -> Tensor:
        target = self.target(clean)
        return 1 - F.cosine_similarity(self.projector(hidden), target, dim=-1).flatten(1).mean(1)
