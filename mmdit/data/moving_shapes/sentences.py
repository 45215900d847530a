"""Captions written from facts, and the fixed lists of prompts on which scores are measured. Text is
never parsed here."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from functools import lru_cache

from mmdit.data.moving_shapes.choices import Choices
from mmdit.data.moving_shapes.drawing import draw
from mmdit.data.moving_shapes.facts import VERSION, Facts, Object
from mmdit.rng import key

DROP = 0.15  # probability with which a training caption leaves out a fact
PROMPTS = 256
MANY_PROMPTS = 128  # of each task

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

# A template is a list of clauses; a clause is left out if it names a fact that the caption leaves
# out.
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
    ("{things}", ", against a {background} background"),
    ("a {background} backdrop with ", "{things}"),
)
NUMBERS = {1: ("a", "one", "a single"), 2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
GROUPS = ("{} {}", "exactly {} {}", "a group of {} {}")
JOINED = ("{} and {}", "{} together with {}", "{} along with {}")
RELATION_WORDS = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
BESIDE = (" {} ", " is {} ", ", {} ")
WHICH = (" that is {} ", ", which is {} ")


@dataclass(frozen=True)
class Prompt:
    """A caption that names every attribute, and the facts that it describes."""

    caption: str
    facts: Facts


def named_attributes(facts: Facts, seed: int, index: int, complete: bool) -> frozenset[str]:
    """Return the attributes that `caption` states for the same arguments. For a scene with a task
    only background and motion may be left out, and colours are added to half of the captions that
    need not state them."""
    if complete:
        return frozenset(facts.attributes)
    words = _choices(seed, index, "named")
    droppable = facts.attributes if facts.task is None else ("background", "motion")
    kept = []
    for name in facts.attributes:
        if name not in droppable or words.below(10_000) >= DROP * 10_000:
            kept.append(name)
    if facts.task is not None and words.below(2):
        kept.append("color")
    return frozenset(kept)


def caption(facts: Facts, seed: int, index: int, complete: bool) -> str:
    """Return a caption for `facts`, a function of the arguments alone. `complete`: state every
    attribute (for benchmarks); otherwise each is left out with probability DROP (for training)."""
    named, words = named_attributes(facts, seed, index, complete), _choices(seed, index, "words")
    fields = {}
    if "background" in named:
        fields["background"] = words.pick(BACKGROUND_WORDS[facts.background])
    if facts.task is None:
        item = facts.objects[0]
        template = words.pick(IMAGE if item.motion is None else VIDEO)
        fields |= _object_fields(item, named, words)
    else:
        template = words.pick(MANY)
        fields["things"] = _things(facts, named, words)
    clauses = [clause for clause in template if _placeholders(clause) <= fields.keys()]
    text = "".join(clauses).format(**fields).strip(" ,:")
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def _choices(seed: int, index: int, purpose: str) -> Choices:
    return Choices("moving_shapes caption", VERSION, seed, index, purpose)


def _things(facts: Facts, named: frozenset[str], words: Choices) -> str:
    """Return the part of a caption about the objects of a scene with a task."""
    phrases = []
    for item in facts.objects:
        fields = _object_fields(item, named, words)
        phrases.append(f"{fields['thing']} {fields.get('participle', '')}".strip())
    if facts.task == "position":
        return _positions([f"a {phrase}" for phrase in phrases], facts, words)
    if facts.task == "counting":
        fields = _object_fields(facts.objects[0], named, words)
        noun = fields["noun"]
        fields["things"] = noun + ("es" if noun.endswith("s") else "s")
        names = [name for name in ("color", "things", "participle") if name in fields]
        group = " ".join(fields[name] for name in names)
        return words.pick(GROUPS).format(words.pick(NUMBERS[len(phrases)]), group)
    if len(phrases) == 1:
        return f"{words.pick(NUMBERS[1])} {phrases[0]}"
    phrases = [f"a {phrase}" for phrase in words.some(tuple(phrases), len(phrases))]
    return words.pick(JOINED).format(", ".join(phrases[:-1]), phrases[-1])


def _positions(phrases: list[str], facts: Facts, words: Choices) -> str:
    """Return a text that states the relation of each object in `phrases` to the next one, beginning
    at either end."""
    relations = list(facts.relations)
    if words.below(2):
        phrases = phrases[::-1]
        relations = [OPPOSITE[relation] for relation in reversed(relations)]
    first, *links = [words.pick(RELATION_WORDS[relation]) for relation in relations]
    # after a motion, "left of" could be understood as its direction
    opening = BESIDE[:2] if facts.objects[0].motion is None else BESIDE[1:]
    text = phrases[0] + words.pick(opening).format(first) + phrases[1]
    for link, phrase in zip(links, phrases[2:], strict=True):
        text += words.pick(WHICH).format(link) + phrase
    return text


@lru_cache
def _placeholders(clause: str) -> frozenset[str]:
    return frozenset(name for _, name, _, _ in string.Formatter().parse(clause) if name)


def _object_fields(item: Object, named: frozenset[str], words: Choices) -> dict[str, str]:
    """Return the values of the placeholders for one object; `noun` and `thing` are always among
    them."""
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
def prompts(
    split: str, video: bool, width: int = 64, height: int = 64, task: str | None = None
) -> tuple[Prompt, ...]:
    """Return the 256 prompts of `seen` or `held_out`, which are fixed for each version; with a
    `task`, the MANY_PROMPTS prompts of that task.

    The captions of single objects do not depend on the canvas, which only scales the drawn
    positions; these matter if the facts are rendered (the tokenizer's ceiling). Captions of a task
    depend on the aspect ratio, because objects must fit."""
    if split not in ("seen", "held_out"):
        raise ValueError(f"prompts are of the split 'seen' or 'held_out', not {split!r}")
    source = "train" if split == "seen" else "held_out"
    variant, seed, count = "one", key("moving_shapes prompts", split), PROMPTS
    if task is not None:
        variant, seed, count = "many", key("moving_shapes prompts", split, task), MANY_PROMPTS
    facts = draw(
        seed,
        range(count),
        video=video,
        width=width,
        height=height,
        split=source,
        variant=variant,
        task=task,
    )
    return tuple(
        Prompt(caption(item, seed, i, complete=True), item) for i, item in enumerate(facts)
    )
