"""Words as fixed random vectors: no download, nothing to train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit import rng
from mmdit.config import ConfigError, most
from mmdit.interfaces import TextEncoder, TextEncoderSection, TextTokens
from mmdit.text_encoders.words import MOST_WORDS, WordRows, place_table, split_words


@dataclass(frozen=True)
class HashConfig(TextEncoderSection):
    """Fixed random vectors for words: no download, nothing to train."""

    # Chooses hashed words.
    type: Literal["hash"] = "hash"
    # Width of its tokens.
    dim: int = 256
    # The most words of a caption that are read.
    max_length: int = 77
    # Always true: there is nothing to train.
    freeze: bool = True

    def __post_init__(self):
        if self.dim < 2 or self.dim % 2:
            raise ConfigError("dim", f"is {self.dim}; must be even and at least 2; 256 is usual")
        if self.max_length < 1:
            raise ConfigError("max_length", f"is {self.max_length}; must be at least 1 word")
        most(self, MOST_WORDS, "max_length")
        if not self.freeze:
            raise ConfigError(
                "freeze", "is false, but hash has nothing to train; set true, or type: byte_level"
            )


class HashEncoder(TextEncoder):
    """Represents each word by a standard normal vector, drawn with the word as key, plus a sinusoid
    of its place. The vectors are the same on every rank, machine and run, so nothing is saved. Case
    and surrounding punctuation do not count; only the sinusoid carries the word order."""

    def __init__(self, config: HashConfig):
        super().__init__()
        self.dim = config.dim
        self.words = WordRows(lambda chunk: split_words(chunk)[1], self._draw, config.max_length)
        self.positions: Tensor
        self.register_buffer(
            "positions", place_table(config.max_length, config.dim), persistent=False
        )

    def _draw(self, words: list[str]) -> Tensor:
        keys = torch.tensor([rng.key(word) for word in words], dtype=torch.long)
        return rng.Draws(seed=0, step=0, indices=keys).normal("hash text encoder", self.dim)

    @torch.no_grad()
    def forward(self, captions: list[str]) -> TextTokens:
        """Return the tokens `(B, T, dim)` of B captions, float32 on this module's device. T is the
        number of words in the longest caption."""
        rows, index, valid = self.words(captions, self.positions.device)
        embeddings = F.embedding(index, rows) + self.positions[: index.shape[1]]
        return TextTokens(torch.where(valid[..., None], embeddings, 0.0), valid)
