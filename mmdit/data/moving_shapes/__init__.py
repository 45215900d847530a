"""Moving shapes: a text-to-image and text-to-video data set that is generated in seconds and scored
by arithmetic.

`draw` → facts, `render` → pixels, `caption` → words; `oracle` → what pixels show, `accuracy` → how
often they show what was asked for.
"""

from mmdit.data.moving_shapes.drawing import draw
from mmdit.data.moving_shapes.facts import ATTRIBUTES, VERSION, Facts, Object
from mmdit.data.moving_shapes.oracle import (
    Predictions,
    accuracy,
    oracle,
    rate,
    score_samples,
    wilson,
)
from mmdit.data.moving_shapes.render import render
from mmdit.data.moving_shapes.sentences import Prompt, caption, named_attributes, prompts

__all__ = [
    "ATTRIBUTES",
    "VERSION",
    "Facts",
    "Object",
    "Predictions",
    "Prompt",
    "accuracy",
    "caption",
    "draw",
    "named_attributes",
    "oracle",
    "prompts",
    "rate",
    "render",
    "score_samples",
    "wilson",
]
