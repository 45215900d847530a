"""The encoder: a plain ViT with a class token, rotary positions and a linear bottleneck whose
output is the latent.

Axes: b batch, n = h·w patches (row-major), D width, C latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from vtp.models.layers import init_linear, init_normal, make_blocks, make_norm
from vtp.models.rope import RotaryEmbedding


class PatchEmbed(nn.Module):
    """Maps each non-overlapping patch linearly: (b, 3, H, W) → (b, D, h, w); a remainder at the
    right or bottom is cut off."""

    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        bound = (3 * patch_size**2) ** -0.5
        nn.init.uniform_(self.proj.weight, -bound, bound)
        nn.init.uniform_(self.proj.bias, -bound, bound)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image)


class DinoVisionTransformer(nn.Module):
    """The trunk without a bottleneck. Arguments are the `vision_*` keys of config.json; images are
    ImageNet-normalised."""

    def __init__(
        self,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        ffn_layer: str = "swiglu",
        norm_layer: str = "rmsnorm",
        init_values: float | None = None,
        qk_norm: bool = False,
    ):
        super().__init__()
        self.patch_size, self.embed_dim, self.num_heads = patch_size, embed_dim, num_heads
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        self.blocks = make_blocks(
            depth, embed_dim, num_heads, mlp_ratio, ffn_layer, norm_layer, init_values, qk_norm
        )
        self.rope_embed = RotaryEmbedding(embed_dim // num_heads)
        self.norm = make_norm(norm_layer, embed_dim)
        self.apply(init_linear)
        init_normal(self.cls_token, 0.02)

    def bottleneck(self, tokens: Tensor) -> Tensor:
        """Map tokens (…, D) to (…, C). This class has no bottleneck and returns its input."""
        return tokens

    def forward(
        self,
        image: Tensor,
        is_training: bool = False,
        use_bottleneck: bool = True,
        masks: Tensor | None = None,
        drop_ratio: float | None = None,
    ) -> Tensor | dict[str, Tensor | None]:
        """Return the class token (b, C) of image (b, 3, H, W); with `is_training`, a dict of
        tokens.

        masks: (b, n) bool, True = patch replaced by `mask_token` after patch embedding (iBOT).
        drop_ratio: stochastic depth. use_bottleneck: pass the normed tokens of the dict through the
        bottleneck. The dict holds x_norm_clstoken (b, ·), x_norm_patchtokens (b, n, ·),
        x_storage_tokens (b, 0, D), x_prenorm (b, 1 + n, D) and masks.
        """
        x, table, _ = self._tokens(image, masks)
        for block in self.blocks:
            x = block(x, table, drop_ratio or 0.0)
        normed = self.norm(x)
        if not is_training:
            return self.bottleneck(normed[:, 0])
        normed = self.bottleneck(normed) if use_bottleneck else normed
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_storage_tokens": x[:, 1:1],
            "x_norm_patchtokens": normed[:, 1:],
            "x_prenorm": x,
            "masks": masks,
        }

    def encode(self, image: Tensor) -> Tensor:
        """Return the latents (b, C, h, w) of image (b, 3, H, W)."""
        tokens = self(image, is_training=True, use_bottleneck=False)["x_norm_patchtokens"]
        h = image.shape[-2] // self.patch_size
        return rearrange(self.bottleneck(tokens), "b (h w) c -> b c h w", h=h)

    def get_intermediate_layers(
        self,
        image: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple:
        """Return the outputs of the last `n` blocks, or of the blocks listed in `n`: patches (b, n,
        D), or (b, D, h, w) with `reshape`; with `return_class_token`, pairs (patches, class token).
        They do not pass the bottleneck. ValueError if there is no such block."""
        depth = len(self.blocks)
        wanted = range(depth - n, depth) if isinstance(n, int) else n
        if any(not 0 <= index < depth for index in wanted):
            raise ValueError(
                f"intermediate layers {n!r} asked of an encoder with {depth} blocks; count from 0"
                f" to {depth - 1}"
            )
        x, table, (h, w) = self._tokens(image)
        outputs = {}
        for index, block in enumerate(self.blocks):
            x = block(x, table)
            if index in wanted:
                tokens = self.norm(x) if norm else x
                patches = tokens[:, 1:]
                if reshape:
                    patches = rearrange(patches, "b (h w) c -> b c h w", h=h, w=w)
                outputs[index] = (patches, tokens[:, 0]) if return_class_token else patches
        return tuple(outputs[index] for index in sorted(outputs))

    def _tokens(self, image: Tensor, masks: Tensor | None = None):
        """Return class token and patches (b, 1 + n, D), the rotary table, and the grid (h, w)."""
        if image.ndim != 4 or image.shape[1] != 3 or min(image.shape[2:]) < self.patch_size:
            raise ValueError(
                f"images are {tuple(image.shape)}; must be (batch, 3, height, width), at least"
                f" {self.patch_size} pixels a side"
            )
        patches = self.patch_embed(image)
        h, w = patches.shape[-2:]
        patches = rearrange(patches, "b d h w -> b (h w) d")
        if masks is not None:
            patches = torch.where(masks[..., None], self.mask_token.to(patches.dtype), patches)
        x = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1)
        return x, self.rope_embed(h, w), (h, w)


class DinoVisionTransformerWithBottleneck(DinoVisionTransformer):
    """The trunk with a linear map D → `vit_feature_bottleneck` (no bias) after its last norm;
    without a map if the widths are equal."""

    def __init__(self, vit_feature_bottleneck: int = 64, **trunk):
        super().__init__(**trunk)
        self.vit_feature_bottleneck = vit_feature_bottleneck
        self.original_embed_dim = self.embed_dim
        self.feature_bottleneck = nn.Identity()
        if vit_feature_bottleneck != self.embed_dim:
            self.feature_bottleneck = nn.Linear(self.embed_dim, vit_feature_bottleneck, bias=False)
            init_linear(self.feature_bottleneck)

    def bottleneck(self, tokens: Tensor) -> Tensor:
        return self.feature_bottleneck(tokens)
