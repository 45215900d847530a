"""Moving shapes: a text-to-image and text-to-video data set that is made in seconds and scored by arithmetic.

`draw` → facts, `render` → pixels, `caption` → words, `oracle` → what pixels show, `accuracy` → how often that is what was asked.
"""

from mmdit.data.moving_shapes.captions import Prompt, caption, named_attributes, prompts
from mmdit.data.moving_shapes.facts import ATTRIBUTES, VERSION, Facts, Object, draw, draw_facts
from mmdit.data.moving_shapes.render import render, to_float, to_uint8

__all__ = [
    "ATTRIBUTES", "VERSION", "Facts", "Object", "Prompt",
    "caption", "draw", "draw_facts", "named_attributes", "prompts", "render", "to_float", "to_uint8",
]  # fmt: skip
