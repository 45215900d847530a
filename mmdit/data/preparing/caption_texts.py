"""Clean captions that a model wrote, before they are trained on."""

from __future__ import annotations

import re

from mmdit.data.dataset.problems import Unusable
from mmdit.terminal import COMMANDS

THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)  # of models that reason first
HALF_PAIRS = re.compile("[\ud800-\udfff]")
SENTENCE_END = re.compile(r"[.!?。！？](?=\s|$)|[。！？]")
QUOTES = (('"', '"'), ("'", "'"), ("“", "”"), ("«", "»"))


def clean_caption(text: str, most: int, cut_off: bool = False) -> str:
    """Return a caption as one line of at most `most` characters, without reasoning, control
    characters and surrounding quotes. `cut_off`: the model was stopped within a sentence. A caption
    that is too long or cut off ends with its last complete sentence, if it has one. Unusable if
    nothing is left."""
    text = HALF_PAIRS.sub("", THOUGHTS.sub(" ", text))
    text = " ".join(COMMANDS.sub(" ", text).split())
    for first, last in QUOTES:
        if len(text) > 1 and text[0] == first and text[-1] == last:
            text = text[1:-1].strip()
    if cut_off or len(text) > most:
        text = _whole_sentences(text[:most], cut_within_word=len(text) > most)
    if not any(letter.isalnum() for letter in text):
        raise Unusable("empty caption", "the model wrote no word" if not text else repr(text[:40]))
    return text


def _whole_sentences(text: str, cut_within_word: bool) -> str:
    """Return the text up to its last complete sentence, or else up to its last complete word."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    if ends:
        return text[: ends[-1]]
    return text.rpartition(" ")[0] or text if cut_within_word else text
