"""A small text encoder that is trained with the model and reads any language: words are spelt, not
looked up.

Axes: b caption · t word · u distinct word of the batch · h head · d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmdit.config import MOST_BLOCKS, ConfigError, least, most
from mmdit.interfaces import TextEncoder, TextEncoderSection, TextTokens
from mmdit.nn.attention import Attention, attend
from mmdit.nn.feedforward import GELU
from mmdit.nn.norm import RMSNorm, rms_norm
from mmdit.text_encoders.words import MOST_WORDS, WordRows, place_table, split_words

WORD_BYTES = 16  # longer words become several tokens
NO_BYTE = 0


@dataclass(frozen=True)
class ByteLevelConfig(TextEncoderSection):
    """A small encoder that is trained with the model and reads any language."""

    # Chooses the byte-level encoder.
    type: Literal["byte_level"] = "byte_level"
    # Width of its tokens.
    dim: int = 256
    # Layers of attention over the words of a caption.
    depth: int = 2
    # Heads of attention; must divide `dim`.
    num_heads: int = 4
    # How many adjacent words a convolution mixes before the layers, an odd number: 5 are a word
    # and two on each side of it; 1 mixes none. The tokens then show from the first step which
    # colour, number or place belongs to which noun.
    convolution: int = 1
    # The most words of a caption that are read; a word of more than 16 bytes counts for several.
    max_length: int = 77
    # Leave its weights as they are.
    freeze: bool = False
    # Its learning rate as a multiple of `train.lr`.
    lr_scale: float = 1.0

    def __post_init__(self):
        if not 0 < self.lr_scale <= 1000:
            raise ConfigError(
                "lr_scale",
                f"is {self.lr_scale}; must be above 0 and at most 1000; freeze: true trains"
                " nothing",
            )
        least(self, 2, "dim")
        least(self, 0, "depth")
        least(self, 1, "num_heads", "max_length")
        most(self, MOST_BLOCKS, "depth")
        most(self, MOST_WORDS, "max_length")
        if self.convolution < 1 or self.convolution % 2 == 0:
            raise ConfigError(
                "convolution",
                f"is {self.convolution}; must be odd and at least 1, which mixes no words: a word"
                " has as many neighbours before it as behind it",
            )
        if self.dim % 2 or self.dim % self.num_heads:
            raise ConfigError(
                "dim",
                f"is {self.dim}; must be even and a multiple of num_heads, which is"
                f" {self.num_heads}",
            )


def spell(chunk: str) -> list[str]:
    """Return the words and punctuation marks of a text without spaces; long words are cut between
    letters into pieces of at most `WORD_BYTES` bytes."""
    pieces = []
    for word in sum(split_words(chunk), []):
        size = WORD_BYTES + 1
        for letter in word:
            needed = len(letter.encode())
            if size + needed > WORD_BYTES:
                pieces.append("")
                size = 0
            pieces[-1] += letter
            size += needed
    return pieces


def byte_rows(words: list[str]) -> Tensor:
    """Return rows of the embedding table, `(len(words), WORD_BYTES)` int64: for each byte of a word
    the row of that byte at that place, and NO_BYTE after the end."""
    rows = torch.full((len(words), WORD_BYTES), NO_BYTE)
    for row, word in zip(rows, words, strict=True):
        content = torch.tensor(list(word.encode()))
        row[: len(content)] = 1 + 256 * torch.arange(len(content)) + content
    return rows


def side_by_side(words: Tensor, count: int) -> Tensor:
    """Return, for each of the words `(b, t, d)`, the vectors of the `count` words around it (an odd
    number, the word included) joined to one: `(b, t, count·d)`. Beyond both ends there are
    zeros."""
    length, reach = words.shape[1], count // 2
    padded = F.pad(words, (0, 0, reach, reach))
    return torch.cat([padded[:, first : first + length] for first in range(count)], dim=-1)


class Layer(nn.Module):
    """Pre-norm self-attention and MLP over the words of a caption."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.attention_norm, self.mlp_norm = RMSNorm(dim), RMSNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.mlp = GELU(dim, ratio=2)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Return the words after this layer, of the same shape as `x (b, t, h·d)`. `valid (b, t)`
        must have a valid word in every caption."""
        h = self.attention_norm(x)
        q, k, v = (rearrange(z, "b t h d -> b h t d") for z in self.attention.heads(h, h))
        x = x + self.attention.output(
            rearrange(attend(q, k, v, valid[:, None, None]), "b h t d -> b t (h d)")
        )
        return x + self.mlp(self.mlp_norm(x))


class ByteLevelEncoder(TextEncoder):
    """Reads words by their bytes. A word is the sum of one vector per (place, byte), so that every
    spelling has its own sum. An MLP turns this into a token (once per distinct word of the batch),
    a convolution may add the word's neighbours, and attention then reads the words in order."""

    def __init__(self, config: ByteLevelConfig):
        super().__init__()
        self.dim = dim = config.dim
        self.lr_scale = config.lr_scale
        self.words = WordRows(spell, byte_rows, config.max_length)
        self.bytes = nn.Embedding(
            1 + 256 * WORD_BYTES, dim, padding_idx=NO_BYTE
        )  # standard normal: words differ from the start
        self.word_mlp = GELU(dim, ratio=2)
        self.convolution = config.convolution
        if config.convolution > 1:
            self.neighbours = nn.Linear(config.convolution * dim, dim, bias=False)
        self.layers = nn.ModuleList(Layer(dim, config.num_heads) for _ in range(config.depth))
        self.norm = RMSNorm(dim)
        self.positions: Tensor
        self.register_buffer("positions", place_table(config.max_length, dim), persistent=False)
        self.requires_grad_(not config.freeze)

    def forward(self, captions: list[str]) -> TextTokens:
        """Return the tokens `(B, T, dim)` of B captions, float32 on this module's device, of about
        unit variance. T is the number of words in the longest caption."""
        device = self.positions.device
        rows, index, valid = self.words(captions, device)
        words = rms_norm(self.bytes(rows).sum(dim=1))  # (u, dim)
        words = words + self.word_mlp(words)
        length = index.shape[1]
        x = F.embedding(index, words)
        if self.convolution > 1:
            read = torch.where(valid[..., None], x, 0.0)
            x = x + self.neighbours(side_by_side(read, self.convolution))
        x = x + self.positions[:length]
        # An empty caption attends to its first padding: on some devices, a softmax over nothing
        # gives nan.
        readable = valid | (
            ~valid.any(dim=1, keepdim=True) & (torch.arange(length, device=device) == 0)
        )
        for layer in self.layers:
            x = layer(x, readable)
        return TextTokens(torch.where(valid[..., None], self.norm(x).float(), 0.0), valid)
