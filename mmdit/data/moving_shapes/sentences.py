"""Captions written from facts, and the fixed prompt lists that a score is measured on. Nothing here
ever parses text."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from functools import lru_cache

from mmdit.data.moving_shapes.facts import VERSION, Facts, Object, draw
from mmdit.rng import key

DROP = 0.15  # the share of facts that a training caption leaves out
PROMPTS = 256

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
SHAPE_WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus sign"),
    None: ("shape", "object"),
}
BACKGROUND_WORDS = {
    "black": ("black",),
    "gray": ("gray", "grey"),
    "navy": ("navy",),
    "brown": ("brown",),
}
VERBS = {
    "still": ("stays still", "does not move", "rests"),
    "moving": ("moves {}", "drifts {}", "slides {}"),
}
PARTICIPLES = {
    "still": ("still", "not moving", "at rest"),
    "moving": ("moving {}", "drifting {}", "sliding {}", "going {}"),
}
TOWARDS = {
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
}

# A template is a row of clauses; a clause is left out when the caption drops a fact that it names.
IMAGE = (
    ("a {thing}", " on a {background} background"),
    ("{thing}", " on {background}"),
    ("{background} background, ", "{thing}"),
    ("a picture of a {thing}", " against a {background} background"),
    ("on a {background} background there is ", "a {thing}"),
    ("a {background} backdrop with ", "a {thing}"),
    ("{color} ", "{noun}", ", {size}", ", {background} background"),
    ("a {size} ", "{noun}", " in {color}", " on a {background} background"),
)
VIDEO = (
    ("a {thing}", " {verb}", " on a {background} background"),
    ("{background} background, ", "{thing}", ", {participle}"),
    ("a video of a {thing}", " {participle}", " on a {background} background"),
    ("on a {background} background ", "a {thing}", " {verb}"),
    ("{participle}: ", "a {thing}", " on {background}"),
    ("{thing}", " {participle}", ", {background} background"),
    ("a {thing}", " on a {background} background", " {verb}"),
    ("{color} ", "{noun}", ", {size}", ", {participle}", ", {background} background"),
)
MANY = (
    ("{things}", " on a {background} background"),
    ("{things}", " on {background}"),
    ("{background} background, ", "{things}"),
    ("on a {background} background: ", "{things}"),
    ("{count} shapes, ", "{things}", ", against a {background} background"),
    ("a {background} backdrop with ", "{things}"),
)


@dataclass(frozen=True)
class Prompt:
    """Hold a caption that names every attribute, and the facts it names."""

    caption: str
    facts: Facts


class _Words:
    """A stream of choices keyed by the caption it writes."""

    def __init__(self, *parts: object):
        self.parts, self.drawn = parts, 0

    def below(self, count: int) -> int:
        self.drawn += 1
        number = key("moving_shapes caption", VERSION, *self.parts, self.drawn)
        return ((number >> 20) & 0xFFFF_FFFF) * count >> 32

    def pick(self, options: tuple):
        return options[self.below(len(options))]


def named_attributes(facts: Facts, seed: int, index: int, complete: bool) -> frozenset[str]:
    """Return the attributes that `caption` with the same arguments states. Colours stay when there
    are several objects: they tell which object is meant."""
    if complete:
        return frozenset(facts.attributes)
    words = _Words(seed, index, "named")
    kept = [name for name in facts.attributes if words.below(10_000) >= DROP * 10_000]
    return frozenset([*kept, "color"] if len(facts.objects) > 1 else kept)


def caption(facts: Facts, seed: int, index: int, complete: bool) -> str:
    """Return words for `facts`. `complete`: every attribute is stated (benchmark); otherwise each
    is dropped with probability 0.15 (training). A function of its arguments alone."""
    named, words = named_attributes(facts, seed, index, complete), _Words(seed, index, "words")
    fields = {}
    if "background" in named:
        fields["background"] = words.pick(BACKGROUND_WORDS[facts.background])
    if len(facts.objects) == 1:
        item = facts.objects[0]
        template = words.pick(IMAGE if item.motion is None else VIDEO)
        fields |= _object_fields(item, named, words)
    else:
        template = words.pick(MANY)
        phrases = []
        for item in facts.objects:
            parts = _object_fields(item, named, words)
            phrases.append(f"a {parts['thing']} {parts.get('participle', '')}".strip())
        first = words.below(len(phrases))
        phrases = phrases[first:] + phrases[:first]
        fields |= {
            "things": f"{', '.join(phrases[:-1])} and {phrases[-1]}",
            "count": {2: "two", 3: "three"}[len(phrases)],
        }
    clauses = [clause for clause in template if _placeholders(clause) <= fields.keys()]
    text = "".join(clauses).format(**fields).strip(" ,:")
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def _placeholders(clause: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(clause) if name}


def _object_fields(item: Object, named: frozenset[str], words: _Words) -> dict[str, str]:
    """Return the placeholders that one object fills. `noun` and `thing` are always there."""
    fields = {"noun": words.pick(SHAPE_WORDS[item.shape if "shape" in named else None])}
    if "color" in named:
        fields["color"] = item.color
    if "size" in named:
        fields["size"] = words.pick(SIZE_WORDS[item.size])
    fields["thing"] = " ".join(fields[name] for name in ("size", "color", "noun") if name in fields)
    if item.motion is not None and "motion" in named:
        state = "still" if item.motion == "still" else "moving"
        towards = words.pick(TOWARDS[item.motion]) if state == "moving" else ""
        fields["verb"] = words.pick(VERBS[state]).format(towards)
        fields["participle"] = words.pick(PARTICIPLES[state]).format(towards)
    return fields


@lru_cache
def prompts(split: str, video: bool, width: int = 64, height: int = 64) -> tuple[Prompt, ...]:
    """Return the 256 prompts of `seen` or `held_out`, fixed by the version. The captions do not
    depend on the canvas; it only scales the drawn positions, which matter where the facts are
    rendered (the tokenizer's ceiling)."""
    if split not in ("seen", "held_out"):
        raise ValueError(f"prompts are of the split 'seen' or 'held_out', not {split!r}")
    seed = key("moving_shapes prompts", split)
    source = "train" if split == "seen" else "held_out"
    facts = draw(seed, range(PROMPTS), video=video, width=width, height=height, split=source)
    return tuple(
        Prompt(caption(item, seed, i, complete=True), item) for i, item in enumerate(facts)
    )
