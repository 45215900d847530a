"""The byte-pair tokenizer of CLIP (Radford et al. 2021; Sennrich et al. 2016), with the standard
library alone.

open_clip first repairs broken and typographic characters with ftfy; apart from those the ids are
the same.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import re
import unicodedata
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from vtp.tokenizers.byte import pad

MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 49152 - 256 - 2  # lines of the file that are used, after its heading
START, END = "<start_of_text>", "<end_of_text>"  # as open_clip spells them
_WORD_END = "</w>"


def _byte_letters() -> tuple[list[str], list[str]]:
    """Return a printable letter for each byte, once in the order of the ids and once in that of the
    bytes: the byte's own letter, or the next free one from code point 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in printable + others], [letters[byte] for byte in range(256)]


@lru_cache(maxsize=1)
def _pattern() -> re.Pattern:
    """Return the pattern that splits text into words: special words, English contractions, runs of
    letters, single digits, runs of other characters."""
    # `re` has no \p{N}: its \d lacks numbers such as ², Ⅷ and ½, which its \w counts as letters.
    numbers = "".join(
        c for c in map(chr, range(0x110000)) if unicodedata.category(c) in ("Nl", "No")
    )
    contractions = "'s|'t|'re|'ve|'m|'ll|'d"
    special = f"{re.escape(START)}|{re.escape(END)}"
    return re.compile(
        rf"{special}|{contractions}|[^\W\d_{numbers}]+|[\d{numbers}]|(?:[^\s\w]|_)+", re.IGNORECASE
    )


def _find_merges() -> Path:
    spec = importlib.util.find_spec("open_clip")
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    for folder in folders:
        if (Path(folder) / MERGES_FILE).is_file():
            return Path(folder) / MERGES_FILE
    raise FileNotFoundError(
        f"no {MERGES_FILE}: pip install open_clip_torch, or give the path of the file"
        " (github.com/openai/CLIP, clip/) as merges"
    )


class SimpleTokenizer:
    """Has 49,408 ids: 256 bytes, the same at the end of a word, 48,894 merges, start 49406, end
    49407.

    merges: path of the gzipped merges file; None takes that of an installed open_clip.
    FileNotFoundError if it is not there, ValueError if it is another file.
    """

    def __init__(self, merges: str | Path | None = None, context_length: int = 77):
        path = Path(merges) if merges is not None else _find_merges()
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no merges file {str(path)!r}; give the path of {MERGES_FILE}"
            )
        try:
            lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : MERGES + 1]
        except (OSError, EOFError, UnicodeError) as error:
            raise ValueError(f"{path} is not a gzipped merges file: {error}") from None
        pairs = [tuple(line.split()) for line in lines if line]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(
                f"{path} is not a merges file: each line after the first must be two words"
            )
        self.context_length = context_length
        letters, self._letter_of_byte = _byte_letters()
        words = [
            *letters,
            *(letter + _WORD_END for letter in letters),
            *map("".join, pairs),
            START,
            END,
        ]
        self.encoder = {word: i for i, word in enumerate(words)}
        self._ranks = {pair: i for i, pair in enumerate(pairs)}
        self._merged = lru_cache(maxsize=1 << 16)(self._merge)
        self.vocab_size = len(words)
        self.start, self.end = self.encoder[START], self.encoder[END]

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without start and end."""
        text = " ".join(html.unescape(html.unescape(text)).split()).lower()
        ids = []
        for word in _pattern().findall(text):
            if word in (START, END):
                ids.append(self.encoder[word])
            else:
                ids += self._merged("".join(self._letter_of_byte[byte] for byte in word.encode()))
        return ids

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """Return (b, context_length) int64 ids, between start and end."""
        texts = [texts] if isinstance(texts, str) else texts
        return pad(
            [[self.start, *self.encode(text), self.end] for text in texts],
            context_length or self.context_length,
        )

    def _merge(self, word: str) -> tuple[int, ...]:
        """Return the ids of a word: join the neighbouring parts of the lowest rank until no pair is
        in the list of merges."""
        parts = [*word[:-1], word[-1] + _WORD_END]
        while len(parts) > 1:
            best = min(
                zip(parts, parts[1:], strict=False),
                key=lambda pair: self._ranks.get(pair, len(self._ranks)),
            )
            if best not in self._ranks:
                break
            joined, i = [], 0
            while i < len(parts):
                pair = tuple(parts[i : i + 2])
                joined.append("".join(pair) if pair == best else parts[i])
                i += 2 if pair == best else 1
            parts = joined
        return tuple(self.encoder[part] for part in parts)
