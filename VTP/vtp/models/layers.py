"""Transformer blocks shared by the encoder and the pixel decoder. Axes: b batch, n tokens, d head
width."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vtp.models.rope import Table, rotate


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis; statistics in float32, the result cast to x's dtype
    *before* the weight."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class LayerScale(nn.Module):
    """A learned gain per channel on a residual branch (Touvron et al. 2021), started at `init`."""

    def __init__(self, dim: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def make_norm(name: str, dim: int) -> nn.Module:
    """Return the norm of this name in config.json: layernorm (eps 1e-6), layernormbf16 (eps 1e-5)
    or rmsnorm (eps 1e-5)."""
    match name:
        case "layernorm":
            return nn.LayerNorm(dim, eps=1e-6)
        case "layernormbf16":
            return nn.LayerNorm(dim, eps=1e-5)
        case "rmsnorm":
            return RMSNorm(dim)
    raise ValueError(f"norm_layer is {name!r}; must be layernorm, layernormbf16 or rmsnorm")


class Mlp(nn.Module):
    """fc2(gelu(fc1 x)), exact GELU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """w3(silu(w1 x) ⊙ w2 x) (Shazeer 2020); two thirds of `hidden`, rounded up to a multiple of
    `multiple`."""

    def __init__(self, dim: int, hidden: int, multiple: int):
        super().__init__()
        inner = -(-(hidden * 2 // 3) // multiple) * multiple
        self.w1 = nn.Linear(dim, inner)
        self.w2 = nn.Linear(dim, inner)
        self.w3 = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


_MULTIPLES = {"swiglu": 8, "swiglu32": 32, "swiglu64": 64, "swiglu128": 128}


def make_ffn(name: str, dim: int, ratio: float) -> nn.Module:
    """Return the MLP of this name in config.json: mlp, swiglu, swiglu32, swiglu64 or swiglu128."""
    hidden = int(dim * ratio)
    if name == "mlp":
        return Mlp(dim, hidden)
    if name in _MULTIPLES:
        return SwiGLU(dim, hidden, _MULTIPLES[name])
    raise ValueError(f"ffn_layer is {name!r}; must be mlp, {', '.join(_MULTIPLES)}")


class Attention(nn.Module):
    """Self-attention over tokens rotated by their place in the grid; optional RMSNorm per head on q
    and k before that."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, table: Table) -> Tensor:
        q, k, v = rearrange(
            self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.num_heads
        )
        q, k = (
            rotate(norm(y), table).to(v.dtype) for norm, y in ((self.q_norm, q), (self.k_norm, k))
        )
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(h, "b heads n d -> b n (heads d)"))


class Block(nn.Module):
    """Pre-norm attention and feed-forward with optional LayerScale; `x (b, n, dim)` to the same."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ratio: float,
        ffn: str,
        norm: str,
        init_values: float | None,
        qk_norm: bool,
    ):
        super().__init__()
        self.norm1 = make_norm(norm, dim)
        self.attn = Attention(dim, num_heads, qk_norm)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = make_norm(norm, dim)
        self.mlp = make_ffn(ffn, dim, ratio)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()

    def forward(self, x: Tensor, table: Table, drop_ratio: float = 0.0) -> Tensor:
        """Add both branches to `x`. drop_ratio: stochastic depth, the share of samples that skip
        each branch (0 outside training)."""
        x = _add_branch(x, lambda kept: self.ls1(self.attn(self.norm1(kept), table)), drop_ratio)
        return _add_branch(x, lambda kept: self.ls2(self.mlp(self.norm2(kept))), drop_ratio)


def _add_branch(x: Tensor, branch, drop_ratio: float) -> Tensor:
    """Return `x + branch(x)`. With a drop ratio, only a random subset of the batch passes through
    the branch, whose output is scaled up to keep the mean (DINOv2)."""
    if not drop_ratio:
        return x + branch(x)
    count = max(int(len(x) * (1 - drop_ratio)), 1)
    kept = torch.randperm(len(x), device=x.device)[:count]
    return x.index_add(0, kept, branch(x[kept]).to(x.dtype), alpha=len(x) / count)


def make_blocks(depth: int, dim: int, num_heads: int, *options) -> nn.ModuleList:
    """Return `depth` blocks. ValueError if the width is not divisible by the number of heads."""
    if dim % num_heads:
        raise ValueError(f"embed_dim {dim} is not divisible by num_heads {num_heads}")
    return nn.ModuleList(Block(dim, num_heads, *options) for _ in range(depth))


@torch.no_grad()
def init_normal(tensor: Tensor, std: float) -> None:
    """Fill a tensor with normally distributed numbers of deviation `std`. On the meta device this
    does nothing: torch would import its compiler, which takes a second at the start of every
    command."""
    if not tensor.is_meta:
        nn.init.normal_(tensor, std=std)


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as the release does: weights truncated normal 0.02, biases 0. For
    `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
