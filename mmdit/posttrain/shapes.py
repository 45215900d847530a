"""Serve post-training on moving shapes, the generated data set: prompts with facts, a reward that
compares pictures with these, and a scorer of colour words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.data import moving_shapes
from mmdit.data.moving_shapes.facts import COLORS
from mmdit.data.moving_shapes.sentences import PROMPTS
from mmdit.posttrain.prompt_lists import Prompts
from mmdit.posttrain.rewards import Reward, Samples, given
from mmdit.rng import key


def generated_prompts(
    count: int, seed: int, video: bool, width: int, height: int, held: int
) -> tuple[Prompts, dict[str, Prompts]]:
    """Return `count` prompts to train on, and at most `held` each of the fixed lists `seen` and
    `held_out`, all with their facts."""
    size: dict[str, Any] = {"video": video, "width": width, "height": height}
    drawn = key("posttrain prompts", seed)
    facts = moving_shapes.draw(drawn, range(count), split="train", **size)
    captions = [
        moving_shapes.caption(item, drawn, i, complete=True) for i, item in enumerate(facts)
    ]
    evaluated = {}
    for name in ("seen", "held_out") if held else ():
        fixed = moving_shapes.prompts(name, **size)[: min(held, PROMPTS)]
        evaluated[name] = Prompts([p.caption for p in fixed], [p.facts for p in fixed])
    return Prompts(captions, facts), evaluated


@dataclass(frozen=True)
class PromptAccuracy(Reward):
    """The moving-shapes oracle: the part `partial` of the reward is the share of right attributes;
    the rest is given if all of them are right."""

    needs: ClassVar[tuple[str, ...]] = ("pixels", "facts")
    # Chooses this reward.
    type: Literal["prompt_accuracy"] = "prompt_accuracy"
    # This part of the reward is the share of right attributes; the rest is given only if all of
    # them are right.
    partial: float = 0.0

    def call(self, samples: Samples) -> Tensor:
        facts = given(samples.facts)
        right = moving_shapes.score_samples(moving_shapes.oracle(given(samples.pixels)), facts)
        names = facts[0].attributes
        share = torch.stack([right[name].float() for name in names]).mean(0)
        return self.partial * share + (1 - self.partial) * right["all"].float()


@dataclass(frozen=True)
class ColorWords:
    """A scorer of texts for SRPO: how far the mean colour lies from grey in the direction of the
    colours that the text names. It is bounded and differentiable, and has no weights."""

    # Chooses the scorer by colour words.
    type: Literal["color_words"] = "color_words"

    def prepare(self, device: torch.device) -> None:
        """Do nothing: there are no weights to load."""

    def __call__(self, pixels: Tensor, texts: list[str]) -> Tensor:
        directions = {}
        for name, rgb in COLORS.items():
            if len(set(rgb)) > 1:
                directions[name] = F.normalize(torch.tensor(rgb) / 255 - sum(rgb) / 765, dim=0)
        rows = []
        for text in texts:
            words = [directions[w] for w in re.findall(r"\w+", text.lower()) if w in directions]
            rows.append(torch.stack(words).mean(0) if words else torch.zeros(3))
        mean = pixels.mean((1, 3, 4))
        colour = mean - mean.mean(1, keepdim=True)
        return (colour * torch.stack(rows).to(pixels.device)).sum(1)
