"""What the text encoder is given for an item at one step: one of its captions, trimmed, thinned,
shuffled, with the trigger.

Everything is decided when a batch is made, by draws keyed with (seed, step, index in the global
batch): the cache keeps the captions as they were written, and changing this section needs no
caching. Dropping the whole caption for guidance is not done here but by `train.cfg_dropout_prob`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mmdit.config import ConfigError, Section
from mmdit.rng import Draws

PLACES = ("[trigger]", "[name]")  # where a caption wants the trigger word
BINS = (0, 4, 8, 16, 32, 64, 128, 256)  # words; upper ends of the length report
_SENTENCE = re.compile(
    r"(?<=[.!?])\s+(?=[^a-z0-9])"
)  # not after "m.p.h." in the middle of a sentence


@dataclass(frozen=True)
class CaptionsConfig(Section):
    """The section `captions:`. Tokens are what stands between two separators: tags, or the parts of
    a sentence."""

    # A trigger word. It replaces `[trigger]` and `[name]` in a caption, or is put in front of a
    # caption that lacks it; prompts get it, too.
    trigger: str = ""
    # What stands between two tokens of a caption.
    separator: str = ","
    # Remove the tokens in which one of these stands as whole words; a caption that would lose all
    # of them stays as it is.
    trim_keywords: tuple[str, ...] = ()
    # The probability of trimming a caption.
    trim_prob: float = 1.0
    # The probability with which each token is left out; at least one remains.
    token_dropout: float = 0.0
    # Whether tokens come in a new order at each step.
    shuffle: bool = False
    # So many first tokens are neither left out nor moved.
    keep_first: int = 0

    def __post_init__(self):
        if not self.separator:
            raise ConfigError(
                "separator", "is empty; must be the text between tokens, for example ','"
            )
        if not 0 <= self.trim_prob <= 1:
            raise ConfigError("trim_prob", f"is {self.trim_prob}; must be from 0 to 1")
        if not 0 <= self.token_dropout < 1:
            raise ConfigError(
                "token_dropout",
                f"is {self.token_dropout}; must be at least 0 and below 1 (to drop whole "
                "captions for guidance, set train.cfg_dropout_prob)",
            )
        if self.keep_first < 0:
            raise ConfigError("keep_first", f"is {self.keep_first}; must be at least 0")
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
        """Whether a caption is used as it was written."""
        return not (self.trigger or self.trim_keywords or self.token_dropout or self.shuffle)


def all_captions(caption: str, facts: dict) -> list[str]:
    """Those of an item, as `records` stores them: one, or several among its facts."""
    several = facts.get("captions")
    foreign = not isinstance(several, list) or not all(
        isinstance(text, str) for text in several
    )  # a file not made by us
    return [caption] if foreign or not several else several


def has_word(text: str, word: str) -> bool:
    """`word` (or words) stands in `text` on its own, whatever the case: "art" is not in "heart"."""
    return re.search(rf"(?<!\w){re.escape(word.strip())}(?!\w)", text, re.IGNORECASE) is not None


def with_trigger(caption: str, config: CaptionsConfig) -> str:
    """The caption with the trigger word; prompts for sampling take the same way."""
    if not config.trigger:
        return caption
    for place in PLACES:
        caption = caption.replace(place, config.trigger)
    if has_word(caption, config.trigger):
        return caption
    return f"{config.trigger}{config.separator} {caption}" if caption else config.trigger


def trim(caption: str, config: CaptionsConfig) -> str:
    """Without the tokens that hold a keyword; a sentence that loses all of them goes."""
    kept = []
    for sentence in _SENTENCE.split(caption):
        body = sentence.rstrip(".!?")
        tokens = _tokens(body, config)
        left = [
            token
            for token in tokens
            if not any(has_word(token, keyword) for keyword in config.trim_keywords)
        ]
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
    tokens: list[str], config: CaptionsConfig, chance: list[float], order: list[float]
) -> list[str]:
    kept = [
        i for i in range(len(tokens)) if i < config.keep_first or chance[i] >= config.token_dropout
    ] or [0]
    if config.shuffle:
        kept.sort(key=lambda i: (i >= config.keep_first, order[i] if i >= config.keep_first else i))
    return [tokens[i] for i in kept]


def drawn_captions(several: list[list[str]], config: CaptionsConfig, draws: Draws) -> list[str]:
    """The caption of every sample for this step. `several`: per sample all its captions, one of
    which is drawn."""
    captions = [own[0] for own in several]
    if any(len(own) > 1 for own in several):
        choice = draws.uniform("caption_choice").tolist()
        captions = [own[int(part * len(own))] for own, part in zip(several, choice, strict=True)]
    if config.plain:
        return captions
    if config.trim_keywords:
        chance = draws.uniform("caption_trim").tolist()
        captions = [
            trim(c, config) if part < config.trim_prob else c
            for c, part in zip(captions, chance, strict=True)
        ]
    if config.shuffle or config.token_dropout:
        tokens = [_tokens(caption, config) for caption in captions]
        longest = max(map(len, tokens))
        chances = draws.uniform(
            "caption_tokens", longest
        ).tolist()  # a token's draw does not depend on the longest
        orders = draws.uniform("caption_order", longest).tolist()
        captions = [
            _joined(_rearranged(own, config, chance, order), config) if len(own) > 1 else caption
            for caption, own, chance, order in zip(captions, tokens, chances, orders, strict=True)
        ]
    return [with_trigger(caption, config) for caption in captions]


def length_report(several: list[list[str]]) -> dict:
    """How long the captions of a collection are, in words: what a text encoder of limited length
    will cut shows here."""
    lengths = sorted(len(caption.split()) for own in several for caption in own)
    bins: dict[str, int] = {}
    for low, high in zip((-1, *BINS), (*BINS, 1 << 62), strict=True):
        name = "0" if high == 0 else f"{low + 1}-{high}" if high < 1 << 62 else f"over {low}"
        bins[name] = sum(low < length <= high for length in lengths)
    at = lambda share: lengths[min(int(share * len(lengths)), len(lengths) - 1)] if lengths else 0  # noqa: E731
    return {
        "items": len(several),
        "captions": len(lengths),
        "items_with_several": sum(len(own) > 1 for own in several),
        "empty": bins["0"],
        "words": {"median": at(0.5), "p95": at(0.95), "longest": at(1)},
        "captions_by_words": {name: count for name, count in bins.items() if count},
    }
