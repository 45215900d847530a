"""The pixel decoder: maps latents to normalised pixels with the same type of blocks as the encoder,
without a class token."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vtp.models.layers import init_linear, make_blocks, make_norm
from vtp.models.rope import RotaryEmbedding

UPSAMPLING = 16  # fixed, whatever the encoder's patch size


class DinoV3PixelDecoder(nn.Module):
    """The decoder. Its arguments are the `decoder_*` keys of config.json and `in_dim`, the channels
    of a latent; the MLP ratio is fixed at 4."""

    def __init__(
        self,
        in_dim: int = 64,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        ffn_layer: str = "swiglu",
        norm_layer: str = "layernorm",
        init_values: float | None = None,
        qk_norm: bool = False,
    ):
        super().__init__()
        self.in_dim, self.embed_dim, self.num_heads = in_dim, embed_dim, num_heads
        self.proj_in = nn.Conv2d(in_dim, embed_dim, 1)
        self.blocks = make_blocks(
            depth, embed_dim, num_heads, 4.0, ffn_layer, norm_layer, init_values, qk_norm
        )
        self.rope_embed = RotaryEmbedding(embed_dim // num_heads)
        self.norm = make_norm(norm_layer, embed_dim)
        self.proj_out = nn.Conv2d(embed_dim, 3 * UPSAMPLING**2, 1)
        self.apply(init_linear)
        for projection in (self.proj_in, self.proj_out):
            nn.init.trunc_normal_(projection.weight, std=0.02)
            nn.init.zeros_(projection.bias)

    def forward(self, latents: Tensor) -> Tensor:
        """Map latents (b, C, h, w) to normalised pixels (b, 3, 16 h, 16 w), unbounded. ValueError
        for another number of channels."""
        if latents.ndim != 4 or latents.shape[1] != self.in_dim:
            raise ValueError(
                f"latents are {tuple(latents.shape)}; this decoder takes (batch, {self.in_dim},"
                " h, w)"
            )
        h, w = latents.shape[-2:]
        table = self.rope_embed(h, w)
        # Contiguous in this shape: the sum of a transposed stream and a branch would be transposed,
        # too.
        x = rearrange(self.proj_in(latents), "b d h w -> b (h w) d").contiguous()
        for block in self.blocks:
            x = block(x, table)
        x = rearrange(self.norm(x), "b (h w) d -> b d h w", h=h, w=w)
        return F.pixel_shuffle(self.proj_out(x), UPSAMPLING)
