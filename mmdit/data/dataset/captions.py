"""Make the text that the text encoder gets for an item at one step: one of its captions, with
keywords trimmed, tokens left out and shuffled, and the trigger word added.

Everything is decided when a batch is made, by draws keyed with (seed, step, index in the global
batch): the cache keeps the captions as they were written, and changing this section needs no new
caching. Dropping the whole caption for guidance is not done here but by `train.cfg_dropout_prob`.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from dataclasses import dataclass

import numpy as np

from mmdit.config import ConfigError, Section, least
from mmdit.rng import Draws

PLACES = ("[trigger]", "[name]")  # placeholders in a caption for the trigger word
BINS = (0, 4, 8, 16, 32, 64, 128, 256)  # upper ends, in words, of the ranges in the length report
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[^a-z0-9])")  # not after "m.p.h." within a sentence


@dataclass(frozen=True)
class CaptionsConfig(Section):
    """The section `captions:`. Tokens are the texts between separators: tags, or the parts of a
    sentence."""

    # A trigger word. It replaces `[trigger]` and `[name]` in a caption, or is put in front of a
    # caption that lacks it. Prompts get it in the same way.
    trigger: str = ""
    # The text between two tokens of a caption.
    separator: str = ","
    # Remove the tokens in which one of these occurs as whole words; a caption that would lose all
    # of its tokens stays as it is.
    trim_keywords: tuple[str, ...] = ()
    # The probability of trimming a caption.
    trim_prob: float = 1.0
    # The probability of leaving out each token; at least one remains.
    token_dropout: float = 0.0
    # Whether tokens come in a new order at each step.
    shuffle: bool = False
    # The number of leading tokens that are neither left out nor moved.
    keep_first: int = 0

    def __post_init__(self):
        if not self.separator:
            raise ConfigError(
                "separator", "is empty; must be the text between tokens, for example ','"
            )
        if not 0 <= self.trim_prob <= 1:
            raise ConfigError("trim_prob", f"is {self.trim_prob}; must be from 0 to 1")
        if self.trim_prob != 1 and not self.trim_keywords:
            raise ConfigError(
                "trim_prob",
                f"is {self.trim_prob} but trim_keywords is empty, so that no caption is trimmed;"
                " list keywords, or remove it",
            )
        if not 0 <= self.token_dropout < 1:
            raise ConfigError(
                "token_dropout",
                f"is {self.token_dropout}; must be at least 0 and below 1 (to drop whole "
                "captions for guidance, set train.cfg_dropout_prob)",
            )
        least(self, 0, "keep_first")
        if self.keep_first and not (self.shuffle or self.token_dropout):
            raise ConfigError(
                "keep_first",
                f"is {self.keep_first} but tokens are neither shuffled nor left out; set shuffle "
                "or token_dropout, or remove it",
            )
        for i, keyword in enumerate(self.trim_keywords):
            if not keyword.strip():
                raise ConfigError(f"trim_keywords[{i}]", "is empty; must be a word")

    @property
    def plain(self) -> bool:
        """Return whether captions are used as they were written."""
        return not (self.trigger or self.trim_keywords or self.token_dropout or self.shuffle)


def all_captions(caption: str, facts: dict) -> list[str]:
    """Return the captions of an item: `caption` alone, or those that `records` stored among its
    facts."""
    several = facts.get("captions")
    if not isinstance(several, list) or not all(isinstance(text, str) for text in several):
        return [caption]  # the second happens in files that other programs made
    return several or [caption]


def has_word(text: str, *words: str) -> bool:
    """Return whether one of `words` occurs in `text` as a whole word, in upper or lower case, and
    however its accents are encoded: "art" is not in "heart"."""
    some = "|".join(re.escape(_composed(word.strip())) for word in words)
    return re.search(rf"(?<!\w)({some})(?!\w)", _composed(text), re.IGNORECASE) is not None


def _composed(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def with_trigger(caption: str, config: CaptionsConfig) -> str:
    """Return the caption with the trigger word; prompts for sampling are treated in the same
    way."""
    if not config.trigger:
        return caption
    for place in PLACES:
        caption = caption.replace(place, config.trigger)
    if has_word(caption, config.trigger):
        return caption
    return f"{config.trigger}{config.separator} {caption}" if caption else config.trigger


def trim(caption: str, config: CaptionsConfig) -> str:
    """Return the caption without the tokens that hold a keyword. A sentence that would lose all of
    its tokens is removed; a caption that would lose all of its sentences stays as it is."""
    kept = []
    for sentence in _SENTENCE.split(caption):
        body = sentence.rstrip(".!?")
        tokens = _tokens(body, config)
        left = [token for token in tokens if not has_word(token, *config.trim_keywords)]
        if len(left) == len(tokens):
            kept.append(sentence)
        elif left:
            kept.append(_joined(left, config) + sentence[len(body) :])
    return " ".join(kept) or caption


def _tokens(caption: str, config: CaptionsConfig) -> list[str]:
    return [token.strip() for token in caption.split(config.separator) if token.strip()]


def _joined(tokens: list[str], config: CaptionsConfig) -> str:
    return f"{config.separator} ".join(tokens)


def _rearranged(
    caption: str, config: CaptionsConfig, chances: list[float], orders: list[float]
) -> str:
    """Return the caption with tokens left out and shuffled. Token `i` is left out if `chances[i]`
    is below the probability; tokens are sorted by `orders[i]`."""
    tokens = _tokens(caption, config)
    if len(tokens) < 2:
        return caption
    first = list(range(min(config.keep_first, len(tokens))))
    others = range(len(first), len(tokens))
    rest = [i for i in others if chances[i] >= config.token_dropout]
    if config.shuffle:
        rest.sort(key=lambda i: orders[i])
    chosen = first + rest or [0]
    return _joined([tokens[i] for i in chosen], config)


def drawn_captions(several: list[list[str]], config: CaptionsConfig, draws: Draws) -> list[str]:
    """Return the caption of every sample for this step. `several`: all captions of each sample, one
    of which is drawn."""
    captions = [captions[0] for captions in several]
    if any(len(captions) > 1 for captions in several):
        choice = draws.uniform("caption_choice").tolist()
        pairs = zip(several, choice, strict=True)
        captions = [captions[int(share * len(captions))] for captions, share in pairs]
    if config.plain:
        return captions
    if config.trim_keywords:
        chance = draws.uniform("caption_trim").tolist()
        captions = [
            trim(caption, config) if share < config.trim_prob else caption
            for caption, share in zip(captions, chance, strict=True)
        ]
    if config.shuffle or config.token_dropout:
        # the draws of a token do not depend on the length of the longest caption
        longest = max(len(_tokens(caption, config)) for caption in captions)
        chances = draws.uniform("caption_tokens", longest).tolist()
        orders = draws.uniform("caption_order", longest).tolist()
        captions = [
            _rearranged(caption, config, chance, order)
            for caption, chance, order in zip(captions, chances, orders, strict=True)
        ]
    return [with_trigger(caption, config) for caption in captions]


def fixed_captions(caption: str, config: CaptionsConfig) -> list[str]:
    """Return all texts that `drawn_captions` may make of a caption if tokens are neither left out
    nor shuffled."""
    texts = [caption] if config.trim_prob < 1 or not config.trim_keywords else []
    if config.trim_keywords and config.trim_prob:
        texts.append(trim(caption, config))
    return [with_trigger(text, config) for text in texts]


def length_report(several: list[list[str]]) -> dict:
    """Return statistics of the lengths of all captions, in words: they show what a text encoder of
    limited length will cut off."""
    lengths = np.sort([len(caption.split()) for captions in several for caption in captions])
    ends = np.searchsorted(lengths, BINS, side="right")
    counts = np.diff(ends, prepend=0, append=len(lengths)).tolist()
    ranges = [f"{low + 1}-{high}" for low, high in itertools.pairwise(BINS)]
    by_words = dict(zip(("0", *ranges, f"over {BINS[-1]}"), counts, strict=True))

    def words_at(share: float) -> int:
        return int(lengths[min(int(share * len(lengths)), len(lengths) - 1)]) if len(lengths) else 0

    return {
        "items": len(several),
        "captions": len(lengths),
        "items_with_several": sum(len(captions) > 1 for captions in several),
        "empty": by_words["0"],
        "words": {"median": words_at(0.5), "p95": words_at(0.95), "longest": words_at(1)},
        "captions_by_words": {name: count for name, count in by_words.items() if count},
    }
