"""A plain diffusion transformer to compare with, as the field writes it: DiT and SiT (Peebles & Xie
2023; Ma et al. 2024) with the cross-attention of PixArt (Chen et al. 2023). Every block has its own
adaLN-Zero layer, attends to all tokens of all frames, and has a GELU MLP; positions are absolute
sines, and queries and keys are not normalised.

Axes: b sample · n token · d width · t text token; latents `(b, frames, rows, columns, channels)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmdit.interfaces import Denoiser, ModelSection, TextTokens
from mmdit.nn.conditioning import TimeEmbedding


@dataclass(frozen=True)
class PlainDiTConfig(ModelSection):
    type: Literal["plain_dit"] = "plain_dit"
    dim: int = 320
    depth: int = 8
    num_heads: int = 5
    mlp_ratio: float = 4.0
    freeze: bool = False


def sines(places: Tensor, dim: int) -> Tensor:
    """Return the absolute positions `(n, dim)` of `places (n,)` (Vaswani et al. 2017)."""
    steps = torch.arange(dim // 2, device=places.device) / (dim // 2)
    angles = places[:, None] * torch.exp(-math.log(10_000) * steps)
    return torch.cat([angles.sin(), angles.cos()], 1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return `x (b, n, d)` without mean and scale, with those of its sample `(b, d)`."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor, valid: Tensor | None = None) -> Tensor:
        """`x (b, n, d)`, `context (b, m, d)`, `valid (b, m)` → `(b, n, d)`."""
        parts = (self.q(x), self.k(context), self.v(context))
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.num_heads) for part in parts)
        mask = None if valid is None else valid[:, None, None]
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(rearrange(seen, "b h n d -> b n (h d)"))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, reads: bool = True):
        super().__init__()
        self.adaln = nn.Linear(dim, 6 * dim)
        self.attention = Attention(dim, num_heads)
        self.cross = Attention(dim, num_heads) if reads else None
        self.up = nn.Linear(dim, int(mlp_ratio * dim))
        self.down = nn.Linear(int(mlp_ratio * dim), dim)

    def forward(self, x: Tensor, condition: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaln(condition).chunk(6, 1)
        seen = modulate(x, shift, scale)
        x = x + gate[:, None] * self.attention(seen, seen)
        if self.cross is not None:
            x = x + self.cross(x, text, valid)
        hidden = F.gelu(self.up(modulate(x, mlp_shift, mlp_scale)), approximate="tanh")
        return x + mlp_gate[:, None] * self.down(hidden)


class PlainDiT(Denoiser):
    def __init__(self, config: PlainDiTConfig, latent_channels: int, text_dim: int):
        super().__init__()
        self.config, dim = config, config.dim
        self.input = nn.Linear(latent_channels, dim)
        self.time = TimeEmbedding(dim)
        self.caption = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.null = nn.Parameter(torch.randn(dim) * 0.02)  # what a dropped caption attends to
        self.blocks = nn.ModuleList(self.make_block(index) for index in range(config.depth))
        self.final_adaln = nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, latent_channels)
        self.init_weights()

    def make_block(self, index: int) -> Block:
        return Block(self.config.dim, self.config.num_heads, self.config.mlp_ratio)

    def init_weights(self) -> None:
        """Uniform Xavier; zero for modulation, output, and PixArt's attention to text."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, weight in self.named_parameters():
            if name.endswith(("adaln.weight", "cross.proj.weight", "output.weight")):
                nn.init.zeros_(weight)

    def can_be_captured(self, training: bool) -> bool:
        return training

    def forward(self, x: Tensor, t: Tensor, text: TextTokens) -> Tensor:
        frames, rows, columns = x.shape[1:4]
        condition = F.silu(self.time(t))
        captions = self.caption(text.embeddings.masked_fill(~text.valid[..., None], 0))
        tokens = torch.cat([self.null.expand(len(x), 1, -1).to(captions.dtype), captions], 1)
        valid = F.pad(text.valid, (1, 0), value=True)
        h = self.input(rearrange(x, "b f r c d -> b (f r c) d")) + self.places(x)
        h = self.run(h, frames, condition, tokens, valid)
        h = self.output(modulate(h, *self.final_adaln(condition).chunk(2, 1)))
        return rearrange(h, "b (f r c) d -> b f r c d", f=frames, r=rows, c=columns).to(x.dtype)

    def places(self, x: Tensor) -> Tensor:
        """Return the absolute positions `(frames · rows · columns, d)` of the tokens of `x`."""
        dim, axes = self.config.dim, (torch.arange(n, device=x.device) for n in x.shape[1:4])
        frame, row, column = (grid.flatten() for grid in torch.meshgrid(*axes, indexing="ij"))
        where = torch.cat([sines(row, dim // 2), sines(column, dim // 2)], 1)
        return where + sines(frame, dim) if x.shape[1] > 1 else where

    def run(self, h: Tensor, frames: int, condition: Tensor, *text: Tensor) -> Tensor:
        """Return the tokens `h (b, f · r · c, d)` after all blocks; `text`: tokens and validity."""
        for block in self.blocks:
            h = block(h, condition, *text)
        return h

    def keys(self, index: int, frames: int, cells: int) -> int:
        return frames * cells  # that a token sees in the attention of a block

    def train_flops(
        self, grid: tuple[int, int, int], text_tokens: int, kept: int | None = None
    ) -> int:
        cells, text, total = grid[1] * grid[2], 1 + text_tokens, 0
        tokens = grid[0] * cells
        rows = {"adaln": 1, "time.": 1, "caption.": text, "cross.k.": text, "cross.v.": text}
        for name, weight in self.named_parameters():
            if weight.ndim == 2:  # forward, and the gradients of input and weight
                times = next((rows[part] for part in rows if part in name), tokens)
                total += weight.numel() * (2 + weight.requires_grad) * times
        for index, block in enumerate(self.blocks):
            seen = self.keys(index, grid[0], cells) + (0 if block.cross is None else text)
            total += 6 * tokens * self.config.dim * seen
        return 2 * total
