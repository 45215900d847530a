"""Longer and shorter captions of moving shapes, made while training from the facts of an item:
`complete` ones state every fact, as the prompts of the evaluation do; the `short` one is the
shortest of some. Those in the cache leave out 15 facts in 100."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmdit.data.dataset.captions import CaptionsConfig, drawn_captions
from mmdit.data.moving_shapes.facts import Facts
from mmdit.data.moving_shapes.sentences import caption
from mmdit.rng import Draws, key

TRIES = 8


@dataclass(frozen=True)
class ArmsCaptionsConfig(CaptionsConfig):
    length: Literal["cached", "complete", "short"] = "cached"


def with_facts(text: str, facts: dict) -> list:
    """Return what `all_captions` returns, the facts in place of further captions."""
    return [text, facts]


def drawn_lengths(several: list[list], config: CaptionsConfig, draws: Draws) -> list[str]:
    """Return what `drawn_captions` does of captions in the length of `config`."""
    length = getattr(config, "length", "cached")  # of a config without the section
    return drawn_captions([[worded(item, length)] for item in several], config, draws)


def worded(item: list, length: str) -> str:
    """Return a caption of an item `[text, facts]`, which is kept behind them: it is always the
    same."""
    if length == "cached":
        return item[0]
    if len(item) == 2:
        facts, index = Facts.from_json(item[1]["facts"]), key(item[0])
        complete = length == "complete"
        texts = [caption(facts, 0, index + i, complete) for i in range(1 if complete else TRIES)]
        item.append(min(texts, key=len))
    return item[2]
