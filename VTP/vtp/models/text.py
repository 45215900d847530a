"""The text tower of the contrastive loss: a causal pre-norm transformer in the manner of CLIP
(Radford et al. 2021).

Axes: b batch, n = context_length tokens, d head width. `scaled_dot_product_attention` makes the
causal mask. The public release keeps it in a non-persistent buffer, which transformers ≥ 5 leaves
uninitialised; this silently ruins its text features.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vtp.models.layers import LayerScale, init_linear, init_normal

POOLS = ("argmax", "first", "last", "none")


class TextAttention(nn.Module):
    """Multi-head self-attention with the parameter names of `nn.MultiheadAttention`."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.in_proj_weight, std=0.02)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = rearrange(
            qkv, "b n (three heads d) -> three b heads n d", three=3, heads=self.num_heads
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(rearrange(h, "b heads n d -> b n (heads d)"))


class TextMlp(nn.Module):
    """c_proj(gelu(c_fc x)); `quick_gelu` is x · sigmoid(1.702 x)."""

    def __init__(self, dim: int, hidden: int, quick_gelu: bool):
        super().__init__()
        self.c_fc = nn.Linear(dim, hidden)
        self.c_proj = nn.Linear(hidden, dim)
        self.quick_gelu = quick_gelu

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(x)
        return self.c_proj(h * torch.sigmoid(1.702 * h) if self.quick_gelu else F.gelu(h))


class TextBlock(nn.Module):
    """Pre-norm attention and feed-forward with optional LayerScale: None disables it, 0.0 does
    not."""

    def __init__(
        self, dim: int, num_heads: int, ratio: float, ls_init_value: float | None, quick_gelu: bool
    ):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = TextAttention(dim, num_heads)
        self.ls_1 = nn.Identity() if ls_init_value is None else LayerScale(dim, ls_init_value)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = TextMlp(dim, int(dim * ratio), quick_gelu)
        self.ls_2 = nn.Identity() if ls_init_value is None else LayerScale(dim, ls_init_value)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.ls_1(self.attn(self.ln_1(x), causal))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class TextBlocks(nn.Module):
    """The residual blocks, under the name that the released weights have for them."""

    def __init__(self, depth: int, causal: bool, **block):
        super().__init__()
        self.resblocks = nn.ModuleList(TextBlock(**block) for _ in range(depth))
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x, self.causal)
        return x


class TextTransformer(nn.Module):
    """The whole tower: maps ids (b, context_length) to features (b, embed_dim); with pool_type
    "none", to one feature for each token.

    Arguments are the `text_*` keys of config.json. `VTPModel` holds the parts of a tower as its own
    attributes, as the released weights name them. ValueError for an unknown pool_type, a width not
    divisible by the heads, and ids of another length.
    """

    def __init__(
        self,
        context_length: int = 77,
        vocab_size: int = 49408,
        embed_dim: int = 768,
        num_heads: int = 12,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = None,
        no_causal_mask: bool = False,
        pool_type: str = "argmax",
        proj_type: str = "linear",
        proj_bias: bool = False,
        quick_gelu: bool = False,
    ):
        super().__init__()
        if pool_type not in POOLS:
            raise ValueError(f"text_pool_type is {pool_type!r}; must be one of {', '.join(POOLS)}")
        if embed_dim % num_heads:
            raise ValueError(
                f"text_embed_dim {embed_dim} is not divisible by text_num_heads {num_heads}"
            )
        self.text_pool_type = pool_type
        self.token_embedding = nn.Embedding(vocab_size, embed_dim)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, embed_dim))
        self.text_transformer = TextBlocks(
            depth,
            causal=not no_causal_mask,
            dim=embed_dim,
            num_heads=num_heads,
            ratio=mlp_ratio,
            ls_init_value=ls_init_value,
            quick_gelu=quick_gelu,
        )
        self.ln_final = nn.LayerNorm(embed_dim)
        self.text_projection = None
        if proj_type != "none" and proj_bias:
            self.text_projection = nn.Linear(embed_dim, embed_dim)
        elif proj_type != "none":
            self.text_projection = nn.Parameter(torch.empty(embed_dim, embed_dim))
        self.apply(init_linear)
        init_normal(self.token_embedding.weight, 0.02)
        init_normal(self.positional_embedding, 0.01)
        if isinstance(self.text_projection, nn.Parameter):
            init_normal(self.text_projection, embed_dim**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return text_features(self, ids)


def text_features(tower: nn.Module, ids: Tensor) -> Tensor:
    """Return the features of ids (b, context_length). `tower` is a `TextTransformer`, or a model
    that has the parts of one as its own attributes."""
    length = len(tower.positional_embedding)
    if ids.ndim != 2 or ids.shape[1] != length:
        raise ValueError(
            f"text ids are {tuple(ids.shape)}; must be (batch, {length}): use"
            f" get_tokenizer(context_length={length})"
        )
    x = tower.token_embedding(ids) + tower.positional_embedding
    x = tower.ln_final(tower.text_transformer(x))
    match tower.text_pool_type:
        case "argmax":  # the end token has the largest id
            x = x[torch.arange(len(x), device=x.device), ids.argmax(dim=-1)]
        case "first":
            x = x[:, 0]
        case "last":
            x = x[:, -1]
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Module) else x @ projection
