"""Tokenize text as bytes: needs no file, takes any language. For small text towers such as that of
the shipped checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor


def pad(rows: list[list[int]], context_length: int) -> Tensor:
    """Return id lists as a tensor (b, context_length), padded with zeros; a row that is too long is
    cut, and its last id, the end, stays last."""
    ids = torch.zeros(len(rows), context_length, dtype=torch.long)
    for i, row in enumerate(rows):
        cut = row if len(row) <= context_length else [*row[: context_length - 1], row[-1]]
        ids[i, : len(cut)] = torch.tensor(cut)
    return ids


class ByteTokenizer:
    """UTF-8 bytes 0..255 between start (256) and end (257)."""

    start, end, vocab_size = 256, 257, 258

    def __init__(self, context_length: int = 77):
        if context_length < 2:
            raise ValueError(
                f"context_length is {context_length}; must hold at least the start and the end"
                " id (2)"
            )
        self.context_length = context_length

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """Return (b, context_length) int64 ids."""
        texts = [texts] if isinstance(texts, str) else texts
        return pad(
            [[self.start, *text.encode(), self.end] for text in texts],
            context_length or self.context_length,
        )
