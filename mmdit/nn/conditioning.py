"""Embed what conditions a network besides its input: the time, the crop, a small clip and the
text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.interfaces import TextTokens
from mmdit.nn.norm import RMSNorm, upcast


class Perceptron(nn.Sequential):
    """Two linear layers with a SiLU between them."""

    def __init__(self, width: int, dim: int):
        super().__init__(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))

    @property
    def dtype(self) -> torch.dtype:
        """Return the type that the input must have."""
        first = self[0]
        assert isinstance(first, nn.Linear)
        return first.weight.dtype


class TimeEmbedding(nn.Module):
    """`t (b,)` on a scale of about 1000 → `(b, dim)`: sinusoids (Vaswani et al. 2017), then a small
    network."""

    frequencies = 128

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = Perceptron(2 * self.frequencies, dim)

    def forward(self, t: Tensor) -> Tensor:
        steps = torch.arange(self.frequencies, dtype=torch.float32, device=t.device)
        angles = upcast(t)[:, None] * torch.exp(-math.log(10_000) * (steps / self.frequencies))
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp.dtype))


class CropEmbedding(nn.Module):
    """Embeds which part of its picture a sample shows, `(b, 4)` left, top, right, bottom as shares,
    as `(b, dim)`: the conditioning on crop coordinates of SDXL (Podell et al. 2023, section 2.2).
    Zero before training, for any crop.
    """

    frequencies = 8  # half periods, from the whole picture down to 1/128 of it

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = Perceptron(8 * self.frequencies, dim)

    def init_weights(self) -> None:
        last = self.mlp[2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)

    def forward(self, crop: Tensor) -> Tensor:
        turns = (
            upcast(crop)[..., None]
            * 2.0 ** torch.arange(self.frequencies, device=crop.device)
            * math.pi
        )
        return self.mlp(torch.cat([turns.cos(), turns.sin()], dim=-1).flatten(1).to(self.mlp.dtype))


class LowResolution(nn.Module):
    """Embeds a small clip that a network redraws: the clip's latents, enlarged and noised, and the
    level of that noise (conditioning augmentation, Ho et al. 2021, Cascaded Diffusion Models,
    section 4). Both embeddings are zero before training, so that a model starts as it was without
    them.
    """

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.clip = nn.Linear(channels, dim)
        self.level = TimeEmbedding(dim)

    def init_weights(self) -> None:
        last = self.level.mlp[2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(self.clip.weight)


class TextContext(nn.Module):
    """Captions as attention context: a learned null token, always valid, and then the caption's
    tokens. A dropped caption attends to the null token alone."""

    def __init__(self, text_dim: int, dim: int):
        super().__init__()
        self.norm = RMSNorm(text_dim)
        self.embed = nn.Linear(text_dim, dim)
        self.null = nn.Parameter(torch.empty(dim))

    def forward(self, text: TextTokens) -> tuple[Tensor, Tensor]:
        """Return tokens `(b, 1 + t, dim)` and their validity `(b, 1 + t)`. The values of invalid
        embeddings, even NaN, have no effect."""
        embeddings = torch.where(
            text.valid[..., None], text.embeddings, torch.zeros_like(text.embeddings)
        )
        tokens = self.embed(self.norm(embeddings).to(self.embed.weight.dtype))
        null = self.null.to(tokens.dtype).expand(len(tokens), 1, -1)
        return torch.cat([null, tokens], dim=1), F.pad(text.valid, (1, 0), value=True)


class PooledText(nn.Module):
    """The caption as one vector: the mean of its valid tokens through a small network, or a learned
    vector if it has none."""

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = Perceptron(dim, dim)
        self.null = nn.Parameter(torch.empty(dim))

    def forward(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """`tokens (b, t, dim)`, `valid (b, t)` → `(b, dim)`."""
        count = valid.sum(dim=1, keepdim=True)
        total = upcast(tokens * valid[..., None]).sum(dim=1)
        pooled = self.mlp((total / count.clamp(min=1)).to(self.null.dtype))
        return torch.where(count > 0, pooled, self.null)


@dataclass(frozen=True)
class PreparedText:
    """All that a model computes from captions alone. `context`: for each block, tokens `(b, t, d)`
    or their keys and values; `valid (b, t)`; `pooled (b, d)`, or 0 in a model without it."""

    context: list[Tensor | tuple[Tensor, Tensor]]
    valid: Tensor
    pooled: Tensor | int


def repeated_to_batch(rows: Tensor, x: Tensor) -> Tensor:
    """Return `rows (n, …)` repeated to the number of samples of `x (b, …)`: guidance puts each
    sample into a batch twice."""
    return rows.repeat(len(x) // len(rows), *[1] * (rows.ndim - 1))
