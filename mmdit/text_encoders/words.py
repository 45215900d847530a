"""Captions as words, without a vocabulary file: what the hash and byte-level encoders share."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from mmdit.nn.position import rotary_tables

logger = logging.getLogger(__name__)

_UNSPACED = (  # scripts without spaces (kana, Han): each sign is a word
    "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
)
_PARTS = re.compile(f"[{_UNSPACED}]|[^{_UNSPACED}]+")
PLACE_BASE = 100.0
MOST_WORDS = 65_536  # of a caption
MEMORY = 1 << 16  # distinct words kept; beyond that all are forgotten and read anew


def split_words(chunk: str) -> tuple[list[str], list[str], list[str]]:
    """Split text without spaces into (opening punctuation, words, closing punctuation): `("` ·
    `red` · `,`. Words are lower case and composed Unicode, so that é is one letter however it was
    typed. Punctuation inside a word stays: `left-moving`, `don't`, `3.5`."""
    # half of a surrogate pair, which broken JSON can hold, becomes "?"
    chunk = chunk.encode("utf-8", "replace").decode()
    chunk = unicodedata.normalize("NFC", chunk.lower())
    first, last = 0, len(chunk)
    while first < last and unicodedata.category(chunk[first]).startswith("P"):
        first += 1
    while last > first and unicodedata.category(chunk[last - 1]).startswith("P"):
        last -= 1
    return list(chunk[:first]), _PARTS.findall(chunk[first:last]), list(chunk[last:])


def place_table(max_length: int, dim: int) -> Tensor:
    """Return sinusoids `(max_length, dim)` of a word's place (Vaswani et al. 2017); the slowest
    turns by a radian in 100 words."""
    tables = rotary_tables(torch.arange(max_length)[:, None], dim, PLACE_BASE)
    return torch.cat(tables, dim=-1).float()


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Copy a new tensor to `device` without waiting for the work that is queued there; a copy from
    pageable memory would wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class WordRows:
    """Turns captions into indices into a small table of the distinct words of a batch. `split`
    returns the words of a piece of text without spaces, `describe` the rows `(n, width)` of n new
    words. Both are called once per text, and captions are remembered: in small networks, reading
    2,048 captions anew would take longer than the GPU's step."""

    def __init__(
        self,
        split: Callable[[str], list[str]],
        describe: Callable[[list[str]], Tensor],
        max_length: int,
    ):
        self.split, self.describe, self.max_length = split, describe, max_length
        self.reported = False
        self.forget()

    def forget(self) -> None:
        self.captions: dict[str, np.ndarray] = {}  # caption → rows of its words, cut to max_length
        self.numbers: dict[str, int] = {}  # word → row
        self.chunks: dict[str, list[int]] = {}  # piece of text → rows
        self.rows = self.describe([])

    def __call__(self, captions: list[str], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return `rows (U, width)` of the distinct words in order of appearance, `index (B, T)`
        into them, and `valid (B, T)` bool, all on `device`. T is the length of the longest caption
        of the batch, at least 1. Where nothing is valid, `index` is 0, and U is at least 1."""
        if max(len(self.numbers), len(self.chunks)) > MEMORY:
            self.forget()
        elif len(self.captions) > MEMORY:
            self.captions = {}
        if new := [caption for caption in dict.fromkeys(captions) if caption not in self.captions]:
            self._read(new)
        numbers = [self.captions[caption] for caption in captions]
        lengths = np.fromiter(map(len, numbers), np.int64, len(numbers))
        flat = np.concatenate([*numbers, np.empty(0, np.int64)])
        first = np.full(len(self.numbers), -1)  # where each word first occurs in this batch
        # if an index occurs several times, numpy keeps the last value
        first[flat[::-1]] = np.arange(len(flat))[::-1]
        distinct = np.flatnonzero(first >= 0)
        distinct = distinct[first[distinct].argsort()]
        first[distinct] = np.arange(len(distinct))
        valid = np.arange(lengths.max(initial=1)) < lengths[:, None]
        # numpy, because torch wakes all its threads for an indexed write
        index = np.zeros(valid.shape, dtype=np.int64)
        index[valid] = first[flat]
        rows = self.rows[torch.from_numpy(distinct)]
        if not len(distinct):
            rows = self.rows.new_zeros(1, self.rows.shape[1])
        place = partial(upload, device=device)
        return place(rows), place(torch.from_numpy(index)), place(torch.from_numpy(valid))

    def _read(self, captions: list[str]) -> None:
        pieces = [caption.split() for caption in captions]
        if new := set(chain.from_iterable(pieces)) - self.chunks.keys():
            self._learn(sorted(new))
        numbers = [
            list(chain.from_iterable(map(self.chunks.__getitem__, piece))) for piece in pieces
        ]
        if (longest := max(map(len, numbers))) > self.max_length:
            self._report(longest)
        for caption, words in zip(captions, numbers):
            self.captions[caption] = np.array(words[: self.max_length], np.int64)

    def _learn(self, chunks: list[str]) -> None:
        known = len(self.numbers)
        for chunk in chunks:
            self.chunks[chunk] = [
                self.numbers.setdefault(word, len(self.numbers)) for word in self.split(chunk)
            ]
        words = list(self.numbers)[known:]
        self.rows = torch.cat([self.rows, self.describe(words)])

    def _report(self, longest: int) -> None:
        if not self.reported:
            message = (
                "a caption has %d words, text_encoder.max_length is %d: the rest is not read (said"
                " once)"
            )
            logger.warning(message, longest, self.max_length)
        self.reported = True
